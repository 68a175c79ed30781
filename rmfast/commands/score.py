"""``rmfast score``."""

from __future__ import annotations

from typing import Any

import typer

from rmfast.commands.arguments import command
from rmfast.score.options import ScoreOptions

HELP = """Score a file of conversations with a reward model.

Scores each row of a file and writes it again with its reward. Rows are messages, prompt +
responses (completions), prompt + response (completion), chosen + rejected (prompt or not), or text,
whichever comes first in this order; all their columns are kept. The output has the input's order,
and is on the disk window by window: after a kill, the same command with --resume continues, and the
output is the same as if nothing had happened.
"""
EPILOG = (
    "Rows that cannot be scored are left out and listed in OUTPUT.errors.jsonl by line and reason. "
    "Exit code: 0, all rows scored; 1, some were not; 2, it could not run, or --strict met a bad "
    "row; 130, interrupted."
)


def add(app: typer.Typer) -> None:
    command(app, "score", ScoreOptions, run, HELP, EPILOG)


def run(options: ScoreOptions) -> int:
    from rmfast.score import job

    return job.run(options, job.load_scorer if options.ray is None else on_ray)


def on_ray(options: ScoreOptions, settings: dict[str, Any]) -> Any:
    from rmfast.integrations.ray import RayScorer

    load = options.for_loading()
    return RayScorer(options.model, actors=options.ray, load=load, **settings)
