"""Counts what a GPU would be given, without one: launches, copies each way, waits, bytes.

    python -m rmfast.benchmarks.launches

:mod:`rmfast.benchmarks.played` says what counts. Models have 2 and 3 layers; a layer is the
difference, and the whole is as deep as the real one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import rmfast
from rmfast import ops
from rmfast.benchmarks import contestants, gpu_common, played
from rmfast.packed import elementwise
from rmfast.packed.step import Step
from rmfast.train.batches import Collator
from rmfast.train.objective import Objective

SHAPES = {"Qwen3-0.6B": "0.6B", "Llama-8B": "8B"}  # as they are called in gpu_common
PAIRS = 16


class Figure(NamedTuple):
    what: str
    case: str
    figure: float


def build(name: str, layers: int) -> nn.Module:
    """A patched reward model in bf16, on the GPU."""
    made, *sizes = gpu_common.SHAPES[SHAPES[name]]
    sizes = dict(zip(gpu_common.SIZES, sizes, strict=True)) | {"num_hidden_layers": layers}
    config = made.config_class(num_labels=1, pad_token_id=0, use_cache=False, **sizes)
    with torch.device(played.META):
        return rmfast.patch(made._from_config(config, dtype=torch.bfloat16).eval())


def padded(model: nn.Module, gpu: played.Gpu, backward: bool = False) -> Counter[str]:
    inputs = contestants.padded(gpu_common.rows_of("pairs"), range(2 * PAIRS), 0)
    inputs = {name: gpu.put(x) for name, x in inputs.items()}

    def run() -> None:
        model.zero_grad()
        with torch.set_grad_enabled(backward):
            logits = model(**inputs).logits
        if backward:
            logits.backward(torch.empty_like(logits))

    return gpu.twice(run)


def window(model: nn.Module, gpu: played.Gpu) -> Counter[str]:
    scorer = rmfast.Scorer(model, max_tokens=1 << 16)
    return gpu.twice(lambda: scorer.score(gpu_common.rows_of("pairs")))


def piece(model: nn.Module, gpu: played.Gpu) -> Counter[str]:
    """From the end of the second piece to that of the third, both in the midst of a group."""
    ends: list[Counter[str]] = []
    scorer = rmfast.Scorer(model, max_tokens=512, progress=lambda *_: ends.append(gpu.total()))
    scorer.score(gpu_common.rows_of("groups")[:8])  # 600 tokens that all share, 8 times 200
    return played.minus(ends[2], ends[1])


def step(model: nn.Module, gpu: played.Gpu) -> Counter[str]:
    """With the copies of the batch, as a trainer makes them of what its data loader pinned."""
    rows = gpu_common.rows_of("pairs")[: 2 * PAIRS]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    batch = Collator(0)([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs])
    tensors = {name: x.pin_memory() for name, x in batch.items() if isinstance(x, Tensor)}

    def run() -> None:
        model.train().zero_grad()
        moved = batch | {name: x.to(played.GPU, non_blocking=True) for name, x in tensors.items()}
        loss = model(rmfast_step=Step(moved, Objective(), PAIRS)).loss
        loss.backward()

    return gpu.twice(run)


CASES: dict[str, Callable[[nn.Module, played.Gpu], Counter[str]]] = {
    "padded batch, forward": padded,
    "padded batch, forward and backward": lambda model, gpu: padded(model, gpu, True),
    "window of a Scorer": window,
    "carried piece of a Scorer": piece,
    "training step": step,
}


def of_models() -> Iterator[Figure]:
    nodes = len(rmfast.pack(gpu_common.rows_of("pairs")[: 2 * PAIRS]))
    for name, (about, run) in itertools.product(SHAPES, CASES.items()):
        with played.gpu() as gpu:
            two, three = (run(build(name, layers), gpu) for layers in (2, 3))
        layer = played.minus(three, two)
        whole = played.minus(two, layer, 2 - gpu_common.SHAPES[SHAPES[name]][3])
        case = f"{about}, {name}"
        for what in ("launches", "copies to the GPU", "copies to the host", "waits"):
            yield Figure(what, case, whole[what])
        yield Figure("launches a layer", case, layer["launches"])
        if run is padded:
            what = "elementwise bytes a token and layer, forward"
            yield Figure(what, name, round(layer["bytes"] / nodes))
            with mock.patch.object(elementwise, "overrides", lambda *_: []), played.gpu() as gpu:
                two, three = (run(build(name, layers), gpu) for layers in (2, 3))
            layer, own = played.minus(three, two), ", transformers' own layers"
            yield Figure("launches a layer", case + own, layer["launches"])
            yield Figure(what, name + own, round(layer["bytes"] / nodes))


def plan(nodes: int, first: int, window: int | None, backward: bool) -> Counter[str]:
    """What the first call of attention, on nodes from ``first`` on, has beyond the second."""
    start = list(range(1024))
    trie = rmfast.pack([start + [i] * 512 for i in range((nodes - len(start)) // 512)])
    with played.gpu() as gpu:
        query, key, value = (
            torch.empty(1, n, 8, 128, dtype=torch.bfloat16, device=played.GPU).transpose(1, 2)
            for n in (nodes - first, nodes, nodes)
        )
        query.requires_grad_(backward)
        end, position = gpu.put(trie.subtree_end), gpu.put(trie.position_ids)
        totals = [gpu.total()]
        made = ops.TriePlan(end, position, first=first)
        for _ in range(2):
            out = ops.trie_attention(query, key, value, made, window=window)
            if backward:
                torch.autograd.grad(out, query, torch.empty_like(out))
            totals.append(gpu.total())
    return played.minus(played.minus(totals[1], totals[0]), played.minus(totals[2], totals[1]))


def of_plans() -> Iterator[Figure]:
    kinds = ("whole", "whole, with that of the backward", "carried")
    for size, kind, window in itertools.product((16, 64), kinds, (None, 4096)):
        found = plan(size << 10, 1024 if kind == "carried" else 0, window, "backward" in kind)
        case = f"{size}k nodes, {kind}" + (f", window {window}" if window else "")
        yield Figure("launches of a plan", case, found["launches"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("launches", description=__doc__.partition("\n")[0])
    results = Path(__file__).with_name("results")
    default = results / "launches.csv" if results.is_dir() else None
    parser.add_argument("--csv", type=Path, default=default, help="written anew: %(default)s")
    args = parser.parse_args(argv)
    lines = [Figure._fields, *sorted([*of_models(), *of_plans()])]
    for number, line in enumerate(lines):
        print(f"| {' | '.join(map(str, line))} |" + ("" if number else f"\n|{'---|' * len(line)}"))
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main()
