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

import rmfast
from rmfast.benchmarks import contestants, gpu_common, gpu_kernels
from rmfast.benchmarks import kernels as bench
from rmfast.benchmarks.gpu_common import (
    DEV,
    DRY,
    KINDS,
    ROUNDS,
    Row,
    build,
    goal,
    on_gpu,
    padded,
    ready,
    rows_of,
)  # fmt: skip
from rmfast.packed import patching
from rmfast.packed import step as packed_step
from rmfast.train import batches as train_batches
from rmfast.train import objective

ATTENTION = "sdpa" if DRY else "auto"
SLOTS = 400 if DRY else 16_384  # token slots of a filled batch: about the nodes of a whole one
WAITS = "ynchronize|Malloc"  # in the names of what the host waits in


def clean(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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
    """Calls of a small model, launched and replayed as a CUDA graph, and Hugging Face's."""
    own = build("0.6B").eval()
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
        calls = {name: functools.partial(run, failed) for name, failed in who.items()}
        calls["Hugging Face"] = functools.partial(own, **batch)
        before, took = found.replayed, {name: [] for name in calls}
        for name, call in list(calls.items()) * (5 * ROUNDS):
            ready()
            start = time.perf_counter()
            call()
            ready()
            took[name].append(time.perf_counter() - start)
        for name, times in took.items():
            row = {"sequences": count, "nodes": len(rmfast.pack(rows_of("pairs")[:count]))}
            row |= {"who": name, "apart": float(off), "replayed": found.replayed - before}
            yield {**row, "ms": 1e3 * median(times)}


def roofs(timed: bool) -> Iterator[Row]:
    yield gpu_common.roof()


# --- all of it

# function, arguments, seconds, whether it is run once before, to compile
SECTIONS: dict[str, tuple[Callable, tuple, float, bool]] = {
    "roof": (roofs, (), 20, False), "launches": (gpu_kernels.launches, (), 40, True),
    "scoring 0.6B": (scoring, ("0.6B",), 75, True), "training 0.6B": (steps, ("0.6B",), 100, True),
    "against": (gpu_kernels.against, (), 60, True), "dualkv": (gpu_kernels.dualkv, (), 30, True),
    "heads": (gpu_kernels.heads, (), 30, True),
    **{f"tuning D {d}": (gpu_kernels.tuning, (d,), 20, True) for d in (64, 256)},
    "scoring 8B": (scoring, ("8B",), 70, False),
    "training 8B": (steps, ("8B, 12 layers",), 60, False), "profiles": (profiles, (), 50, False),
    "elementwise": (gpu_kernels.elementwise, (), 40, True),
    "scoring 1B": (scoring, ("1B",), 40, True), "graphs": (graphs, (), 20, False),
    "tuning D 128": (gpu_kernels.tuning, (128,), 20, True),
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
