"""Parquet output, a part a window, joined at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmfast.data import columns as data_columns
from rmfast.data import files
from rmfast.errors import UserError
from rmfast.resume import put_in_place
from rmfast.score.cells import _cell, to_json

if TYPE_CHECKING:
    import pyarrow


_GROUP = 32 << 20  # bytes of a Parquet row group, about


class Parquet:
    """A part for each window in a folder beside the file; at the end one file, types agreed on.

    Columns keep the types of a Parquet input. Elsewhere they are found: the parts' types are joined
    where one holds the values of all; a column that mixes others becomes text, JSON where it was
    none.
    """

    def __init__(
        self,
        path: Path,
        schema: pyarrow.Schema | None,
        seen: list[str],
        layout: data_columns.Columns,
        mark: int,
    ) -> None:
        files.need("pyarrow", str(path))
        import pyarrow

        self.path, self._seen, self._count, self._schema = path, seen, mark, schema
        score = pyarrow.float32()
        if layout.kind == "responses":
            score = pyarrow.list_(score)
        self._added = [pyarrow.field(name, score) for name in layout.added]
        self._folder = parts_folder(path)
        self._folder.mkdir(exist_ok=True)
        there = {file.name for file in self._folder.iterdir()}
        for name in there - {self._part(i).name for i in range(mark)}:
            (self._folder / name).unlink()
        if not all(self._part(i).name in there for i in range(mark)):
            raise UserError(f"{self._folder} lacks a part: start again with --overwrite")

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:06d}.parquet"

    def prepare(self, record: files.Record) -> Any:
        """The row as Arrow has it, or its columns.

        Raises:
            RowError: it has text that is not Unicode.
        """
        if self._schema is not None:
            return record.raw
        if isinstance(record.raw, bytes) and b"\\ud" in record.raw.lower():
            to_json(record.value)
        return record.value

    def write(self, rows: Sequence[tuple[Any, list[data_columns.Scores]]]) -> None:
        if not rows:
            return
        prepared, scores = zip(*rows, strict=True)
        table = self._taken(prepared) if self._schema is not None else _table(prepared)
        for field, values in zip(self._added, zip(*scores, strict=True), strict=True):
            table = table.append_column(field, [_array(list(values), field.type)])
        self._save(self._part(self._count), [table], table.schema)
        self._count += 1

    def _taken(self, rows: Sequence[tuple[pyarrow.RecordBatch, int]]) -> pyarrow.Table:
        import pyarrow

        wanted: list[tuple[pyarrow.RecordBatch, list[int]]] = []
        for batch, index in rows:
            if not wanted or wanted[-1][0] is not batch:
                wanted.append((batch, []))
            wanted[-1][1].append(index)
        batches = [batch.take(pyarrow.array(indices)) for batch, indices in wanted]
        return pyarrow.Table.from_batches(batches, self._schema)

    def mark(self) -> int:
        return self._count

    def finish(self) -> None:
        schema = self._agreed()
        self._save(self.path, (self._as(schema, i) for i in range(self._count)), schema)

    def _save(self, path: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> None:
        """Write tables, in row groups of a good size, as if in one moment."""
        import pyarrow
        from pyarrow import parquet

        beside = path.with_name(path.name + ".tmp")
        waiting, size = [], 0
        with parquet.ParquetWriter(beside, schema) as writer:
            for table in tables:
                waiting.append(table)
                size += table.nbytes
                if size >= _GROUP:
                    writer.write_table(pyarrow.concat_tables(waiting))
                    waiting, size = [], 0
            if waiting:
                writer.write_table(pyarrow.concat_tables(waiting))
        put_in_place(beside, path)

    def _agreed(self) -> pyarrow.Schema:
        """The schema of all parts together."""
        import pyarrow

        if self._schema is not None:
            fields = list(self._schema)
            return pyarrow.schema([*fields, *self._added], self._schema.metadata)
        kinds: dict[str, list[pyarrow.DataType]] = {name: [] for name in self._seen}
        for i in range(self._count):
            with self._read(i) as part:
                for field in part.schema_arrow:
                    seen = kinds.setdefault(field.name, [])
                    if field.type not in seen:
                        seen.append(field.type)
        for field in self._added:
            kinds.pop(field.name, None)
        fields = [pyarrow.field(name, self._type(name, seen)) for name, seen in kinds.items()]
        return pyarrow.schema([*fields, *self._added])

    def _type(self, name: str, seen: list[pyarrow.DataType]) -> pyarrow.DataType:
        """A type that holds a column's values of all parts; text does."""
        import pyarrow

        if not seen:
            return pyarrow.string()
        if len(seen) == 1:
            return seen[0]
        try:
            schemas = [pyarrow.schema([(name, kind)]) for kind in seen]
            kind = pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
            for i in range(self._count):
                with self._read(i) as part:
                    if name in part.schema_arrow.names:
                        _cast(part.read([name]).column(0), kind)
        except (pyarrow.ArrowException, OverflowError):
            return pyarrow.string()
        return kind

    def _as(self, schema: pyarrow.Schema, number: int) -> pyarrow.Table:
        import pyarrow

        with self._read(number) as part:
            table = part.read()
        columns = [
            _cast(table.column(field.name), field.type)
            if field.name in table.column_names
            else pyarrow.nulls(table.num_rows, field.type)
            for field in schema
        ]
        return pyarrow.table(columns, schema=schema)

    def _read(self, number: int) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self._part(number))

    def close(self) -> None:
        """Parts are closed when they are written."""


def _table(rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
    """Rows whose columns may differ, in order of first appearance."""
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: _array([row.get(name) for row in rows]) for name in names})


def _array(values: list[Any], kind: pyarrow.DataType | None = None) -> pyarrow.Array:
    """Arrow's own type for the values, or the one given; text where they do not go together."""
    import pyarrow

    if kind is not None and not pyarrow.types.is_string(kind):
        return pyarrow.array(values, kind)
    if kind is None:
        try:
            array = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
            pass
        else:
            if _writable(array.type):
                return array
    return pyarrow.array([x if x is None else _cell(x) for x in values], pyarrow.string())


def _writable(kind: pyarrow.DataType) -> bool:
    """Parquet has no place for objects without fields."""
    import pyarrow

    if pyarrow.types.is_struct(kind) and kind.num_fields == 0:
        return False
    return all(_writable(kind.field(i).type) for i in range(kind.num_fields))


def _cast(column: pyarrow.ChunkedArray, kind: pyarrow.DataType) -> Any:
    return column if column.type == kind else _array(column.to_pylist(), kind)


# --- files that are there whole or not at all


def parts_folder(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def clean(path: Path) -> None:
    """Forget the parts of a file that is complete."""
    shutil.rmtree(parts_folder(path), ignore_errors=True)
