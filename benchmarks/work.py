"""Counts work instead of timing it: what kernels move and launch, against the least there is to do.

    python -m rmfast.benchmarks.work

No GPU is needed. Bytes are counted while Triton's interpreter runs the kernels, launch by launch:
each address that is read once, whatever read it how often (a repeat is served by the cache as long
as the rows of a batch fit into it), and each store each time. Launches are counted in one training
step of head and loss, forward and backward, as :mod:`rmfast.benchmarks.played` does; the gradient
of the loss, a one, is given. Attention: tiles visited, against the mask itself; tiles on the
longest way to dK and dV, on 132 processors, against a processor's on average; instructions of the
loop over full tiles, against those of plain causal attention compiled from the same source.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rmfast.benchmarks import attention_work, offline, played
from rmfast.kernels import chips
from rmfast.trie import PackedTrie


class Figure(NamedTuple):
    what: str
    case: str
    counted: float
    least: float | None
    ratio: float | None  # counted / least
    limit: float | None  # that the ratio, or without one the count, may have


def figure(
    what: str, case: str, counted: float, least: float | None = None, limit: float | None = None
) -> Figure:
    ratio = None if least is None else counted / least
    return Figure(what, case, counted, least, ratio, limit)


# --- bytes


class Traffic(NamedTuple):
    """Bytes of one launch."""

    kernel: str
    read: int
    written: int


@contextlib.contextmanager
def traffic() -> Iterator[list[Traffic]]:
    """Launches inside the block, in a process where Triton interprets."""
    from triton.runtime import interpreter

    done: list[Traffic] = []
    reads: dict[int, list[np.ndarray]] = {}  # addresses by bytes of an element
    written = [0]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, rmw = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    )  # fmt: skip
    launch = executor.__call__

    def size(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def read(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        reads.setdefault(size(pointers), []).append(np.unique(addresses))

    def write(pointers: Any, mask: Any) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        written[0] += size(pointers) * int(np.broadcast_to(mask.data, shape).sum())

    def loads(self, pointers, mask, *rest):
        read(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stores(self, pointers, value, mask, *rest):
        write(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def atomics(self, operation, pointers, value, mask, *rest):
        read(pointers, mask)
        write(pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest)

    def launches_(self, *args, **kwargs):
        reads.clear()
        written[0] = 0
        launch(self, *args, **kwargs)
        distinct = sum(k * np.unique(np.concatenate(v)).size for k, v in reads.items())
        name = f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}"
        done.append(Traffic(name, distinct, written[0]))

    builder.create_masked_load, builder.create_masked_store = loads, stores
    builder.create_atomic_rmw, executor.__call__ = atomics, launches_
    try:
        yield done
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, executor.__call__ = rmw, launch


TOKENS, WIDTH, BATCH = 512, 4096, 32  # rows of hidden; sequences, half of them chosen


def bytes_moved() -> list[Figure]:
    """All but attention. The least is what the kernels' own docstrings say, tensor by tensor."""
    kinds = (_head_bytes, _fused_bytes, _pairwise_bytes, _listwise_bytes, _elementwise_bytes)
    cases = [case for kind in kinds for case in kind()]
    out = []
    for name, call, least in cases:
        with traffic() as moved:
            call()
        counted = sum(one.read + one.written for one in moved)
        out.append(figure("bytes moved", name, counted, least, 1.05))
    return out


def _head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype)
    return hidden, torch.randperm(TOKENS)[:BATCH], torch.randn(1, WIDTH).to(dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


_Case = tuple[str, Callable[[], object], int]


def _head_bytes() -> Iterable[_Case]:
    from rmfast.kernels import reward_head as kernel

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hidden, index, weight = _head(dtype)
        scores = torch.randn(BATCH, 1)
        rows = hidden[index]
        yield (
            f"head forward, {name}",
            lambda args=(hidden, index, weight): kernel.reward_head(*args, None),
            _bytes(rows, weight, index, scores),
        )
        yield (
            f"head backward, {name}",
            lambda args=(scores, hidden, index, weight): kernel.reward_head_backward(*args, None),
            _bytes(scores, rows, index, weight) + _bytes(hidden, weight),
        )


def _fused_bytes() -> Iterable[_Case]:
    from rmfast import ops

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        hidden, index, weight = _head(dtype)
        scores, pairs, metrics, loss = (torch.empty(n) for n in (BATCH, BATCH, 6, 1))
        forward = _bytes(hidden[index], weight, index, scores, pairs, metrics, loss)
        backward = _bytes(weight, index, pairs, loss) + _bytes(hidden, weight)

        def step(hidden=hidden, index=index, weight=weight, ids=None) -> None:
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            rule = {} if ids is None else {"input_ids": ids, "pad_token_id": 0}
            loss = ops.reward_head_pairwise_loss(leaves[0], index, leaves[1], **rule).loss
            loss.backward(torch.ones(()))

        yield f"head and loss, forward and backward, {name}", step, forward + backward
        # the ids are read from the pooled one on; the index, read before, is written
        ids = torch.randint(0, 2, (BATCH, TOKENS // BATCH))
        padded = hidden.view(*ids.shape, WIDTH)
        passed = sum(int(row.flip(0).argmax()) + 1 for row in ids)
        least = forward + backward + passed * ids.itemsize
        run = functools.partial(step, padded, None, weight, ids)
        yield f"head and loss, padded, forward and backward, {name}", run, least


def _pairwise_bytes() -> Iterable[_Case]:
    from rmfast import ops

    scores = torch.randn(4096)
    pairs, metrics, loss = torch.empty(4096), torch.empty(6), torch.empty(1)

    def step() -> None:
        ops.pairwise_loss(scores.clone().requires_grad_()).loss.backward(torch.ones(()))

    least = _bytes(scores, loss, metrics, pairs) + _bytes(loss, pairs, scores)
    yield "pairwise loss, forward and backward", step, least


def _listwise_bytes() -> Iterable[_Case]:
    from rmfast import ops

    scores, ranks, offsets = torch.randn(512), torch.arange(512) % 16, torch.arange(0, 513, 16)
    losses, slope = torch.empty(32), torch.empty(512)
    least = _bytes(scores, ranks, offsets, losses, slope) + _bytes(losses, slope, offsets, scores)
    for kind in ("all_pairs", "plackett_luce"):

        def step(kind=kind) -> None:
            leaf = scores.clone().requires_grad_()
            loss = ops.listwise_loss(
                leaf, ranks, offsets, kind=kind, reduction="none", max_size=16
            )  # fmt: skip
            loss.backward(torch.ones(32))

        yield f"{kind}, forward and backward", step, least


def _elementwise_bytes() -> Iterable[_Case]:
    from rmfast.kernels import elementwise as kernel

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, grad, up = torch.randn(3, 64, 1024).to(dtype)
        weight, eps = torch.randn(1024).to(dtype), 1e-6
        q, k = (torch.randn(1, 32, heads, 128).to(dtype).transpose(1, 2) for heads in (16, 8))
        cos, sin = torch.randn(2, 1, 32, 128).to(dtype)
        turned, norms = 2 * _bytes(q, k) + _bytes(cos, sin), 3 * _bytes(x) + _bytes(weight)
        parts = torch.empty(2, 32, 1024)  # of two rows each, written and read
        cases = {
            "RMSNorm": (kernel.rms_norm, (x, weight, eps, 0.0, False), norms - _bytes(x)),
            "RMSNorm backward, frozen": (
                kernel.rms_norm_backward, (grad, x, weight, eps, 0.0, False), norms,
            ),
            "RMSNorm backward": (
                kernel.rms_norm_backward, (grad, x, weight, eps, 0.0),
                norms + _bytes(parts, weight),
            ),
            "rotary": (kernel.rotary, (q, k, cos, sin), turned),
            "rotary backward": (kernel.rotary, (q, k, cos, sin, True), turned),
            "SwiGLU": (kernel.gated, (x, up, False), 3 * _bytes(x)),
            "SwiGLU backward": (kernel.gated_backward, (grad, x, up, False), 5 * _bytes(x)),
        }  # fmt: skip
        for case, (function, arguments, least) in cases.items():
            yield f"{case}, {name}", functools.partial(function, *arguments), least


# --- launches


def launches_per_step() -> list[Figure]:
    """A training step of head and loss, on the rows of a packed batch and on a padded one."""
    from rmfast import ops

    def rmfast(hidden, index, weight):
        return ops.reward_head_pairwise_loss(hidden, index, weight).loss

    def rmfast_padded(hidden, ids, weight):
        return ops.reward_head_pairwise_loss(
            hidden, None, weight, input_ids=ids, pad_token_id=0
        ).loss

    def rmfast_apart(hidden, index, weight):
        return ops.pairwise_loss(ops.reward_head(hidden, index, weight)).loss

    def eager(hidden, index, weight):
        chosen, rejected = F.linear(hidden[index].float(), weight.float())[:, 0].chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def hugging_face(hidden, ids, weight):  # its sequence classifiers' pooling, and TRL's loss
        logits = F.linear(hidden, weight)
        columns = torch.arange(ids.shape[-1], device=ids.device, dtype=torch.int32)
        last = (columns * (ids != 0).to(torch.int32)).argmax(-1)
        pooled = logits[torch.arange(len(ids), device=ids.device), last]
        chosen, rejected = pooled.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    hidden, index, weight = _head(torch.bfloat16)
    ids = torch.randint(1, 9, (BATCH, TOKENS // BATCH))
    padded = hidden.view(*ids.shape, WIDTH)
    contestants: list[tuple[str, Callable, Tensor, Tensor, int | None]] = [
        ("rmfast, one op", rmfast, hidden, index, 2),
        ("rmfast, one op on the padded batch", rmfast_padded, padded, ids, 2),
        ("rmfast, head and loss apart", rmfast_apart, hidden, index, 4),
        ("eager torch on the pooled rows", eager, hidden, index, None),
        ("Hugging Face and TRL on the padded batch", hugging_face, padded, ids, None),
    ]
    out = []
    with played.gpu() as gpu:
        for name, loss, states, rows, limit in contestants:
            leaves, rows = [gpu.put(x).requires_grad_() for x in (states, weight)], gpu.put(rows)

            def step(loss=loss, leaves=leaves, rows=rows) -> None:
                value = loss(leaves[0], rows, leaves[1])
                torch.autograd.grad(value, leaves, torch.empty_like(value))

            count = gpu.twice(step)["launches"]
            out.append(figure("launches a step", name, count, limit=limit))
    return out


# --- attention

TILES = ((128, 64, None), (64, 128, None), (128, 64, 128))  # queries, keys, sliding window


def tiles_visited(tries: dict[str, PackedTrie]) -> list[Figure]:
    """Tiles that the kernels visit, against those that hold a pair the mask allows."""
    cases = {f"{name}, {len(trie)} nodes": (trie, 0) for name, trie in tries.items()}
    groups = tries["8 groups of 8"]
    piece, first = attention_work.carried(groups, len(groups) // 16)
    cases[f"half a group, {len(piece) - first} nodes after {first}"] = (piece, first)
    out = []
    for name, (trie, first) in cases.items():
        for rows, nodes, window in TILES:
            case = f"{name}, {rows} x {nodes}"
            case += "" if window is None else f", window {window}"
            counted, least = attention_work.tiles(trie, rows, nodes, window, first)
            out.append(figure("tiles visited", case, counted, least, 1.0))
    return out


def tile_steps(tries: dict[str, PackedTrie]) -> list[Figure]:
    """Tile steps until the last program of dK and dV ends, against a processor's on average."""
    from rmfast.kernels import trie_configs

    config = trie_configs.TABLE["sm_90", 128][2]
    what, out = "tile steps until dK and dV are done", []
    for name in ("64 pairs", "8 groups of 8", attention_work.WORDS):
        for how, cut, limit in (("", True, 1.3), (", no list cut", False, None)):
            path = attention_work.critical_path(tries[name], 32, 8, config, cut)
            out.append(figure(what, f"{name}, {len(tries[name])} nodes{how}", *path, limit))
    return out


def loop_instructions(chip_names: Iterable[str]) -> list[Figure]:
    """Instructions of the full-tile loop, against plain causal attention of the same source."""
    out = []
    for kernel, chip, width, counted, least in attention_work.instructions(chip_names, (64, 128)):
        # AMD's loops are short, and looking up a tile takes 8 scalar instructions there
        limit = 1.025 if chips.CHIPS[chip].backend == "cuda" else 1.05
        what, case = f"instructions a full tile, {kernel}", f"{chip}, D {width}"
        out.append(figure(what, case, counted, least, limit))
    return out


def count(chip_names: Iterable[str], data: Path | None = None) -> list[Figure]:
    """Every figure."""
    with offline.processes(1, interpret=True) as pool:
        moved = pool.submit(bytes_moved).result()
    tries = attention_work.tries(data)
    counted = [*launches_per_step(), *tiles_visited(tries), *tile_steps(tries)]
    return [*moved, *counted, *loop_instructions(chip_names)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("work", description=__doc__.partition("\n")[0])
    results = Path(__file__).with_name("results")
    default = results / "work.csv" if results.is_dir() else None
    parser.add_argument("--csv", type=Path, default=default, help="written anew: %(default)s")
    parser.add_argument("--chips", nargs="*", default=list(chips.CHIPS), choices=chips.CHIPS)
    parser.add_argument("--data", type=Path, help="preference pairs as JSON lines, for the tiles")
    args = parser.parse_args(argv)
    figures = [
        one._replace(ratio=one.ratio and round(one.ratio, 4))._asdict()
        for one in count(args.chips, args.data)
    ]
    print(f"| {' | '.join(Figure._fields)} |\n|{'---|' * len(Figure._fields)}")
    for one in figures:
        print(f"| {' | '.join('' if x is None else str(x) for x in one.values())} |")
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, Figure._fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(figures)


if __name__ == "__main__":
    main()
