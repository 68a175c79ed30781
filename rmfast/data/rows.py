"""From the rows of data sets as they are published to :class:`Pair` and :class:`Group`."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rmfast.data.records import Group, Pair
from rmfast.data.values import (
    Conversation,
    checked,
    kind_of,
    why_not_number,
    why_not_text_or_messages,
    why_not_unicode,
)
from rmfast.errors import RowError

if TYPE_CHECKING:
    from rmfast.data.encoding import Conversation


HOW = ("pairs", "all_pairs", "groups")
_PROMPTS = ("prompt", "instruction")
_SEVERAL = ("responses", "completions", "answers")
_TEXTS = ("response", "text", "answer")  # of one of several, where they are objects
_RATINGS = ("overall_score", "rating", "score", "fine-grained_score")
_LISTED = ("ratings", "scores")
# what else may belong to a prompt: without it, answers to something else would be compared
_INSTEAD = ("question", "query", "context", "history")
_BESIDE = ("input", "system", "system_prompt", "tools", "chat_template_kwargs", "image", "images")
UNDERSTOOD = (
    'chosen and rejected; completions, or responses with "ratings", "scores" or "ranks", after '
    '"prompt" or "instruction"; or answers with ranks'
)


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class _Dropped(Exception):
    """A row that says nothing; the reason is its argument."""


class Rows:
    """Reads rows; the options are those of :func:`rmfast.data.preferences`.

    Args:
        cells: every value is text, as in CSV: lists and objects are JSON.

    Raises:
        ValueError: an unknown option.
    """

    def __init__(
        self,
        ratings: str = "pairs",
        ranks: str = "groups",
        *,
        margins: bool = False,
        rating: str | None = None,
        chat: bool | None = None,
        cells: bool = False,
    ) -> None:
        for name, value in (("ratings", ratings), ("ranks", ranks)):
            if value not in HOW:
                raise ValueError(f"{name} must be one of {', '.join(HOW)}, got {value!r}")
        self.ratings, self.ranks, self.margins, self.rating = ratings, ranks, margins, rating
        self.chat, self.cells = chat, cells

    def read(self, row: Any, where: str = "") -> tuple[list[Pair] | list[Group], list[str]]:
        """The records of a row, none if it says nothing, and a reason for each thing left out.

        Raises:
            RowError: the row is not understood, or has something wrong in it.
        """
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, Mapping):
            raise RowError(f"must be an object, with a value for each column, not {kind_of(row)}")
        empty = (None, "") if self.cells else (None,)
        row = {name: value for name, value in row.items() if value not in empty}
        reasons: list[str] = []
        try:
            if "chosen" in row or "rejected" in row:
                return [self._pair(row, where)], reasons
            for name in _SEVERAL:
                if name in row:
                    return self._several(name, row, where, reasons), reasons
        except _Dropped as dropped:
            return [], [*reasons, str(dropped)]
        names = ", ".join(map(str, row)) or "none"
        raise RowError(f"has the fields {names}; understood are {UNDERSTOOD}")

    # --- one row

    def _pair(self, row: dict[str, Any], where: str) -> Pair:
        for name in ("chosen", "rejected"):
            if name not in row:
                raise RowError(f'"{name}" is missing')
        sides = {f'"{name}"': self._side(f'"{name}"', row[name]) for name in ("chosen", "rejected")}
        prompt, (chosen, rejected) = self._conversations(row, sides, rated=False)
        if _blank(chosen, prompt) or _blank(rejected, prompt):
            raise _Dropped("empty response")
        if chosen == rejected:
            raise _Dropped("identical chosen and rejected")
        margin = None
        if "margin" in row:
            margin = self._number('"margin"', row["margin"])
        elif self.margins:
            better, worse = (
                self._number(f'"{name}"', row.get(name))
                for name in ("score_chosen", "score_rejected")
            )
            if better < worse:
                raise _Dropped("score_rejected above score_chosen")
            margin = better - worse
        return Pair(chosen, rejected, prompt, margin, where)

    def _several(
        self, name: str, row: dict[str, Any], where: str, reasons: list[str]
    ) -> list[Pair] | list[Group]:
        items = self._list(name, row[name])
        if any(isinstance(x, Mapping) and "role" not in x for x in items):
            responses, goodness, rated = self._objects(name, items)
        else:
            responses, goodness, rated = self._listed(name, items, row)
        if self.margins and not rated:
            raise RowError("has ranks, of which no margins can be made: leave margins off")
        sides = {
            f'"{name}" item {i}': self._side(f'"{name}" item {i}', response)
            for i, response in enumerate(responses)
        }
        prompt, answers = self._conversations(row, sides, rated)
        kept = [i for i, answer in enumerate(answers) if not _blank(answer, prompt)]
        reasons += ["empty response among several"] * (len(answers) - len(kept))
        answers, goodness = [answers[i] for i in kept], [goodness[i] for i in kept]
        if len(answers) < 2:
            raise _Dropped("fewer than two responses")
        if len(set(goodness)) == 1:
            raise _Dropped("all responses tied")
        if all(answer == answers[0] for answer in answers):
            raise _Dropped("all responses the same")
        how = self.ratings if rated else self.ranks
        if how == "groups":
            order = sorted(set(goodness), reverse=True)
            places = [float(order.index(x) + 1) if rated else -x for x in goodness]
            return [Group(answers, places, prompt, where)]
        if how == "pairs":
            chosen = [(goodness.index(max(goodness)), goodness.index(min(goodness)))]
        else:
            both = itertools.permutations(range(len(answers)), 2)
            chosen = [(i, j) for i, j in both if goodness[i] > goodness[j]]
        out = []
        for i, j in chosen:
            if answers[i] == answers[j]:
                reasons.append("identical chosen and rejected")
                continue
            margin = goodness[i] - goodness[j] if self.margins else None
            out.append(Pair(answers[i], answers[j], prompt, margin, where))
        return out

    def _objects(self, name: str, items: list[Any]) -> tuple[list[Any], list[float], bool]:
        """Responses, how good they are (more is better), and whether that is a rating."""
        for i, item in enumerate(items):
            if not isinstance(item, Mapping):
                raise RowError(f'"{name}" item {i} must be an object, not {kind_of(item)}')
        text = next((key for key in _TEXTS if key in items[0]), None)
        ranked = self.rating is None and "rank" in items[0]
        known = ("rank",) if ranked else (self.rating,) if self.rating else _RATINGS
        key = next((key for key in known if items[0].get(key) is not None), known[0])
        if text is None:
            raise RowError(f'"{name}" item 0 has none of {", ".join(_TEXTS)}')
        if items[0].get(key) is None:
            raise RowError(f'"{name}" item 0 has none of {", ".join(known)} that is a number')
        numbers = [
            self._number(f'"{name}" item {i}: "{key}"', x.get(key)) for i, x in enumerate(items)
        ]
        return (
            [x.get(text) for x in items],
            [-x for x in numbers] if ranked else numbers,
            not ranked,
        )

    def _listed(
        self, name: str, items: list[Any], row: dict[str, Any]
    ) -> tuple[list[Any], list[float], bool]:
        key = next((key for key in ("ranks", *_LISTED) if key in row), None)
        if key is None:
            if not items:
                return [], [], True
            raise RowError(f'"{name}" needs one of ranks, {", ".join(_LISTED)}')
        values = self._list(key, row[key])
        if len(values) != len(items):
            raise RowError(f'"{key}" has {len(values)} numbers for {len(items)} {name}')
        numbers = [self._number(f'"{key}" item {i}', x) for i, x in enumerate(values)]
        return items, [-x for x in numbers] if key == "ranks" else numbers, key != "ranks"

    # --- conversations

    def _conversations(
        self, row: dict[str, Any], sides: dict[str, Any], rated: bool
    ) -> tuple[Any, list[Any]]:
        """The prompt, or None, and the answers; all of text or all of messages.

        Args:
            sides: answers by their names for errors.
        """
        name = next((name for name in _PROMPTS if row.get(name)), None)
        for other in _BESIDE if name else (*_INSTEAD, *_BESIDE):
            if row.get(other):
                raise RowError(
                    f'has "{other}", which seems to belong to the prompt and is not read: put it '
                    'into "prompt", or take the column away'
                )
        prompt = None if name is None else self._side(f'"{name}"', row[name])
        answers = list(sides.values())
        texts = [isinstance(x, str) for x in [*answers, *([] if prompt is None else [prompt])]]
        if not all(texts):
            return self._messages(prompt, sides)
        if prompt is None:
            return None, [_turns(*x) for x in sides.items()] if self.chat else answers
        dialogue = _TURN.match(prompt)
        turns = name == "instruction" or (rated and not dialogue)
        if self.chat is False or not (self.chat or turns):
            return prompt, answers
        if not dialogue:
            return [_said("user", prompt)], [[_said("assistant", x)] for x in answers]
        before = _turns(f'"{name}"', prompt)
        if before[-1]["role"] == "assistant":  # where the answer begins
            if before.pop()["content"]:
                raise RowError(f'"{name}" ends within an answer: chat=True cannot part them')
        return before, [[_said("assistant", x.strip())] for x in answers]

    @staticmethod
    def _messages(prompt: Any, sides: dict[str, Any]) -> tuple[Any, list[Any]]:
        if prompt is None:
            if any(isinstance(x, str) for x in sides.values()):
                raise RowError(f"{', '.join(sides)} must all be text, or all be lists of messages")
            return None, list(sides.values())
        text = isinstance(prompt, str)
        prompt = [_said("user", prompt)] if text else prompt
        answers = [[_said("assistant", x)] if isinstance(x, str) else x for x in sides.values()]
        whole = [bool(x) and x[0]["role"] in ("system", "user") for x in answers]
        if text and any(whole):
            for (name, _), answer in zip(sides.items(), answers, strict=True):
                if prompt[0] not in answer[:2]:  # a system message may come first
                    raise RowError(f'{name} is a whole conversation that does not have "prompt"')
            return None, answers
        if all(x[: len(prompt)] == prompt and len(x) > len(prompt) for x in answers):
            return None, answers
        return prompt, answers

    # --- values

    def _side(self, name: str, value: Any) -> Any:
        """Text or messages."""
        if self.cells and isinstance(value, str) and value.lstrip().startswith("["):
            parsed = _json(value)
            value = value if not parsed or why_not_text_or_messages(parsed) else parsed
        if isinstance(value, list):  # columns of Arrow have each key in each message
            value = [
                {k: v for k, v in x.items() if v is not None} if isinstance(x, Mapping) else x
                for x in value
            ]
        reason = why_not_text_or_messages(value)
        if reason is not None:
            raise RowError(f"{name} {reason}")
        return value

    def _list(self, name: str, value: Any) -> list[Any]:
        found = _json(value) if self.cells else value
        if not isinstance(found, list):
            raise RowError(f'"{name}" must be a list, not {kind_of(value)}')
        return found

    def _number(self, name: str, value: Any) -> float:
        if self.cells and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        reason = why_not_number(value)
        if reason is not None:
            raise RowError(f"{name} {reason}")
        return float(value)


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _turns(name: str, text: str) -> Conversation:
    """The messages of a dialogue as in HH-RLHF; what one side says twice in a row is one message.

    Raises:
        RowError: it is none.
    """
    before, *parts = _TURN.split(text)
    if before or not parts:
        raise RowError(
            f"{name} is text that is no dialogue, and there is no prompt: chat=True cannot tell "
            "whose turns are in it"
        )
    out: Conversation = []
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        role, said = _ROLES[who], said.strip()
        if out and out[-1]["role"] == role:
            out[-1]["content"] += f"\n\n{said}"
        else:
            out.append(_said(role, said))
    return out


def _blank(answer: Any, prompt: Any) -> bool:
    """Whether there is no response: no text, or a last turn without any."""
    if not isinstance(answer, str):
        return not answer or not answer[-1]["content"].strip()
    if prompt is None and _TURN.match(answer):
        answer = _TURN.split(answer)[-1]
    return not answer.strip()


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError):
        return None


class Row(NamedTuple):
    """A prompt with its answers.

    Attributes:
        record: the columns it was made of.
        prompt: text or messages; None where the answers begin with it.
        chosen, rejected: conversations, at least one of each.
        subset: its name, or None.
    """

    record: dict[str, Any]
    prompt: Any
    chosen: list[Conversation]
    rejected: list[Conversation]
    subset: str | None


def read_row(
    record: dict[str, Any],
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    subset: str = "subset",
    cells: bool = False,
) -> Row:
    """A row of preference data.

    ``chosen`` and ``rejected`` are each an answer or a list of answers; an answer is text or a list
    of messages. With a prompt, answers follow it; without, they begin with it.

    Args:
        prompt, chosen, rejected, subset: names of columns.
        cells: every value is text, as in CSV: lists are JSON.

    Raises:
        RowError: a column is missing, empty, or not what it should be.
    """
    sides = []
    for name in (chosen, rejected):
        if name not in record:
            raise RowError(f'"{name}" is missing')
        sides.append(_answers(name, _cell(record[name]) if cells else record[name]))
    before = _cell(record.get(prompt)) if cells else record.get(prompt)
    if before in (None, "", []):
        before = None
        kinds = {isinstance(answer, str) for side in sides for answer in side}
        if len(kinds) > 1:
            raise RowError(f'"{chosen}" and "{rejected}" must both be text, or both messages')
    else:
        checked(f'"{prompt}"', before)
        sides = [[(before, answer) for answer in side] for side in sides]
    name = record.get(subset)
    if isinstance(name, (dict, list)):
        raise RowError(f'"{subset}" must be a name, not {kind_of(name)}')
    if isinstance(name, str) and (reason := why_not_unicode(name)) is not None:
        raise RowError(f'"{subset}" {reason}')
    return Row(record, before, *sides, None if name in (None, "") else str(name))


def _answers(name: str, value: Any) -> list[Any]:
    several = isinstance(value, list) and not (value and isinstance(value[0], dict))
    if not several:
        return [checked(f'"{name}"', value)]
    if not value:
        raise RowError(f'"{name}" is empty')
    return [checked(f'"{name}" item {i}', answer) for i, answer in enumerate(value)]


def _cell(value: str | None) -> Any:
    """What a cell of CSV says: a list if it is one in JSON, else its text."""
    if value is None or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if found and isinstance(found[0], (str, dict, list)) else value
