"""``rmfast demo``."""

from __future__ import annotations

import typer

from rmfast.commands.arguments import command
from rmfast.demo.options import DemoOptions
from rmfast.errors import UserError

HELP = """Patch a reward model, check it, train it, and time both.

Holds the scores of the patched model against the unpatched model's, trains it on preference pairs,
and times both. With no options nothing is downloaded: the model comes from a package,
the pairs are from Python's own documentation, and a few minutes on two CPU cores are enough.
"""


def add(app: typer.Typer) -> None:
    command(app, "demo", DemoOptions, run, HELP)


def run(options: DemoOptions) -> None:
    try:
        from rmfast.demo import demo
    except ImportError as error:
        raise UserError(f"it needs TRL: pip install 'rmfast[demo]' ({error})") from None
    demo.run(options)
