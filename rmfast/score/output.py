"""Scored rows into JSON lines, CSV or Parquet, so that a killed run can be resumed.

An output takes rows in two steps: ``prepare`` turns a record into what will be written, or raises
RowError, before it is scored; ``write`` adds the scores to prepared rows. When ``write`` returns,
its rows are on the disk. ``mark`` says how much is: an output opened with an earlier mark cuts off
what was written after it.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rmfast.data import columns, files, sources
from rmfast.errors import RowError, UserError
from rmfast.score.parquet import Parquet, schema_of
from rmfast.score.source import Source
from rmfast.score.start import STDOUT, beside

_REASON = 1000  # characters: what a tokenizer's template says may be long


def open_output(path: Path, source: Source, mark: int = 0) -> JsonLines | Csv | Parquet:
    """The output of the format that a file's name says; so much of it stays as ``mark`` says."""
    kind, packed = sources.file_format(path) or ("jsonl", None)  # stdout
    if kind == "jsonl":
        return JsonLines(path, packed, source, mark)
    return Csv(path, packed, source, mark) if kind == "csv" else Parquet(path, source, mark)


def check(path: Path, source: Source) -> None:
    """Raise what :func:`open_output` would raise for its columns, before a model is loaded."""
    kind, packed = sources.file_format(path) or ("jsonl", None)
    if kind == "parquet":
        schema_of(path, source)
    elif packed == "zst":
        sources.need("pyarrow", str(path))


class Appended:
    """A file that grows by whole pieces; packed, a member or frame each. Or else a stream."""

    def __init__(
        self, path: Path, packed: str | None, mark: int, stream: BinaryIO | None = None
    ) -> None:
        self._packed, self._is_file = packed, stream is None
        self._file = stream or open(path, "ab")  # noqa: SIM115 (closed by close)
        if not self._is_file:
            return
        if self._file.tell() < mark:
            self._file.close()
            raise UserError(
                f"{path} is shorter than when it was last written: start again with --overwrite"
            )
        self._file.truncate(mark)
        self._file.seek(mark)

    def append(self, data: bytes) -> None:
        self._file.write(_pack(data, self._packed))
        self._file.flush()
        if self._is_file:
            os.fsync(self._file.fileno())

    def mark(self) -> int:
        return self._file.tell() if self._is_file else 0

    def close(self) -> None:
        if self._is_file:
            with contextlib.suppress(OSError):  # what a full disk did not take is after the mark
                self._file.close()


def _pack(data: bytes, packed: str | None) -> bytes:
    if packed == "zst":
        import pyarrow

        return pyarrow.compress(data, codec="zstd", asbytes=True)
    return data if packed is None else gzip.compress(data, mtime=0)


class Errors(Appended):
    """The rows that an output leaves out: a line of JSON each, and no file if there are none."""

    def __init__(self, path: Path, mark: int) -> None:
        self._path = beside(path, "errors.jsonl")
        super().__init__(self._path, None, mark, sys.stderr.buffer if path == STDOUT else None)

    def write(self, rows: Sequence[tuple[int | str, RowError]]) -> None:
        text = ""
        for number, error in rows:
            line = {"line": number, "reason": str(error)[:_REASON], "kind": error.kind}
            text += json.dumps(line, ensure_ascii=False) + "\n"
        if text:
            self.append(text.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        empty = self._is_file and self.mark() == 0
        super().close()
        if empty:
            self._path.unlink()


class JsonLines(Appended):
    """A line a row: that of the input, where that is JSON lines too, with the scores put in."""

    def __init__(self, path: Path, packed: str | None, source: Source, mark: int) -> None:
        super().__init__(path, packed, mark, sys.stdout.buffer if path == STDOUT else None)
        names = [json.dumps(name, ensure_ascii=False) for name in source.layout.added]
        self._keys = [f", {name}: ".encode() for name in names]

    def prepare(self, record: files.Record) -> bytes:
        """The row's object, without its closing brace."""
        if isinstance(record.raw, bytes):
            return record.raw[:-1].rstrip()
        return to_json(record.value)[:-1].encode()

    def write(self, rows: Sequence[tuple[bytes, list[columns.Scores]]]) -> None:
        if rows:
            self.append(b"".join(map(self._line, *zip(*rows, strict=True))))

    def _line(self, prepared: bytes, scores: list[columns.Scores]) -> bytes:
        values = [as_text(score).encode() for score in scores]
        return prepared + b"".join(map(bytes.__add__, self._keys, values)) + b"}\n"

    def finish(self) -> None:
        if self._packed is not None and self.mark() == 0:
            self.append(b"")


class Csv(Appended):
    """A header, then a record a row. What is not text is written as JSON."""

    def __init__(self, path: Path, packed: str | None, source: Source, mark: int) -> None:
        super().__init__(path, packed, mark)
        self._source = source

    def prepare(self, record: files.Record) -> list[str]:
        """The row's cells."""
        self._source.check_columns(record.value)
        if isinstance(record.raw, list):
            return record.raw
        return [_as_cell(record.value.get(name)) for name in self._source.names]

    def write(self, rows: Sequence[tuple[list[str], list[columns.Scores]]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        if self.mark() == 0:
            writer.writerow([*self._source.names, *self._source.layout.added])
        writer.writerows([*cells, *map(as_text, scores)] for cells, scores in rows)
        if text.tell():
            self.append(text.getvalue().encode())

    def finish(self) -> None:
        self.write([])  # of an empty file, the header


def as_text(score: columns.Scores) -> str:
    """The shortest decimal that gives the same fp32; several as a list of JSON."""
    if isinstance(score, np.ndarray):
        return f"[{', '.join(map(str, score))}]"
    return str(score)


def to_json(value: Any) -> str:
    """JSON, with types that it does not have as text."""
    try:
        return _unicode(json.dumps(value, ensure_ascii=False, default=_plain))
    except TypeError as error:
        raise RowError(str(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, (decimal.Decimal, datetime.timedelta, uuid.UUID)):
        return str(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _as_cell(value: Any) -> str:
    """Text as it is; other values as JSON, but without the quotes of a time or of bytes."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _unicode(value)
    text = to_json(value)
    return json.loads(text) if text.startswith('"') else text


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("it has half a surrogate pair, which only JSON lines can keep") from None
    return text
