"""``rmfast eval``."""

from __future__ import annotations

import typer

from rmfast.commands.arguments import command
from rmfast.evaluate.options import EvalOptions

HELP = """Measure a reward model on preference data.

Prints its accuracy on pairs of chosen and rejected answers, by subset and with its interval;
margins, length bias and calibration. Where rows have lists of answers, how often the best one is a
chosen one; where these are three and three, RM-Bench's figures too. The rows of RewardBench,
RewardBench 2, RM-Bench and JudgeBench get their published figure first. chosen and rejected are
text, messages, or lists of these; prompt is optional.
"""
EPILOG = (
    "Exit code: 0, all rows scored; 1, some were not; 2, it could not run, or --strict met a bad "
    "row; 130, interrupted. All options may be written with _ for -, as RewardBench has them."
)


def add(app: typer.Typer) -> None:
    command(app, "eval", EvalOptions, run, HELP, EPILOG)


def run(options: EvalOptions) -> int:
    from rmfast.evaluate import job

    return job.run(options)
