"""Preference data: pairs and ranked groups, where they come from, and what is wrong with a row.

:func:`preferences` reads every usual kind of data set for training; :func:`read_pairs` reads pairs
alone, from JSON lines. There a line is ``{"chosen": …, "rejected": …}``, both text or both lists of
messages ``{"role": …, "content": …}``. A ``"prompt"`` of the same kind may be there, which comes
before both, and a ``"margin"``.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import math
import numbers
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

Message = dict[str, Any]
Conversation = list[Message]

DEEPEST = 64  # lists and objects inside one another, in a line of JSON


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the line, and says why."""


class RowError(DataError):
    """One row that cannot be scored.

    Attributes:
        reason: why, for people, without the row's number.
        kind: ``"overlong"`` for too many tokens, else ``"bad"``.
    """

    def __init__(self, reason: str, kind: str = "bad") -> None:
        super().__init__(reason)
        self.reason, self.kind = reason, kind

    def __reduce__(self) -> tuple:  # what other processes send has its kind
        return RowError, (self.reason, self.kind)


@dataclass(frozen=True)
class Pair:
    """Two answers, of which the first is preferred.

    Attributes:
        chosen: text or messages, without the prompt where ``prompt`` is given.
        rejected: the same kind.
        prompt: what comes before both, or None where both already begin with it.
        margin: by how much the chosen answer is to score higher (Llama 2, arXiv 2307.09288, eq. 2);
            None: not said.
        where: where the pair is from, for messages: ``file:line``.
    """

    chosen: str | Conversation
    rejected: str | Conversation
    prompt: str | Conversation | None = None
    margin: float | None = None
    where: str = field(default="", compare=False)

    def whole(self) -> tuple[str, str] | tuple[Conversation, Conversation]:
        """Chosen and rejected with the prompt before them."""
        if self.prompt is None:
            return self.chosen, self.rejected
        return self.prompt + self.chosen, self.prompt + self.rejected

    def question(self) -> str:
        """What both sides begin with, as a key: pairs of one prompt have the same."""
        return _question(self.prompt, [self.chosen, self.rejected])


@dataclass(frozen=True)
class Group:
    """K >= 2 answers to one prompt, in an order of preference.

    Attributes:
        responses: text, or messages, without the prompt where ``prompt`` is given.
        ranks: a number for each response; lower is better, equal is a tie.
        prompt: what comes before each, or None where all already begin with it.
        where: where the group is from, for messages: ``file:line``.
    """

    responses: list[str] | list[Conversation]
    ranks: list[float]
    prompt: str | Conversation | None = None
    where: str = field(default="", compare=False)

    def whole(self) -> list[str] | list[Conversation]:
        """The responses with the prompt before them."""
        if self.prompt is None:
            return self.responses
        return [self.prompt + response for response in self.responses]

    def question(self) -> str:
        """What all responses begin with, as a key."""
        return _question(self.prompt, self.responses)


def _question(prompt: str | Conversation | None, sides: Sequence[str | Conversation]) -> str:
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
        one = self.records[0]
        return not isinstance(one.responses[0] if isinstance(one, Group) else one.chosen, str)

    def __str__(self) -> str:
        of = "messages" if self.conversational else "text"
        kind = self.kind if len(self) > 1 else self.kind[:-1]
        lines = [f"{self.source}: {len(self):,} {kind} of {of}, from {self.rows:,} rows"]
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
        from rmfast.files import need

        need("datasets", "a data set")
        import datasets

        records = self.records
        if self.kind == "groups":
            columns = {"responses": [x.responses for x in records]}
            whole = {"responses": [x.whole() for x in records]}
        else:
            columns = {"chosen": [x.chosen for x in records]}
            columns["rejected"] = [x.rejected for x in records]
            chosen, rejected = zip(*(x.whole() for x in records), strict=True)
            whole = {"chosen": list(chosen), "rejected": list(rejected)}
        if all(x.prompt is not None for x in records):
            columns = {"prompt": [x.prompt for x in records], **columns}
        else:
            columns = whole
        if self.kind == "groups":
            columns["ranks"] = [[float(rank) for rank in x.ranks] for x in records]
        elif records[0].margin is not None:
            columns["margin"] = [float(x.margin) for x in records]
        return datasets.Dataset.from_dict(columns)


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
) -> Preferences:
    """Read preference data of every usual kind.

    Each row is one of these, by the fields it has; other fields are passed over:

    - ``chosen`` and ``rejected``, with or without ``prompt`` and ``margin``: TRL's formats, text
      and messages; Anthropic/hh-rlhf's dialogues; the ultrafeedback_binarized of HuggingFaceH4 and
      of trl-lib (a ``prompt`` with which both lists of messages begin is not repeated);
    - ``completions``, objects with a ``response`` or ``text`` and a rating, after ``instruction``
      or ``prompt``: openbmb/UltraFeedback;
    - ``responses`` with ``ratings`` or ``scores``, or with ``ranks`` (lower is better, equal ties);
    - ``answers``, objects with ``answer`` and ``rank``: berkeley-nest/Nectar.

    A row is left out, and counted, if it says nothing: an empty response (of several responses only
    that one), identical chosen and rejected, fewer than two responses, all tied or all the same.

    Args:
        source: a file, folder or data set as :class:`rmfast.files.Reader` takes it, a
            ``datasets.Dataset``, or dicts.
        ratings: what becomes of several rated responses: ``"pairs"``, the best against the worst;
            ``"all_pairs"``, each against each that is rated lower; or ``"groups"``.
        ranks: the same of several ranked responses.
        margins: make margins of differences of ratings (of ``score_chosen`` and ``score_rejected``
            where a row has these). A ``margin`` in the data is always kept.
        rating: the field of a completion that rates it; None: the first that is there of
            ``overall_score``, ``rating``, ``score``, ``fine-grained_score``.
        chat: whether text becomes messages. None: only rated text and an ``instruction`` with its
            answers, which are turns; all other text stays as it is, byte for byte, prompt and
            answer joined as TRL does. True: dialogues (``"\\n\\nHuman: …\\n\\nAssistant: …"``)
            become turns, as fits a model that was trained to chat; so do text prompts and answers.
            False: no text does, as fits a model without a chat template.
        strict: what would be left out is an error.
        name, split: configuration and split of a data set that ``source`` names.
        limit: stop after so many rows.

    Raises:
        DataError: it cannot be read; no record comes out; or a row is not understood, has a value
            of a wrong kind, NaN or infinity, ranks that do not match its responses, or is of
            another kind than the first one. The message begins with the place of the row.
        ValueError: an unknown option.
    """
    from rmfast.rows import Rows

    label, cells, found = _rows(source, name, split, limit)
    rows = Rows(ratings, ranks, margins=margins, rating=rating, chat=chat, cells=cells)
    records: list[Any] = []
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    count = 0
    for where, row in found:
        count += 1
        try:
            made, reasons = rows.read(row, where)
            if strict and reasons:
                raise RowError(reasons[0])
            for record in made:
                _check_like(records[0] if records else made[0], record)
        except RowError as error:
            raise DataError(f"{where}: {error.reason}") from None
        records += made
        for reason in reasons:
            dropped[reason] += 1
            first.setdefault(reason, where)
    if not records:
        why = "".join(f"; dropped: {n:,} × {reason}" for reason, n in dropped.items())
        raise DataError(f"{label}: no preferences in {count:,} rows{why}")
    return Preferences(records, label, count, dropped, first)


def _rows(
    source: Any, name: str | None, split: str, limit: int | None
) -> tuple[str, bool, Iterator[tuple[str, Any]]]:
    """What the source is called, whether all values are text, and its rows with their places."""
    if isinstance(source, (str, Path)):
        from rmfast.files import Reader

        reader = Reader(source, name=name, split=split, limit=limit)
        found = ((f"{source}:{x.number}", x.value) for x in reader.read())
        return str(source), reader.format == "csv", found
    if isinstance(source, Mapping):
        names = ", ".join(map(str, source))
        raise DataError(f"a {type(source).__name__} of {names}: give one of them, or an iterable")
    if hasattr(source, "with_format"):  # Python's values, where it gives tensors
        source = source.with_format(None)
    label = type(source).__name__
    rows = enumerate(itertools.islice(source, limit))
    return label, False, ((f"{label}[{i}]", row) for i, row in rows)


def _check_like(first: Pair | Group, record: Pair | Group) -> None:
    """Trainers look at the first record to see what all are.

    Raises:
        RowError: they are of different kinds.
    """
    one, other = _about(first), _about(record)
    for mine, firsts in zip(other, one, strict=True):
        if mine != firsts:
            raise RowError(f"{mine}, and the first one ({first.where}) {firsts}")


def _about(record: Pair | Group) -> tuple[str, str, str]:
    group = isinstance(record, Group)
    side = record.responses[0] if group else record.chosen
    return (
        "is a group of responses" if group else "is a pair",
        "is text" if isinstance(side, str) else "is messages",
        "has no margin" if group or record.margin is None else "has a margin",
    )


def read_pairs(path: str | Path) -> list[Pair]:
    """Read preference pairs from a ``.jsonl`` or ``.jsonl.gz`` file; blank lines are passed over.

    Raises:
        DataError: no such file, no pair in it, or a line that is not a pair; the message begins
            with ``file:line``.
    """
    out = []
    for number, line in _lines(Path(path)):
        where = f"{path}:{number}"
        try:
            record = parse_json(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except RowError as error:
            raise DataError(f"{where}: {error}") from None
        reason = _why_not_a_pair(record)
        if reason is not None:
            raise DataError(f"{where}: {reason}")
        out.append(
            Pair(
                record["chosen"],
                record["rejected"],
                record.get("prompt"),
                None if record.get("margin") is None else float(record["margin"]),
                where,
            )
        )
    if not out:
        raise DataError(f"{path}: no pairs: the file is empty")
    return out


def parse_json(line: bytes) -> Any:
    """What a line of JSON says.

    Raises:
        RowError: not UTF-8, not JSON, an object that names something twice, or nested too deep.
    """
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError(f"nested more than {DEEPEST} deep") from None
    except RowError:
        raise
    except ValueError as error:  # a number of too many digits
        raise RowError(f"not JSON that can be read: {error}") from None
    if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(value) > DEEPEST:
        raise RowError(f"nested more than {DEEPEST} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"{json.dumps(twice)} is there twice")
    return out


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _why_not_a_pair(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"a line must be a JSON object, this is {kind_of(record)}"
    for name in ("chosen", "rejected"):
        if name not in record:
            return f'"{name}" is missing'
    names = ["chosen", "rejected"] + (["prompt"] if record.get("prompt") is not None else [])
    for name in names:
        reason = why_not_text_or_messages(record[name])
        if reason is not None:
            return f'"{name}" {reason}'
    if len({type(record[name]) for name in names}) > 1:
        return f"{', '.join(names)} must all be text, or all be lists of messages"
    for name in ("chosen", "rejected"):
        if not record[name]:
            return f'"{name}" is empty'
    if record.get("margin") is not None:
        reason = why_not_number(record["margin"])
        return None if reason is None else f'"margin" {reason}'
    return None


def why_not_number(value: Any) -> str | None:
    """What is wrong with a number, which must be finite; None: nothing."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return f"must be a number, not {kind_of(value)}"
    try:
        return None if math.isfinite(value) else f"must be a finite number, not {value}"
    except OverflowError:
        return "is too large a number"


def why_not_text_or_messages(value: Any) -> str | None:
    """What is wrong with text, or with a list of messages; None: nothing. Both may be empty."""
    if isinstance(value, str):
        return why_not_unicode(value)
    if not isinstance(value, list):
        return f"must be text or a list of messages, not {kind_of(value)}"
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return f"message {i} must be an object with role and content, not {kind_of(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                what = kind_of(message[key]) if key in message else "missing"
                return f'message {i}: "{key}" must be text, is {what}'
            reason = why_not_unicode(message[key])
            if reason is not None:
                return f'message {i}: "{key}" {reason}'
    return None


def checked(what: str, value: Any) -> Any:
    """The value, which must be text or a list of messages, and not empty.

    Raises:
        RowError: it is not; the reason begins with ``what``.
    """
    reason = why_not_text_or_messages(value)
    if reason is None and not value:
        reason = "is empty"
    if reason is not None:
        raise RowError(f"{what} {reason}")
    return value


def why_not_unicode(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair at character {error.start}"
    return None


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    other = "a number" if isinstance(value, numbers.Real) else f"a {type(value).__name__}"
    return "null" if value is None else names.get(type(value), other)


def by_question(records: Iterable[Pair | Group]) -> list[list[Pair | Group]]:
    """The records, together where they have one question, in order of first appearance."""
    groups: dict[str, list[Pair | Group]] = {}
    for record in records:
        groups.setdefault(record.question(), []).append(record)
    return list(groups.values())
