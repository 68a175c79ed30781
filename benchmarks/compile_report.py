"""Compiles every kernel for chips that are not there: registers, spills, shared memory, occupancy.

    python -m rmfast.benchmarks.compile_report

No GPU is needed, and nothing is timed. ``tests/compile`` asserts what the cases promise.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rmfast.benchmarks import launches
from rmfast.kernels import chips

COLUMNS = (
    "kernel case chip num_warps num_stages registers spills local_bytes shared programs occupancy"
).split()


class Case(NamedTuple):
    """A launcher called once. Kernels are named as ``file.function``."""

    call: Callable[[], object]  # with CPU tensors; nothing is run
    wide: tuple[str, ...] = ()  # kernels that must have 16-byte global loads
    dots: tuple[str, ...] = ()  # kernels that must have tensor-core instructions


CASES: dict[str, Case] = {}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (64, 576, 2048, 4096, 8192, 16384)
BATCH, TOKENS = 16, 1024  # a launch's grid, and strides: no code depends on them


def head_cases() -> Iterable[tuple[str, Case]]:
    def call(width: int, dtype: torch.dtype, labels: int, bias: bool) -> None:
        from rmfast.kernels import reward_head

        reward_head.reward_head(
            torch.empty(TOKENS, width, dtype=dtype),
            torch.empty(BATCH, dtype=torch.int64),
            torch.empty(labels, width, dtype=dtype),
            torch.empty(labels, dtype=dtype) if bias else None,
        )

    wide = ("reward_head._forward_kernel",)
    for width, name in _widths():
        case = Case(_bind(call, width, DTYPES[name], 1, False), wide if width >= 1024 else ())
        yield f"head forward, H {width}, {name}", case
    yield "head forward, H 4096, bf16, 5 labels", Case(_bind(call, 4096, torch.bfloat16, 5, True))


def listwise_cases() -> Iterable[tuple[str, Case]]:
    offsets = torch.zeros(33, dtype=torch.int64)

    def forward(kind: str, dtype: torch.dtype, ranks: torch.dtype, size: int) -> None:
        from rmfast.kernels import listwise_loss

        scores, order = torch.empty(512, dtype=dtype), torch.empty(512, dtype=ranks)
        listwise_loss.listwise_loss(scores, order, offsets, kind, size)

    def backward(dtype: torch.dtype, size: int) -> None:
        from rmfast.kernels import listwise_loss

        slope = torch.empty(512, dtype=torch.promote_types(dtype, torch.float32))
        grad = slope.new_empty(32)
        listwise_loss.listwise_loss_backward(grad, slope, offsets, size, dtype)

    for kind in ("all_pairs", "plackett_luce"):
        for size in (4, 16, 32, 64):
            case = Case(_bind(forward, kind, torch.float32, torch.int64, size))
            yield f"{kind} forward, K {size}, fp32", case
        for name, dtype in (("bf16", torch.bfloat16), ("fp64", torch.float64)):
            case = Case(_bind(forward, kind, dtype, dtype, 64))
            yield f"{kind} forward, K 64, {name}, ranks too", case
    yield "listwise backward, K 4, fp32", Case(_bind(backward, torch.float32, 4))
    yield "listwise backward, K 64, bf16", Case(_bind(backward, torch.bfloat16, 64))
    yield "listwise backward, K 64, fp64", Case(_bind(backward, torch.float64, 64))


def _widths() -> Iterable[tuple[int, str]]:
    """Every width in bf16, the other dtypes in one small and one large."""
    for width in WIDTHS:
        yield width, "bf16"
    for name in ("fp16", "fp32"):
        yield 576, name
        yield 4096, name


def _bind(call: Callable, *arguments: object) -> Callable[[], object]:
    return lambda: call(*arguments)


for _cases in (head_cases, listwise_cases):
    CASES.update(_cases())


def compile_case(name: str, chip: str) -> list[launches.Compiled]:
    """Every kernel the case launches, as ``chip`` would run it."""
    with chips.launching_for(chip), launches.record() as recorded:
        CASES[name].call()
    return [launches.compile(launch, chip) for launch in recorded]


def compile_all(
    pool: Executor, names: Iterable[str] = CASES, on: Iterable[str] = chips.CHIPS
) -> dict[tuple[str, str], Future[list[launches.Compiled]]]:
    """By case and chip; ``pool`` is one of :func:`launches.processes`."""
    names = list(names)
    return {(name, chip): pool.submit(compile_case, name, chip) for chip in on for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default="", help="only those with this in their name")
    parser.add_argument("--chips", nargs="+", default=list(chips.CHIPS), choices=chips.CHIPS)
    parser.add_argument("--jobs", type=int, help="processes; as many as CPUs if not given")
    parser.add_argument(
        "--all", action="store_true", help="print all cases, not each kernel's worst"
    )
    results = Path(__file__).with_name("results")
    default = results / "compile.csv" if results.is_dir() else None
    parser.add_argument("--csv", type=Path, default=default, help="written anew: %(default)s")
    args = parser.parse_args(argv)
    names = [name for name in CASES if args.cases in name]
    rows = []
    with launches.processes(args.jobs) as pool:
        for (case, _), compiled in compile_all(pool, names, args.chips).items():
            rows += [{"case": case, **one._asdict()} for one in compiled.result()]
    rows.sort(key=lambda row: (row["kernel"], names.index(row["case"])))  # chips stay in order
    _show(rows if args.all else _worst(rows))
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"occupancy": f"{row['occupancy']:.2f}"} for row in rows)


def _worst(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel on each chip the case of least occupancy; of those, of most registers."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kept = worst.setdefault((row["kernel"], row["chip"]), row)
        if (row["occupancy"], -row["registers"]) < (kept["occupancy"], -kept["registers"]):
            worst[row["kernel"], row["chip"]] = row
    return list(worst.values())


def _show(rows: Iterable[dict[str, Any]]) -> None:
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        cells = row | {"occupancy": f"{row['occupancy']:.2f}"}
        print(f"| {' | '.join(str(cells[column]) for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
