"""Makes :class:`Pair` and :class:`Group` of the rows of published data sets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast.data.coats import is_conversation
from rmfast.data.files import Reader
from rmfast.data.records import (
    Group,
    Pair,
    Preferences,
    check_alike,
    is_blank,
    useless_group,
    useless_pair,
)
from rmfast.data.rows import Row, RowReader, check_record
from rmfast.data.values import TURN, as_messages, begun, dialogue, kind_of, without_inner_nulls
from rmfast.errors import DataError, RowError

if TYPE_CHECKING:
    import datasets

SHAPES = ("pairs", "all_pairs", "groups")
_SEVERAL = ("responses", "completions", "answers")
_TEXTS = ("response", "text", "answer")  # of an answer that is an object
_RATINGS = ("overall_score", "rating", "score", "fine-grained_score")  # of the same
_NUMBERS = ("ranks", "ratings", "scores")  # of a row
_UNDERSTOOD = (
    'chosen and rejected; completions, or responses with "ratings", "scores" or "ranks", after '
    '"prompt" or "instruction"; or answers with ranks'
)


def preferences(
    source: str | Path | datasets.Dataset | Iterable[Mapping[str, Any]],
    *,
    ratings: str = "pairs",
    ranks: str = "groups",
    margins: bool = False,
    rating: str | None = None,
    chat: bool | None = None,
    strict: bool = False,
    name: str | None = None,
    split: str = "train",
    limit: int | None = None,
    ignored: Collection[str] = (),
) -> Preferences:
    """Read preference data of every usual kind.

    Each row is one of these, by the fields it has. Other fields are passed over, but for those that
    belong to the prompt, which are read (``question``, ``system``, ``tools``, …) or must be in it
    (``context``, ``images``, …). Messages may come in any coat that
    :func:`rmfast.data.coats.uncoat` takes off.

    - ``chosen`` and ``rejected``, with or without ``prompt`` and ``margin``: TRL's formats, text
      and messages; Anthropic/hh-rlhf's dialogues; the ultrafeedback_binarized of HuggingFaceH4 and
      of trl-lib (a ``prompt`` with which both lists of messages begin is not repeated);
    - ``completions``, objects with a ``response`` or ``text`` and a rating, after ``instruction``
      or ``prompt``: openbmb/UltraFeedback;
    - ``responses`` with ``ratings`` or ``scores``, or with ``ranks`` (lower is better, equal ties);
    - ``answers``, objects with ``answer`` and ``rank``: berkeley-nest/Nectar.

    A row is dropped, and counted, if nothing can be learnt from it: an empty response (of several
    responses only that one), identical chosen and rejected, fewer than two responses, all tied or
    all the same.

    Args:
        source: a file, folder or data set as :class:`rmfast.data.files.Reader` takes it, a
            ``datasets.Dataset``, or dicts.
        ratings: what becomes of several rated responses: ``"pairs"``, the best against the worst;
            ``"all_pairs"``, each against each that is rated lower; or ``"groups"``.
        ranks: the same of several ranked responses.
        margins: make margins of differences of ratings (of ``score_chosen`` and ``score_rejected``
            where a row has these). A ``margin`` in the data is always kept.
        rating: the field of a completion that rates it; None: the first that is there of
            ``overall_score``, ``rating``, ``score``, ``fine-grained_score``.
        chat: whether text becomes messages. None: only rated text, and text after ``instruction``,
            ``question``, ``query`` or ``system``, which are turns; all other text stays as it is,
            byte for byte, prompt and answer joined as TRL does. True: dialogues
            (``"\\n\\nHuman: …\\n\\nAssistant: …"``) become turns, as fits a model that was trained
            to chat; so do text prompts and answers. False: no text does, as fits a model without a
            chat template.
        strict: raise an error where a row or a response would be dropped.
        name: configuration of a data set that ``source`` names.
        split: split of that data set.
        limit: stop after so many rows.
        ignored: columns that are passed over, though they seem to belong to the prompt.

    Raises:
        DataError: the source cannot be read or holds no preferences; or a row is not understood,
            has a value of a wrong kind, NaN or infinity, ranks that do not match its responses, or
            is of another kind than the first one. The message begins with the place of the row.
        ValueError: an unknown option.
    """
    label, cells, rows = _rows(source, name, split, limit)
    row_reader = RowReader(cells=cells, empty=True, ignored=ignored)
    reader = _Reader(ratings, ranks, margins, rating, chat, row_reader)
    records: list[Any] = []
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    count = 0
    for where, row in rows:
        count += 1
        try:
            made, reasons = reader.read(row, where)
            if strict and reasons:
                raise RowError(reasons[0])
            for record in made:
                check_alike(records[0] if records else made[0], record)
        except RowError as error:
            raise DataError(f"{where}: {error.reason}") from None
        records += made
        for reason in reasons:
            dropped[reason] += 1
            first.setdefault(reason, where)
    if not records:
        reasons = "".join(f"; dropped: {n:,} × {reason}" for reason, n in dropped.items())
        raise DataError(f"{label}: no preferences in {count:,} rows{reasons}")
    return Preferences(records, label, count, dropped, first)


def _rows(
    source: Any, name: str | None, split: str, limit: int | None
) -> tuple[str, bool, Iterator[tuple[str, Any]]]:
    """What the source is called, whether all values are text, and its rows with their places."""
    if isinstance(source, (str, Path)):
        reader = Reader(source, name=name, split=split, limit=limit)
        rows = ((f"{source}:{x.number}", reader.plain(x.value)) for x in reader.read())
        return str(source), reader.format == "csv", rows
    if isinstance(source, Mapping):
        names = ", ".join(map(str, source))
        raise DataError(f"a {type(source).__name__} of {names}: give one of them, or an iterable")
    label = type(source).__name__
    if hasattr(source, "with_format"):  # Python's values, where it gives tensors
        source = map(without_inner_nulls, source.with_format(None))
    rows = enumerate(itertools.islice(source, limit))
    return label, False, ((f"{label}[{i}]", row) for i, row in rows)


class _Dropped(Exception):
    """Nothing can be learnt from a row; the reason is the argument."""


@dataclass(frozen=True)
class _Reader:
    """Makes pairs or groups of rows; the options are those of :func:`preferences`."""

    ratings: str
    ranks: str
    margins: bool
    rating: str | None
    chat: bool | None
    row_reader: RowReader

    def __post_init__(self) -> None:
        for name in ("ratings", "ranks"):
            value = getattr(self, name)
            if value not in SHAPES:
                raise ValueError(f"{name} must be one of {', '.join(SHAPES)}, got {value!r}")

    def read(self, record: Any, where: str) -> tuple[list[Any], list[str]]:
        """The records of a row, none if it is dropped, and the reason of everything dropped."""
        cells = self.row_reader.cells
        record = {
            k: v for k, v in check_record(record).items() if not (v is None or (cells and v == ""))
        }
        reasons: list[str] = []
        try:
            if "chosen" in record or "rejected" in record:
                return [self._pair(record, where)], reasons
            for name in _SEVERAL:
                if name in record:
                    return self._several(name, record, where, reasons), reasons
        except _Dropped as dropped:
            return [], [*reasons, str(dropped)]
        names = ", ".join(map(str, record)) or "none"
        raise RowError(f"has the fields {names}; understood are {_UNDERSTOOD}")

    def _pair(self, record: dict[str, Any], where: str) -> Pair:
        row = self.row_reader.read(record, "pair")
        prompt, (chosen, rejected) = self._turns(row)
        if reason := useless_pair(chosen, rejected, prompt):
            raise _Dropped(reason)
        margin = None
        if "margin" in record:
            margin = self.row_reader.number('"margin"', record["margin"])
        elif self.margins:
            better, worse = (
                self.row_reader.number(f'"{name}"', record.get(name))
                for name in ("score_chosen", "score_rejected")
            )
            if better < worse:
                raise _Dropped("score_rejected above score_chosen")
            margin = better - worse
        return Pair(chosen, rejected, prompt, margin, where, row.given or None)

    def _several(
        self, name: str, record: dict[str, Any], where: str, reasons: list[str]
    ) -> list[Pair] | list[Group]:
        answers, numbers, rated = self._numbered(name, record)
        if self.margins and not rated:
            raise RowError("has ranks, of which no margins can be made: leave margins off")
        row = self.row_reader.row(record, self.row_reader.answers(name, answers))
        given = row.given or None
        prompt, answers = self._turns(row, rated)
        kept = [i for i, answer in enumerate(answers) if not is_blank(answer, prompt)]
        reasons += ["empty response among several"] * (len(answers) - len(kept))
        answers, numbers = [answers[i] for i in kept], [numbers[i] for i in kept]
        if reason := useless_group(answers, numbers):
            raise _Dropped(reason)
        shape = self.ratings if rated else self.ranks
        if shape == "groups":
            order = sorted(set(numbers), reverse=True)
            ranks = [float(order.index(x) + 1) if rated else -x for x in numbers]
            return [Group(answers, ranks, prompt, where, given)]
        sides = [(numbers.index(max(numbers)), numbers.index(min(numbers)))]
        if shape == "all_pairs":
            both = itertools.permutations(range(len(answers)), 2)
            sides = [(i, j) for i, j in both if numbers[i] > numbers[j]]
        pairs = []
        for i, j in sides:
            if answers[i] == answers[j]:
                reasons.append("identical chosen and rejected")
                continue
            margin = numbers[i] - numbers[j] if self.margins else None
            pairs.append(Pair(answers[i], answers[j], prompt, margin, where, given))
        return pairs

    def _numbered(self, name: str, record: dict[str, Any]) -> tuple[list[Any], list[float], bool]:
        """Several answers, how good they are (more is better), and whether that is a rating."""
        answers = self.row_reader.items(name, record[name], "responses")
        if any(isinstance(x, Mapping) and not is_conversation(x) for x in answers):
            text, key = self._keys(name, answers)
            values = {f'"{name}" item {i}: "{key}"': x.get(key) for i, x in enumerate(answers)}
            answers = [x.get(text) for x in answers]
        else:
            key = next((key for key in _NUMBERS if key in record), None)
            if key is None and answers:
                raise RowError(f'"{name}" needs one of {", ".join(_NUMBERS)}')
            items = [] if key is None else self.row_reader.items(key, record[key])
            values = {f'"{key}" item {i}': x for i, x in enumerate(items)}
        if len(values) != len(answers):
            raise RowError(f'"{key}" has {len(values)} numbers for {len(answers)} {name}')
        numbers = [self.row_reader.number(*x) for x in values.items()]
        ranked = key in ("rank", "ranks")
        return answers, [-x for x in numbers] if ranked else numbers, not ranked

    def _keys(self, name: str, answers: list[Any]) -> tuple[str, str]:
        """Which field of answers that are objects is their text, and which their number."""
        for i, answer in enumerate(answers):
            if not isinstance(answer, Mapping):
                raise RowError(f'"{name}" item {i} must be an object, not {kind_of(answer)}')
        known = (self.rating,) if self.rating else _RATINGS
        if self.rating is None and "rank" in answers[0]:
            known = ("rank",)
        text = next((key for key in _TEXTS if key in answers[0]), None)
        number = next((key for key in known if answers[0].get(key) is not None), None)
        if text is None:
            raise RowError(f'"{name}" item 0 has none of {", ".join(_TEXTS)}')
        if number is None:
            raise RowError(f'"{name}" item 0 has none of {", ".join(known)} that is a number')
        return text, number

    def _turns(self, row: Row, rated: bool = False) -> tuple[Any, list[Any]]:
        """The prompt, or None, and the answers; all of text or all of messages."""
        found = self._turns_of(row, rated)
        if row.given and any(isinstance(x, str) for x in found[1]):
            raise RowError(
                f"has {', '.join(row.given)}, which go with messages: chat=True makes these of text"
            )
        return found

    def _turns_of(self, row: Row, rated: bool) -> tuple[Any, list[Any]]:
        prompt, answers = row.prompt, [answer for _, answer in row.answers]
        text = all(isinstance(x, str) for x in answers)
        if prompt is None:
            turns = self.chat and text
            return None, [dialogue(*x) for x in row.answers] if turns else answers
        if not (text and isinstance(prompt, str)):
            raw = row.record.get(row.prompt_column)
            if self.chat is False and text and isinstance(raw, str) and not is_conversation(raw):
                raise RowError(
                    "has a system prompt, which goes with turns, and chat=False makes none"
                )
            return as_messages("user", prompt), [as_messages("assistant", x) for x in answers]
        is_dialogue = TURN.match(prompt)
        turns = row.prompt_column != "prompt" or (rated and not is_dialogue)
        if self.chat is False or not (self.chat or turns):
            return prompt, answers
        if not is_dialogue:
            return as_messages("user", prompt), [as_messages("assistant", x) for x in answers]
        before = begun(f'"{row.prompt_column}"', prompt)
        return before, [as_messages("assistant", x.strip()) for x in answers]
