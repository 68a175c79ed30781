"""Windows of rows: gathered, read ahead in a thread, and what became of them."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from rmfast.errors import RowError


class Scored(NamedTuple):
    """A row's scores, or why it has none."""

    scores: np.ndarray | None  # fp32 [k], one for each conversation of the row
    lengths: np.ndarray | None  # int64 [k], tokens
    error: RowError | None


@dataclasses.dataclass
class Stats:
    """What a scorer did since it was made.

    Attributes:
        rows: rows scored.
        conversations: conversations scored.
        tokens: their tokens.
        nodes: their distinct prefixes, window by window: the fewest tokens an exact method runs.
        tokens_run: what the backbone was given, padding included where there is any.
        padded_slots: token slots, had they been padded in batches of 16 in input order.
        micro_batches: forward passes.
        overlong: rows left out because a conversation is too long.
        errors: rows left out for any other reason.
        halvings: times that memory ran out and the micro-batch was halved.
        seconds: spent in forward passes and on what leads to them, reading left out.
    """

    rows: int = 0
    conversations: int = 0
    tokens: int = 0
    nodes: int = 0
    tokens_run: int = 0
    padded_slots: int = 0
    micro_batches: int = 0
    overlong: int = 0
    errors: int = 0
    halvings: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


def gathered(rows: Iterable, size: int) -> Iterator[list[list | RowError]]:
    """Windows of rows, with ``size`` conversations or more each but the last."""
    window: list[list | RowError] = []
    count = 0
    for row in rows:
        if not isinstance(row, RowError):
            row = list(row) or RowError("it holds no conversation")
        window.append(row)
        count += 1 if isinstance(row, RowError) else len(row)
        if count >= size:
            yield window
            window, count = [], 0
    if window:
        yield window


def first_error(ids: list[np.ndarray | RowError]) -> RowError | None:
    """Why a row cannot be scored, with the place in the row; None: it can."""
    for at, found in enumerate(ids, start=1):
        if isinstance(found, RowError):
            if len(ids) == 1:
                return found
            return RowError(f"conversation {at} of {len(ids)}: {found.reason}", found.kind)
    return None


def _ahead(items: Iterator) -> Iterator:
    """The same items, the next one being made in a background thread."""
    ready: queue.Queue = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(*what: Any) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(what, timeout=0.1)
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

    thread = threading.Thread(target=work, name="rmfast-encode", daemon=True)
    thread.start()
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
