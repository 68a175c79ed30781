"""Any number of conversations in, their scores out, a window at a time.

Conversations are read and tokenised in a background thread, a window ahead.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rmfast.data.encoding import Conversation, Encoder, counted
from rmfast.data.records import Pair
from rmfast.data.rows import RowReader
from rmfast.data.values import Side
from rmfast.errors import DataError, RowError
from rmfast.packed import patching, pieces
from rmfast.packed.models import keeping_modes
from rmfast.score.windows import (
    Scored,
    Stats,
    Tagged,
    ahead,
    first_error,
    gathered,
    is_text_or_messages,
    progress_bar,
    refuse_one,
)

Progress = bool | Callable[[int, int], None]


class BulkScorer:
    """What scorers share: from conversations to rows of token ids, and from scores to results.

    A scorer gives ``_scores``, and sets these:
    """

    encoder: Encoder
    _budget: pieces.Budget
    _patches: list[tuple[Any, patching.Patch]]  # its models, and how they were patched for it

    def __init__(self, window: int, progress: Progress) -> None:
        self.window = window
        self.stats = Stats()
        self._progress = progress
        self._show: Progress = False  # for the window that runs

    def _scores(self, rows: list) -> np.ndarray:  # fp32 [len(rows)]
        raise NotImplementedError

    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Scores of conversations, fp32 ``[n]``, in their order; NaN for those skipped.

        Raises:
            DataError: a conversation that cannot be scored; the message names it.
            TypeError: one conversation instead of a list; so do the methods below.
        """
        refuse_one(conversations)
        rows = ([conversation] for conversation in conversations)
        return self._table(rows, len(conversations), 1)[:, 0]

    def score_pairs(self, pairs: Sequence[Any]) -> np.ndarray:
        """Scores of preference pairs, fp32 ``[n, 2]``: chosen, rejected.

        Sides that are plain text end as in the model's training; where that is not recorded, with
        the end of text, as TRL's trainer ends them.

        Args:
            pairs: (chosen, rejected) tuples of conversations, ``{"chosen", "rejected"}`` with or
                without ``"prompt"``, or :class:`rmfast.data.Pair`.

        Raises:
            DataError: a pair that cannot be scored; the message names it.
        """
        refuse_one(pairs, "pairs")
        return self._table(map(_sides, pairs), len(pairs), 2)

    def stream(self, conversations: Iterable[Conversation]) -> Iterator[float]:
        """Scores one by one, in order, for an iterable of any length; NaN for those skipped.

        Scores come a window at a time: the first when ``window`` conversations were read.

        Raises:
            DataError: a conversation that cannot be scored; those before it have been given out.
        """
        refuse_one(conversations)
        rows = ([conversation] for conversation in conversations)
        for scores in self._each(rows, None):
            yield float("nan") if scores is None else float(scores[0])

    def windows(self, rows: Iterable[Tagged]) -> Iterator[list[tuple[Any, Scored]]]:
        """Score rows of conversations that belong together, a window at a time.

        Args:
            rows: each a tag and some conversations, or a tag and the RowError that says why the
                row could not be read. They are read in a background thread, a window ahead.

        Yields:
            The rows of a window, in input order, each as its tag and what became of it. A window
            ends when it holds ``window`` conversations or more (a row without one counts as one),
            so where it ends depends on the rows alone.

        Raises:
            DataError: messages without a chat template, or text without a tokenizer.
            MemoryError: not even a few tokens fit.
            RuntimeError: a model was unpatched, or patched anew.
        """
        refuse_one(rows, "rows")
        return self._windows(rows, self._progress)

    def _windows(
        self, rows: Iterable[Tagged], progress: Progress
    ) -> Iterator[list[tuple[Any, Scored]]]:
        with contextlib.closing(ahead(self._encoded(gathered(rows, self.window)))) as encoded:
            for tags, window, told in encoded:
                with _lock_of(self):
                    if any(patching.attached(model) is not patch for model, patch in self._patches):
                        raise RuntimeError(
                            "a model was unpatched or patched anew since this Scorer was made: "
                            "make another one"
                        )
                    start = time.perf_counter()
                    self._show = progress
                    scored = self._scored(window)
                    self.stats.told = (self.stats + Stats(told=told)).told
                    self.stats.seconds += time.perf_counter() - start
                yield list(zip(tags, scored, strict=True))

    def _encoded(self, windows: Iterable[list[Tagged]]) -> Iterator[tuple]:
        """Of each window the tags, its rows as token ids, and warnings about these."""
        for window in windows:
            self.encoder.warnings.clear()
            encoded = self._encode([row for _, row in window])
            yield [tag for tag, _ in window], encoded, dict(self.encoder.warnings)

    def _table(self, rows: Iterable, count: int, width: int) -> np.ndarray:  # fp32 [count, width]
        table = np.full((count, width), np.nan, np.float32)
        for i, scores in enumerate(self._each(rows, count * width)):
            if scores is not None:
                table[i] = scores
        return table

    def _each(self, rows: Iterable, count: int | None) -> Iterator[np.ndarray | None]:
        """The scores of each row, of ``count`` conversations in all; None for one skipped."""
        before = dict(self.stats.told)
        with (
            self._bar(count) as progress,
            contextlib.closing(self._windows(enumerate(rows), progress)) as windows,
        ):
            for window in windows:
                for i, scored in window:
                    skip = self.encoder.on_overlong == "skip"
                    if scored.error is not None and not (skip and scored.error.kind == "overlong"):
                        raise DataError(f"row {i}: {scored.error}")
                    yield scored.scores
        for what, count in self.stats.told.items():
            if what not in before:
                warnings.warn(counted({what: count})[0], stacklevel=4)

    @contextlib.contextmanager
    def _bar(self, count: int | None) -> Iterator[Progress]:
        if self._progress is not True:
            yield self._progress
            return
        with progress_bar(total=count, unit=" conversations") as bar:
            yield lambda conversations, tokens: bar.update(conversations)

    def _encode(self, window: list[list | RowError]) -> list[Any]:
        """Rows of token ids, each a list of arrays, or the RowError that says why it has none."""
        flat = iter(self.encoder([c for row in window if isinstance(row, list) for c in row]))
        encoded: list[list[np.ndarray] | RowError] = []
        for row in window:
            if isinstance(row, list):
                ids = [next(flat) for _ in row]
                row = first_error(ids) or self.encoder.lost(row, ids) or ids
            encoded.append(row)
        return encoded

    def _scored(self, window: list[Any]) -> list[Scored]:
        """The scores of encoded rows."""
        rows = [ids for row in window if isinstance(row, list) for ids in row]
        halvings = self._budget.halvings
        scores = iter(self._scores(rows) if rows else ())
        self.stats.halvings += self._budget.halvings - halvings
        results = []
        for row in window:
            if isinstance(row, list):
                found = np.array([next(scores) for _ in row], np.float32)
                lengths = np.array([ids.size for ids in row])
                if np.isfinite(found).all():
                    results.append(Scored(found, lengths, None))
                    continue
                row = RowError(
                    f"its score is {found[~np.isfinite(found)][0]}: weights that are not finite, "
                    "or too large for their dtype (rmfast doctor tells)"
                )
            results.append(Scored(None, None, row))
        self.stats.count(results)
        return results

    def _ran(self, run: int, conversations: int, tokens: int) -> None:
        """Count a forward pass over ``run`` tokens, and what it finished."""
        self.stats.micro_batches += 1
        self.stats.tokens_run += run
        if callable(self._show):
            self._show(conversations, tokens)


def _sides(pair: Any) -> list[Conversation] | RowError:
    if isinstance(pair, Pair):
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        pair = {"prompt": pair.prompt, **sides, **pair.columns()}
    if isinstance(pair, Mapping):
        sides = [pair.get("chosen"), pair.get("rejected")]
        if pair.get("prompt") is None and not any(map(is_text_or_messages, sides)):
            return sides  # token ids
        try:
            return RowReader().read(pair, "pair").conversations
        except RowError as error:
            return error
    if isinstance(pair, (str, bytes)) or not hasattr(pair, "__len__") or len(pair) != 2:
        kind = type(pair).__name__
        return RowError(f"a pair is (chosen, rejected) or a dict of the two, not this {kind}")
    return [_side(side) for side in pair]


def _side(side: Any) -> Any:
    """A side whose text, or the text of whose response, is known to be one of a pair's."""
    if isinstance(side, tuple) and len(side) == 2 and isinstance(side[1], str):
        return side[0], Side(side[1])
    return Side(side) if isinstance(side, str) else side


# by object: a lock that was an attribute could be neither copied nor pickled
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKING = threading.Lock()


def _lock_of(owner: Any) -> threading.RLock:
    """The lock of a scorer or a model."""
    with _LOCKING:
        return _LOCKS.setdefault(owner, threading.RLock())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, without gradients, then back in the modes it was in.

    One thread at a time: these modes are the model's, and so are rotary frequencies that depend on
    the rows that ran before.
    """
    with _lock_of(patching.attached(model) or model), keeping_modes(model) as training:
        if training:
            model.eval()
        with torch.inference_mode():
            yield
