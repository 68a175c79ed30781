"""Preference data in memory: pairs and ranked groups, and what was dropped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rmfast.data.values import TURN, Messages
from rmfast.errors import RowError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Pair:
    """Two answers, of which the first is preferred.

    Attributes:
        chosen: text or messages, without the prompt where ``prompt`` is given.
        rejected: the same kind.
        prompt: what comes before both, or None where both already begin with it.
        margin: by how much the chosen answer is to score higher (Llama 2, arXiv 2307.09288, eq. 2);
            None: not known.
        where: where the pair is from, for messages: ``file:line``.
    """

    chosen: str | Messages
    rejected: str | Messages
    prompt: str | Messages | None = None
    margin: float | None = None
    where: str = field(default="", compare=False)

    def whole(self) -> tuple[str, str] | tuple[Messages, Messages]:
        """Chosen and rejected with the prompt before them."""
        if self.prompt is None:
            return self.chosen, self.rejected
        return self.prompt + self.chosen, self.prompt + self.rejected

    def question(self) -> str:
        """What both sides begin with, as a key: pairs of one prompt have the same."""
        return _question(self.prompt, [self.chosen, self.rejected])

    def columns(self, apart: bool) -> dict[str, Any]:
        """The pair as a row for TRL, with the prompt in a column of its own or in the answers."""
        row = {"prompt": self.prompt} if apart else {}
        sides = (self.chosen, self.rejected) if apart else self.whole()
        row |= dict(zip(("chosen", "rejected"), sides, strict=True))
        return row if self.margin is None else {**row, "margin": float(self.margin)}


@dataclass(frozen=True)
class Group:
    """K >= 2 answers to one prompt, in an order of preference.

    Attributes:
        responses: text, or messages, without the prompt where ``prompt`` is given.
        ranks: a number for each response; lower is better, equal is a tie.
        prompt: what comes before each, or None where all already begin with it.
        where: where the group is from, for messages: ``file:line``.
    """

    responses: list[str] | list[Messages]
    ranks: list[float]
    prompt: str | Messages | None = None
    where: str = field(default="", compare=False)

    def whole(self) -> list[str] | list[Messages]:
        """The responses with the prompt before them."""
        if self.prompt is None:
            return self.responses
        return [self.prompt + response for response in self.responses]

    def question(self) -> str:
        """What all responses begin with, as a key."""
        return _question(self.prompt, self.responses)

    def columns(self, apart: bool) -> dict[str, Any]:
        """The group as a row for rmfast's trainer, as :meth:`Pair.columns`."""
        row = {"prompt": self.prompt} if apart else {}
        row["responses"] = self.responses if apart else self.whole()
        return {**row, "ranks": [float(rank) for rank in self.ranks]}


def _question(prompt: str | Messages | None, sides: Sequence[str | Messages]) -> str:
    if prompt is not None:
        return json.dumps(prompt)
    same = 0
    for column in zip(*sides, strict=False):
        if any(item != column[0] for item in column):
            break
        same += 1
    shared = sides[0][:same]
    if isinstance(shared, str):  # answers may begin with the same words: back to the line break
        shared = shared[: shared.rfind("\n") + 1] or shared
    return json.dumps(shared)


# --- records from which nothing can be learnt


def is_blank(answer: Any, prompt: Any = None) -> bool:
    """Whether an answer (text, messages or token ids) is missing: its last turn has no text."""
    if isinstance(answer, str):
        if prompt is None and TURN.match(answer):
            answer = TURN.split(answer)[-1]
        return not answer.strip()
    if answer and isinstance(answer[-1], dict):
        content = answer[-1].get("content")
        return isinstance(content, str) and not content.strip()
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


# --- many records


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
        return not isinstance(self.records[0].whole()[0], str)

    def __str__(self) -> str:
        content = "messages" if self.conversational else "text"
        kind = self.kind if len(self) > 1 else self.kind[:-1]
        lines = [f"{self.source}: {len(self):,} {kind} of {content}, from {self.rows:,} rows"]
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
        have, it is put before their answers.

        Raises:
            DataError: ``datasets`` is not installed.
        """
        from rmfast.data.files import need

        need("datasets", "a data set")
        import datasets

        apart = all(record.prompt is not None for record in self.records)
        return datasets.Dataset.from_list([record.columns(apart) for record in self.records])


def check_alike(first: Pair | Group, record: Pair | Group) -> None:
    """Trainers look at the first record to see what all are.

    Raises:
        RowError: the records are of different kinds.
    """
    for trait, expected in zip(_traits(record), _traits(first), strict=True):
        if trait != expected:
            raise RowError(f"{trait}, and the first one ({first.where}) {expected}")


def _traits(record: Pair | Group) -> tuple[str, str, str]:
    group = isinstance(record, Group)
    return (
        "is a group of responses" if group else "is a pair",
        "is text" if isinstance(record.whole()[0], str) else "is messages",
        "has no margin" if group or record.margin is None else "has a margin",
    )


def by_question(records: Iterable[Pair | Group]) -> list[list[Pair | Group]]:
    """The records, together where they have one question, in order of first appearance."""
    groups: dict[str, list[Pair | Group]] = {}
    for record in records:
        groups.setdefault(record.question(), []).append(record)
    return list(groups.values())
