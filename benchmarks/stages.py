"""Where the time of a pass goes on a CPU, by stage, and how far the linear layers' products can go.

    python -m rmfast.benchmarks.stages --data pairs.jsonl --pairs 96

One pass of a Scorer over the chosen and rejected texts, and training steps of 8 pairs, each of them
under torch's profiler: operations below an op of a stage are that op's. The last line of each table
is the time of the same products alone, by the faster of ``torch.matmul`` and prepacked weights.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import rmfast
from rmfast.benchmarks import contestants
from rmfast.benchmarks.peers import models, roof, workloads
from rmfast.ops import _cpu
from rmfast.packed import pieces
from rmfast.packed.models import pad_token
from rmfast.packed.step import Step
from rmfast.score import scorer
from rmfast.train import batches
from rmfast.train.objective import Objective

PAIRS_A_STEP = 8
PACKING = "packing and plans"
STAGES = {  # a stage: how its operations' names begin
    "linear layers": ("aten::linear", "aten::mm", "aten::addmm"),
    "attention": ("rmfast::trie_attention",),
    PACKING: (PACKING,),
}
REST = "the rest: norms, activations, rotary embedding, head, Python"


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Packing, cutting, and the plan that attention makes once a batch, as ranges of a profile."""
    places = (scorer, "pack"), (batches, "pack"), (pieces, "cut"), (_cpu, "_bundles")
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, ranged(getattr(owner, name))))
        yield


def ranged(function: Callable) -> Callable:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(PACKING):
            return function(*args, **kwargs)

    return inside


def profiled(run: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Seconds of ``run()``, and of each stage of it."""
    with named(), torch.profiler.profile() as profile:
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
    found = dict.fromkeys(STAGES, 0.0)

    def add(event: Any, outer: str | None = None) -> None:
        stage = next((s for s, names in STAGES.items() if event.name.startswith(names)), None)
        if stage is not None and (outer is None or stage == PACKING != outer):
            found[stage] += event.cpu_time_total / 1e6
            if outer is not None:
                found[outer] -= event.cpu_time_total / 1e6
            outer = stage
        for child in event.cpu_children:
            add(child, outer)

    for event in profile.events():
        if event.cpu_parent is None:
            add(event)
    return whole, {**found, REST: whole - sum(found.values())}


def scoring(model: nn.Module, rows: list[list[int]], dtype: torch.dtype) -> Callable[[], Any]:
    made = rmfast.Scorer(model.eval().to(dtype))
    return lambda: made.score(rows)


def training(model: nn.Module, rows: list[list[int]], dtype: torch.dtype) -> Callable[[], Any]:
    rmfast.patch(model.train())
    pairs = [
        {"chosen_ids": one, "rejected_ids": other}
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    collator, objective = batches.Collator(pad_token(model)), Objective()

    def run() -> None:
        for i in range(0, len(pairs), PAIRS_A_STEP):
            batch = collator(pairs[i : i + PAIRS_A_STEP])
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(rmfast_step=Step(batch, objective, PAIRS_A_STEP)).loss
            loss.backward()

    return run


def nodes_of(rows: list[list[int]], trains: bool) -> int:
    """Distinct prefixes, in training of each step."""
    size = 2 * PAIRS_A_STEP if trains else len(rows)
    return sum(contestants.trie_nodes(rows[i : i + size]) for i in range(0, len(rows), size))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="pairs; default: the embedded ones")
    add("--pairs", type=int, default=96)
    add("--model", help="reward model, folder or hub name; default: the embedded one")
    add("--dtype", choices=contestants.DTYPES, default="bfloat16", help="in training by autocast")
    add("--rounds", type=int, default=3, help="after an untimed one")
    args = parser.parse_args(argv)
    source, dtype = str(models.original(args.model)), getattr(torch, args.dtype)
    rows = workloads._pairs(args.data, args.pairs, source)
    ceiling = roof.Peer(source, args.dtype, "cpu")
    for stages in (scoring, training):
        load = AutoModelForSequenceClassification.from_pretrained
        run = stages(load(source, dtype=torch.float32, num_labels=1), rows, dtype)
        run()
        some = [(*profiled(run), max(ceiling.scores(rows)[1:])) for _ in range(args.rounds)]
        show(stages.__name__, nodes_of(rows, stages is training), ceiling.flops, some)


def show(name: str, nodes: int, flops: int, some: list[tuple[float, dict, float]]) -> None:
    whole = median(seconds for seconds, _, _ in some)
    products = flops * nodes * (3 if name == "training" else 1) / median(r for _, _, r in some)
    lines = {s: median(stages[s] for _, stages, _ in some) for s in (*STAGES, REST)}
    lines |= {"all": whole, "the linear layers' products alone": products}
    print(f"\n| {name}, {nodes} nodes | seconds | share |\n|---|---|---|")
    for stage, seconds in lines.items():
        print(f"| {stage} | {seconds:.2f} | {seconds / whole:.1%} |")


if __name__ == "__main__":
    main()
