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
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast.data.records import Pair, Preferences, _check_like
from rmfast.data.values import kind_of, parse_json, why_not_number, why_not_text_or_messages
from rmfast.errors import DataError, RowError

if TYPE_CHECKING:
    import datasets


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
        source: a file, folder or data set as :class:`rmfast.data.files.Reader` takes it, a
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
        name: configuration of a data set that ``source`` names.
        split: split of that data set.
        limit: stop after so many rows.

    Raises:
        DataError: it cannot be read; no record comes out; or a row is not understood, has a value
            of a wrong kind, NaN or infinity, ranks that do not match its responses, or is of
            another kind than the first one. The message begins with the place of the row.
        ValueError: an unknown option.
    """
    from rmfast.data.rows import Rows

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
        from rmfast.data.files import Reader

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
