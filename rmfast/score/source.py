"""The input of ``rmfast score``: its columns, and its conversations."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from rmfast.data import columns, files
from rmfast.errors import RowError, UserError
from rmfast.score.options import ScoreOptions

INSTEAD = "write JSON lines instead"
LOOK = 1000  # rows at the beginning that tell which columns there are


@dataclasses.dataclass
class Source:
    """The input, and what is known of it beforehand."""

    reader: files.Reader
    layout: columns.Columns  # which columns hold the conversations
    names: list[str]  # its columns; of a file that does not list them, those of the first rows
    # the first rows that can be scored, all of Unicode; none where the file lists its columns
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def conversations(self, row: dict[str, Any]) -> list[Any]:
        """The conversations of a row; RowError: none, or it has a column of the scores' name."""
        taken = next((name for name in self.layout.added if name in row), None)
        if taken is not None:
            raise RowError(f'it has a "{taken}" already: --reward-column gives another name')
        return self.layout.conversations(row)

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]

    def check_columns(self, row: dict[str, Any]) -> None:
        """Raise RowError if the row has a column that the first rows do not have."""
        new = next((name for name in row if name not in self.names), None)
        if new is not None:
            words = "is not among the columns of the first rows"
            raise RowError(f"{json.dumps(new)} {words}: {INSTEAD}")


def look(options: ScoreOptions, reader: files.Reader) -> Source:
    """Find the columns of the conversations."""
    named = {field: getattr(options, f"{field}_column") for field in columns.FIELDS}
    named = {field: name for field, name in named.items() if name is not None}
    choice = {"stem": options.reward_column, "cells": reader.format == "csv"}
    choice["ignored"] = options.ignored
    source = Source(reader, columns.choose(reader.columns or (), named, **choice), [])
    names = dict.fromkeys(reader.columns or ())
    if source.layout is None or reader.columns is None:
        names |= _look_at_rows(source, named, choice)
    source.names = list(names)
    if source.layout is None and source.names:
        raise UserError(
            f"{options.input}: no row has {columns.needed(named)}; there are: "
            f"{', '.join(map(json.dumps, source.names))}. --text-column, --prompt-column and their "
            "like name the right ones"
        )
    if source.layout is None:
        source.layout = columns.Columns("text", {"text": "text"}, options.reward_column)
    taken = next((name for name in source.layout.added if name in source.names), None)
    if taken is not None:
        raise UserError(
            f'{options.input} has a column "{taken}" already: --reward-column gives the scores '
            "another name"
        )
    return source


def _look_at_rows(source: Source, named: dict[str, str], choice: dict[str, Any]) -> dict[str, None]:
    """Find the layout, the first rows that can be scored, and the names of the columns.

    The layout is that of the first row that can be scored, else of the first that seems so.
    """
    names: dict[str, None] = {}
    fits = False
    records = (source.reader.plain(record.value) for record in source.reader.read())
    rows = (row for row in records if not isinstance(row, RowError))
    for row in itertools.islice(rows, LOOK):
        names.update(dict.fromkeys(row))
        if not fits:
            present = [name for name, value in row.items() if value is not None]
            layout = columns.choose(present, named, **choice)
            fits = layout is not None and _fits(layout, row)
            source.layout = layout if fits else source.layout or layout
        if fits and _fits(source.layout, row) and _is_unicode(row):
            source.rows.append(row)
    return names


def _fits(layout: columns.Columns, row: dict[str, Any]) -> bool:
    try:
        return bool(layout.conversations(row))
    except RowError:
        return False


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
