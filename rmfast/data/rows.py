"""One row of data: a prompt and its answers, read from a record (a dict of columns) and checked.

Whatever scores, evaluates or trains reads its rows here: a row means the same to all of them, and
what is wrong with one is told in the same words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rmfast.data.values import (
    Messages,
    Side,
    check_conversation,
    check_number,
    check_text,
    kind_of,
    parse_list,
    without_nulls,
)
from rmfast.errors import RowError

# columns that may hold a part of the prompt: answers without it would be answers to another one
_BESIDE = ("input", "system", "system_prompt", "tools", "chat_template_kwargs", "image", "images")
_INSTEAD = ("prompt", "instruction", "question", "query", "context", "history", *_BESIDE)


@dataclass(frozen=True)
class Row:
    """A prompt with its answers.

    Attributes:
        record: the columns it was read from.
        prompt: text or messages; None where the answers begin with it.
        prompt_column: where the prompt is from.
        answers: text or messages, each after what it is called in an error: ``"chosen" item 1``.
        preferred: so many answers, the first ones, are chosen; the others are rejected.
        subset: its name, or None.
    """

    record: Mapping[str, Any]
    prompt: str | Messages | None
    prompt_column: str
    answers: list[tuple[str, Any]]
    preferred: int = 0
    subset: str | None = None

    @property
    def conversations(self) -> list[Any]:
        """The answers; each as a tuple with the prompt, where there is one."""
        answers = [answer for _, answer in self.answers]
        return answers if self.prompt is None else [(self.prompt, answer) for answer in answers]

    @property
    def chosen(self) -> list[Any]:
        """The conversations of chosen answers."""
        return self.conversations[: self.preferred]

    @property
    def rejected(self) -> list[Any]:
        """The conversations of rejected answers."""
        return self.conversations[self.preferred :]


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one source.

    Attributes:
        columns: the column of each field (``prompt``, ``chosen``, …) that has another name.
        cells: every value is text, as in CSV: prompts and answers may be messages as JSON, and
            numbers are written out.
        lists: ``chosen`` and ``rejected`` may each be a list of answers.
        empty: answers may be empty.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    cells: bool = False
    lists: bool = False
    empty: bool = False

    def read(self, record: Any, kind: str) -> Row:
        """The row that a record holds.

        Args:
            record: a dict of columns; a RowError is raised as it is.
            kind: a key of :data:`rmfast.data.columns.CONVENTIONS`.

        Raises:
            RowError: a column is missing or empty, is not what it should be, or is not read though
                it seems to belong to the prompt.
        """
        record = check_record(record)
        if kind == "pair":
            chosen, rejected = (self._side(x, record) for x in ("chosen", "rejected"))
            both = [*chosen, *rejected]
            sides = [(name, Side(x) if isinstance(x, str) else x) for name, x in both]
            return self.row(record, sides, len(chosen))
        name = self.columns.get(kind, kind)
        value = _value(name, record)
        if kind == "response":
            answer = self.conversation(f'"{name}"', value)
            return self.row(record, [(f'"{name}"', answer)], needs_prompt=True)
        if kind == "responses":
            answers = self.answers(name, self.items(name, value, "responses"))
            return self.row(record, answers, needs_prompt=True)
        if kind == "messages":
            value = self.items(name, value, "messages")
        elif not isinstance(value, str):
            raise RowError(f'"{name}" must be text, not {kind_of(value)}')
        value = without_nulls(check_conversation(f'"{name}"', value))
        return Row(record, None, "", [(f'"{name}"', value)])

    def row(
        self,
        record: Mapping[str, Any],
        answers: list[tuple[str, Any]],
        preferred: int = 0,
        needs_prompt: bool = False,
    ) -> Row:
        """The row of answers that were read already."""
        name, prompt = self.columns.get("prompt", "prompt"), None
        if needs_prompt or record.get(name) not in (None, "", []):
            prompt = self.conversation(f'"{name}"', _value(name, record))
        elif len({isinstance(answer, str) for _, answer in answers}) > 1:
            names = ", ".join(name for name, _ in answers)
            raise RowError(f"{names} must all be text, or all be lists of messages")
        for unread in _INSTEAD if prompt is None else _BESIDE:
            empty = self.cells and record.get(unread) in ("[]", "{}")
            if record.get(unread) and not empty and unread not in self.columns.values():
                raise RowError(
                    f'has "{unread}", which seems to belong to the prompt and is not read: put it '
                    'into "prompt", or take the column away'
                )
        return Row(record, prompt, name, answers, preferred, self._subset(record))

    def _side(self, name: str, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Chosen or rejected: an answer, or several."""
        name = self.columns.get(name, name)
        value = _value(name, record)
        if self.lists and self.cells:
            value = parse_list(value, lambda x: x and isinstance(x[0], (str, list)))
        if self.lists and isinstance(value, list) and value and not isinstance(value[0], dict):
            return self.answers(name, value)
        return [(f'"{name}"', self.conversation(f'"{name}"', value))]

    def _subset(self, record: Mapping[str, Any]) -> str | None:
        name = self.columns.get("subset")
        subset = record.get(name)
        if isinstance(subset, (dict, list)):
            raise RowError(f'"{name}" must be a name, not {kind_of(subset)}')
        if isinstance(subset, str):
            check_text(f'"{name}"', subset)
        return None if subset in (None, "") else str(subset)

    # --- values

    def conversation(self, name: str, value: Any) -> str | Messages:
        """Text or messages, called ``name`` in an error."""
        if self.cells:
            value = parse_list(value, lambda x: x and isinstance(x[0], dict) and "role" in x[0])
        return without_nulls(check_conversation(name, value, self.empty))

    def answers(self, name: str, items: list[Any]) -> list[tuple[str, Any]]:
        """Several answers, each after what it is called in an error."""
        names = [f'"{name}" item {i}' for i in range(len(items))]
        return [(x, self.conversation(x, item)) for x, item in zip(names, items, strict=True)]

    def items(self, name: str, value: Any, what: str = "numbers") -> list[Any]:
        """A list, which text may be as JSON."""
        items = parse_list(value, lambda _: True)
        if not isinstance(items, list):
            raise RowError(f'"{name}" must be a list of {what}, not {kind_of(value)}')
        if not items and not self.empty:
            raise RowError(f'"{name}" is empty')
        return items

    def number(self, name: str, value: Any) -> float:
        """A finite number, called ``name`` in an error."""
        if self.cells and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        return check_number(name, value)


def check_record(record: Any) -> Mapping[str, Any]:
    """The record, which must be a dict of columns; a reader's RowError is raised."""
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        kind = kind_of(record)
        raise RowError(f"must be an object, with a value for each column, not {kind}")
    return record


def _value(name: str, record: Mapping[str, Any]) -> Any:
    if name not in record:
        raise RowError(f'"{name}" is missing')
    return record[name]
