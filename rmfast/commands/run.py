"""``rmfast run``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from rmfast.commands.arguments import SETTINGS
from rmfast.errors import UserError

_STARTUP = Path(__file__).parent.parent / "integrations" / "startup"


def add(app: typer.Typer) -> None:
    app.command("run", context_settings=SETTINGS | {"allow_interspersed_args": False})(run)


# fmt: off
def run(
    program: Annotated[list[str], typer.Argument(
        metavar="PROGRAM", show_default=False,
        help="A script, -m and a module, or a program on PATH; then its arguments.")],
    classes: Annotated[str, typer.Option(metavar="NAMES", show_default=False, help=
        "Patch models of these classes, too, with commas between: a policy's, for example.")] = "",
    attention: Annotated[Literal["auto", "triton", "sdpa"], typer.Option(help=
        "Choose the attention backend; auto: triton on a GPU where it can, else sdpa.")] = "auto",
    pooling: Annotated[Literal["hf", "mask"], typer.Option(help=
        "Choose the token that carries the score; hf: the last that is not the pad token, as in "
        "Hugging Face; mask: the last one.")] = "hf",
    max_tokens: Annotated[int | None, typer.Option(metavar="TOKENS", min=0, help=
        "Run this many distinct prefixes at once without gradients; 0: no limit.")] = None,
    max_training_tokens: Annotated[int | None, typer.Option(metavar="TOKENS", min=1, help=
        "Run this many distinct prefixes at once with gradients, and larger batches in pieces.",
        show_default=False)] = None,
    share_prefixes: Annotated[bool, typer.Option(show_default=False, help=
        "Run a prefix that sequences of a batch share once, or not.")] = True,
) -> None:
    # fmt: on
    """Run a program, and patch the reward models that it loads.

    The program need not know of rmfast, as in: rmfast run -- torchrun train.py --epochs 1. Python
    processes that it starts patch theirs, too, as torchrun's, deepspeed's, accelerate's and Ray's.
    When a process ends, it says on stderr what was patched, and how many calls ran packed.
    """
    options = {
        "classes": [name for name in classes.split(",") if name],
        "attention": attention,
        "pooling": pooling,
        "max_tokens": max_tokens,
        "max_training_tokens": max_training_tokens,
        "share_prefixes": share_prefixes,
    }
    first, *rest = program
    if first.startswith("-") or first.endswith(".py"):
        first, rest = sys.executable, program
    # first what is installed beside this Python, whose environment may not be activated
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    found = shutil.which(first, path=path)
    if found is None:
        raise UserError(f"there is no program {first!r} on PATH")
    python_path = filter(None, [str(_STARTUP), os.environ.get("PYTHONPATH")])
    added = {"PYTHONPATH": os.pathsep.join(python_path), "RMFAST_EVERYWHERE": json.dumps(options)}
    sys.stdout.flush()
    os.execve(found, [found, *rest], os.environ | added)
