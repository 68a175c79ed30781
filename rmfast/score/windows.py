"""Windows of rows: gathered, made in a background thread, and their scores."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from rmfast.data.encoding import counted
from rmfast.data.records import Pair
from rmfast.errors import RowError, UserError

if TYPE_CHECKING:
    from tqdm import tqdm

# what the caller knows a row by, and its conversations or why it has none
Tagged = tuple[Any, Sequence[Any] | RowError]


class Scored(NamedTuple):
    """A row's scores, or why it has none."""

    scores: np.ndarray | None  # fp32 [k], one for each conversation of the row
    lengths: np.ndarray | None  # int64 [k], tokens
    error: RowError | None


@dataclasses.dataclass
class Stats:
    """What a scorer did since it was made."""

    rows: int = 0  # scored
    conversations: int = 0  # scored
    tokens: int = 0  # of conversations
    nodes: int = 0  # distinct prefixes, by window: the fewest tokens an exact method runs
    tokens_run: int = 0  # by the backbone, padding included where there is any
    micro_batches: int = 0  # forward passes
    overlong: int = 0  # rows left out because a conversation is too long
    errors: int = 0  # rows left out for any other reason
    halvings: int = 0  # times that memory ran out and the micro-batch was halved
    seconds: float = 0.0  # in forward passes and what leads to them, reading left out
    told: dict[str, int] = dataclasses.field(default_factory=dict)  # warnings, and how often

    def __add__(self, other: Stats) -> Stats:
        pairs = [(getattr(self, x.name), getattr(other, x.name)) for x in dataclasses.fields(self)]
        *numbers, (told, more) = pairs
        return Stats(*(a + b for a, b in numbers), dict(Counter(told) + Counter(more)))

    def warnings(self) -> list[str]:
        """What is to know about the conversations, for people."""
        return counted(self.told)

    def count(self, scored: Iterable[Scored]) -> None:
        """Count the rows of a window."""
        for row in scored:
            if row.error is None:
                self.rows += 1
                self.conversations += len(row.scores)
            elif row.error.kind == "overlong":
                self.overlong += 1
            else:
                self.errors += 1

    @property
    def left_out(self) -> int:
        """Rows that have no scores."""
        return self.overlong + self.errors

    @property
    def saved(self) -> float:
        """The share of the tokens that did not run; 0 where the model runs padded batches."""
        return max(0.0, 1 - self.tokens_run / self.tokens) if self.tokens else 0.0


def refuse_one(given: Any, name: str = "conversations") -> None:
    """Raise TypeError for a conversation, a pair or a table in the place of a list of them.

    Most could be gone through: the letters of a text, the keys of a dict.
    """
    first = given[0] if isinstance(given, (list, np.ndarray, Tensor)) and len(given) else None
    if (
        isinstance(given, (str, bytes, Mapping, Pair))
        or hasattr(given, "columns")  # of pandas or polars: their names
        or (isinstance(given, tuple) and len(given) == 2 and all(map(is_text_or_messages, given)))
        or (isinstance(first, Mapping) and "role" in first)
        or isinstance(first, (int, np.integer))
        or (isinstance(first, Tensor) and first.ndim == 0)
    ):
        kind = type(given).__name__ + ("" if first is None else f" of {type(first).__name__}")
        raise TypeError(
            f"{name} must be a list of {name}, not a {kind}: a single one goes into a list too"
        )


def is_text_or_messages(side: Any) -> bool:
    first = [*side, 0][0] if isinstance(side, list) else side
    return isinstance(first, (str, Mapping))


def gathered(rows: Iterable[Tagged], size: int) -> Iterator[list[Tagged]]:
    """Windows of tagged rows, with ``size`` conversations or more each but the last.

    A row without conversations counts as one.
    """
    window: list[Tagged] = []
    count = 0
    for tag, row in rows:
        if not isinstance(row, RowError):
            refuse_one(row)
            row = list(row) or RowError("it holds no conversation")
        window.append((tag, row))
        count += 1 if isinstance(row, RowError) else len(row)
        if count >= size:
            yield window
            window, count = [], 0
    if window:
        yield window


def first_error(ids: list[np.ndarray | RowError]) -> RowError | None:
    """Why a row cannot be scored, with the place in the row; None if it can."""
    for at, found in enumerate(ids, start=1):
        if isinstance(found, RowError):
            if len(ids) == 1:
                return found
            return RowError(f"conversation {at} of {len(ids)}: {found.reason}", found.kind)
    return None


def ahead(items: Iterator) -> Iterator:
    """The same items, the next one being made in a background thread.

    The thread is a daemon, unlike those of an executor: an iterator that blocks holds up no exit.
    """
    ready: queue.Queue = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: Any, error: BaseException | None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    threading.Thread(target=work, name="rmfast-encode", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()


def memory_told(windows: Iterable, advice: str = "") -> Iterator:
    """The same windows; a MemoryError becomes a UserError, with some advice."""
    try:
        yield from windows
    except MemoryError as error:
        raise UserError(f"{error}{advice}") from None


def progress_bar(**options: Any) -> tqdm:
    """A bar on stderr, with tqdm's options; every 10 seconds where stderr is no terminal."""
    from tqdm import tqdm

    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc="scoring", mininterval=pause, miniters=0, **options)
