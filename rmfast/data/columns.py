"""Which columns of a file hold conversations to score, and what the scores' columns are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmfast.data.coats import ASKED, TURNS
from rmfast.data.rows import RowReader
from rmfast.errors import UserError

# In this order: the first whose fields are all there. A pair may have a prompt.
CONVENTIONS = {
    "messages": ("messages",),
    "responses": ("prompt", "responses"),
    "response": ("prompt", "response"),
    "pair": ("chosen", "rejected"),
    "text": ("text",),
}
FIELDS = tuple(dict.fromkeys(field for fields in CONVENTIONS.values() for field in fields))
_ALSO_CALLED = {"response": ("completion",), "responses": ("completions",), "prompt": ASKED[1:]}
Scores = np.float32 | np.ndarray  # a column's value in one row: a number, or several


@dataclass(frozen=True)
class Columns:
    """A convention and the names that its fields have in this file."""

    kind: str  # a key of CONVENTIONS
    names: Mapping[str, str]  # column of each field; of the prompt only where the user named it
    stem: str = "reward"  # name of the scores' columns, or what it is made of
    cells: bool = False  # as in RowReader
    ignored: Collection[str] = ()

    @property
    def added(self) -> list[str]:
        """Names of the columns that hold the scores."""
        if self.kind == "pair":
            return [f"chosen_{self.stem}", f"rejected_{self.stem}"]
        return [f"{self.stem}s"] if self.kind == "responses" else [self.stem]

    def conversations(self, row: Mapping[str, Any]) -> list[Any]:
        """What is to be scored: one conversation; chosen and rejected; or each of the responses."""
        reader = RowReader(self.names, cells=self.cells, ignored=self.ignored)
        return reader.read(row, self.kind).conversations

    def scores(self, scores: np.ndarray) -> list[Scores]:  # scores: fp32 [k]
        """A row's scores, as values of the columns :attr:`added`."""
        return [scores] if self.kind == "responses" else list(scores)


def choose(
    present: Collection[str],
    named: Mapping[str, str] | None = None,
    *,
    stem: str = "reward",
    cells: bool = False,
    ignored: Collection[str] = (),
) -> Columns | None:
    """The first convention that the columns ``present`` fit, or None.

    Args:
        named: columns that the user named, by field; only conventions with all of these count.
        stem, cells, ignored: see :class:`Columns`.
    """
    named = named or {}
    fields = {**CONVENTIONS, "pair": (*CONVENTIONS["pair"], "prompt")}
    fitting = [kind for kind in CONVENTIONS if set(named) <= {*fields[kind]}]
    if not fitting:
        flags = " and ".join(f"--{field}-column" for field in named)
        raise UserError(f"{flags} do not go together")
    for kind in fitting:
        names = {field: _find(field, present, named) for field in fields[kind]}
        if all(names[field] is not None for field in (*CONVENTIONS[kind], *named)):
            if "prompt" not in named:  # a row may have it in another column than the first ones
                names.pop("prompt", None)
            return Columns(kind, names, stem, cells, ignored)
    turns = next((name for name in TURNS if name in present), None)
    if named or turns is None:
        return None
    return Columns("messages", {"messages": turns}, stem, cells, ignored)


def _find(field: str, present: Collection[str], named: Mapping[str, str]) -> str | None:
    if field in named:  # it may be within an object
        name = named[field]
        return name if name in present or name.split(".")[0] in present else None
    names = (field, *_ALSO_CALLED.get(field, ()))
    return next((name for name in names if name in present), None)


def needed(named: Mapping[str, str] | None = None) -> str:
    """The conventions in words, for an error."""
    if named:
        return " and ".join(f'"{name}" ({field})' for field, name in named.items())
    return ", or ".join("+".join(fields) for fields in CONVENTIONS.values())
