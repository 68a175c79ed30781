"""``rmfast doctor``."""

from __future__ import annotations

import typer

from rmfast.commands.arguments import command
from rmfast.diagnosis.options import DoctorOptions

HELP = """Check a reward model for what would give wrong scores.

Looks at the model, its checkpoint and its tokenizer, scores a few built-in conversations with and
without the patch, and says what to do.
"""
EPILOG = "Exit code: 0, nothing gives wrong scores; 1, something does; 2, the model does not load."


def add(app: typer.Typer) -> None:
    command(app, "doctor", DoctorOptions, run, HELP, EPILOG)


def run(options: DoctorOptions) -> int:
    from rmfast.diagnosis import doctor

    return doctor.run(options)
