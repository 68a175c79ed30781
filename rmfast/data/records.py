"""Preference data in memory: pairs and ranked groups, and what was dropped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rmfast.data.values import TURN, Chat, Messages
from rmfast.errors import DataError, RowError

if TYPE_CHECKING:
    import datasets


class _Record:
    """Answers to one prompt; ``answers`` are without it, where it is given."""

    answers: Sequence[str] | Sequence[Messages]
    prompt: str | Messages | None
    given: Mapping[str, Any] | None

    def whole(self) -> Any:
        """The answers with the prompt before them; a pair's as a tuple, a group's as a list.

        Each is a :class:`rmfast.data.values.Chat` where the row gives its template something.
        """
        whole = self.answers
        if self.prompt is not None:
            whole = type(whole)(self.prompt + answer for answer in whole)
        return type(whole)(Chat(one, self.given) for one in whole) if self.given else whole

    def columns(self) -> dict[str, Any]:
        """What the row gives its chat template, as columns in TRL's format; tools as JSON."""
        given = dict(self.given or {})
        tools = given.pop("tools", None)
        found = {"tools": tools and json.dumps(tools), "chat_template_kwargs": given}
        return {name: value for name, value in found.items() if value}

    def question(self) -> str:
        """What all answers begin with, as a key: records of one prompt have the same."""
        if self.prompt is not None:
            return json.dumps(self.prompt)
        same = 0
        for column in zip(*self.answers, strict=False):
            if any(item != column[0] for item in column):
                break
            same += 1
        shared = self.answers[0][:same]
        if isinstance(shared, str):  # answers may begin with the same words: back to the line break
            shared = shared[: shared.rfind("\n") + 1] or shared
        return json.dumps(shared)


@dataclass(frozen=True)
class Pair(_Record):
    """Two answers, of which the first is preferred.

    Attributes:
        chosen: text or messages, without the prompt where ``prompt`` is given.
        rejected: the same kind.
        prompt: what comes before both, or None where both already begin with it.
        margin: by how much the chosen answer is to score higher (Llama 2, arXiv 2307.09288, eq. 2);
            None: not known.
        where: where the pair is from, for messages: ``file:line``.
        given: ``tools`` and other values for the chat template; None: there are none.
    """

    chosen: str | Messages
    rejected: str | Messages
    prompt: str | Messages | None = None
    margin: float | None = None
    where: str = field(default="", compare=False)
    given: Mapping[str, Any] | None = None

    @property
    def answers(self) -> tuple[str, str] | tuple[Messages, Messages]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Group(_Record):
    """K >= 2 answers to one prompt, in an order of preference.

    Attributes:
        responses: text or messages, without the prompt where ``prompt`` is given.
        ranks: a number for each response; lower is better, equal is a tie.
        prompt, where, given: as for :class:`Pair`.
    """

    responses: list[str] | list[Messages]
    ranks: list[float]
    prompt: str | Messages | None = None
    where: str = field(default="", compare=False)
    given: Mapping[str, Any] | None = None

    @property
    def answers(self) -> list[str] | list[Messages]:
        return self.responses


def is_blank(answer: Any, prompt: Any = None) -> bool:
    """Whether an answer (text, messages or token ids) is missing: its last turn has no text."""
    if isinstance(answer, str):
        if prompt is None and TURN.match(answer):
            answer = TURN.split(answer)[-1]
        return not answer.strip()
    if answer and isinstance(answer[-1], dict):
        content = answer[-1].get("content")
        blank = isinstance(content, str) and not content.strip()
        return blank and not answer[-1].get("tool_calls")
    return not answer


def useless_pair(chosen: Any, rejected: Any, prompt: Any = None) -> str:
    """Why nothing can be learnt from a pair; empty where something can."""
    if is_blank(chosen, prompt) or is_blank(rejected, prompt):
        return "empty response"
    return "identical chosen and rejected" if chosen == rejected else ""


def useless_group(answers: Sequence[Any], numbers: Sequence[float]) -> str:
    """Why nothing can be learnt from answers with ranks or ratings; empty where something can."""
    if len(answers) < 2:
        return "fewer than two responses"
    if len(set(numbers)) == 1:
        return "all responses tied"
    same = all(answer == answers[0] for answer in answers)
    return "all responses the same" if same else ""


@dataclass(frozen=True)
class Preferences:
    """Preference data in one shape, and what is not in it.

    Attributes:
        records: all pairs or all groups; all of text or all of messages.
        source: what was read, for people.
        rows: how many rows were read.
        dropped: for each reason, how often something was left out.
        first: for each reason, where it was first.
    """

    records: list[Pair] | list[Group]
    source: str = ""
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Pair | Group]:
        return iter(self.records)

    @property
    def kind(self) -> str:
        """``"pairs"`` or ``"groups"``."""
        return "groups" if isinstance(self.records[0], Group) else "pairs"

    @property
    def conversational(self) -> bool:
        """Whether the answers are messages, for which a tokenizer needs a chat template."""
        return not isinstance(self.records[0].answers[0], str)

    @property
    def content(self) -> str:
        """``"messages"`` or ``"text"``."""
        return "messages" if self.conversational else "text"

    def __str__(self) -> str:
        kind = self.kind if len(self) > 1 else self.kind[:-1]
        lines = [f"{self.source}: {len(self):,} {kind} of {self.content}, from {self.rows:,} rows"]
        if isinstance(self.records[0], Group):
            sizes = [len(group.responses) for group in self.records]
            least, most = min(sizes), max(sizes)
            lines[0] += f", {least}{'' if least == most else f' to {most}'} responses each"
        elif self.records[0].margin is not None:
            lines[0] += ", with margins"
        for reason, count in self.dropped.items():
            lines.append(f"  dropped: {count:,} × {reason}, first at {self.first[reason]}")
        return "\n".join(lines)

    def dataset(self) -> datasets.Dataset:
        """The records in TRL's format, for its ``RewardTrainer`` and rmfast's.

        Columns are ``chosen``, ``rejected`` and, where there are any, ``margin`` (fp64); of groups
        ``responses`` and ``ranks`` (fp64). ``prompt`` is there if each record has one; if only some
        have, it is put before their answers. ``tools`` (as JSON) and ``chat_template_kwargs`` are
        there where a row has them.

        Raises:
            DataError: ``datasets`` is not installed, or rows have not the same keys in
                ``chat_template_kwargs``.
        """
        from rmfast.data.files import need

        need("datasets", "a data set")
        import datasets

        given = [record.columns() for record in self.records]
        if len({frozenset(x.get("chat_template_kwargs", ())) for x in given}) > 1:
            raise DataError(
                "rows have different keys in chat_template_kwargs, and a data set gives each row "
                "the keys of all: rmfast train reads the file itself"
            )
        apart = all(record.prompt is not None for record in self.records)
        rows = []
        for record, more in zip(self.records, given, strict=True):
            answers = record.answers if apart else replace(record, given=None).whole()
            row = {**more, "prompt": record.prompt} if apart else more
            if isinstance(record, Group):
                row |= {"responses": answers, "ranks": [float(rank) for rank in record.ranks]}
            else:
                row |= {"chosen": answers[0], "rejected": answers[1]}
                row |= {} if record.margin is None else {"margin": float(record.margin)}
            rows.append(row)
        return datasets.Dataset.from_list(rows)


def check_alike(first: Pair | Group, record: Pair | Group) -> None:
    """Raise RowError for records of different kinds: trainers look at the first one alone."""
    for trait, expected in zip(_traits(record), _traits(first), strict=True):
        if trait != expected:
            raise RowError(f"{trait}, and the first one ({first.where}) {expected}")


def _traits(record: Pair | Group) -> tuple[str, str, str]:
    group = isinstance(record, Group)
    return (
        "is a group of responses" if group else "is a pair",
        "is text" if isinstance(record.answers[0], str) else "is messages",
        "has no margin" if group or record.margin is None else "has a margin",
    )


def by_question(records: Iterable[Pair | Group]) -> list[list[Pair | Group]]:
    """The records, together where they have one question, in order of first appearance."""
    groups: dict[str, list[Pair | Group]] = {}
    for record in records:
        groups.setdefault(record.question(), []).append(record)
    return list(groups.values())
