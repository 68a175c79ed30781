"""Records from files: JSON lines, CSV, Parquet, and data sets through ``datasets``.

A record is a row's columns as a dict. What cannot be read as one comes out as a
:class:`rmfast.data.RowError` in its place, and reading goes on. Nothing is read ahead: a file may
be larger than memory.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from rmfast.data.values import kind_of, parse_json, why_not_unicode
from rmfast.errors import DataError, RowError

if TYPE_CHECKING:
    import pyarrow

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
KINDS = ".jsonl, .jsonl.gz, .csv, .csv.gz or .parquet"
_LONGEST_CELL = 64 << 20  # characters of CSV: a quote that is never closed ends there
_BATCH = 1024  # rows of Parquet in memory


class Record(NamedTuple):
    """One row.

    Attributes:
        number: 1-based: the line it begins at (JSON lines, CSV), else the row.
        value: its columns, or why it cannot be read.
        position: how far the reader is, against ``Reader.total``; None where nobody knows.
        raw: what it was read from: a line of JSON (stripped), the cells of a CSV row, a
            ``(RecordBatch, index)``; None for a data set and where ``value`` is an error.
    """

    number: int
    value: dict[str, Any] | RowError
    position: int | None
    raw: Any = None


def file_format(path: str | Path) -> tuple[str, bool] | None:
    """``"jsonl"``, ``"csv"`` or ``"parquet"``, and whether gzip is around it; None: neither."""
    name = str(path).lower()
    gzipped = name.endswith(".gz")
    kind = FORMATS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    return None if kind is None or (kind == "parquet" and gzipped) else (kind, gzipped)


class Reader:
    """The records of a file, a folder or a data set on the hub, as often as wanted.

    Args:
        source: a file (JSON lines or CSV, ``.gz`` too, or Parquet); or what ``datasets`` loads: a
            folder, or a name on the hub.
        name: configuration of a data set.
        split: split of a data set.
        limit: stop after so many records.
        lists: a file may also be one list of JSON objects, which is read whole.

    Attributes:
        format: ``"jsonl"``, ``"csv"``, ``"parquet"`` or ``"dataset"``.
        columns: names of the columns, where they are known before the first row.
        schema: Arrow schema of a Parquet file, else None.
        total: what ``Record.position`` goes up to, or None.
        unit: of ``total`` and ``position``: ``"B"`` of the file as it is on disk, or ``"row"``.

    Raises:
        DataError: there is no such file or data set, or not a row of it can be read.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        split: str = "train",
        limit: int | None = None,
        lists: bool = False,
    ) -> None:
        self.source, self.limit = str(source), limit
        self._file = _open(self.source, name, split, lists)
        self.format: str = self._file.format
        self.columns: list[str] | None = self._file.columns
        self.schema: pyarrow.Schema | None = self._file.schema
        self.total: int | None = self._file.total
        self.unit: str = self._file.unit
        if limit is not None and self.unit == "row" and self.total is not None:
            self.total = min(self.total, limit)

    def identity(self) -> dict[str, Any]:
        """What tells this input from another, or from itself before somebody changed it."""
        return self._file.identity()

    def read(self, skip: int = 0) -> Iterator[Record]:
        """The records after the first ``skip``, which are passed over without a look inside."""
        stop = None if self.limit is None else max(0, self.limit - skip)
        return itertools.islice(self._file.read(skip), stop)


def _open(source: str, name: str | None, split: str, lists: bool) -> Any:
    found = file_format(source)
    if os.path.isfile(source):
        if found is None:
            raise DataError(f"{source}: its name must end with {KINDS}, to say what it is")
        kind, gzipped = found
        if kind == "parquet":
            return _Parquet(source)
        return _Csv(source, gzipped) if kind == "csv" else _JsonLines(source, gzipped, lists)
    if found is not None or not (os.path.isdir(source) or re.fullmatch(r"[\w./-]+", source)):
        raise DataError(f"{source}: no such file")
    return _DataSet(source, name, split)


def need(library: str, what: str) -> None:
    """See that an optional library is there.

    Raises:
        DataError: it is not; the message says how to install it.
    """
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise DataError(f"{what} needs {library}: pip install 'rmfast[data]'")


class _File:
    """A file, of whatever format."""

    columns: list[str] | None = None
    schema: pyarrow.Schema | None = None
    total: int | None

    def __init__(self, path: str) -> None:
        self.path = path

    def identity(self) -> dict[str, Any]:
        stat = os.stat(self.path)
        return {"path": os.path.abspath(self.path), "size": stat.st_size, "time": stat.st_mtime_ns}

    def name_columns(self, names: list[str]) -> None:
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise DataError(f'{self.path}: two columns are named "{double}"')
        self.columns = names


# --- files of lines


class _Text(_File):
    """Subclasses have ``rows``, which numbers rows of text, and ``parse``, which reads one."""

    unit = "B"

    def __init__(self, path: str, gzipped: bool) -> None:
        super().__init__(path)
        self.gzipped = gzipped

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, Iterator[bytes]]]:
        """The file as it is on disk, and its lines."""
        try:
            self.total = os.path.getsize(self.path)
            with open(self.path, "rb") as file:
                yield file, _lines(gzip.GzipFile(fileobj=file) if self.gzipped else file)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def read(self, skip: int) -> Iterator[Record]:
        with self.opened() as (file, lines):
            for number, raw in itertools.islice(self.rows(lines), skip, None):
                value = raw
                if not isinstance(raw, RowError):
                    try:
                        value = self.parse(raw)
                    except RowError as error:
                        value = error
                raw = None if isinstance(value, RowError) else raw
                yield Record(number, value, file.tell(), raw)


def _lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines without a byte order mark; a RowError where a gzip file is damaged, at the end."""
    try:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RowError(f"damaged gzip file, nothing after this is read: {error}") from None


class _JsonLines(_Text):
    format = "jsonl"

    def __init__(self, path: str, gzipped: bool, lists: bool) -> None:
        super().__init__(path, gzipped)
        self.list: list[Any] | None = None
        with self.opened() as (_, lines):
            _, first = next(self.rows(lines), (0, b""))
        if isinstance(first, RowError):  # told with its line when that is read
            return
        if lists and not gzipped and first.startswith(b"["):
            self.list = self._parse_list()
        elif first == b"[" or (first.startswith(b"[{") and not first.endswith(b"]")):
            raise DataError(
                f"{path} is one list of JSON: write each record on a line of its own, "
                f"such as with: jq -c '.[]' {path}"
            )

    def _parse_list(self) -> list[Any]:
        try:
            return json.loads(Path(self.path).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: a list of JSON that cannot be read: {error}") from None

    def read(self, skip: int) -> Iterator[Record]:
        if self.list is None:
            yield from super().read(skip)
            return
        for number, value in enumerate(self.list[skip:], start=skip + 1):
            if not isinstance(value, dict):
                value = RowError(f"an item must be a JSON object, this is {kind_of(value)}")
            yield Record(number, value, None)

    def rows(self, lines: Iterator[bytes]) -> Iterator[tuple[int, bytes | RowError]]:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line := line.strip():
                    yield number, line
        except RowError as error:
            yield number + 1, error

    parse = staticmethod(parse_json)


class _Csv(_Text):
    format = "csv"

    def __init__(self, path: str, gzipped: bool) -> None:
        super().__init__(path, gzipped)
        with self.opened() as (_, lines):
            number, header = next(self._all_rows(lines), (1, []))
        if isinstance(header, RowError):
            raise DataError(f"{path}:{number}: no header can be read: {header}")
        if why_not_unicode("".join(header)) is not None:
            raise DataError(f"{path}:{number}: the header is not UTF-8")
        self.name_columns(header)

    def rows(self, lines: Iterator[bytes]) -> Iterator[tuple[int, list[str] | RowError]]:
        return itertools.islice(self._all_rows(lines), 1, None)

    @staticmethod
    def _all_rows(lines: Iterator[bytes]) -> Iterator[tuple[int, list[str] | RowError]]:
        """Rows that are not empty, the header too.

        Bytes that are not UTF-8 become half surrogates, which are looked for row by row.
        """
        csv.field_size_limit(max(_LONGEST_CELL, csv.field_size_limit()))  # of the whole process
        text = (line.decode("utf-8", "surrogateescape") for line in lines)
        rows = csv.reader(text, strict=True)
        while True:
            number = rows.line_num + 1
            try:
                row: Any = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                row = RowError(f"not CSV: {error}")
            except RowError as error:
                row = error
            if row != []:
                yield number, row

    def parse(self, cells: list[str]) -> dict[str, str]:
        if len(cells) != len(self.columns):
            raise RowError(f"{len(cells)} cells, and the header names {len(self.columns)}")
        if why_not_unicode("".join(cells)) is not None:
            raise RowError("not UTF-8")
        return dict(zip(self.columns, cells, strict=True))


# --- Parquet and data sets


class _Parquet(_File):
    format = "parquet"
    unit = "row"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        need("pyarrow", path)
        import pyarrow

        try:
            with self._opened() as file:
                self.schema = file.schema_arrow
                self.total = file.metadata.num_rows
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not Parquet that can be read: {error}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        self.name_columns(self.schema.names)

    def _opened(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.path)

    def read(self, skip: int) -> Iterator[Record]:
        import pyarrow

        number = 0
        with self._opened() as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= skip:
                    number += rows
                    continue
                try:
                    for batch in file.iter_batches(_BATCH, row_groups=[group]):
                        for i, value in enumerate(_values(batch)):
                            number += 1
                            if number > skip:
                                raw = None if isinstance(value, RowError) else (batch, i)
                                yield Record(number, value, number, raw)
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(f"{self.path}: damaged after row {number}: {error}") from None


def _values(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | RowError]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # a time beyond Python's, text that is not UTF-8
        return [_value(batch, i) for i in range(batch.num_rows)]


def _value(batch: pyarrow.RecordBatch, i: int) -> dict[str, Any] | RowError:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = column[i].as_py()
        except (ValueError, OverflowError) as error:
            return RowError(f'"{name}" cannot be read: {error}')
    return value


class _DataSet:
    """A data set of the hub, or a folder, row by row as it comes in."""

    format = "dataset"
    unit = "row"
    schema = None

    def __init__(self, source: str, name: str | None, split: str) -> None:
        need("datasets", f"{source}: a data set")
        import datasets

        self.source, self.name, self.split = source, name, split
        saved = any((Path(source) / x).is_file() for x in ("state.json", "dataset_dict.json"))
        with self._errors("neither a file nor a data set that can be loaded"):
            if saved:
                data = datasets.load_from_disk(source)
                if isinstance(data, datasets.DatasetDict):
                    data = data[split]
                self.total = data.num_rows
                self.data = data.to_iterable_dataset()
            else:
                self.data = datasets.load_dataset(source, name, split=split, streaming=True)
                info = (self.data.info.splits or {}).get(split)
                self.total = info.num_examples if info is not None else None
        self.columns = self.data.column_names

    @contextlib.contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        """Whatever the hub, the network or the files raise, as one error."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.source}: {problem}: {reason[:400]}") from None

    def identity(self) -> dict[str, Any]:
        source = os.path.abspath(self.source) if os.path.isdir(self.source) else self.source
        return {"path": source, "name": self.name, "split": self.split}

    def read(self, skip: int) -> Iterator[Record]:
        number, rows = skip, iter(())
        with self._errors(f"reading stopped after row {skip}"):
            rows = iter(self.data.skip(skip))
        for number in itertools.count(skip + 1):
            with self._errors(f"reading stopped after row {number - 1}"):
                value = next(rows, None)
            if value is None:
                return
            yield Record(number, dict(value), number)
