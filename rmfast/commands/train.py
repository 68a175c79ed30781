"""``rmfast train``."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

import typer

from rmfast.arguments import kind_of
from rmfast.commands.arguments import command
from rmfast.errors import UserError
from rmfast.train.options import TrainOptions

HELP = """Train a reward model on preference data.

Trains on preference pairs or ranked groups of answers, and measures on held-out ones as rmfast eval
does. The folder gets the model (safetensors), its tokenizer, a model card, config.yaml,
metrics.jsonl, training.png, and the last two checkpoints: after a kill, the same command with
--resume continues, and the weights are the same as if nothing had happened."""
RUN = ("resume", "overwrite")  # belong to the command line alone
EPILOG = (
    "Ctrl-C and SIGTERM save a checkpoint first; a second one stops at once. Exit code: 0, "
    "trained; 2, it could not run; 130, interrupted."
)


def add(app: typer.Typer) -> None:
    config = typer.Option(
        "--config",
        metavar="FILE",
        help="Read options from this YAML file, named without --; the command line goes first.",
        callback=read_config,
        is_eager=True,
    )
    command(app, "train", TrainOptions, run, HELP, EPILOG, config=config)


def read_config(context: typer.Context, path: str | None) -> None:
    """Take a file's options as defaults of the command line."""
    if path is None:
        return
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: must be options, such as 'epochs: 2', a line each")
    names = [field.name for field in dataclasses.fields(TrainOptions) if field.name not in RUN]
    defaults = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f", did you mean {near[0].replace('_', '-')}?" if near else ""
            raise UserError(f"--config {path}: there is no option {key!r}{hint}")
        if name in defaults:
            raise UserError(f"--config {path}: duplicate key {key!r}")
        if isinstance(value, (list, dict)):
            raise UserError(f"--config {path}: {key} needs one value, got {value!r}")
        if value is not None:
            switch = isinstance(value, bool) and kind_of(TrainOptions, name) is bool
            defaults[name] = value if switch else str(value)
    context.default_map = defaults


def run(options: TrainOptions) -> int:
    from rmfast.train import job

    return job.run(options)
