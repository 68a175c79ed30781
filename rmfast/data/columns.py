"""Which columns hold the conversations of a row, and what the columns of its scores are called."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmfast.data.values import checked, kind_of, why_not_text_or_messages
from rmfast.errors import RowError, UserError

# In this order: the first whose fields are all there. A pair may have a prompt.
CONVENTIONS = {
    "messages": ("messages",),
    "responses": ("prompt", "responses"),
    "response": ("prompt", "response"),
    "pair": ("chosen", "rejected"),
    "text": ("text",),
}


FIELDS = tuple(dict.fromkeys(field for fields in CONVENTIONS.values() for field in fields))
_ALSO_CALLED = {"response": "completion", "responses": "completions"}
Scores = np.float32 | np.ndarray  # a column's value in one row: a number, or several


@dataclass(frozen=True)
class Columns:
    """A convention and the names that its fields have in this file.

    Attributes:
        kind: a key of CONVENTIONS.
        names: column of each field that is used.
        stem: name of the scores' columns, or what it is made of.
        cells: every value is text, as in CSV: prompts and answers may be messages as JSON.
    """

    kind: str
    names: Mapping[str, str]
    stem: str = "reward"
    cells: bool = False

    @property
    def added(self) -> list[str]:
        """Names of the columns that hold the scores."""
        return added(self.kind, self.stem)

    def conversations(self, row: Mapping[str, Any]) -> list[Any]:
        """What is to be scored: one conversation; chosen and rejected; or each of the responses.

        A conversation is text, a list of messages, or a tuple of prompt and response.

        Raises:
            RowError: a field is missing, empty, or not what it should be.
        """
        if self.kind == "messages":
            return [self._messages(row)]
        if self.kind == "text":
            return [self._text(row)]
        if self.kind == "pair":
            return self._pair(row)
        prompt = self._side("prompt", self._value("prompt", row))
        if self.kind == "response":
            return [(prompt, self._side("response", self._value("response", row)))]
        return [(prompt, response) for response in self._responses(row)]

    def scores(self, scores: np.ndarray) -> list[Scores]:  # scores: fp32 [k]
        """A row's scores, as values of the columns :attr:`added`."""
        return [scores] if self.kind == "responses" else list(scores)

    def _value(self, field: str, row: Mapping[str, Any]) -> Any:
        name = self.names[field]
        if name not in row:
            raise RowError(f'"{name}" is missing')
        return row[name]

    def _side(self, field: str, value: Any, item: str = "") -> Any:
        """Text or messages, in CSV as JSON."""
        if self.cells and isinstance(value, str) and value.lstrip().startswith("["):
            parsed = _json(value)
            if parsed and why_not_text_or_messages(parsed) is None:
                value = parsed
        return self._checked(field, value, item)

    def _checked(self, field: str, value: Any, item: str = "") -> Any:
        return checked(f'"{self.names[field]}"{item}', value)

    def _messages(self, row: Mapping[str, Any]) -> Any:
        value = self._value("messages", row)
        if isinstance(value, str):
            value = _json(value)
        if not isinstance(value, list):
            raise RowError(
                f'"{self.names["messages"]}" must be a list of messages, not '
                f"{kind_of(row[self.names['messages']])}"
            )
        return self._checked("messages", value)

    def _responses(self, row: Mapping[str, Any]) -> list[Any]:
        value = self._value("responses", row)
        if isinstance(value, str):
            value = _json(value)
        name = self.names["responses"]
        if not isinstance(value, list):
            raise RowError(f'"{name}" must be a list of responses, not {kind_of(row[name])}')
        if not value:
            raise RowError(f'"{name}" is empty')
        return [self._side("responses", x, f" item {i}") for i, x in enumerate(value)]

    def _text(self, row: Mapping[str, Any]) -> str:
        value = self._value("text", row)
        if not isinstance(value, str):
            raise RowError(f'"{self.names["text"]}" must be text, not {kind_of(value)}')
        return self._checked("text", value)

    def _pair(self, row: Mapping[str, Any]) -> list[Any]:
        chosen, rejected = (self._side(x, self._value(x, row)) for x in ("chosen", "rejected"))
        if type(chosen) is not type(rejected):
            names = f'"{self.names["chosen"]}" and "{self.names["rejected"]}"'
            raise RowError(f"{names} must both be text, or both lists of messages")
        prompt = row.get(self.names["prompt"])
        if prompt is None or prompt == "" or prompt == []:
            return [chosen, rejected]
        prompt = self._side("prompt", prompt)
        return [(prompt, chosen), (prompt, rejected)]


def _json(text: str) -> Any:
    """What the text says if it is JSON, else None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def added(kind: str, stem: str) -> list[str]:
    if kind == "pair":
        return [f"chosen_{stem}", f"rejected_{stem}"]
    return [f"{stem}s"] if kind == "responses" else [stem]


def choose(
    present: Collection[str],
    named: Mapping[str, str] | None = None,
    *,
    stem: str = "reward",
    cells: bool = False,
) -> Columns | None:
    """The first convention that these columns fit, or None.

    Args:
        present: the columns that are there.
        named: columns that the user named, by field; only conventions with all of these count.
        stem: see :class:`Columns`.
        cells: see :class:`Columns`.

    Raises:
        UserError: no convention has all the fields in ``named``.
    """
    named = named or {}
    fitting = [kind for kind in CONVENTIONS if set(named) <= {*_fields(kind)}]
    if not fitting:
        flags = " and ".join(f"--{field}-column" for field in named)
        raise UserError(f"{flags} do not go together")
    for kind in fitting:
        names = {field: _find(field, present, named) for field in _fields(kind)}
        if all(names[field] is not None for field in (*CONVENTIONS[kind], *named)):
            if kind == "pair":  # a later row may have one
                names["prompt"] = names["prompt"] or "prompt"
            return Columns(kind, names, stem, cells)
    return None


def _fields(kind: str) -> tuple[str, ...]:
    return (*CONVENTIONS[kind], "prompt") if kind == "pair" else CONVENTIONS[kind]


def _find(field: str, present: Collection[str], named: Mapping[str, str]) -> str | None:
    names = (named[field],) if field in named else (field, _ALSO_CALLED.get(field))
    return next((name for name in names if name in present), None)


def needed(named: Mapping[str, str] | None = None) -> str:
    """The conventions in words, for an error."""
    if named:
        return " and ".join(f'"{name}" ({field})' for field, name in named.items())
    return ", or ".join("+".join(fields) for fields in CONVENTIONS.values())
