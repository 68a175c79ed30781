"""The progress of a run of ``rmfast score``, on a terminal and in a log."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Mapping

from rmfast.data import files
from rmfast.score.state import State

_PAUSE = 10.0  # seconds between lines of progress, where there is no terminal


# --- what is shown


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; on stderr."""

    def __init__(self, reader: files.Reader, state: State) -> None:
        self._reader, self._state, self._bar = reader, state, None

    def __enter__(self) -> _Progress:
        self._start = self._told = time.perf_counter()
        self._begun, self._tokens = self._state.position or 0, 0
        if sys.stderr.isatty():
            from tqdm import tqdm

            end = "" if self._reader.total is None else "{percentage:3.0f}% |{bar}| "
            self._bar = tqdm(
                total=self._reader.total,
                initial=self._begun,
                bar_format=end + "{desc}, {elapsed}" + ("<{remaining}" if end else ""),
                desc=self._words(),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.set_description_str(self._words())
            self._bar.close()

    def ran(self, conversations: int, tokens: int) -> None:
        """After each micro-batch."""
        self._tokens += tokens
        self._show()

    def wrote(self) -> None:
        """After each window."""
        if self._bar is not None:
            self._bar.update((self._state.position or 0) - self._bar.n)
        self._show()

    def _show(self) -> None:
        now = time.perf_counter()
        if now - self._told < (_PAUSE if self._bar is None else 0.1):
            return
        self._told = now
        if self._bar is not None:
            self._bar.set_description_str(self._words())
        else:
            print(f"rmfast score: {self._words()}{self._left()}", file=sys.stderr, flush=True)

    def _words(self) -> str:
        totals = self._state.totals
        speed = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        words = f"{self._state.rows:,} rows, {speed:,.0f} tokens/s"
        if totals.get("tokens"):
            words += f", {_saved_by_sharing(totals):.0%} shared"
        return words

    def _left(self) -> str:
        """How much is left, where that can be told."""
        total, at = self._reader.total, self._state.position or 0
        if not total or at <= self._begun:
            return ""
        seconds = (time.perf_counter() - self._start) * (total - at) / (at - self._begun)
        left = datetime.timedelta(seconds=round(seconds))
        return f", {at / total:.0%} of the input, {left} left"


def _saved_by_sharing(totals: Mapping[str, float]) -> float:
    """Share of the tokens; none where the model runs padded batches."""
    return max(0.0, 1 - totals["tokens_run"] / totals["tokens"])
