"""The progress bars of scoring."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmfast.data import files

if TYPE_CHECKING:
    from tqdm import tqdm

    from rmfast.score.start import State


def progress_bar(**options: Any) -> tqdm:
    """A bar on stderr, with tqdm's options; every 10 seconds where stderr is no terminal."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc="scoring", mininterval=pause, miniters=0, **options)


def saved_by_sharing(totals: Mapping[str, float]) -> float:
    """The share of the tokens that did not run; 0 where the model runs padded batches."""
    return max(0.0, 1 - totals["tokens_run"] / totals["tokens"]) if totals.get("tokens") else 0.0


class Progress:
    """The bar of ``rmfast score``: the input that is read, with rows and tokens beside it."""

    def __init__(self, reader: files.Reader, state: State) -> None:
        self._reader, self._state = reader, state
        self._tokens = int(state.totals.get("tokens", 0))

    def __enter__(self) -> Progress:
        unit, start = self._reader.unit, self._state.position or 0
        self._bar = progress_bar(
            total=self._reader.total, initial=start, unit=unit, unit_scale=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.wrote()
        self._bar.close()

    def ran(self, conversations: int, tokens: int) -> None:
        """Show a micro-batch."""
        self._tokens += tokens
        self._show()

    def wrote(self) -> None:
        """Show a window."""
        self._show((self._state.position or self._bar.n) - self._bar.n)

    def _show(self, step: int = 0) -> None:
        state, totals = self._state, self._state.totals
        left_out = totals.get("errors", 0) + totals.get("overlong", 0)
        self._bar.set_postfix_str(
            f"{state.rows:,} rows, {self._tokens:,} tokens, {saved_by_sharing(totals):.0%} saved "
            f"by sharing, {left_out:,} left out",
            refresh=False,
        )
        self._bar.update(step)
