"""Where a run of ``rmfast score`` starts: its options, checked, and how far an earlier run came."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rmfast.data import columns, files
from rmfast.errors import RowError, UserError
from rmfast.resume import digest, model_identity, same_run, stored
from rmfast.score.options import ScoreOptions
from rmfast.score.windows import Stats

# options that decide the output, beside the input, the model, the device and the template
_DECIDE = """dtype max_tokens max_length on_overlong batch_window limit compile attention pooling
system_prompt chat end_of_text special_tokens normalize sigmoid reward_column tokenizer""".split()


@dataclasses.dataclass
class State:
    """How far a run is: all that ``--resume`` needs."""

    settings: dict[str, Any]  # what decides the output, by names that users know
    rows: int = 0  # records read
    position: int | None = None  # of the last record in the input, for the progress bar
    output: int = 0  # mark of the output
    errors: int = 0  # mark of the file of errors
    max_tokens: int | None = None  # a micro-batch
    totals: dict[str, float] = dataclasses.field(default_factory=dict)  # the scorer's figures
    seconds: float = 0.0  # of all runs together
    done: bool = False  # nothing is left to do

    def stats(self) -> Stats:
        return Stats(**self.totals)

    def is_failure(self, error: RowError) -> bool:
        """Whether the row should have been scored: one that is too long may be skipped."""
        return error.kind != "overlong" or self.settings["--on-overlong"] != "skip"

    def exit_code(self) -> int:
        skips = self.settings["--on-overlong"] == "skip"
        return int((self.stats().errors if skips else self.stats().left_out) > 0)


def beside(path: Path, suffix: str) -> Path:
    """A file that belongs to an output."""
    return path.with_name(f"{path.name}.{suffix}")


def output_path(options: ScoreOptions) -> Path:
    path = Path(options.output)
    if files.file_format(path) is None:
        raise UserError(f"--output {path}: its name must end with {files.KINDS}")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder")
    for option, file in (("output", path), ("report", Path(options.report or path))):
        if not file.parent.is_dir():
            raise UserError(f"--{option} {file}: there is no folder {file.parent}")
    if path.exists() and os.path.exists(options.input) and path.samefile(options.input):
        raise UserError(f"--output {path} is the input: give it another name")
    return path


def settings(options: ScoreOptions, reader: files.Reader, template: str | None) -> dict[str, Any]:
    """What decides the output. ``--resume`` continues a run with the same settings only."""
    import torch

    found = {f"{name} of --input": value for name, value in reader.identity().items()}
    found |= model_identity(options.model)
    found["--revision"] = options.revision
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found["--device"] = device.split(":")[0]
    for name in [*_DECIDE, *(f"{field}_column" for field in columns.FIELDS)]:
        if hasattr(options, name):
            found["--" + name.replace("_", "-")] = getattr(options, name)
    found["the text of --chat-template"] = None if template is None else digest(template)
    return json.loads(json.dumps(found))


def first_state(path: Path, now: dict[str, Any], options: ScoreOptions) -> State:
    """The state to start from: a new one, or that of the run that ``--resume`` continues.

    Args:
        now: the settings of this run.

    Raises:
        UserError: a file is there that would be lost, or that this run cannot continue.
    """
    file = beside(path, "state.json")
    before = None if options.overwrite else stored(file, State)
    if before is None:
        if path.exists() and not options.overwrite:
            reason = f" --resume cannot continue it without {file}." if options.resume else ""
            raise UserError(f"{path} already exists.{reason} --overwrite replaces it")
        return State(now)
    if not options.resume:
        empty = not path.exists() or path.stat().st_size == 0
        if before.rows == 0 and empty and not before.done:
            return State(now)
        if before.done:
            raise UserError(f"{path} already exists and is complete: --overwrite starts again")
        raise UserError(
            f"{path} already exists, with {before.rows:,} rows done: --resume continues, "
            "--overwrite starts again"
        )
    same_run(before.settings, now)
    if before.done and not path.exists():
        raise UserError(f"{file} says the run is complete, and {path} is gone: --overwrite starts "
                        "again")  # fmt: skip
    return before
