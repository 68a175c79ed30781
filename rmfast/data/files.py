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
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rmfast.data.values import kind_of, parse_json
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
LONGEST = 64 << 20  # bytes of a line, and characters of a CSV cell
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

    Attributes:
        format: ``"jsonl"``, ``"csv"``, ``"parquet"`` or ``"dataset"``.
        columns: names of the columns, where they are known before the first row.
        schema: Arrow schema of a Parquet file, and of a data set where it is known; else None.
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
    ) -> None:
        self.source, self.limit = str(source), limit
        self._open = _choose(self.source, name, split)
        self.format: str = self._open.format
        self.columns: list[str] | None = self._open.columns
        self.schema: pyarrow.Schema | None = self._open.schema
        self.total: int | None = self._open.total
        self.unit: str = self._open.unit
        if limit is not None and self.unit == "row" and self.total is not None:
            self.total = min(self.total, limit)

    def identity(self) -> dict[str, Any]:
        """What tells this input from another, or from itself before somebody changed it."""
        return self._open.identity()

    def read(self, skip: int = 0) -> Iterator[Record]:
        """The records after the first ``skip``, which are passed over without a look inside."""
        stop = None if self.limit is None else max(0, self.limit - skip)
        return itertools.islice(self._open.read(skip), stop)


def _choose(source: str, name: str | None, split: str) -> Any:
    found = file_format(source)
    if os.path.isfile(source):
        if found is None:
            raise DataError(f"{source}: its name must end with {KINDS}, to say what it is")
        kind, gzipped = found
        with _system_errors(source):
            return _Parquet(source) if kind == "parquet" else _TEXT[kind](source, gzipped)
    if found is not None or not (os.path.isdir(source) or re.fullmatch(r"[\w./-]+", source)):
        raise DataError(f"{source}: no such file")
    return _DataSet(source, name, split)


@contextlib.contextmanager
def _system_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from None


class _Lines:
    """The lines of a file, as bytes. None is longer than LONGEST: such a one is passed over.

    Raises:
        RowError: from ``next``, for a line too long, and for damage to a gzip file, which ends it.
            The next call goes on.
        DataError: the system cannot read on.
    """

    def __init__(self, path: str, gzipped: bool) -> None:
        self.path, self.number, self._ended, self._bytes = path, 0, False, 0
        with _system_errors(path):
            self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._text = gzip.GzipFile(fileobj=self._file) if gzipped else self._file

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line = self._readline()
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) <= LONGEST or line.endswith(b"\n"):
            return line
        while (line := self._readline()) and not line.endswith(b"\n"):
            pass
        raise RowError(f"a line of more than {LONGEST:,} bytes")

    def _readline(self) -> bytes:
        if self._ended:
            return b""
        with _system_errors(self.path):
            try:
                line = self._text.readline(LONGEST + 1)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                self._ended = True
                self.number += 1
                raise RowError(f"damaged gzip file, nothing after this is read: {error}") from None
        self._bytes += len(line)
        return line

    @property
    def position(self) -> int:
        return self._bytes if self._text is self._file else self._file.tell()

    def close(self) -> None:
        self._text.close()
        self._file.close()


class _Text:
    """A file of lines."""

    format: str
    columns: list[str] | None = None
    schema = None
    unit = "B"

    def __init__(self, path: str, gzipped: bool) -> None:
        self.path, self.gzipped = path, gzipped
        self.total = os.path.getsize(path)
        self._begin()

    def _begin(self) -> None:
        """Look at the beginning of the file."""
        raise NotImplementedError

    def lines(self) -> contextlib.closing[_Lines]:
        return contextlib.closing(_Lines(self.path, self.gzipped))

    def identity(self) -> dict[str, Any]:
        return _file_identity(self.path)


def _file_identity(path: str) -> dict[str, Any]:
    about = os.stat(path)
    return {"path": os.path.abspath(path), "size": about.st_size, "time": about.st_mtime_ns}


class _JsonLines(_Text):
    format = "jsonl"

    def _begin(self) -> None:
        with self.lines() as lines:
            first = b""
            with contextlib.suppress(RowError):  # told with its line when that is read
                first = next((line.strip() for line in lines if line.strip()), b"")
        if first == b"[" or (first.startswith(b"[{") and not first.endswith(b"]")):
            raise DataError(
                f"{self.path} is one list of JSON: write each record on a line of its own, "
                f"such as with: jq -c '.[]' {self.path}"
            )

    def read(self, skip: int) -> Iterator[Record]:
        with self.lines() as lines:
            while True:
                line, problem = None, None
                try:
                    line = next(lines).strip()
                except StopIteration:
                    return
                except RowError as error:
                    problem = error
                if line == b"":
                    continue
                if skip > 0:
                    skip -= 1
                    continue
                yield Record(lines.number, *self._parse(line, problem, lines.position))

    def _parse(self, line: bytes | None, problem: RowError | None, position: int) -> tuple:
        if problem is not None:
            return problem, position
        try:
            value = parse_json(line)
        except RowError as error:
            return error, position
        if not isinstance(value, dict):
            problem = RowError(f"a line must be a JSON object, this is {kind_of(value)}")
            return problem, position
        return value, position, line


class _Csv(_Text):
    format = "csv"

    def _begin(self) -> None:
        with self.lines() as lines:
            try:
                self.columns = next(filter(None, self._rows(lines)), [])
            except (RowError, csv.Error) as error:
                raise DataError(f"{self.path}:1: no header can be read: {error}") from None
        if not _is_utf8(self.columns):
            raise DataError(f"{self.path}:1: the header is not UTF-8")
        _no_name_twice(self.path, self.columns)

    @staticmethod
    def _rows(lines: _Lines) -> Iterator[list[str]]:
        csv.field_size_limit(max(LONGEST, csv.field_size_limit()))  # one for the whole process
        # a generator would end with the first line that raises, a map goes on
        return csv.reader(map(_decoded, lines), strict=True)

    def read(self, skip: int) -> Iterator[Record]:
        with self.lines() as lines:
            rows = self._rows(lines)
            next(filter(None, rows), None)
            while True:
                number = lines.number + 1
                cells, problem = None, None
                try:
                    cells = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    problem = RowError(f"not CSV: {error}")
                except RowError as error:
                    problem = error
                if cells == []:
                    continue
                if skip > 0:
                    skip -= 1
                    continue
                yield Record(number, *self._check(cells, problem, lines.position))

    def _check(self, cells: list[str] | None, problem: RowError | None, position: int) -> tuple:
        if problem is not None:
            return problem, position
        if len(cells) != len(self.columns):
            problem = RowError(f"{len(cells)} cells, and the header names {len(self.columns)}")
            return problem, position
        if not _is_utf8(cells):
            return RowError("not UTF-8"), position
        return dict(zip(self.columns, cells, strict=True)), position, cells


_TEXT = {"jsonl": _JsonLines, "csv": _Csv}


def _decoded(line: bytes) -> str:
    """What is not UTF-8 becomes half surrogates, which UTF-8 cannot hold: to be found row by row"""
    return line.decode("utf-8", "surrogateescape")


def _is_utf8(cells: list[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_name_twice(source: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f'{source}: two columns are named "{twice}"')


def need(library: str, what: str) -> None:
    """See that an optional library is there.

    Raises:
        DataError: it is not; the message says how to install it.
    """
    import importlib.util

    if importlib.util.find_spec(library) is None:
        raise DataError(f"{what} needs {library}: pip install 'rmfast[data]'")


class _Parquet:
    format = "parquet"
    unit = "row"

    def __init__(self, path: str) -> None:
        need("pyarrow", path)
        import pyarrow

        self.path = path
        try:
            with self._opened() as file:
                self.schema = file.schema_arrow
                self.total = file.metadata.num_rows
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not Parquet that can be read: {error}") from None
        self.columns = self.schema.names
        _no_name_twice(path, self.columns)

    def _opened(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.path)

    def identity(self) -> dict[str, Any]:
        return _file_identity(self.path)

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
                        if number + batch.num_rows <= skip:
                            number += batch.num_rows
                            continue
                        for i, value in enumerate(_records(batch)):
                            number += 1
                            if number > skip:
                                raw = None if isinstance(value, RowError) else (batch, i)
                                yield Record(number, value, number, raw)
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(f"{self.path}: damaged after row {number}: {error}") from None


def _records(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    columns = [_values(name, batch.column(i)) for i, name in enumerate(batch.schema.names)]
    for row in zip(*columns, strict=True):
        problem = next((value for value in row if isinstance(value, RowError)), None)
        yield problem or dict(zip(batch.schema.names, row, strict=True))


def _values(name: str, column: pyarrow.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # a time beyond Python's, text that is not UTF-8
        return [_value(name, scalar) for scalar in column]


def _value(name: str, scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return RowError(f'"{name}" cannot be read: {error}')


class _DataSet:
    """A data set of the hub, or a folder, row by row as it comes in."""

    format = "dataset"
    unit = "row"

    def __init__(self, source: str, name: str | None, split: str) -> None:
        need("datasets", f"{source}: a data set")
        import datasets

        self.source, self.name, self.split = source, name, split
        try:
            if any((Path(source) / file).is_file() for file in ("state.json", "dataset_dict.json")):
                data = datasets.load_from_disk(source)
                if isinstance(data, datasets.DatasetDict):
                    data = data[split]
                self.total = data.num_rows
                data = data.to_iterable_dataset()
            else:
                data = datasets.load_dataset(source, name, split=split, streaming=True)
                about = (data.info.splits or {}).get(split)
                self.total = about.num_examples if about is not None else None
        except Exception as error:  # of the hub, the network, the files: the kinds are many
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{source}: neither a file nor a data set that can be loaded: {reason[:400]}"
            ) from None
        self.data = data
        self.columns = data.column_names
        self.schema = None if data.features is None else data.features.arrow_schema

    def identity(self) -> dict[str, Any]:
        source = os.path.abspath(self.source) if os.path.isdir(self.source) else self.source
        return {"path": source, "name": self.name, "split": self.split}

    def read(self, skip: int) -> Iterator[Record]:
        number = skip
        try:
            for value in self.data.skip(skip):
                number += 1
                yield Record(number, dict(value), number)
        except Exception as error:  # as above; GeneratorExit is none
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.source}: reading stopped after row {number}: {reason[:400]}"
            ) from None
