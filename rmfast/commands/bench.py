"""``rmfast bench``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import typer

from rmfast.commands.arguments import interruptible

BENCHMARKS = ("score", "train", "bulk", "trainer", "trees", "parity", "kernels")


def add(app: typer.Typer) -> None:
    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command("bench", context_settings=settings)(bench)


def bench(context: typer.Context) -> int:
    """Time and check scoring and training, side by side with Hugging Face.

    Give the name of a benchmark and its own options, as in: rmfast bench score --pairs 96; rmfast
    bench score --help lists them. With no name, score and train run.
    """
    name, *rest = context.args or [""]
    if name in ("-h", "--help"):
        print(context.get_help())
        print(f"\nBenchmarks: {', '.join(BENCHMARKS)}")
        return 0
    if name and name not in BENCHMARKS:
        context.fail(f"no benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}")
    return interruptible("bench", lambda: run([name] if name else BENCHMARKS[:2], rest))


def run(names: Sequence[str], options: list[str]) -> int:
    code = 0
    for name in names:
        benchmark = importlib.import_module(f"rmfast.benchmarks.{name}")
        code = code or benchmark.main(options) or 0
    return code
