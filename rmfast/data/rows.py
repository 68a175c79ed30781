"""One row of data: a prompt and its answers, read from a record (a dict of columns) and checked.

Whatever scores, evaluates or trains reads its rows here: a row means the same to all of them, and
what is wrong with one is told in the same words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rmfast.data.coats import (
    ASKED,
    TURNS,
    begins_as_message,
    given_by,
    is_conversation,
    is_message,
    read_conversation,
    unwrapped,
    with_parts,
)
from rmfast.data.values import (
    Chat,
    Messages,
    Side,
    check_answer,
    check_number,
    check_text,
    holds,
    is_empty,
    is_whole,
    kind_of,
    parse_text,
    without_nulls,
)
from rmfast.errors import RowError, UserError

_NOTHING = ("[]", "{}", "nan", "NaN", "None", "null")  # in a cell
_ANSWERS = "chosen response responses completion completions output answer generation".split()


@dataclass(frozen=True)
class Row:
    """A prompt with its answers."""

    record: Mapping[str, Any]  # the columns it was read from
    prompt: str | Messages | None  # None: the answers begin with it
    prompt_column: str
    answers: list[tuple[str, Any]]  # each after what it is called in an error: "chosen" item 1
    preferred: int = 0  # so many answers, the first ones, are chosen; the others are rejected
    subset: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)  # as in a Chat

    @property
    def conversations(self) -> list[Any]:
        """The answers; each as a tuple with the prompt, where there is one; or each a Chat."""
        found = [answer for _, answer in self.answers]
        if self.prompt is not None:
            found = [(self.prompt, answer) for answer in found]
        return [Chat(one, self.given) for one in found] if self.given else found

    @property
    def chosen(self) -> list[Any]:
        return self.conversations[: self.preferred]

    @property
    def rejected(self) -> list[Any]:
        return self.conversations[self.preferred :]


@dataclass(frozen=True)
class RowReader:
    """Reads rows of one source."""

    # of each field (prompt, chosen, …) that has another name, such as data.prompt within an object
    columns: Mapping[str, str] = field(default_factory=dict)
    cells: bool = False  # every value is text, as in CSV: lists and numbers are written out
    lists: bool = False  # chosen and rejected may each be a list of answers
    empty: bool = False  # answers may be empty
    ignored: Collection[str] = ()  # passed over, though they seem to belong to the prompt

    def __post_init__(self) -> None:
        named = [column for field, column in self.columns.items() if field != "subset"]
        double = next((column for column in named if named.count(column) > 1), None)
        if double is not None:
            raise UserError(f'two options name the column "{double}": each field has its own')

    def read(self, record: Any, kind: str) -> Row:
        """The row of a record, by a ``kind`` of :data:`rmfast.data.columns.CONVENTIONS`.

        Raises:
            RowError: a column is missing or empty, is not what it should be, or is not read though
                it seems to belong to the prompt; or the record itself, if it is a RowError.
        """
        record = check_record(record)
        if kind == "pair":
            chosen, rejected = self._sides(record)
            both = [*chosen, *rejected]
            sides = [(name, Side(x) if isinstance(x, str) else x) for name, x in both]
            return self.row(record, sides, len(chosen))
        name = self.columns.get(kind, kind)
        value = value_of(name, record)
        if kind == "response":
            answer = self.conversation(f'"{name}"', value)
            return self.row(record, [(f'"{name}"', answer)], prompt=True)
        if kind == "responses":
            answers = self.answers(name, self.items(name, value, "responses"))
            return self.row(record, answers, prompt=True)
        if kind == "text" and not isinstance(value, str):
            raise RowError(f'"{name}" must be text, not {kind_of(value)}')
        if kind == "messages" and not hasattr(value, "__len__"):
            raise RowError(f'"{name}" must be a list of messages, not {kind_of(value)}')
        answer = self.conversation(f'"{name}"', value)
        if kind == "messages" and isinstance(answer, str):
            raise RowError(f'"{name}" must be a list of messages, not text')
        row = self.row(record, [(f'"{name}"', answer)], prompt=False, used={name})
        record = row.record
        beside = next((x for x in _ANSWERS if not is_empty(record.get(x))), None)
        whole = row.answers[0][1]
        if beside is not None and (
            isinstance(record[beside], str) and record[beside].strip() not in whole
            if isinstance(whole, str)
            else whole[-1]["role"] == "user"
        ):
            raise RowError(
                f'"{name}" has no answer, and "{beside}" is beside it: --response-column, or '
                "--chosen-column and --rejected-column, name the columns of answers"
            )
        return row

    def row(
        self,
        record: Mapping[str, Any],
        answers: list[tuple[str, Any]],
        preferred: int = 0,
        prompt: bool | None = None,
        used: Collection[str] = (),
    ) -> Row:
        """The row of answers that were read already.

        Args:
            answers, preferred: as in :class:`Row`; an answer may be a Chat.
            prompt: whether there must be one (None: may be); False: the answers are whole.
            used: columns that were read.
        """
        record = {k: v for k, v in record.items() if k not in self.ignored}
        around = {}  # what stands beside a column of a dotted name
        for column in self.columns.values():
            if "." in column and column not in record:
                around |= value_of(column.rpartition(".")[0], record)
        parts = {**record, **{k: v for k, v in around.items() if k not in record}}
        own = {column.rpartition(".")[2] for column in self.columns.values()}
        given = given_by(parts)
        answers = [(x, unwrapped(x, answer, given)) for x, answer in answers]
        name, before = self._prompt(record, answers, prompt)
        before = unwrapped(f'"{name}"', before, given)
        if before is not None and self._are_whole(answers, name, before):
            before = None
        if isinstance(before, list) and before[-1]["role"] == "assistant":
            raise RowError(f'"{name}" is beside the answers, and ends with no user\'s turn')
        if before is None and len({isinstance(answer, str) for _, answer in answers}) > 1:
            names = ", ".join(name for name, _ in answers)
            raise RowError(f"{names} must all be text, or all be lists of messages")
        beside = {k: v for k, v in parts.items() if not (self.cells and v in _NOTHING)}
        used = {*used, name, *self.columns.values(), *own}
        used |= {*ASKED} if self._named("prompt") else set()
        if before is None:
            found = with_parts(beside, used, [answer for _, answer in answers])
            answers = [(x, answer) for (x, _), answer in zip(answers, found, strict=True)]
        else:
            (before,) = with_parts(beside, used, [before], prompt=True)
        if given and before is None and any(isinstance(answer, str) for _, answer in answers):
            raise RowError(f"has {', '.join(given)} for a chat template, and its answers are text")
        return Row(record, before, name, answers, preferred, self._subset(record), given)

    def _prompt(
        self, record: Mapping[str, Any], answers: list[tuple[str, Any]], must: bool | None
    ) -> tuple[str, Any]:
        """The column of the prompt, and what it holds; None where there is no prompt."""
        if must is False:
            return "", None
        name = self.columns.get("prompt", "prompt")
        if not self._named("prompt"):
            columns = ASKED if any(is_whole(answer) for _, answer in answers) else (*ASKED, *TURNS)
            free = [x for x in columns if x == name or x not in self.columns.values()]
            name = next((x for x in free if not _is_blank(record.get(x))), name)
        value = value_of(name, record) if must or self._named("prompt") else record.get(name)
        if _is_blank(value) and not must:
            return name, None
        before = self.conversation(f'"{name}"', value)
        turns = before.conversation if isinstance(before, Chat) else before
        if isinstance(turns, str) and name in TURNS and not self._named("prompt"):
            raise RowError(f'"{name}" is beside the answers, and ends with no user\'s turn')
        return name, before

    @staticmethod
    def _are_whole(answers: list[tuple[str, Any]], name: str, before: str | Messages) -> bool:
        """Whether the answers begin with the prompt; RowError where only some do."""
        begin = [is_whole(x) or (isinstance(before, list) and holds(x, before)) for _, x in answers]
        if not any(begin):
            for answer, value in answers:
                check_answer(answer, value, before)
            return False
        for (answer, value), whole in zip(answers, begin, strict=True):
            if not whole:
                raise RowError(f"{answer} is no whole conversation, and another answer is")
            if not holds(value, before):
                raise RowError(f'{answer} is a whole conversation that does not have "{name}"')
        return True

    def _named(self, field: str) -> bool:
        """Whether the user named the column of a field."""
        return self.columns.get(field, field) != field

    def _sides(self, record: Mapping[str, Any]) -> list[list[tuple[str, Any]]]:
        """Chosen and rejected: each an answer, or several."""
        names = [self.columns.get(name, name) for name in ("chosen", "rejected")]
        values = [value_of(name, record) for name in names]
        parsed = [parse_text(x) if self.lists and _is_list_text(x) else x for x in values]
        texts = [self.cells and _is_list_of_text(x) for x in parsed]
        if any(texts) and not all(texts):  # the other may be a list of one, or this be an answer
            wrong = names[texts.index(False)]
            raise RowError(f'"{wrong}" must be a list of texts, as the other side is, or neither')
        sides = []
        for name, value, items in zip(names, values, parsed, strict=True):
            items = items if all(texts) or is_conversation(items) else value
            several = self.lists and isinstance(items, list) and bool(items)
            if several and not any(is_message(x) or begins_as_message(x) for x in items):
                sides.append(self.answers(name, items))
            else:
                sides.append([(f'"{name}"', self.conversation(f'"{name}"', items))])
        return sides

    def _subset(self, record: Mapping[str, Any]) -> str | None:
        name = self.columns.get("subset")
        subset = value_of(name, record) if self._named("subset") else record.get(name)
        if isinstance(subset, (dict, list)):
            raise RowError(f'"{name}" must be a name, not {kind_of(subset)}')
        if isinstance(subset, str):
            check_text(f'"{name}"', subset)
        return None if subset in (None, "") else str(subset)

    def conversation(self, name: str, value: Any) -> str | Messages | Chat:
        """Text or messages, called ``name`` in an error; a Chat where they come with ``tools``."""
        return read_conversation(name, value, self.empty)

    def answers(self, name: str, items: list[Any]) -> list[tuple[str, Any]]:
        """Several answers, each after what it is called in an error."""
        names = [f'"{name}" item {i}' for i in range(len(items))]
        return [(x, self.conversation(x, item)) for x, item in zip(names, items, strict=True)]

    def items(self, name: str, value: Any, what: str = "numbers") -> list[Any]:
        """A list, which may be written as text."""
        items = parse_text(value) if isinstance(value, str) else value
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


def check_as_it_is(record: Mapping[str, Any]) -> None:
    """Raise RowError unless a row means to TRL, which takes its columns as they are, the same."""
    reader = RowReader(empty=True)
    if "responses" in record:
        raw = list(record["responses"])
        row = reader.row(record, reader.answers("responses", raw))
    else:
        raw = [record["chosen"], record["rejected"]]
        row = reader.read(record, "pair")
    read = [row.prompt, *(answer for _, answer in row.answers)]
    if without_nulls(read) != without_nulls([record.get("prompt") or None, *raw]):
        raise RowError(
            "its conversations are in a coat, or their prompt in other columns, which a trainer "
            "does not read: give it rmfast.data.preferences(dataset).dataset()"
        )


def check_record(record: Any) -> Mapping[str, Any]:
    """The record, which must be a dict of columns; a reader's RowError is raised."""
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(f"must be an object, with a value for each column, not {kind_of(record)}")
    # pandas has arrays of Parquet's lists
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in record.items()}


def value_of(name: str, record: Mapping[str, Any]) -> Any:
    """The value of a column, or of a dotted name within objects where no column has that name."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise RowError(f'"{name}" is missing: there are {", ".join(map(str, record))}')
        value = value[part]
    return value


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list)) and not value)


def _is_list_text(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and value and all(isinstance(item, str) for item in value)
