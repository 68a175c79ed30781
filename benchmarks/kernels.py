"""Times the kernels on a GPU, beside eager torch, torch.compile and FlexAttention.

    python -m rmfast.benchmarks.kernels

Head and loss: forward and backward on bf16 hidden rows, 128 to a sequence. Attention: bf16, over a
trie, against the others over the same trie and over the batch with nothing shared, as it is run
without a trie (all its sequences are of one length: nothing is padded). Contestants take turns,
``--rounds`` times, and the median counts; before each turn the L2 cache is flushed, and the GPU
kept waiting until the host has queued all of it, so that what is timed is the GPU's work alone.
Masks, plans and row lists are made once a batch, outside those times, and timed as a line each.

Share of the roof: work by time, over the rate that a copy (1 GiB, bytes read and written) or a
matmul (8192 cubed, bf16) reached in the same turns. Work is what has to be done, whoever does it:
head and loss, the bytes of the pooled rows, of the gradient of all hidden rows and of weight,
index and what is left for the backward, each read or written once; attention, 4 floating-point
operations a pair that the trie's mask allows, head and channel forward, 10 more backward.
``difference`` is the distance of the answer to rmfast's, relative.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import rmfast
from rmfast import ops

COLUMNS = (
    "what case shape contestant seconds seconds_min seconds_max work unit rate roof share "
    "difference rounds device torch triton"
).split()


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


# as of Qwen2.5-0.5B, Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B
SHAPES = {
    "0.5B": Shape(14, 2, 64, 896),
    "1.5B": Shape(32, 8, 64, 2048),
    "3B": Shape(24, 8, 128, 3072),
    "8B": Shape(32, 8, 128, 4096),
}
BATCHES = (64, 512)  # sequences of head and loss
TOKENS = 128  # hidden rows a sequence
# prompts, answers to each, tokens of a prompt, tokens of an answer
TRIES = {"8 pairs": (8, 2, 512, 256), "2 groups of 8": (2, 8, 600, 200)}
QUICK = {"tiny": Shape(4, 2, 16, 64)}, (8,), {"2 pairs": (2, 2, 24, 8)}


class Contestant(NamedTuple):
    forward: Callable[..., Tensor]
    inputs: list[Tensor]
    place: Tensor | None = None  # [B, T], trie nodes of its tokens; None: its tokens are the nodes


Call = Callable[[], object]


# --- time


class Clock:
    """Seconds of a call: of the GPU's work, or by the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        if self.gpu:
            self.cache = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # above any L2
            torch.cuda._sleep(10_000_000)  # the first one is loaded
            cycles = 100_000_000
            self.rate = cycles / self._gpu_seconds(lambda: torch.cuda._sleep(cycles))

    def _gpu_seconds(self, call: Call, wait: int = 0) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        if wait:
            torch.cuda._sleep(wait)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def warm_up(self, call: Call) -> float:
        """Compiles what is to be compiled; seconds that the host is busy with one call."""
        for _ in range(3):
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
            if self.gpu:
                torch.cuda.synchronize()
        return host

    def seconds(self, call: Call, host: float) -> float:
        if self.gpu:
            return self._gpu_seconds(call, int(self.rate * (2 * host + 1e-4)))
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def measure(calls: dict[str, Call], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each call, in turn; one that fails is left out, and says why."""
    busy = {}
    for name, call in calls.items():
        try:
            busy[name] = clock.warm_up(call)
        except Exception as error:  # whatever a library or a driver cannot do
            why = " ".join(str(error).split())[:150]
            print(f"left out: {name}: {type(error).__name__}: {why}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in busy}
    for turn in range(rounds):
        names = list(busy)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(clock.seconds(calls[name], busy[name]))
    return times


def roof(kind: str, device: str, quick: bool) -> tuple[Call, float]:
    """A call, and the bytes or floating-point operations of it."""
    if kind == "bytes":
        source = torch.zeros(1 << (16 if quick else 28), device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes
    size = 128 if quick else 8192
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2 * size**3


# --- head and loss


def trl(scores: Tensor) -> Tensor:  # [B, 1]
    chosen, rejected = scores.squeeze(-1).float().chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def plain(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return trl(F.linear(hidden[index], weight))


def every_row(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:  # as transformers does
    return trl(F.linear(hidden, weight)[index])


def one_op(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return ops.reward_head_pairwise_loss(hidden, index, weight).loss


def two_ops(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return ops.pairwise_loss(ops.reward_head(hidden, index, weight)).loss


def heads(batch: int, width: int, device: str) -> tuple[dict[str, Contestant], int]:
    """Contestants, and the bytes of forward and backward."""
    torch.manual_seed(0)
    rows = batch * TOKENS
    hidden = torch.randn(rows, width, device=device).to(torch.bfloat16).requires_grad_()
    weight = torch.randn(1, width, device=device) / width**0.5
    weight = weight.to(torch.bfloat16).requires_grad_()
    index = torch.arange(TOKENS - 1, rows, TOKENS, device=device)
    runs: dict[str, Callable] = {"rmfast, one op": one_op, "rmfast, two ops": two_ops}
    runs |= {"torch": plain, "torch, every row": every_row}
    if device == "cuda":
        runs["torch.compile"] = torch.compile(plain)
        runs["torch.compile, every row"] = torch.compile(every_row)
    contestants = {
        name: Contestant(lambda h, w, run=run: run(h, index, w), [hidden, weight])
        for name, run in runs.items()
    }
    forward = batch * width * 2 + weight.nbytes + index.nbytes + 2 * 4 * batch + 7 * 4
    backward = hidden.nbytes + 2 * weight.nbytes + index.nbytes + 4 * batch + 4
    return contestants, forward + backward


# --- attention


def trie_of(prompts: int, answers: int, prompt: int, answer: int) -> rmfast.PackedTrie:
    g = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(prompts):
        start = torch.randint(1 << 20, (prompt,), generator=g)
        rows += [
            torch.cat([start, torch.randint(1 << 20, (answer,), generator=g)])
            for _ in range(answers)
        ]
    return rmfast.pack(rows)


def allowed_pairs(trie: rmfast.PackedTrie) -> int:
    return int((trie.subtree_end.long() - torch.arange(len(trie))).sum())


def attentions(shape: Shape, trie: rmfast.PackedTrie, device: str) -> dict[str, Contestant]:
    torch.manual_seed(0)
    paths = torch.tensor([path.tolist() for path in trie.paths()], device=device)  # [B, T]
    trie = trie.to(device)
    end, position = trie.subtree_end, trie.position_ids
    nodes, groups = torch.arange(len(trie), device=device), shape.heads // shape.kv_heads
    mask = ((nodes <= nodes[:, None]) & (nodes[:, None] < end))[None, None]

    plan, backend = ops.TriePlan(end, position), "triton" if device == "cuda" else "sdpa"

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.trie_attention(q, k, v, plan, backend=backend)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # no fused kernel has mask and groups
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
        return out.transpose(1, 2)

    def leaves(rows: int, heads: Iterable[int]) -> list[Tensor]:  # tokens first in memory
        drawn = [torch.randn(1, rows, h, shape.head_dim, device=device) for h in heads]
        return [x.to(torch.bfloat16).transpose(1, 2).requires_grad_() for x in drawn]

    packed = leaves(len(trie), (shape.heads, shape.kv_heads, shape.kv_heads))
    apart = [x.detach()[0].transpose(0, 1)[paths].transpose(1, 2).requires_grad_() for x in packed]
    return {
        "rmfast": Contestant(ours, packed),
        "FlexAttention": Contestant(flex(end, device), packed),
        "torch SDPA, dense mask": Contestant(dense, packed),
        "torch SDPA, nothing shared": Contestant(causal, apart, paths),
    }


def flex(end: Tensor, device: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    mask = block_mask(end)
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def block_mask(end: Tensor) -> Any:
    """FlexAttention's mask, from the extrema of blocks: create_block_mask tests all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    size, count = 128, len(end)  # nodes that FlexAttention looks up together
    nodes = torch.arange(-(-count // size) * size, device=end.device).view(-1, size)
    whole = nodes[:, -1] < count
    nodes = nodes.clamp(max=count - 1)
    first, last, ends = nodes[:, 0], nodes[:, -1], end[nodes].aminmax(dim=1)
    some = (first <= last[:, None]) & (first[:, None] < ends.max)  # [Q, K]
    full = (last <= first[:, None]) & (last[:, None] < ends.min)
    full &= whole[:, None] & whole  # as create_block_mask has it

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:  # int32 [1, 1, Q], [1, 1, Q, K]
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~full), *listed(full), BLOCK_SIZE=size, seq_lengths=(count, count),
        mask_mod=lambda batch, head, q, k: (k <= q) & (q < end[k]),
    )  # fmt: skip


def preparations(shape: Shape, trie: rmfast.PackedTrie, device: str) -> dict[str, Call]:
    """What is made of a trie once a batch, for all layers: plans of the three kernels, masks."""
    trie = trie.to(device)
    end, position = trie.subtree_end, trie.position_ids
    calls: dict[str, Call] = {"FlexAttention": lambda: block_mask(end)}
    if importlib.util.find_spec("triton") is not None:
        from rmfast.kernels import trie_configs, trie_plan

        like = torch.empty(0, dtype=torch.bfloat16, device=device)

        def plans() -> None:
            who = trie_plan.rule(end, position, None, len(end), None)
            for kernel in ("forward", "dq", "dkv"):
                config = trie_configs.config(kernel, like, shape.head_dim, False, False)
                trie_plan.plan(who, config.rows, config.nodes, kernel == "dkv")

        calls = {"rmfast": plans, **calls}
    return calls


# --- all of it


def forward_of(one: Contestant) -> Call:
    inputs = [x.detach() for x in one.inputs]
    return lambda: one.forward(*inputs)


def step_of(one: Contestant) -> Call:
    grads: list[Tensor] = []

    def step() -> None:
        out = one.forward(*one.inputs)
        if not grads:
            grads.append(torch.randn_like(out) if out.ndim else torch.ones_like(out))
        torch.autograd.grad(out, one.inputs, grads[0])

    return step


def distances(contestants: dict[str, Contestant], names: Iterable[str]) -> dict[str, float]:
    """Of their answers to the first one's, relative."""
    first, *_ = contestants
    if first not in names:
        return {}
    want, out = forward_of(contestants[first])().float(), {}
    for name in names:
        one = contestants[name]
        true = want if one.place is None else want[0][one.place]
        out[name] = float((forward_of(one)().float() - true).norm() / true.norm())
    return out


def run(device: str, quick: bool, turns: int) -> Iterable[dict[str, Any]]:
    """A row for each contestant of each case."""
    clock = Clock(device)
    shapes, batches, tries = QUICK if quick else (SHAPES, BATCHES, TRIES)

    def rows(
        shape: str, case: str, what: str, calls: dict[str, Call], work: float = 0, unit: str = "",
        made: dict[str, Contestant] | None = None,
    ) -> Iterable[dict[str, Any]]:  # fmt: skip
        print(f"{shape}: {what}, {case}", file=sys.stderr)
        if work:
            call, size = roof(unit, device, quick)
            calls = {**calls, "roof": call}
        times = measure(calls, turns, clock)
        top = size / median(times.pop("roof")) if work else None
        far = distances(made, times) if made else {}
        for name, each in times.items():
            rate = work / median(each) if work else None
            yield {
                "what": what, "case": case, "shape": shape, "contestant": name,
                "seconds": median(each), "seconds_min": min(each), "seconds_max": max(each),
                "work": work or None, "unit": unit, "rate": rate, "roof": top,
                "share": rate / top if work else None, "difference": far.get(name),
                "rounds": turns,
            }  # fmt: skip

    for name, shape in shapes.items():
        for batch in batches:
            torch.compiler.reset()  # torch gives up compiling a function for ever more shapes
            made, work = heads(batch, shape.hidden, device)
            calls = {k: step_of(one) for k, one in made.items()}
            what = "head and loss, forward and backward"
            yield from rows(name, f"B {batch}", what, calls, work, "bytes", made)
        for case, numbers in tries.items():
            torch.compiler.reset()
            trie = trie_of(*numbers)
            yield from rows(name, case, "masks, once a batch", preparations(shape, trie, device))
            made = attentions(shape, trie, device)
            pairs = allowed_pairs(trie) * shape.heads * shape.head_dim
            for what, call, flops in (
                ("attention, forward", forward_of, 4),
                ("attention, forward and backward", step_of, 14),
            ):
                calls = {k: call(one) for k, one in made.items()}
                yield from rows(name, case, what, calls, flops * pairs, "flops", made)


def file_of(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".csv"


def show(rows: Sequence[dict[str, Any]]) -> None:
    print("| what | case | shape | contestant | ms | TB/s or PFLOP/s | of the roof | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row[k] for k in ("what", "case", "shape", "contestant")]
        cells.append(f"{1e3 * row['seconds']:.3f}")
        done = row["share"] is not None
        cells += [f"{row['rate'] / 1e12:.3f}", f"{row['share']:.0%}"] if done else ["", ""]
        cells.append("" if row["difference"] is None else f"{row['difference']:.1e}")
        print(f"| {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda: ROCm too")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that all of it runs")
    parser.add_argument("--rounds", type=int, help="turns of each; default: 20, or 3 with --quick")
    parser.add_argument("--csv", type=Path, help="written anew; default: benchmarks/results/ and "
        "the GPU's name, where that folder is; none with --quick")  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu goes with --quick: it shows that all of it runs, no more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU, and this times GPU kernels: to try it out, --device cpu "
            "--quick")  # fmt: skip
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
    rounds = args.rounds or (3 if args.quick else 20)
    versions = {"device": name, "torch": torch.__version__, "triton": triton}
    rows = [row | versions for row in run(args.device, args.quick, rounds)]
    show(rows)
    results = Path(__file__).with_name("results")
    if args.csv is None and not args.quick and results.is_dir():
        args.csv = results / file_of(name)
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
