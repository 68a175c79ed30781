"""Records from files: JSON lines, CSV, Parquet, and data sets through ``datasets``.

A record is a row's columns as a dict. A row that cannot be read becomes a
:class:`rmfast.data.RowError` in its place, and reading goes on. Nothing is read ahead: a file may
be larger than memory.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from rmfast.data import sources
from rmfast.data.sources import file_format, need
from rmfast.data.values import (
    from_arrow,
    has_arrow_json,
    kind_of,
    parse_json,
    read_json,
    without_inner_nulls,
)
from rmfast.errors import DataError, RowError

if TYPE_CHECKING:
    import pyarrow

_ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json")  # of a folder, and no data
_LONGEST_CELL = 64 << 20  # characters of CSV: a quote that is never closed ends there
_BATCH = 1024  # rows of Parquet in memory


class Record(NamedTuple):
    """One row.

    Attributes:
        number: 1-based: the line it begins at (JSON lines, CSV), else the row; of several files
            ``"FILE:NUMBER"``.
        raw: its source: a line of JSON (stripped), the cells of a CSV row, a
            ``(RecordBatch, index)``; None for a data set and where ``value`` is an error.
    """

    number: int | str
    value: dict[str, Any] | RowError  # its columns, or why it cannot be read
    position: int | None  # how far the reader is, of Reader.total
    raw: Any = None


class Reader:
    """Reads the records of files, a folder or a data set on the hub, any number of times.

    Args:
        source: a file (JSON lines, one list of JSON, or CSV, with ``.gz`` or ``.zst`` too; or
            Parquet); several of one kind, as a pattern (``"data/*.jsonl"``) or with commas between
            them; ``"-"``, JSON lines from stdin; or what ``datasets`` loads: a folder, or a name on
            the hub. A list of JSON is read whole.
        name, split: configuration and split of a data set.
        limit: stop after so many rows.
        shard: ``(i, n)``: of these rows, i and each n-th after it, counted from 0.

    Raises:
        DataError: the file or data set does not exist, or cannot be opened.
    """

    format: str  # jsonl, csv, parquet or dataset
    columns: list[str] | None = None  # None: not known before the first row
    schema: pyarrow.Schema | None = None  # of Parquet, and of a data set where it is known
    total: int | None = None  # what Record.position goes up to
    unit = "row"  # of total and position; or "B", bytes of the file as it is on disk

    def __new__(cls, source: str | Path, **_: Any) -> Reader:
        found = ["-.jsonl"] if str(source) == "-" else sources.find(str(source))
        classes = {"jsonl": _JsonLines, "csv": _Csv, "parquet": _Parquet}
        one = classes[file_format(found[0])[0]] if found else _DataSet
        reader = super().__new__(_Several if len(found) > 1 else one)
        reader.paths = found
        return reader

    def __init__(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        split: str = "train",
        limit: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.source, self.name, self.split = str(source), name, split
        self.limit, self.shard = limit, shard
        self._stdin = None
        if self.source == "-":
            self.source, self._stdin = "stdin", sources.spooled()
            self.paths = [self._stdin.name]
        self._begin()
        double = next((x for x in self.columns or () if self.columns.count(x) > 1), None)
        if double is not None:
            raise DataError(f'{source}: two columns are named "{double}"')
        if limit is not None and self.total is not None and self.unit == "row":
            self.total = min(self.total, limit)

    def plain(self, value: Any) -> Any:
        """A record's value as it was written: Arrow gives every object the keys of all."""
        is_arrow = self.format in ("parquet", "dataset") and isinstance(value, dict)
        return without_inner_nulls(value) if is_arrow else value

    def identity(self) -> dict[str, Any]:
        """What identifies this input and its present content, for ``--resume``."""
        if self._stdin is not None:
            return {"path": "-", "the text": self._stdin.digest}
        stat = os.stat(self.paths[0])
        path = os.path.abspath(self.paths[0])
        return {"path": path, "size": stat.st_size, "time": stat.st_mtime_ns}

    def read(self, skip: int = 0) -> Iterator[Record]:
        """The records after the first ``skip``, which are not parsed."""
        index, count = self.shard
        start = index + skip * count
        stop = None if self.limit is None else max(0, self.limit - start)
        return itertools.islice(self._records(start), 0, stop, count)


# A class for each format: _begin finds what is known before the first row, _records reads the rows


class _Text(Reader):
    """A file of lines: ``_rows`` numbers its rows, ``_parse`` reads one."""

    unit = "B"
    _headers = 0  # rows before the first record

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[BinaryIO, Iterator[bytes]]]:
        """The file as it is on disk, and its lines."""
        (path,) = self.paths
        try:
            with open(path, "rb") as file:
                self.total = os.fstat(file.fileno()).st_size
                yield file, sources.lines(file, path)
        except OSError as error:
            raise DataError(f"{self.source}: cannot be read: {error.strerror or error}") from None

    def _records(self, skip: int) -> Iterator[Record]:
        with self._opened() as (file, lines):
            for number, row in itertools.islice(self._rows(lines), self._headers + skip, None):
                try:
                    if isinstance(row, RowError):
                        raise row
                    record = Record(number, self._parse(row), file.tell(), row)
                except RowError as error:
                    record = Record(number, error, file.tell())
                yield record


class _JsonLines(_Text):
    format = "jsonl"
    _list: list[Any] | None = None
    _parse = staticmethod(parse_json)

    def _begin(self) -> None:
        with self._opened() as (_, lines):
            rows = [row for _, row in itertools.islice(self._rows(lines), 2)]
        if not rows or isinstance(rows[0], RowError) or not rows[0].startswith(b"["):
            return
        if len(rows) > 1 and rows[0].endswith(b"]"):
            return  # a line that is a bad row
        try:
            with self._opened() as (_, lines):
                self._list = read_json(b"".join(lines).decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.source}: a list of JSON that cannot be read: {error}") from None

    def _records(self, skip: int) -> Iterator[Record]:
        if self._list is None:
            yield from super()._records(skip)
            return
        for number, value in enumerate(self._list[skip:], start=skip + 1):
            if not isinstance(value, dict):
                value = RowError(f"an item must be a JSON object, this is {kind_of(value)}")
            yield Record(number, value, None)

    def _rows(self, lines: Iterator[bytes]) -> Iterator[tuple[int, bytes | RowError]]:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line := line.strip():
                    yield number, line
        except RowError as error:
            yield number + 1, error


class _Csv(_Text):
    format = "csv"
    _headers = 1

    def _begin(self) -> None:
        with self._opened() as (_, lines):
            number, header = next(self._rows(lines), (1, []))
        if isinstance(header, RowError):
            raise DataError(f"{self.source}:{number}: no header can be read: {header}")
        self.columns = header

    def _rows(self, lines: Iterator[bytes]) -> Iterator[tuple[int, list[str] | RowError]]:
        csv.field_size_limit(max(_LONGEST_CELL, csv.field_size_limit()))  # of the whole process
        # bytes that are not UTF-8 become half surrogates, which cannot be encoded again
        rows = csv.reader((x.decode("utf-8", "surrogateescape") for x in lines), strict=True)
        while True:
            number = rows.line_num + 1
            try:
                if cells := next(rows):
                    "".join(cells).encode()
                    yield number, cells
            except StopIteration:
                return
            except UnicodeEncodeError:
                yield number, RowError("not UTF-8")
            except csv.Error as error:
                yield number, RowError(f"not CSV: {error}")
            except RowError as error:
                yield number, error

    def _parse(self, cells: list[str]) -> dict[str, str]:
        if len(cells) != len(self.columns):
            raise RowError(f"{len(cells)} cells, and the header names {len(self.columns)}")
        return dict(zip(self.columns, cells, strict=True))


class _Parquet(Reader):
    format = "parquet"

    def _begin(self) -> None:
        need("pyarrow", self.source)
        import pyarrow

        try:
            with self._opened() as file:
                self.schema, self.total = file.schema_arrow, file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.source}: not Parquet that can be read: {error}") from None
        self.columns = self.schema.names

    def _opened(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.paths[0])

    def _records(self, skip: int) -> Iterator[Record]:
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
                    raise DataError(f"{self.source}: damaged after row {number}: {error}") from None


def _values(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | RowError]:
    try:
        return to_records(batch)
    except (ValueError, OverflowError):  # a time beyond Python's, text that is not UTF-8
        return [_value(batch, i) for i in range(batch.num_rows)]


def _value(batch: pyarrow.RecordBatch, i: int) -> dict[str, Any] | RowError:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = from_arrow(batch.schema.field(name), column[i].as_py())
        except (ValueError, OverflowError) as error:
            return RowError(f'"{name}" cannot be read: {error}')
    return value


class _Several(Reader):
    """Files of one kind, one after the other."""

    def _begin(self) -> None:
        self.readers = [Reader(path) for path in self.paths]
        first = self.readers[0]
        self.format, self.unit = first.format, first.unit
        self.columns, self.schema = first.columns, first.schema
        self.total = sum(reader.total for reader in self.readers)
        for reader in self.readers:
            if (reader.columns, reader.schema) != (self.columns, self.schema):
                raise DataError(f"{reader.source} has other columns than {first.source}")

    def identity(self) -> dict[str, Any]:
        found = [reader.identity() for reader in self.readers]
        return {name: [one[name] for one in found] for name in found[0]}

    def _records(self, skip: int) -> Iterator[Record]:
        return itertools.islice(self._all(), skip, None)

    def _all(self) -> Iterator[Record]:
        before = 0
        for reader in self.readers:
            for number, value, position, raw in reader.read():
                position = None if position is None else before + position
                yield Record(f"{reader.source}:{number}", value, position, raw)
            before += reader.total


def to_records(table: pyarrow.RecordBatch | pyarrow.Table) -> list[dict[str, Any]]:
    """The rows of a table, also where columns have Arrow's JSON type, which it reads as text."""
    rows = table.to_pylist()
    fields = [field for field in table.schema if has_arrow_json(field)]
    for row in rows if fields else ():
        row |= {field.name: from_arrow(field, row[field.name]) for field in fields}
    return rows


class _DataSet(Reader):
    """A data set of the hub, or a folder, streamed."""

    format = "dataset"

    def _begin(self) -> None:
        need("datasets", f"{self.source}: a data set")
        import datasets

        saved = [Path(self.source) / name for name in ("state.json", "dataset_dict.json")]
        with self._naming("neither a file nor a data set that can be loaded"):
            if any(file.is_file() for file in saved):
                data = datasets.load_from_disk(self.source)
                data = data[self.split] if isinstance(data, datasets.DatasetDict) else data
                self.data, self.total = data.to_iterable_dataset(), data.num_rows
            else:
                path = os.path.abspath(self.source) if os.path.isdir(self.source) else self.source
                builder = datasets.load_dataset_builder(path, self.name)  # "csv" may be a folder
                self.data = builder.as_streaming_dataset(self.split)
                info = (self.data.info.splits or {}).get(self.split)
                self.total = info.num_examples if info is not None else None
                self._check_files(builder.config.data_files or {})
        self.columns = self.data.column_names
        features = self.data.features
        self.schema = None if features is None else features.arrow_schema

    def _files(self) -> list[Path]:
        """What lies in the folder and is not hidden."""
        folder = Path(self.source)
        files = [(x, x.relative_to(folder).parts) for x in sorted(folder.rglob("*")) if x.is_file()]
        return [x for x, parts in files if not any(y.startswith((".", "__")) for y in parts)]

    def _check_files(self, splits: dict[str, list[str]]) -> None:
        """Raise DataError where the folder has files that no split has."""
        card = Path(self.source) / "README.md"
        if card.is_file() and b"data_files:" in card.read_bytes():
            return  # it says which they are
        read = {os.path.realpath(file) for files in splits.values() for file in files}
        data = [file for file in self._files() if file_format(file) and file.name not in _ABOUT]
        unread = [str(file) for file in data if os.path.realpath(file) not in read]
        if unread:
            raise DataError(
                f"{self.source}: datasets reads other files of it, and not {unread[0]}: name files "
                f"of one kind, such as {self.source}/*{Path(unread[0]).suffix}"
            )

    @contextlib.contextmanager
    def _naming(self, problem: str) -> Iterator[None]:
        """Turns whatever the hub, the network or the files raise into a DataError."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.source}: {problem}: {reason[:400]}") from None

    def identity(self) -> dict[str, Any]:
        found = {"path": self.source, "name": self.name, "split": self.split}
        if not os.path.isdir(self.source):
            return found
        path = os.path.abspath(self.source)
        stats = ((os.path.relpath(file, path), os.stat(file)) for file in self._files())
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        digest = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
        return found | {"path": path, "the files": digest}

    def _records(self, skip: int) -> Iterator[Record]:
        rows = iter(self.data.skip(skip))
        for number in itertools.count(skip + 1):
            with self._naming(f"reading stopped after row {number - 1}"):
                value = next(rows, None)
            if value is None:
                return
            yield Record(number, dict(value), number)
