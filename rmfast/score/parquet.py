"""Parquet output: a part for each window, joined at the end."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast.data import columns, files
from rmfast.data.values import kind_of
from rmfast.errors import RowError, UserError
from rmfast.resume import put_in_place
from rmfast.score.source import INSTEAD, Source
from rmfast.score.start import beside

if TYPE_CHECKING:
    import pyarrow


_GROUP = 32 << 20  # bytes of a Parquet row group, about


class Parquet:
    """A part for each window in a folder beside the file; at the end one file.

    Columns keep the types of a Parquet input or a data set; those of CSV are text; those of JSON
    lines have the types of the first rows.
    """

    def __init__(self, path: Path, source: Source, mark: int) -> None:
        import pyarrow

        self.path, self._source, self._count = path, source, mark
        self._given = schema_of(path, source)
        score = pyarrow.float32()
        if source.layout.kind == "responses":
            score = pyarrow.list_(score)
        self._added = [pyarrow.field(name, score) for name in source.layout.added]
        fields = [*self._given, *self._added]
        self._schema = pyarrow.schema(fields, self._given.metadata)
        self._folder = beside(path, "parts")
        self._folder.mkdir(exist_ok=True)
        kept = [self._part(number) for number in range(mark)]
        for file in set(_parts(self._folder)) - set(kept):
            file.unlink()
        if not all(file.exists() for file in kept):
            raise UserError(f"{self._folder} lacks a part: start again with --overwrite")

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:06d}.parquet"

    def prepare(self, record: files.Record) -> pyarrow.RecordBatch:
        """The row as a batch of one."""
        import pyarrow

        if isinstance(record.raw, tuple):  # of a Parquet file
            batch, index = record.raw
            return batch.slice(index, 1)
        self._source.check_columns(record.value)
        values = [_array(field, record.value.get(field.name)) for field in self._given]
        return pyarrow.RecordBatch.from_arrays(values, schema=self._given)

    def write(self, rows: Sequence[tuple[pyarrow.RecordBatch, list[columns.Scores]]]) -> None:
        import pyarrow

        if not rows:
            return
        batches, scores = zip(*rows, strict=True)
        table = pyarrow.Table.from_batches(batches, self._given).combine_chunks()
        for field, values in zip(self._added, zip(*scores, strict=True), strict=True):
            table = table.append_column(field, pyarrow.array(list(values), field.type))
        self._save(self._part(self._count), iter([table]))
        self._count += 1

    def mark(self) -> int:
        return self._count

    def finish(self) -> None:
        from pyarrow import parquet

        parts = (self._part(number) for number in range(self._count))
        self._save(self.path, (parquet.read_table(part) for part in parts))

    def _save(self, path: Path, tables: Iterator[pyarrow.Table]) -> None:
        """Write tables, in row groups of a good size, and put the file in place whole."""
        import pyarrow
        from pyarrow import parquet

        beside = path.with_name(path.name + ".tmp")
        waiting, size = [], 0
        with parquet.ParquetWriter(beside, self._schema) as writer:
            for table in tables:
                waiting.append(table)
                size += table.nbytes
                if size >= _GROUP:
                    writer.write_table(pyarrow.concat_tables(waiting))
                    waiting, size = [], 0
            if waiting:
                writer.write_table(pyarrow.concat_tables(waiting))
        put_in_place(beside, path)

    def close(self) -> None:
        """Nothing is open: parts are closed when they are written."""


def schema_of(path: Path, source: Source) -> pyarrow.Schema:
    """The schema of the input's columns; UserError: no type of Parquet holds one's values."""
    files.need("pyarrow", str(path))
    import pyarrow
    from pyarrow import parquet

    reader = source.reader
    if reader.schema is not None:
        for field in reader.schema if reader.format == "dataset" else ():
            if "extension<" in str(field.type):  # such as JSON: its values come as objects
                raise UserError(f'--output {path}: "{field.name}" is {field.type}: {INSTEAD}')
        return reader.schema
    if reader.format == "csv":
        return pyarrow.schema([(name, pyarrow.string()) for name in source.names])
    fields = []
    for name in source.names:
        try:
            field = pyarrow.field(name, pyarrow.array(source.column(name)).type)
            # Parquet has no place for objects without fields
            parquet.ParquetWriter(io.BytesIO(), pyarrow.schema([field])).close()
        except (pyarrow.ArrowException, OverflowError, NotImplementedError) as error:
            raise UserError(
                f"--output {path}: a Parquet column has one type, and no type holds the values of "
                f'"{name}" ({error}): {INSTEAD}'
            ) from None
        fields.append(field)
    return pyarrow.schema(fields)


def _array(field: pyarrow.Field, value: Any) -> pyarrow.Array:
    """A value of a column; RowError: the column's type does not hold it."""
    import pyarrow

    try:
        array = pyarrow.array([value], field.type)
        if _same(value, array[0].as_py()):
            return array
    except UnicodeEncodeError:
        raise RowError("it has half a surrogate pair, which only JSON lines can keep") from None
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        pass
    what = f"{kind_of(value)} that is not of the column's type {field.type}"
    raise RowError(f'"{field.name}" is {what}: {INSTEAD}')


def _same(value: Any, kept: Any) -> bool:
    """Whether Arrow, which cuts 2.5 to 2 and drops what a struct has no field for, kept a value."""
    if isinstance(value, dict):
        return isinstance(kept, dict) and all(_same(x, kept.get(k)) for k, x in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) == len(kept) and all(map(_same, value, kept))
    if isinstance(value, bool) != isinstance(kept, bool):
        return False
    return value == kept or (value != value and kept != kept)


def _parts(folder: Path) -> list[Path]:
    """The parts, whole and half written; whatever else lies there is not ours."""
    return list(folder.glob("[0-9]" * 6 + ".parquet*"))


def clean(path: Path) -> None:
    """Forget the parts of a file that is complete."""
    folder = beside(path, "parts")
    with contextlib.suppress(OSError):  # not there, or not empty
        for file in _parts(folder):
            file.unlink()
        folder.rmdir()
