"""``rmfast score``: a file of conversations in, the same rows with rewards out, safe to kill.

Rows go to the scorer window by window, and a window's rows are on the disk before
``OUTPUT.state.json`` says so. A run that goes on cuts off what the state does not know of, and sees
the same windows as one that was never killed: its output is the same, byte for byte.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast import loading, resume
from rmfast.data import columns, files
from rmfast.data.encoding import read_template
from rmfast.errors import DataError, RowError, UserError
from rmfast.resume import _saving, _told_to_stop, digest, model_identity, short
from rmfast.score import output, parquet
from rmfast.score.options import ScoreOptions
from rmfast.score.progress import _Progress, _saved_by_sharing
from rmfast.score.state import State

if TYPE_CHECKING:
    from rmfast.score.scorer import Scorer
    from rmfast.score.windows import Scored


_LOOK = 1000  # records at the beginning that tell which columns there are
# Options that decide what is written, beside the input, the model, the device and the template.
_DECIDE = """dtype max_tokens max_length on_overlong batch_window limit compile attention pooling
system_prompt plain normalize sigmoid reward_column""".split()


_NO_WORDS = ("time of --input", "a file of --model", "the text of --chat-template")


def run(args: ScoreOptions, make_scorer: Callable[..., Any] | None = None) -> int:
    """``rmfast score``; returns the exit code.

    Args:
        make_scorer: called with ``args`` and the keyword arguments of :class:`rmfast.Scorer`; left
            out: loads the model.

    Raises:
        UserError, DataError: it cannot run, or ``--strict`` met a bad row; the message is for the
            user.
    """
    loading.silence_transformers()
    path = _output(args)
    reader = files.Reader(args.input, name=args.name, split=args.split, limit=args.limit)
    template = read_template(args.chat_template)
    state = _begin(path, _settings(args, reader, template), args)
    if state.done:
        parquet.clean(path)
        print(f"already complete: {state.rows:,} rows in {path}")
        return state.exit_code()
    layout, seen = _layout(reader, args)
    progress = _Progress(reader, state)
    settings = _scoring(args, template, state.max_tokens, progress.ran)
    try:
        scorer = (make_scorer or load_scorer)(args, settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    with contextlib.ExitStack() as stack:
        stack.callback(getattr(scorer, "close", lambda: None))
        with _saving(path):
            _save(path, state)
            out = output.open_output(path, reader, seen, layout, state.output)
            stack.enter_context(contextlib.closing(out))
            errors = output.Errors(_beside(path, "errors.jsonl"), state.errors)
            stack.enter_context(contextlib.closing(errors))
        stack.enter_context(_told_to_stop())
        try:
            with progress:
                _Job(reader, layout, out, errors, state, path, args.strict).score(scorer, progress)
            with _saving(path):
                out.finish()
                report = _report(scorer.about(), state, args)
                resume.write_whole(Path(args.report or _beside(path, "report.json")), report)
                state.done = True
                _save(path, state)
        except KeyboardInterrupt:
            print(
                f"\nrmfast score: interrupted, {state.rows:,} rows are done; the same command with "
                "--resume goes on",
                file=sys.stderr,
            )
            return 130
    parquet.clean(path)
    print(_words(report, path, _beside(path, "errors.jsonl")))
    return state.exit_code()


@dataclasses.dataclass
class _Job:
    """Rows from the reader to the scorer, and from there to the output."""

    reader: files.Reader
    layout: columns.Columns
    out: Any  # one of rmfast.output's
    errors: output.Errors
    state: State
    path: Path
    strict: bool
    # number, position and what is to be written of the rows that the scorer has, in order: a
    # background thread appends, the main one takes
    waiting: collections.deque[tuple[int, int | None, Any]] = dataclasses.field(
        default_factory=collections.deque
    )

    def score(self, scorer: Scorer, progress: _Progress) -> None:
        """All that is left. The scorer needs ``windows``, ``max_tokens`` and ``stats``."""
        start = time.perf_counter() - self.state.seconds
        totals = self.state.totals
        with contextlib.closing(scorer.windows(self.rows())) as windows:
            for window in _in_words(windows):
                self.state.totals = {
                    name: totals.get(name, 0) + figure
                    for name, figure in scorer.stats.as_dict().items()
                }
                self.state.max_tokens = scorer.max_tokens
                self.state.seconds = time.perf_counter() - start
                with _saving(self.path):
                    self.write(window)
                progress.wrote()

    def rows(self) -> Iterator[list[Any] | RowError]:
        """Conversations of each record that was not read before, or why there are none."""
        for record in self.reader.read(self.state.rows):
            row, prepared = record.value, None
            if not isinstance(row, RowError):
                try:
                    prepared = self.out.prepare(record)
                    row = self.conversations(row)
                except RowError as error:
                    row = error
            self.waiting.append((record.number, record.position, prepared))
            yield row

    def conversations(self, row: dict[str, Any]) -> list[Any]:
        twice = next((name for name in self.layout.added if name in row), None)
        if twice is not None:
            raise RowError(f'it has a "{twice}" already: --reward-column gives another name')
        return self.layout.conversations(row)

    def write(self, window: list[Scored]) -> None:
        """Put a window on the disk, and then into the state."""
        good, bad = [], []
        for scored in window:
            number, position, prepared = self.waiting.popleft()
            if scored.error is None:
                good.append((prepared, self.layout.scores(scored.scores)))
                continue
            bad.append((number, scored.error))
            if self.strict and self.state.is_failure(scored.error):
                self.out.write(good)  # beyond the state's mark: done again by --resume
                raise DataError(
                    f"{self.reader.source}:{number}: {scored.error}; the rows before it are "
                    "written, and --resume without --strict goes on"
                )
        self.out.write(good)
        self.errors.write(bad)
        self.state.rows += len(window)
        self.state.windows += 1
        self.state.position = position
        self.state.output, self.state.errors = self.out.mark(), self.errors.mark()
        _save(self.path, self.state)


def _in_words(windows: Iterable[list[Scored]]) -> Iterator[list[Scored]]:
    try:
        yield from windows
    except MemoryError as error:
        raise UserError(f"out of memory: {error}; --resume goes on from the last window") from None


# --- where it begins


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _output(args: ScoreOptions) -> Path:
    path = Path(args.output)
    if files.file_format(path) is None:
        raise UserError(f"--output {path}: its name must end with {files.KINDS}")
    if path.is_dir():
        raise UserError(f"--output {path} is a folder")
    for option, file in (("output", path), ("report", Path(args.report or path))):
        if not file.parent.is_dir():
            raise UserError(f"--{option} {file}: there is no folder {file.parent}")
    if path.exists() and os.path.exists(args.input) and path.samefile(args.input):
        raise UserError(f"--output {path} is the input: give it another name")
    return path


def _settings(args: ScoreOptions, reader: files.Reader, template: str | None) -> dict[str, Any]:
    """What decides the output. A run with others cannot go on with this one's."""
    import torch

    out = {f"{name} of --input": value for name, value in reader.identity().items()}
    out |= model_identity(args.model)
    out["--revision"] = args.revision
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out["--device"] = device.split(":")[0]
    for name in [*_DECIDE, *(f"{field}_column" for field in columns.FIELDS)]:
        out["--" + name.replace("_", "-")] = getattr(args, name)
    out["the text of --chat-template"] = None if template is None else digest(template)
    return json.loads(json.dumps(out))


def _begin(path: Path, settings: dict[str, Any], args: ScoreOptions) -> State:
    """The state to start from: a new one, or that of the run that is to go on.

    Raises:
        UserError: something is there that would be lost, or that this run cannot go on with.
    """
    file = _beside(path, "state.json")
    if args.overwrite:
        return State(settings)
    before = _saved(file)
    if before is None:
        if path.exists():
            why = f" --resume cannot, without {file}." if args.resume else ""
            raise UserError(f"{path} is there already:{why} --overwrite replaces it")
        return State(settings)
    if not args.resume:
        nothing = not path.exists() or path.stat().st_size == 0
        if before.rows == 0 and nothing and not before.done:
            return State(settings)
        done = "complete" if before.done else f"{before.rows:,} rows done"
        go_on = "" if before.done else "--resume goes on, "
        raise UserError(f"{path} is there already, {done}: {go_on}--overwrite starts again")
    for name in {**before.settings, **settings}:
        then, now = before.settings.get(name), settings.get(name)
        if then != now:
            known = None not in (then, now) and name in _NO_WORDS
            how = "changed" if known else f"was {short(then)}, now it is {short(now)}"
            raise UserError(
                f"--resume goes on with the same run only, and {name} {how}; --overwrite starts "
                "again"
            )
    if before.done and not path.exists():
        raise UserError(f"{file} says it is complete, and {path} is gone: --overwrite starts again")
    return before


def _saved(file: Path) -> State | None:
    try:
        return State(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): --overwrite starts again") from None


def _save(path: Path, state: State) -> None:
    resume.write_whole(_beside(path, "state.json"), dataclasses.asdict(state))


def _layout(reader: files.Reader, args: ScoreOptions) -> tuple[columns.Columns, list[str]]:
    """How the rows are read, and the input's columns, as far as they can be told beforehand.

    Raises:
        UserError: no row is like what can be scored, or the scores' columns are taken.
    """
    named = {
        field: name
        for field in columns.FIELDS
        if (name := getattr(args, f"{field}_column")) is not None
    }
    options = {"stem": args.reward_column, "cells": reader.format == "csv"}
    seen: dict[str, None] = dict.fromkeys(reader.columns or ())
    found = columns.choose(seen, named, **options) if reader.columns else None
    fits = found is not None
    if not fits:
        rows = (r.value for r in reader.read() if not isinstance(r.value, RowError))
        for row in itertools.islice(rows, _LOOK):
            seen.update(dict.fromkeys(row))
            if not fits:
                present = [name for name, value in row.items() if value is not None]
                maybe = columns.choose(present, named, **options)
                fits = maybe is not None and _fits(maybe, row)
                found = maybe if fits else found or maybe
    if found is None and seen:
        raise UserError(
            f"{args.input}: no row has {columns.needed(named)}; there are: "
            f"{', '.join(map(json.dumps, seen))}. --text-column, --prompt-column and their like "
            "name the right ones"
        )
    found = found or columns.Columns("text", {"text": "text"}, args.reward_column)
    taken = next((name for name in found.added if name in seen), None)
    if taken is not None:
        raise UserError(
            f'{args.input} has a column "{taken}" already: --reward-column gives the scores '
            "another name"
        )
    return found, list(seen)


def _fits(layout: columns.Columns, row: dict[str, Any]) -> bool:
    try:
        return bool(layout.conversations(row))
    except RowError:
        return False


def loading_options(args: ScoreOptions) -> dict[str, Any]:
    """Keyword arguments of :func:`rmfast.loading.load`."""
    names = ("dtype", "device", "revision", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def load_scorer(args: ScoreOptions, settings: dict[str, Any]) -> Scorer:
    from rmfast.score.scorer import Scorer

    loaded = loading.load(args.model, **loading_options(args))
    return Scorer(loaded.model, loaded.tokenizer, **settings)


def _scoring(
    args: ScoreOptions, template: str | None, max_tokens: int | None, progress: Any
) -> dict[str, Any]:
    """Keyword arguments of :class:`rmfast.Scorer`."""
    return {
        "max_tokens": max_tokens or args.max_tokens,
        "max_length": args.max_length,
        "on_overlong": args.on_overlong,
        "pooling": args.pooling,
        "system_prompt": args.system_prompt,
        "chat_template": template,
        "chat": False if args.plain else None,
        "window": args.batch_window,
        "normalize": args.normalize,
        "sigmoid": args.sigmoid,
        "attention": args.attention,
        "compile": args.compile,
        "progress": progress,
    }


def _report(about: dict[str, Any], state: State, args: ScoreOptions) -> dict[str, Any]:
    totals = collections.Counter(state.totals)
    tokens, slots = totals["tokens"], totals["padded_slots"]
    return {
        "input": args.input,
        "output": args.output,
        "rows": state.rows,
        "scored": totals["rows"],
        "overlong": totals["overlong"],
        "errors": totals["errors"],
        "conversations": totals["conversations"],
        "tokens": tokens,
        "distinct_prefixes": totals["nodes"],
        "tokens_run": totals["tokens_run"],
        "padded_slots": slots,
        "sharing_saved": _saved_by_sharing(totals) if tokens else 0.0,
        "padding_saved": max(0.0, 1 - max(tokens, totals["tokens_run"]) / slots) if slots else 0.0,
        "micro_batches": totals["micro_batches"],
        "max_tokens": state.max_tokens,
        "halvings": totals["halvings"],
        "seconds": state.seconds,
        "seconds_scoring": totals["seconds"],
        "tokens_per_second": tokens / state.seconds if state.seconds else 0.0,
        "model": args.model,
        "revision": args.revision,
        **about,
        "versions": {**resume.versions(), "python": platform.python_version()},
    }


def _words(report: dict[str, Any], path: Path, errors: Path) -> str:
    """The report for the screen."""
    left_out = report["errors"] + report["overlong"]
    lines = [
        f"{report['scored']:,} of {report['rows']:,} rows scored: {path}",
        f"  conversations      {report['conversations']:,}",
        f"  tokens             {report['tokens']:,}, {report['tokens_per_second']:,.0f} a second",
        f"  distinct prefixes  {report['distinct_prefixes']:,}",
        f"  saved              {report['sharing_saved']:.1%} of the tokens by sharing prefixes, "
        f"{report['padding_saved']:.1%} of the slots of padded batches of 16",
        f"  seconds            {report['seconds']:,.1f}",
        f"  model              {report['model']}, {report['dtype']}, {report['device']}, level "
        f"{report['level']}",
    ]
    if left_out:
        lines.insert(
            1,
            f"  left out           {left_out:,} ({report['overlong']:,} too long): {errors}",
        )
    lines += [f"  ! {warning}" for warning in report["warnings"]]
    return "\n".join(lines)
