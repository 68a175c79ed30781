"""Reading records: JSON lines, CSV, Parquet, folders; what cannot be read is told and passed."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rmfast.data import files, preferences
from rmfast.errors import DataError, RowError


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    if name.endswith(".zst"):
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
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
        ("a.jsonl", ("jsonl", None)),
        ("a.b.NDJSON.gz", ("jsonl", "gz")),
        ("a.json", ("jsonl", None)),
        ("a.csv.gz", ("csv", "gz")),
        ("a.parquet", ("parquet", None)),
        ("a.jsonl.zst", ("jsonl", "zst")),
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


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.zst"])
def test_a_list_of_json_is_read_whole(tmp_path, name):
    path = write(tmp_path, name, '\ufeff[\n  {"a": "é"}, 3,\n  {"a": 2}\n]'.encode())
    first, (number, reason), last = told(path)
    assert (first, last) == ((1, {"a": "é"}), (3, {"a": 2}))
    assert (number, reason) == (2, "an item must be a JSON object, this is a number")
    check_skip(path)
    assert told(path, limit=1) == [first]


@pytest.mark.parametrize(
    "text, values",
    [
        (b'[{"a": 1}, {"a": 2}]', [1, 2]),
        (b'[{"a": 1},\n{"a": 2}]\n\n', [1, 2]),
        (b'[\n{"a": 1}\n, {"a": 2}]', [1, 2]),
        (b"[]", []),
    ],
)
def test_a_list_may_be_on_one_line_or_several(tmp_path, text, values):
    assert [value["a"] for _, value in told(write(tmp_path, "a.jsonl", text))] == values


def test_what_is_no_list_of_json(tmp_path):
    with pytest.raises(DataError, match="a list of JSON that cannot be read"):
        files.Reader(write(tmp_path, "a.json", b"[1, 2"))
    reason = "a line must be a JSON object, this is a list"
    assert told(write(tmp_path, "a.jsonl", b'[1]\n{"a": 2}')) == [(1, reason), (2, {"a": 2})]
    lines = write(tmp_path, "a.jsonl", b'{\n{"a": 2}')
    assert [number for number, _ in told(lines)] == [1, 2]


# --- several files, stdin, shards


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.csv", "{}.parquet", "{}.jsonl.zst", "{}.json"])
def test_several_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"é{i}"} for i in range(7)]
    for part, of in (("b", rows[4:6]), ("a", rows[:4]), ("c", rows[6:])):
        if name == "{}.parquet":
            parquet.write_table(pyarrow.Table.from_pylist(of), name.format(part))
            continue
        lines = [row["text"] if name == "{}.csv" else json.dumps(row) for row in of]
        text = ["text", *lines] if name == "{}.csv" else lines
        if name == "{}.json":
            text = ["[", ",\n".join(lines), "]"]
        write(tmp_path, name.format(part), "\n".join(text).encode())
    for source in (name.format("?"), ",".join(map(name.format, "abc")), name.format("[ab]") + ","
                   + name.format("c")):  # fmt: skip
        assert [value for _, value in told(source)] == rows
    assert told(name.format("*"))[4][0].startswith(name.format("b") + ":")
    check_skip(name.format("*"))
    assert [value for _, value in told(name.format("*"), limit=5)] == rows[:5]
    reader = files.Reader(name.format("*"))
    assert list(reader.read())[-1].position in (reader.total, None)
    before = reader.identity()
    os.utime(name.format("b"), (1, 1))
    assert files.Reader(name.format("*")).identity() != before


@pytest.mark.parametrize(
    "source, said",
    [
        ("*", "files of csv and jsonl: name one kind"),
        ("a.csv,b.csv", "b.csv has other columns than a.csv"),
        ("a.jsonl,c.jsonl", "c.jsonl: no such file"),
        ("a.jsonl,./a.jsonl", "a file is named twice"),
        ("*.txt", "no such file"),
        ("data/", "no such file or folder"),
        ("./data", "no such file or folder"),
        ("some/where/deep", "no such file or folder"),
    ],
)
def test_several_files_that_do_not_go_together(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    for name, text in (("a.jsonl", b"{}"), ("a.csv", b"a\n1"), ("b.csv", b"b\n1")):
        write(tmp_path, name, text)
    with pytest.raises(DataError, match=said):
        files.Reader(source)


def test_stdin(monkeypatch):
    def reader(text: bytes) -> files.Reader:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        return files.Reader("-")

    found = reader(b'{"a": 1}\nbad\n')
    assert (found.format, found.total) == ("jsonl", 13)
    assert [record.number for record in found.read(1)] == [2]
    assert next(found.read()).value == {"a": 1}
    assert found.identity() == reader(b'{"a": 1}\nbad\n').identity()
    assert found.identity() != reader(b'{"a": 2}\nbad\n').identity()
    assert list(reader(b"").read()) == []


@pytest.mark.parametrize("limit", [None, 1, 7, 10, 99])
def test_shards_are_all_rows(tmp_path, limit):
    path = write(tmp_path, "a.jsonl", b"".join(b'{"a": %d}\n' % i for i in range(10)))
    for count in (1, 3, 4, 20):
        shards = [told(path, limit=limit, shard=(i, count)) for i in range(count)]
        assert all(
            number % count == (i + 1) % count for i in range(count) for number, _ in shards[i]
        )
        assert sorted(one for shard in shards for one in shard) == [
            (i + 1, {"a": i}) for i in range(10 if limit is None else min(limit, 10))
        ]
    check_skip(path, limit=limit, shard=(1, 3))


def test_preferences_come_in_every_container(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    write(tmp_path, "list.json", json.dumps(rows).encode())
    write(tmp_path, "pretty.json.gz", json.dumps(rows, indent=1).encode())
    write(tmp_path, "lines.jsonl.zst", b"".join(lines))
    write(tmp_path, "part1.jsonl", lines[0])
    write(tmp_path, "part2.jsonl", b"".join(lines[1:]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(lines))))
    for source in ("list.json", "pretty.json.gz", "lines.jsonl.zst", "part?.jsonl", "-"):
        found = preferences(source)
        assert [(x.question(), x.whole()) for x in found] == [
            (x.question(), x.whole()) for x in preferences(rows)
        ]
    write(tmp_path, "part2.jsonl", lines[1] + b'{"chosen": "a"}\n')
    with pytest.raises(DataError, match=r"part2.jsonl:2: "):
        preferences("part?.jsonl")


# --- packed by Zstandard


def test_a_damaged_zst_file_is_told_after_what_can_be_read(tmp_path):
    lines = b"".join(b'{"a": "%s"}\n' % os.urandom(99).hex().encode() for i in range(2000))
    data = write(tmp_path, "a.jsonl.zst", lines).read_bytes()
    path = tmp_path / "a.jsonl.zst"
    assert len(told(path)) == 2000
    path.write_bytes(data * 2)  # frames, as pzstd and our own output have them
    assert len(told(path)) == 4000
    path.write_bytes(data[:-5000])
    *good, (number, said) = told(path)
    assert len(good) == number - 1 > 500
    assert said.startswith("damaged zstd file, nothing after this is read")
    path.write_bytes(b"no zst")
    assert told(path)[0][1].startswith("damaged zstd file")


# --- folders


def test_a_folder_of_which_not_all_is_read_is_refused(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    write(tmp_path, "a.jsonl", b'{"text": "a"}\n')
    write(tmp_path, "README.md", b"# a card\n")
    write(tmp_path, "config.json", b"{}")
    write(tmp_path, ".hidden.jsonl", b'{"other": 1}\n')
    assert told(tmp_path) == [(1, {"text": "a"})]
    for name, data in (
        ("more.csv", b"text\nb\n"),
        ("deep/more.csv.gz", b"text\nb\n"),
        ("train.jsonl", b'{"text": "b"}\n'),  # the only one that a split has
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path = write(tmp_path, name, data)
        with pytest.raises(DataError, match="datasets reads other files of it, and not"):
            files.Reader(tmp_path)
        path.unlink()
    write(tmp_path, "more.csv", b"text\nb\n")
    card = b"---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n"
    write(tmp_path, "README.md", card)
    assert told(tmp_path) == [(1, {"text": "a"})]


def test_a_folder_may_be_named_like_a_format(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    monkeypatch.chdir(tmp_path)
    for name in ("json", "csv", "parquet"):
        Path(name).mkdir()
        write(tmp_path / name, "a.jsonl", b'{"text": "%s"}\n' % name.encode())
    assert [told(name) for name in ("json", "csv", "parquet")] == [
        [(1, {"text": name})] for name in ("json", "csv", "parquet")
    ]


def test_a_changed_folder_is_another(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    write(tmp_path, "a.jsonl", b'{"text": "a"}\n')

    def identity() -> dict:
        return files.Reader(tmp_path).identity()

    before = identity()
    assert identity() == before
    write(tmp_path, ".hidden", b"")
    assert identity() == before
    found = [before]
    write(tmp_path, "b.jsonl", b'{"text": "b"}\n')
    found.append(identity())
    (tmp_path / "b.jsonl").rename(tmp_path / "0.jsonl")
    found.append(identity())
    os.utime(tmp_path / "0.jsonl", (1, 1))
    found.append(identity())
    assert len({one["the files"] for one in found}) == 4
