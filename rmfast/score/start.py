"""Where a run of ``rmfast score`` starts: its options, checked, and how far an earlier run came."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from rmfast.arguments import flag
from rmfast.data import columns, files, sources
from rmfast.errors import RowError, UserError
from rmfast.resume import check_paths, digest, model_identity, same_run, stored, write_whole
from rmfast.score.options import ScoreOptions
from rmfast.score.windows import Stats

# options that decide the output, beside the input, the models, the device and the template
_DECIDE = """dtype max_tokens max_length on_overlong batch_window limit shard attention
pooling system_prompt chat end_of_text special_tokens ignore_columns normalize sigmoid reward_column
""".split()
STDOUT = Path("-")


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
    report: str | None = None  # where this run writes its report
    done: bool = False  # nothing is left to do

    def save(self, path: Path) -> None:
        """Put the state of an output beside it."""
        write_whole(beside(path, "state.json"), dataclasses.asdict(self))

    def stats(self) -> Stats:
        return Stats(**self.totals)

    def is_failure(self, error: RowError) -> bool:
        """Whether the row should have been scored: one that is too long may be skipped."""
        return error.kind != "overlong" or self.settings["--on-overlong"] != "skip"

    def exit_code(self) -> int:
        skips = self.settings["--on-overlong"] == "skip"
        return int((self.stats().errors if skips else self.stats().left_out) > 0)


def beside(path: Path, suffix: str) -> Path:
    """A file that belongs to an output; what is JSON and no row is hidden from data loaders."""
    return path.with_name(f"{'.' if suffix.endswith('.json') else ''}{path.name}.{suffix}")


def output_path(options: ScoreOptions) -> Path:
    """Where the output goes; raises UserError where a path of the options cannot be used."""
    path = Path(options.output)
    if path != STDOUT and sources.file_format(path) is None:
        raise UserError(f"--output {path}: its name must end with {sources.KINDS}")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder")
    if path == STDOUT and (options.resume or options.overwrite):
        raise UserError("--output - is stdout, which nothing can --resume or --overwrite")
    outputs = {"--output": path, "--report": report_path(options)}
    for option, file in outputs.items():
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{option} {file}: there is no folder {file.parent}")
    beside_it = ("errors.jsonl", "state.json", "parts")
    outputs |= {f"{suffix} of --output": beside(path, suffix) for suffix in beside_it}
    inputs = {
        flag(name): getattr(options, name)
        for name in ("input", "model", "tokenizer", "chat_template")
    }
    check_paths(inputs, outputs, overwrite=True)
    return path


def report_path(options: ScoreOptions) -> Path | None:
    if options.report is not None:
        return Path(options.report)
    return None if options.output == "-" else beside(Path(options.output), "report.json")


def shard(options: ScoreOptions) -> tuple[int, int]:
    """``--shard`` as a number and a count."""
    found = re.fullmatch(r"(\d+)/(\d+)", options.shard or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard must be i/n, from 0/n to n-1/n, such as 0/4: got {options.shard}")
    return int(found[1]), int(found[2])


def settings(options: ScoreOptions, reader: files.Reader, template: str | None) -> dict[str, Any]:
    """What decides the output. ``--resume`` continues a run with the same settings only."""
    import torch

    found = {f"{name} of --input": value for name, value in reader.identity().items()}
    found |= model_identity("--model", options.model)
    found |= model_identity("--tokenizer", options.tokenizer)
    found["--revision"] = options.revision
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found["--device"] = device.split(":")[0]
    for name in [*_DECIDE, *(f"{field}_column" for field in columns.FIELDS)]:
        if hasattr(options, name):
            found[flag(name)] = getattr(options, name)
    found["the text of --chat-template"] = None if template is None else digest(template)
    return json.loads(json.dumps(found))


def first_state(path: Path, now: dict[str, Any], options: ScoreOptions) -> State:
    """The state to start from: a new one, or that of the run that ``--resume`` continues.

    UserError: a file is there that would be lost, or that the settings ``now`` cannot continue.
    """
    report = report_path(options)
    new = State(now, report=report and str(report))
    file = beside(path, "state.json")
    for foreign in (beside(path, "errors.jsonl"), beside(path, "parts")):
        if foreign.exists() and not file.exists():
            words = (
                "is there, and no run for this output wrote it: move it, or name another --output"
            )
            raise UserError(f"{foreign} {words}")
    before = None if options.overwrite else stored(file, State)
    if options.report is not None and os.path.isdir(options.report):
        raise UserError(f"--report {options.report} is a folder: name a file")
    if options.report is not None and new.report != (before and before.report):
        check_paths({}, {"--report": report}, options.overwrite)
    there = path.exists() or beside(path, "parts").exists()
    if before is None:
        if path.exists() and not options.overwrite:
            reason = f" --resume cannot continue it without {file}." if options.resume else ""
            raise UserError(f"{path} already exists.{reason} --overwrite replaces it")
        return new
    if not options.resume:
        empty = not path.exists() or path.stat().st_size == 0
        if not there or (before.rows == 0 and empty and not before.done):
            return new
        if before.done:
            raise UserError(f"{path} already exists and is complete: --overwrite starts again")
        raise UserError(
            f"{path} already exists, with {before.rows:,} rows done: --resume continues, "
            "--overwrite starts again"
        )
    same_run(before.settings, now)
    if before.done and not path.exists():
        words = "says the run is complete, and"
        raise UserError(f"{file} {words} {path} is gone: --overwrite starts again")
    before.report = new.report
    return before
