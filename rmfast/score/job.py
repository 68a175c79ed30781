"""``rmfast score``: a file of conversations in, the same rows with rewards out, safe to kill.

Rows go to the scorer window by window, and a window's rows are on the disk before
``.OUTPUT.state.json`` says so. A run that ``--resume`` continues cuts off the output after the last
window that the state counts, and gets the same windows as one that was never killed: its output is
the same, byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast import loading
from rmfast.data import files
from rmfast.data.encoding import read_template
from rmfast.errors import DataError, RowError, UserError
from rmfast.resume import interrupted, locked, saving, told_to_stop, write_whole
from rmfast.score import output, parquet, start
from rmfast.score.options import ScoreOptions
from rmfast.score.report import as_text, report
from rmfast.score.source import Source, look
from rmfast.score.start import STDOUT, State
from rmfast.score.windows import memory_told, progress_bar

if TYPE_CHECKING:
    from rmfast.score.scorer import Scorer
    from rmfast.score.windows import Scored, Tagged


def run(options: ScoreOptions, make_scorer: Callable[..., Any] | None = None) -> int:
    """``rmfast score``; returns the exit code.

    Args:
        make_scorer: called with ``options`` and the keyword arguments of :class:`rmfast.Scorer`;
            when not given, the model is loaded.
    """
    loading.silence_transformers()
    path = start.output_path(options)
    with contextlib.nullcontext() if path == STDOUT else locked(path):
        return _run(options, make_scorer or load_scorer, path)


def _run(options: ScoreOptions, make_scorer: Callable[..., Any], path: Path) -> int:
    how = {name: getattr(options, name) for name in ("name", "split", "limit")}
    reader = files.Reader(options.input, shard=start.shard(options), **how)
    template = read_template(options.chat_template)
    state = start.first_state(path, start.settings(options, reader, template), options)
    if state.done:
        parquet.clean(path)
        print(f"already complete: {state.rows:,} rows in {path}")
        return state.exit_code()
    source = look(options, reader)
    output.check(path, source)
    job = Job(source, state, path, options.strict)
    keywords = options.for_scorer(template) | {"progress": job.ran}
    keywords["max_tokens"] = state.max_tokens or options.max_tokens
    try:
        scorer = make_scorer(options, keywords)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        with job.opened(), told_to_stop():
            job.score(scorer)
            found = report(scorer.about(), state, options)
            job.finish(found, start.report_path(options))
    except KeyboardInterrupt:
        go_on = "" if path == STDOUT else "; the same command with --resume continues"
        return interrupted("score", f", {state.rows:,} rows are done{go_on}")
    parquet.clean(path)
    print(as_text(found, path), file=sys.stderr if path == STDOUT else None)
    return state.exit_code()


def load_scorer(options: ScoreOptions, keywords: dict[str, Any]) -> Scorer:
    from rmfast.score.scorer import Scorer

    loaded = loading.load(options.model, **options.for_loading())
    return Scorer(loaded.model, loaded.tokenizer, **keywords)


@dataclasses.dataclass
class Job:
    """Rows from the input to the scorer, and from there to the output."""

    source: Source
    state: State
    path: Path
    strict: bool

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the output where the state says that it ends."""
        with contextlib.ExitStack() as stack:
            with self.saving():
                self.save()
                self.output = output.open_output(self.path, self.source, self.state.output)
                stack.enter_context(contextlib.closing(self.output))
                self.errors = output.Errors(self.path, self.state.errors)
                stack.enter_context(contextlib.closing(self.errors))
            yield

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return saving(Path("stdout"), "") if self.path == STDOUT else saving(self.path)

    def save(self) -> None:
        if self.path != STDOUT:
            self.state.save(self.path)

    def score(self, scorer: Scorer) -> None:
        """Score the rows that are left. Of the scorer: ``windows``, ``max_tokens``, ``stats``."""
        state, before, reader = self.state, self.state.stats(), self.source.reader
        begun, self.tokens = time.perf_counter() - state.seconds, before.tokens
        scale = {"unit": reader.unit, "unit_scale": True, "initial": state.position or 0}
        with (
            progress_bar(total=reader.total, **scale) as self.bar,
            contextlib.closing(scorer.windows(self.rows())) as windows,
        ):
            advice = "; --resume continues after the last window"
            for window in memory_told(windows, advice):
                state.totals = dataclasses.asdict(before + scorer.stats)
                state.max_tokens = scorer.max_tokens
                state.seconds = time.perf_counter() - begun
                with self.saving():
                    self.write(window)
                self.show()

    def ran(self, conversations: int, tokens: int) -> None:
        self.tokens += tokens
        self.show()

    def show(self) -> None:
        stats = self.state.stats()
        self.bar.set_postfix_str(
            f"{self.state.rows:,} rows, {self.tokens:,} tokens, {stats.saved:.0%} saved by "
            f"sharing, {stats.left_out:,} left out",
            refresh=False,
        )
        self.bar.update((self.state.position or self.bar.n) - self.bar.n)

    def rows(self) -> Iterator[Tagged]:
        """The rows that were not read before; the tag is the record and its prepared output."""
        for record in self.source.reader.read(self.state.rows):
            row, prepared = record.value, None
            if not isinstance(row, RowError):
                try:
                    row = self.source.conversations(self.source.reader.plain(row))
                    prepared = self.output.prepare(record)
                except RowError as error:
                    row = error
            yield (record.number, record.position, prepared), row

    def write(self, window: list[tuple[Any, Scored]]) -> None:
        """Put a window on the disk, and then into the state."""
        good, bad = [], []
        for (number, _, prepared), scored in window:
            if scored.error is None:
                good.append((prepared, self.source.layout.scores(scored.scores)))
                continue
            bad.append((number, scored.error))
            if self.strict and self.state.is_failure(scored.error):
                self.output.write(good)  # after the state's mark: done again by --resume
                raise DataError(
                    f"{self.source.reader.source}:{number}: {scored.error}; the rows before it are "
                    "written, and --resume without --strict continues"
                )
        self.output.write(good)
        self.errors.write(bad)
        (_, position, _), _ = window[-1]
        self.state.rows += len(window)
        self.state.position = position
        self.state.output, self.state.errors = self.output.mark(), self.errors.mark()
        self.save()

    def finish(self, found: dict[str, Any], path: Path | None) -> None:
        """Complete the output, and write the report to ``path``."""
        with self.saving():
            self.output.finish()
            if path is not None:
                write_whole(path, found)
            self.state.done = True
            self.save()
