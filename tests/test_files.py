"""Reading records: JSON lines, CSV, Parquet, folders; what cannot be read is told and passed."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rmfast.data import files
from rmfast.errors import DataError, RowError


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def told(path: Path | str, **options) -> list[tuple[int, object]]:
    """Number and value, or reason, of each record."""
    return [
        (r.number, r.value.reason if isinstance(r.value, RowError) else r.value)
        for r in files.Reader(path, **options).read()
    ]


def check_skip(path: Path | str, **options) -> None:
    """Reading from anywhere gives what is left of reading it all."""
    reader = files.Reader(path, **options)
    whole = list(reader.read())
    for skip in range(len(whole) + 2):
        assert list(map(repr, reader.read(skip))) == list(map(repr, whole[skip:]))


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.jsonl", ("jsonl", False)),
        ("a.b.NDJSON.gz", ("jsonl", True)),
        ("a.json", ("jsonl", False)),
        ("a.csv.gz", ("csv", True)),
        ("a.parquet", ("parquet", False)),
        ("a.parquet.gz", None),
        ("jsonl", None),
        ("a.gz", None),
    ],
)
def test_the_name_says_what_a_file_is(name, kind):
    assert files.file_format(name) == kind


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    lines = '\ufeff{"a": 1}\r\n\n  {"a": "é\u2028\\u00e9"} \n{"b": [1.5, null]}'
    path = write(tmp_path, name, lines.encode())
    assert told(path) == [(1, {"a": 1}), (3, {"a": "é\u2028é"}), (4, {"b": [1.5, None]})]
    assert next(files.Reader(path).read()).raw == b'{"a": 1}'
    check_skip(path)
    assert told(path, limit=2) == told(path)[:2]
    assert len(list(files.Reader(path, limit=2).read(1))) == 1


BAD_LINES = [
    (b'{"a": 1', "not JSON: Expecting ',' delimiter at column 8"),
    (b"{'a': 1}", "not JSON: Expecting property name"),
    (b'{"a": 1} {"a": 2}', "not JSON: Extra data"),
    (b'{"a": "\x00"}', "not JSON: Invalid control character"),
    (b"\x00\x00", "not JSON: Expecting value"),
    (b'{"a": "\xff\xfe"}', "not UTF-8 at byte 8"),
    ('{"a": "é"}'.encode("utf-16-le"), "not UTF-8 at byte 15"),
    (b'"text"', "a line must be a JSON object, this is text"),
    (b"[1]", "a line must be a JSON object, this is a list"),
    (b"null", "a line must be a JSON object, this is null"),
    (b"true", "a line must be a JSON object, this is true or false"),
    (b"12", "a line must be a JSON object, this is a number"),
    (b'{"a": ' + b"7" * 5000 + b"}", "not JSON that can be read"),
    (b'{"a": ' + b"[" * 100_000, "not JSON that can be read"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_is_told_and_passed(tmp_path, line, reason):
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, (number, said), last = told(path)
    assert (first, last) == ((1, {"a": 1}), (3, {"a": 2}))
    assert number == 2
    assert said.startswith(reason)
    check_skip(path)


def test_positions_end_at_the_total(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz"):
        path = write(tmp_path, name, b'{"a": 1}\n' * 5000)
        reader = files.Reader(path)
        positions = [record.position for record in reader.read()]
        assert positions == sorted(positions)
        assert positions[-1] == reader.total == path.stat().st_size
        assert reader.unit == "B"


def test_a_cut_gzip_file_is_told_after_what_can_be_read(tmp_path):
    lines = b"".join(
        b'{"a": %d, "b": "%s"}\n' % (i, os.urandom(99).hex().encode()) for i in range(500)
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-5000])
    *good, (number, said) = told(path)
    assert [n for n, _ in good] == list(range(1, number))
    assert 100 < number < 500
    assert said.startswith("damaged gzip file, nothing after this is read")
    path.write_bytes(b"no gzip")
    assert told(path)[0][1].startswith("damaged gzip file")


def test_a_list_of_json_is_refused(tmp_path):
    for text in (b'[\n  {"a": 1}\n]', b'[{"a": 1},\n{"a": 2}]'):
        path = write(tmp_path, "a.json", text)
        with pytest.raises(DataError, match=r"is one list of JSON: .*jq"):
            files.Reader(path)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(tmp_path, name):
    text = '\ufeffid,text\r\n007,"a, ""b""\nc"\r\n\r\n,é\r\n'
    path = write(tmp_path, name, text.encode())
    reader = files.Reader(path)
    assert reader.columns == ["id", "text"]
    assert told(path) == [
        (2, {"id": "007", "text": 'a, "b"\nc'}),
        (5, {"id": "", "text": "é"}),
    ]
    check_skip(path)


def test_bad_rows_of_csv_are_told_and_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LONGEST_CELL", 2000)
    before = csv.field_size_limit(1000)
    rows = [b"1,2", b"3", b"1,2,3", b'"a"b,3', b"\xff,2", b"x" * 3000 + b",2", b"4,5", b'6,"7']
    path = write(tmp_path, "a.csv", b"\n".join([b"a,b", *rows]))
    assert told(path) == [
        (2, {"a": "1", "b": "2"}),
        (3, "1 cells, and the header names 2"),
        (4, "3 cells, and the header names 2"),
        (5, "not CSV: ',' expected after '\"'"),
        (6, "not UTF-8"),
        (7, "not CSV: field larger than field limit (2000)"),
        (8, {"a": "4", "b": "5"}),
        (9, "not CSV: unexpected end of data"),
    ]
    check_skip(path)
    csv.field_size_limit(before)


def test_csv_cells_may_be_long(tmp_path):
    before = csv.field_size_limit(1000)
    try:
        path = write(tmp_path, "a.csv", b"a,b\n1," + b"x" * 2000)
        assert told(path) == [(2, {"a": "1", "b": "x" * 2000})]
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"a,b,a\n1,2,3", 'two columns are named "a"'),
        (b"\xff,b\n", "no header can be read: not UTF-8"),
        (b'"a"b\n', "no header can be read"),
    ],
)
def test_csv_without_a_header_that_can_be_used(tmp_path, data, said):
    with pytest.raises(DataError, match=said):
        files.Reader(write(tmp_path, "a.csv", data))


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table(
        {
            "text": [f"é{i}" for i in range(10)],
            "when": [datetime.datetime(2020, 1, 1)] * 9 + [None],
            "messages": [[{"role": "user", "content": "x"}]] * 10,
        }
    )
    parquet.write_table(table, path, row_group_size=4)
    reader = files.Reader(path)
    assert (reader.columns, reader.total, reader.unit) == (table.schema.names, 10, "row")
    assert reader.schema == table.schema
    assert [r.value for r in reader.read()] == table.to_pylist()
    assert [(r.number, r.position) for r in reader.read(6)] == [(i, i) for i in range(7, 11)]
    check_skip(path)
    assert files.Reader(path, limit=3).total == 3
    batch, index = list(reader.read())[5].raw
    assert batch.slice(index, 1).to_pylist() == [table.to_pylist()[5]]


def test_bad_rows_of_parquet_are_told_and_passed(tmp_path):
    path = tmp_path / "a.parquet"
    days = pyarrow.array([0, 2**60, 1]).cast(pyarrow.timestamp("ms"), safe=False)
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "day": days}), path)
    (_, first), (number, said), (_, last) = told(path)
    assert (first["text"], last["text"], number) == ("a", "c", 2)
    assert said.startswith('"day" cannot be read')


def test_what_is_no_parquet_or_damaged(tmp_path):
    with pytest.raises(DataError, match="not Parquet that can be read"):
        files.Reader(write(tmp_path, "a.parquet", b"PAR1 not"))
    path = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 99] * 999}), path)
    data = bytearray(path.read_bytes())
    data[4:40] = os.urandom(36)
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged after row 0"):
        told(path)


def test_folders_and_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"é{i}", "n": i} for i in range(5)]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "test.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    assert told(folder, split="test") == list(enumerate(rows, 1))
    check_skip(folder, split="test")
    assert told(folder, split="test", limit=2) == list(enumerate(rows, 1))[:2]
    with pytest.raises(DataError, match="neither a file nor a data set that can be loaded"):
        files.Reader(folder, split="train")

    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "dict")
    datasets.enable_progress_bars()
    for saved in (tmp_path / "saved", tmp_path / "dict"):
        reader = files.Reader(saved, split="test")
        assert (reader.columns, reader.total, reader.unit) == (["text", "n"], 5, "row")
        assert told(saved, split="test") == list(enumerate(rows, 1))
        check_skip(saved, split="test")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "no such thing!", "a/b.parquet"])
def test_what_is_not_there(source):
    with pytest.raises(DataError, match="no such file"):
        files.Reader(source)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"its name must end with \.jsonl"):
        files.Reader(write(tmp_path, "a.txt", b""))
    pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    with pytest.raises(DataError, match="neither a file nor a data set"):
        files.Reader("nobody/nothing")  # HF_HUB_OFFLINE, or not there
    os.symlink("loop.jsonl", tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match="no such file"):
        files.Reader(tmp_path / "loop.jsonl")


@pytest.mark.parametrize("library, source", [("pyarrow", "a.parquet"), ("datasets", ".")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library, source):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.parquet", b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=rf"needs {library}: pip install 'rmfast\[data\]'"):
        files.Reader(source)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_an_empty_file_has_no_records(tmp_path, name):
    path = write(tmp_path, name, b"")
    assert told(path) == []
    path.write_bytes(b"")
    assert told(path) == []


def test_a_changed_file_is_another(tmp_path):
    path = write(tmp_path, "a.jsonl", b"{}\n")
    before = files.Reader(path).identity()
    assert files.Reader(path).identity() == before
    os.utime(path, (1, 1))
    assert files.Reader(path).identity() != before


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_list_of_json_is_read_whole_if_it_may_be(tmp_path, name):
    path = write(tmp_path, name, '\ufeff[\n  {"a": "é"}, 3,\n  {"a": 2}\n]'.encode())
    first, (number, reason), last = told(path, lists=True)
    assert (first, last) == ((1, {"a": "é"}), (3, {"a": 2}))
    assert (number, reason) == (2, "an item must be a JSON object, this is a number")
    check_skip(path, lists=True)
    assert told(path, lists=True, limit=1) == [first]
    with pytest.raises(DataError, match="a list of JSON that cannot be read"):
        files.Reader(write(tmp_path, name, b"[1, 2"), lists=True)
    lines = write(tmp_path, name, b'{"a": 1}\n[2]')
    assert told(lines, lists=True)[0] == (1, {"a": 1})
