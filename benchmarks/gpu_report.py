"""How fast is it on this machine's GPU, and where does the time go? The answer takes six minutes.

    python -m rmfast.benchmarks.gpu_report --out FOLDER

Sections run one after the other, the most wanted first, a process each; what the time does not
reach is left out and named. Before that, in all processes at once, what has to be compiled is.
Models have random weights and real shapes, batches are ``gpu_common.rows_of``. Whole passes are
timed by the wall clock, idle to idle, contestants in turn, the median counts; single kernels by the
profiler or by ``kernels.Clock``, with a cold cache. Rows with a ``goal`` say what was needed, what
was measured, and whether that was ``reached``: the goals are for one H100. All of it lands in
``FOLDER/<device>.json``. ``--dry`` tries it out on a CPU, tiny.
"""

from __future__ import annotations

import argparse
import functools
import gc
import operator
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import rmfast
from rmfast import ops
from rmfast.benchmarks import contestants, gpu_common
from rmfast.benchmarks import kernels as bench
from rmfast.benchmarks.gpu_common import BF16, DEV, DRY, build, heads_of, noise, padded, rows_of
from rmfast.kernels import trie_attention as kernels
from rmfast.kernels import trie_configs, trie_plan
from rmfast.packed import backends, patching
from rmfast.packed import step as packed_step
from rmfast.train import batches as train_batches
from rmfast.train import objective

KINDS = ("groups", "apart") if DRY else ("pairs", "groups", "long", "apart")
ATTENTION = "sdpa" if DRY else "auto"
SLOTS = 400 if DRY else 16_384  # token slots of a filled batch: about the nodes of a whole one
ROUNDS = 1 if DRY else 3
WAITS = "ynchronize|Malloc"  # in the names of what the host waits in
Row = dict[str, Any]


def ready() -> None:
    if not DRY:
        torch.cuda.synchronize()


def clean(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def goal(what: str, measured: float | None, needed: float, most: bool = False, **more: Any) -> Row:
    """``needed`` is the least, or the ``most``; compared as they are printed, to two digits."""
    well = operator.le if most else operator.ge
    reached = measured is not None and well(round(measured, 2), round(needed, 2))
    sign = "≤" if most else "≥"
    return {
        "goal": what, "needed": f"{sign} {needed:.2f}", "measured": measured, "reached": reached,
        **more,
    }  # fmt: skip


# --- whole passes


class Entry(NamedTuple):
    options: dict[str, Any] | None  # of patch; None: Hugging Face as it comes
    run: Callable  # model, rows, batches
    batches: Any


def filled(rows: Sequence, slots: int) -> list[list[int]]:
    """Longest first, as many in a batch as ``slots`` hold, padded."""
    out: list[list[int]] = [[]]
    for (i,) in contestants.by_length(rows, 1):
        if out[-1] and len(rows[out[-1][0]]) * (len(out[-1]) + 1) > slots:
            out.append([])
        out[-1].append(i)
    return out


def pairs_of(rows: Sequence, by_length: bool) -> list[list[int]]:
    """8 pairs a batch, fewer of long ones: chosen, then rejected; with the longest side first?"""
    count, longest = len(rows) // 2, max(map(len, rows))
    order = list(range(count))
    if by_length:
        order.sort(key=lambda i: -max(map(len, rows[2 * i : 2 * i + 2])))
    batches = contestants.in_file_order(count, min(8, SLOTS // longest))
    return [[2 * order[i // 2] + i % 2 for i in batch] for batch in batches]


def score(model: nn.Module, rows: Sequence, batches: list[list[int]]) -> None:
    with torch.inference_mode():
        for batch in batches:
            model(**padded(rows, batch)).logits.float().cpu()


def train(
    model: nn.Module, rows: Sequence, batches: list[list[int]], made: Sequence | None = None
) -> None:
    for batch in made or (padded(rows, batch) for batch in batches):
        bench.trl(model(**batch).logits).backward()


def packed(rows: Sequence) -> packed_step.Batch:
    """As the trainer's loader hands it over."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    batch = train_batches.Collator(0)([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs])
    return {k: v.to(DEV) if torch.is_tensor(v) else v for k, v in batch.items()}


def train_packed(model: nn.Module, rows: Sequence, batch: packed_step.Batch) -> None:
    step = packed_step.Step(batch, objective.Objective(), batch["count"])
    model(input_ids=batch["input_ids"][None], rmfast_step=step).loss.backward()


def seconds(model: nn.Module, rows: Sequence, entry: Entry) -> float:
    clean(model)
    ready()
    start = time.perf_counter()
    entry.run(model, rows, entry.batches)
    ready()
    return time.perf_counter() - start


def contest(
    what: str, kind: str, model: nn.Module, rows: Sequence, who: dict[str, Entry], rounds: int
) -> Iterator[Row]:
    """A row for each, after an untimed turn; then goals, where there were timed ones.

    Who has its batches made before the clock starts competes with those that have them too.
    """
    took, peak, failed = defaultdict(list), {}, {}
    for turn in range(rounds + 1):
        for name in [name for name in who if name not in failed]:
            options = who[name].options
            try:
                if options is not None:
                    rmfast.patch(model, **{"attention": ATTENTION, **options})
                spent = seconds(model, rows, who[name])
                took[name] += [spent] * (turn > 0)
                peak[name] = 0.0 if DRY else torch.cuda.max_memory_allocated() / 1e9
                if options is not None and rmfast.report(model).fallbacks:
                    failed[name] = str(rmfast.report(model))
            except Exception as error:  # out of memory, or what a backend cannot do
                failed[name] = f"{type(error).__name__}: {str(error)[:150]}"
            rmfast.unpatch(model)
    nodes, made = len(rmfast.pack(rows)), {}
    for name, entry in who.items():
        slots = nodes if entry.options is not None else contestants.token_slots(rows, entry.batches)
        row = {"kind": kind, "who": name, "tokens": sum(map(len, rows)), "slots": slots}
        if name in failed:
            yield {**row, "failed": failed[name]}
        elif took[name]:
            times = [1e3 * s for s in took[name]]
            row |= {"ms": median(times), "spread ms": max(times) - min(times)}
            made[name] = row = {**row, "peak GB": peak[name]}
            yield row
    for early in sorted({n.endswith("before") for n in who}) if rounds else ():
        entered = [row for n, row in made.items() if n.endswith("before") == early]
        ours, theirs = (
            min((r for r in entered if side in r["who"]), key=lambda r: r["ms"], default={})
            for side in ("rmfast", "HF, sorted")
        )
        bound = theirs.get("slots", nodes) / nodes
        yield goal(
            f"{what}, {kind}{', batches made before' * early}: "
            "times as fast as Hugging Face, sorted",
            theirs["ms"] / ours["ms"] if ours and theirs else None,
            1.0 if kind == "apart" else 0.9 * bound, bound=bound,
            **{"fastest": ours.get("who"), "HF's fastest": theirs.get("who")},
            **{"peak GB": ours.get("peak GB"), "HF peak GB": theirs.get("peak GB")},
        )  # fmt: skip


def scoring(timed: bool, name: str) -> Iterator[Row]:
    model = build(name).eval()
    for kind in KINDS if timed else KINDS[:1]:
        rows = rows_of(kind)
        whole, in_order = [list(range(len(rows)))], pairs_of(rows, False)
        who = {
            "HF, sorted, 16": Entry(None, score, contestants.by_length(rows, 16)),
            "HF, sorted, filled": Entry(None, score, filled(rows, SLOTS)),
            "rmfast": Entry({}, score, whole),
        }
        if name == "0.6B":
            who["HF, file order"] = Entry(None, score, in_order)
            who["rmfast, file order"] = Entry({}, score, in_order)
            who["rmfast, sdpa"] = Entry({"attention": "sdpa"}, score, whole)
        yield from contest(f"scoring {name}", kind, model, rows, who, ROUNDS * timed)


def steps(timed: bool, name: str) -> Iterator[Row]:
    """Forward and backward; of the 8B model, with gradient checkpointing."""
    model, big = build(name).train(), name.startswith("8B")
    if big:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for kind in KINDS if timed else KINDS[:1]:
        rows = rows_of(kind)
        in_order, by_length = (pairs_of(rows, sort) for sort in (False, True))
        whole = contestants.in_file_order(len(rows) // 2, len(rows))
        again = functools.partial(train, made=[padded(rows, batch) for batch in by_length])
        who = {
            "HF, sorted": Entry(None, train, by_length),
            "HF, sorted, padded before": Entry(None, again, by_length),
            "HF, file order": Entry(None, train, in_order),
            "rmfast, file order": Entry({}, train, in_order),
            "rmfast, whole": Entry({}, train, whole),
            "rmfast, packed before": Entry({}, train_packed, packed(rows)),
        }
        if big:
            who = {n: who[n] for n in ("HF, sorted, padded before", "rmfast, packed before")}
        rounds = (2 if big else ROUNDS) * timed
        yield from contest(f"training {name}", kind, model, rows, who, rounds)


# --- where the time goes


def on_gpu(run: Callable[[], object]) -> tuple[list, list, float]:
    """The GPU's work during ``run``, all events, and the seconds by the wall clock."""
    from torch.profiler import ProfilerActivity, profile

    ready()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not DRY)) as prof:
        start = time.perf_counter()
        run()
        ready()
        wall = time.perf_counter() - start
    events = list(prof.events())
    there = [e for e in events if str(e.device_type).endswith("CUDA")]
    return sorted(there, key=lambda e: e.time_range.start), events, wall


def waiting_lines(run: Callable[[], object]) -> dict[str, int]:
    """Where the host waits for the GPU."""
    if DRY:
        return {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen)


def profiles(timed: bool) -> Iterator[Row]:
    for name, step in (("0.6B", True), ("0.6B", False), ("8B", False)):
        model, rows = build(name).train(step), rows_of("pairs")
        rmfast.patch(model, attention=ATTENTION)
        batches = packed(rows) if step else [list(range(len(rows)))]
        once = functools.partial(train_packed if step else score, model, rows, batches)
        for _ in range(2):
            once()
        there, events, wall = on_gpu(once)
        total, busy, gaps, until = defaultdict(lambda: [0.0, 0]), 0.0, [], None
        for e in there:
            begin, end = e.time_range.start, e.time_range.end
            total[e.name][0] += end - begin
            total[e.name][1] += 1
            if until is not None and begin > until:
                gaps.append((begin - until, e.name[:50]))
            busy += max(0.0, end - max(begin, until or begin))
            until = max(end, until or end)
        top = sorted(total.items(), key=lambda x: -x[1][0])[:25]
        yield {
            "model": name, "what": "step" if step else "scoring", "wall ms": 1e3 * wall,
            "GPU busy ms": busy / 1e3, "gaps ms": sum(g for g, _ in gaps) / 1e3,
            "launches": len(there),
            "waits": Counter(name for e in events if re.search(WAITS, name := e.name)),
            "waiting lines": waiting_lines(once),
            "longest gaps us": sorted(gaps)[::-1][:6],
            "top": [(round(t / 1e3, 3), n, kernel[:90]) for kernel, (t, n) in top],
        }  # fmt: skip
        del model, once  # before the next one is built


@torch.no_grad()
def graphs(timed: bool) -> Iterator[Row]:
    """Calls of a small model, launched and replayed as a CUDA graph, with what each compares."""
    model = rmfast.patch(build("0.6B").eval(), attention=ATTENTION, cuda_graphs=True)
    found = patching.attached(model).overrides[0].graphs
    for count in (2, 8, 32):
        batch = padded(rows_of("pairs")[:count])

        def run(failed: str | None, batch=batch) -> torch.Tensor:
            found.failed = failed  # then nothing is replayed
            with torch.no_grad():
                return model(**batch).logits[:, 0].float()

        who = {"launched": "not wanted", "replayed": None}
        scores = {name: [run(failed) for _ in range(3)][-1] for name, failed in who.items()}
        off = (scores["replayed"] - scores["launched"]).abs().max() / scores["launched"].std()
        before, took = found.replayed, {name: [] for name in who}
        for name, failed in list(who.items()) * (5 * ROUNDS):
            ready()
            start = time.perf_counter()
            run(failed)
            ready()
            took[name].append(time.perf_counter() - start)
        for name, times in took.items():
            row = {"sequences": count, "nodes": len(rmfast.pack(rows_of("pairs")[:count]))}
            row |= {"who": name, "apart": float(off), "replayed": found.replayed - before}
            yield {**row, "ms": 1e3 * median(times)}


def launches(timed: bool) -> Iterator[Row]:
    """The launches of attention alone, with and without a start that all rows share."""
    cold = torch.empty(1 << (10 if DRY else 28), dtype=torch.uint8, device=DEV)
    cases = [(kind, 4, 128, (32, 8)) for kind in (*KINDS, "wide")]
    cases += [("pairs", 0, 128, (32, 8)), ("apart", 0, 128, (32, 8)), ("pairs", 4, 128, (16, 8))]
    cases += [("pairs", 4, 64, (32, 8)), ("groups", 4, 64, (32, 8)), ("groups", 4, 256, (8, 4))]
    for kind, start, d, h in cases[:2] if DRY else cases:
        d, h = (16, (2, 1)) if DRY else (d, h)
        trie = rmfast.pack(rows_of(kind, start)).to(DEV)
        q, k, v = heads_of(trie, d, h)
        grad = noise(len(trie), h[0], d, dtype=BF16)[None]
        rest = (trie.subtree_end, trie.position_ids, None, None, d**-0.5, None, None)

        made: dict = {}  # plans, as layers of a batch share them

        def run(times: int = 1, q=q, k=k, v=v, grad=grad, rest=rest, made=made) -> None:
            for _ in range(times):
                cold.zero_()
                out, lse = kernels.trie_attention(q, k, v, *rest, True, made=made)
                kernels.trie_attention_backward(grad, q, k, v, *rest, out, lse, made=made)

        run()
        if not timed:
            continue
        seen = [] if DRY else on_gpu(lambda run=run: run(7))[0]
        pairs = bench.allowed_pairs(trie.to("cpu"))
        config = trie_configs.config("dkv", q, d, False, False)
        rule = trie_plan.rule(*rest[:3], len(trie), None)
        lists = trie_plan.plan(rule, config.rows, config.nodes, True).counts[:, 1].float()
        row = {"kind": kind, "start": start, "D": d, "heads": h, "nodes": len(trie),
               "M pairs": pairs / 1e6, "dkv list, mean": float(lists.mean()),
               "longest": float(lists.max())}  # fmt: skip
        for part, flops in (("forward", 4), ("dq", 6), ("dkv", 8), ("add", 0)):
            us = [e.time_range.elapsed_us() for e in seen if f"_{part}_kernel" in e.name]
            if us:
                row[f"{part} us"] = median(us)
            if us and flops:
                row[f"{part} TFLOP/s"] = flops * d * h[0] * pairs / median(us) / 1e6
        yield row


# --- kernels beside others


def against(timed: bool) -> Iterator[Row]:
    """Attention beside FlexAttention and torch's kernels, forward and with backward."""
    clock = bench.Clock(DEV)
    shape = bench.Shape(*(4, 2, 16, 64) if DRY else (32, 8, 128, 4096))
    product, flops = bench.roof("flops", DEV, DRY)
    for kind in ("groups",) if DRY else ("long", "groups", "apart"):
        trie = rmfast.pack(rows_of(kind))
        who = bench.attentions(shape, trie, DEV)
        plain = who["torch SDPA, nothing shared"]
        for backend in () if DRY else ("FLASH_ATTENTION", "CUDNN_ATTENTION"):

            def forced(q, k, v, backend=backend):
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

            who[f"nothing shared, {backend}"] = plain._replace(forward=forced)
        work = bench.allowed_pairs(trie) * shape.heads * shape.head_dim
        whats = ("forward", bench.forward_of, 4), ("forward + backward", bench.step_of, 14)
        for what, call, each in whats:
            calls = {name: call(one) for name, one in who.items()} | {"matmul": product}
            took = bench.measure(calls, (5 * ROUNDS if not DRY else 1) * timed, clock)
            took = {name: median(times) for name, times in took.items() if times}
            for name, s in took.items():
                yield {"kind": kind, "what": what, "who": name, "ms": 1e3 * s}
            if timed:
                ours, flex, most = map(took.get, ("rmfast", "FlexAttention", "matmul"))
                label = f"attention {what}, {kind}, D {shape.head_dim}"
                speed = flex / ours if ours and flex else None
                yield goal(f"{label}: times as fast as FlexAttention", speed, 1.0)
                share = each * work / ours / (flops / most) if ours and most else None
                yield goal(f"{label}: share of the matmul rate", share, 0.6)


# responses, prompt, milliseconds forward + backward on one H100; responses of 2,048, 32 and 8 heads
# of 128, fp16: arXiv 2605.15422, and experiments/reproduce_table1.py of its repository
DUALKV = ((28, 4096, 133), (28, 16384, 468), (16, 32768, 679), (28, 32768, 1018))


def dualkv(timed: bool) -> Iterator[Row]:
    """Responses to one long prompt, attention alone."""
    clock, (h, d) = bench.Clock(DEV), ((2, 1), 16) if DRY else ((32, 8), 128)
    for responses, prompt, published in DUALKV[:1] if DRY else DUALKV:
        count, begins, answer = (2, 40, 8) if DRY else (responses, prompt, 2048)
        stop = begins + answer * torch.arange(1, count + 1)
        end = torch.cat([stop[-1].expand(begins), stop.repeat_interleave(answer)]).int()
        position = torch.cat([torch.arange(begins), begins + torch.arange(answer).repeat(count)])
        trie = rmfast.PackedTrie(torch.zeros_like(position), position, end, stop - 1).to(DEV)

        plan = ops.TriePlan(trie.subtree_end, trie.position_ids)

        def attend(q, k, v, plan=plan):
            return backends.trie_attention("sdpa" if DRY else "triton", q, k, v, plan)

        leaves = [x.requires_grad_() for x in heads_of(trie, d, h, torch.float16)]
        one = bench.Contestant(attend, leaves)
        calls = {"forward": bench.forward_of(one), "forward + backward": bench.step_of(one)}
        took = bench.measure(calls, ROUNDS * timed, clock)
        if not timed:
            return
        ms = {what: 1e3 * median(times) for what, times in took.items()}
        flops = 14 * bench.allowed_pairs(trie.to("cpu")) * h[0] * d
        name = f"{responses} responses to {prompt:,} tokens"
        whole = ms.get("forward + backward")
        rate = flops / whole / 1e9 if whole else None
        yield {"who": name, "nodes": len(trie), **ms, "TFLOP/s": rate}
        what = f"DualKV's shape, {name}: ms forward + backward"
        yield goal(what, whole, published, most=True)


def heads(timed: bool) -> Iterator[Row]:
    who, work = bench.heads(2 if DRY else 512, 32 if DRY else 4096, DEV)
    copy, size = bench.roof("bytes", DEV, DRY)
    calls = {name: bench.step_of(one) for name, one in who.items()} | {"copy": copy}
    took = bench.measure(calls, 5 * ROUNDS * timed, bench.Clock(DEV))
    rate = {n: (size if n == "copy" else work) / median(t) / 1e12 for n, t in took.items() if t}
    for name, x in rate.items():
        yield {"who": name, "ms": 1e3 * median(took[name]), "TB/s": x}
    if timed:
        what = "head and loss, 65,536 rows of 4,096: copy's rate over its own"
        ours, most = map(rate.get, ("rmfast, one op", "copy"))
        yield goal(what, most / ours if ours and most else None, 1.15, most=True)


def elementwise(timed: bool) -> Iterator[Row]:
    """What a layer of 8B does element by element, with its backward, beside transformers' own."""
    n, h, inner, heads, d = (9, 16, 24, (2, 1), 8) if DRY else (16384, 4096, 14336, (32, 8), 128)
    norm = LlamaRMSNorm(h).to(DEV, BF16)
    x, gate, up = (noise(n, size, dtype=BF16).requires_grad_() for size in (h, inner, inner))
    q, k = (noise(n, m, d, dtype=BF16)[None].transpose(1, 2).requires_grad_() for m in heads)
    cos, sin = noise(2, 1, n, d, dtype=BF16)
    cases = {  # ours, theirs, leaves, bytes there and back
        "RMSNorm": (lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, _: norm(x), (x, norm.weight),
                    5 * x.nbytes),
        "rotary": (lambda q, k: ops.rotary(q, k, cos, sin),
                   lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), (q, k),
                   4 * (q.nbytes + k.nbytes + cos.nbytes)),
        "SwiGLU": (ops.gated, lambda g, u: F.silu(g) * u, (gate, up), 8 * gate.nbytes),
    }  # fmt: skip

    def step(function: Callable, leaves: Sequence) -> None:
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(out, leaves, [y.detach() for y in out])

    copy, size = bench.roof("bytes", DEV, DRY)
    for what, (ours, theirs, leaves, least) in cases.items():
        who = {"rmfast": ours, "transformers": theirs}
        if not DRY:
            who["torch.compile"] = torch.compile(theirs)
        calls = {name: functools.partial(step, call, leaves) for name, call in who.items()}
        took = bench.measure({**calls, "copy": copy}, 5 * ROUNDS * timed, bench.Clock(DEV))
        for name, times in took.items():
            if times:
                rate = (size if name == "copy" else least) / median(times) / 1e12
                yield {"what": what, "who": name, "ms": 1e3 * median(times), "TB/s": rate}


def tuning(timed: bool) -> Iterator[Row]:
    """The configurations of all chips: a row of the table against the fastest."""
    from triton.testing import do_bench

    from rmfast.kernels import chips

    cases = [("pairs", 128, (32, 8)), ("groups", 128, (32, 8)), ("groups", 64, (32, 8))]
    for kind, d, h in [] if DRY else cases:
        trie = rmfast.pack(rows_of(kind)).to(DEV)
        q, k, v = heads_of(trie, d, h)
        grad, times = noise(len(trie), h[0], d, dtype=BF16)[None], []

        def timer(run: Callable, times: list = times) -> float:
            times.append(do_bench(run, warmup=3, rep=12, return_mode="median"))
            return times[-1]

        rule = (trie.subtree_end, trie.position_ids, None, None, d**-0.5, None, None)
        best = kernels.tune(grad, q, k, v, *rule, timer=timer)
        trie_configs.TUNED.clear()
        row = trie_configs.TABLE[chips.chip(q.device), d]
        yield {"kind": kind, "D": d, "table": row, "best": best, "ms": times}


def roofs(timed: bool) -> Iterator[Row]:
    yield gpu_common.roof()


# --- all of it

# function, arguments, seconds, whether it is run once before, to compile
SECTIONS: dict[str, tuple[Callable, tuple, float, bool]] = {
    "roof": (roofs, (), 20, False), "launches": (launches, (), 40, True),
    "scoring 0.6B": (scoring, ("0.6B",), 45, True), "training 0.6B": (steps, ("0.6B",), 60, True),
    "against": (against, (), 60, True), "dualkv": (dualkv, (), 30, True),
    "heads": (heads, (), 30, True), "scoring 8B": (scoring, ("8B",), 70, False),
    "training 8B": (steps, ("8B, 12 layers",), 60, False), "profiles": (profiles, (), 50, False),
    "elementwise": (elementwise, (), 40, True), "scoring 1B": (scoring, ("1B",), 40, True),
    "graphs": (graphs, (), 20, False), "tuning": (tuning, (), 90, False),
}  # fmt: skip


def show(name: str, section: dict[str, Any]) -> None:
    print(f"\n## {name} ({section.get('seconds', 0):.0f} s)")
    for row in section["rows"]:
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                 if k != "top")  # fmt: skip
        print("  ".join(cells)[:400])
        for ms, count, kernel in row.get("top", [])[:16]:
            print(f"  {ms:9.3f} ms {count:5}x {kernel[:70]}")
    if section["error"]:
        print("!", section["error"][:300])
    print(end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser("gpu_report", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=350, help="all in all; default: %(default)s")
    add("--compiling", type=float, default=70, help="of them, at most; default: %(default)s")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections")
    args = gpu_common.begin(parser)
    begun, about = time.monotonic(), gpu_common.facts()
    found = {name: {"ok": False, "rows": [], "error": "not reached"} for name in SECTIONS}
    gpu_common.keep(args.out, "report", about, found)
    left = lambda: args.seconds - (time.monotonic() - begun)  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:

        def task(name: str, timed: bool, seconds: float) -> gpu_common.Task:
            function, arguments, *_ = SECTIONS[name]
            path = Path(folder, f"{list(SECTIONS).index(name)}-{timed}.json")
            return gpu_common.Task(path, seconds, function, timed, *arguments)

        once = [name for name in args.only if SECTIONS[name][3] and not DRY]
        for name, one in {name: task(name, False, args.compiling) for name in once}.items():
            while not one.ended(now=left() < args.seconds / 2):
                time.sleep(0.1)
            if not one.result()["ok"]:
                print(f"compiling for {name}: {one.result()['error'][:300]}")
        print(f"compiled: {time.monotonic() - begun:.0f} s", flush=True)
        for name in args.only:
            if left() > 15:
                one = task(name, True, min(SECTIONS[name][2], left() - 5))
                while not one.ended():
                    time.sleep(0.05)
                found[name] = one.result()
            gpu_common.keep(args.out, "report", about, found)
            show(name, found[name])
    goals = [row for one in found.values() for row in one["rows"] if "goal" in row]
    print(f"\n## {sum(row['reached'] for row in goals)} of {len(goals)} goals reached")
    for row in goals:
        measured = "none" if row["measured"] is None else f"{row['measured']:.2f}"
        verdict = "yes" if row["reached"] else "NO "
        print(f"{verdict} {row['goal']}: {measured}, needed {row['needed']}")
    well = sum(found[name]["ok"] for name in args.only)
    print(f"{well} of {len(args.only)} sections, {time.monotonic() - begun:.0f} s")
    raise SystemExit(well < len(args.only))


if __name__ == "__main__":
    main()
