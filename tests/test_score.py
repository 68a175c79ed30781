"""``rmfast score`` from end to end: what it writes and leaves out, and going on after a kill."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers.utils import logging

import tiny
from rmfast import loading
from rmfast.commands import main
from rmfast.data import files
from rmfast.score import job as score_job
from rmfast.score import parquet as score_parquet
from rmfast.score import scorer
from rmfast.score import source as score_source

resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "hi"), ("assistant", "good"), ("assistant", "bad"))
)
NAMES = ("o.jsonl", "o.jsonl.gz", "o.csv", "o.csv.gz", "o.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    made = tiny.model(vocab_size=tiny.WORDS, max_position_embeddings=200)
    made.config.mean, made.config.std = 0.5, 2.0
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(model) -> loading.Loaded:
    return loading.load(model)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, loaded):
    monkeypatch.setattr(loading, "load", lambda *_, **__: loaded)
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def run(tmp_path, monkeypatch, model):
    """Runs the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, source: str = "in.jsonl", name: str = "o.jsonl", code: int = 0) -> Path:
        got = main.main(["score", "--model", model, "--input", source, "--output", name, *argv])
        assert got == code
        return tmp_path / name

    return run


def write(name: str, rows: list[dict]) -> None:
    """A file of these rows, in a format that rmfast does not write itself here."""
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), name)
        return
    text = io.StringIO(newline="")
    if ".jsonl" in name:
        for row in rows:
            text.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        writer = csv.writer(text)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(x if isinstance(x, str) else json.dumps(x) for x in row.values())
    data = text.getvalue().encode()
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def read(path: Path | str) -> list[dict]:
    return [record.value for record in files.Reader(path).read()]


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def conversations(count: int = 20, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "prompt": f"q{i // 3}",
            "response": "".join(draw.choices("abcé\n,\"'😀", k=draw.randint(1, 12))),
        }
        for i in range(count)
    ]


@pytest.fixture
def oracle(loaded):
    """Hugging Face's own scores, one sequence at a time."""
    bare = tiny.model(vocab_size=tiny.WORDS, max_position_embeddings=200)
    bare.load_state_dict(loaded.model.state_dict())

    @torch.no_grad()
    def scores(*whole: str | list[dict]) -> np.ndarray:
        out = []
        for one in whole:
            if not isinstance(one, str):
                one = loaded.tokenizer.apply_chat_template(one, tokenize=False)
            ids = loaded.tokenizer(one, add_special_tokens=False)["input_ids"]
            out.append(bare(torch.tensor([ids])).logits.item())
        return np.array(out)

    return scores


# --- what is scored


@pytest.mark.parametrize(
    "row, wholes, added",
    [
        ({"messages": [USER, GOOD]}, [[USER, GOOD]], "reward"),
        ({"prompt": "hi", "response": "good"}, [[USER, GOOD]], "reward"),
        ({"prompt": [USER], "completion": [GOOD]}, [[USER, GOOD]], "reward"),
        ({"prompt": "hi", "responses": ["good", "bad"]}, [[USER, GOOD], [USER, BAD]], "rewards"),
        (
            {"prompt": "hi", "chosen": "good", "rejected": "bad"},
            [[USER, GOOD], [USER, BAD]],
            "pair",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [[USER, GOOD], [USER, BAD]], "pair"),
        ({"chosen": "hi good", "rejected": "hi bad"}, ["hi good</s>", "hi bad</s>"], "pair"),
        ({"text": "hi good"}, ["hi good"], "reward"),
    ],
)
def test_rewards_are_hugging_faces(run, oracle, row, wholes, added):
    rows = [{"id": i, **row, "more": {"é": None}} for i in range(3)]
    write("in.jsonl", rows)
    run()
    names = ["chosen_reward", "rejected_reward"] if added == "pair" else [added]
    for i, got in enumerate(lines("o.jsonl")):
        assert list(got) == [*rows[i], *names]
        assert {name: got[name] for name in rows[i]} == rows[i]
        scores = np.ravel([got[name] for name in names])
        assert np.allclose(scores, oracle(*wholes), rtol=0, atol=1e-5)


def test_options_reach_the_scorer(run, oracle, capsys):
    rows = conversations(5)
    write("in.jsonl", rows)
    turns = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]
        for r in rows
    ]

    def rewards(*argv: str) -> np.ndarray:
        run("--overwrite", *argv)
        return np.array([row["reward"] for row in lines("o.jsonl")])

    raw = oracle(*turns)
    assert np.allclose(rewards(), raw, atol=1e-5)
    assert np.allclose(rewards("--normalize"), (raw - 0.5) / 2, atol=1e-5)
    assert np.allclose(rewards("--sigmoid"), 1 / (1 + np.exp(-raw)), atol=1e-5)
    joined = oracle(*(r["prompt"] + r["response"] for r in rows))
    assert np.allclose(rewards("--no-chat"), joined, atol=1e-5)
    system = {"role": "system", "content": "Be kind."}
    got = rewards("--system-prompt", "Be kind.", "--max-tokens", "16")
    assert np.allclose(got, oracle(*([system, *turn] for turn in turns)), atol=1e-5)
    assert json.loads(Path(".o.jsonl.report.json").read_text())["max_tokens"] == 16
    Path("t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    marked = oracle(*(f"<{r['prompt']}><{r['response']}>" for r in rows))
    assert np.allclose(rewards("--chat-template", "t.jinja"), marked, atol=1e-5)
    capsys.readouterr()


def test_columns_by_name(run, oracle):
    write("in.jsonl", [{"text": "no", "q": "hi", "a": "good", "reward": 7}])
    run("--prompt-column", "q", "--response-column", "a", "--reward-column", "r")
    (got,) = lines("o.jsonl")
    assert list(got) == ["text", "q", "a", "reward", "r"]
    assert np.allclose(got["r"], oracle([USER, GOOD]), atol=1e-5)


def test_the_layout_is_that_of_the_first_row_that_can_be_scored(run):
    write(
        "in.jsonl",
        [
            {"text": None, "response": "x"},
            {"text": 5},
            {"prompt": "p", "response": "r"},
            {"text": "t"},
        ],
    )
    run(code=1)
    assert [row["prompt"] for row in lines("o.jsonl")] == ["p"]
    assert [row["line"] for row in lines("o.jsonl.errors.jsonl")] == [1, 2, 4]


@pytest.mark.parametrize("source", ["in.jsonl", "in.csv", "in.parquet"])
@pytest.mark.parametrize(
    "row, argv, said",
    [
        ({"a": 1, "b": 2}, [], "no row has messages, or prompt+responses, or prompt+response, or "),
        ({"a": 1, "b": 2}, [], 'there are: "a", "b"'),
        ({"text": "a"}, ["--text-column", "t"], 'no row has "t" (text)'),
        ({"text": "a", "reward": 1}, [], 'has a column "reward" already: --reward-column gives'),
        ({"chosen": "a", "rejected": "b", "rejected_x": 1}, ["--reward-column", "x"], "rejected_x"),
        ({"text": "a"}, ["--text-column", "t", "--messages-column", "m"], "do not go together"),
    ],
)
def test_columns_that_cannot_be_used(run, capsys, row, argv, said, source):
    write(source, [row])
    run(*argv, source=source, code=2)
    assert said in capsys.readouterr().err
    assert [file.name for file in Path().iterdir()] == [source]


# --- formats


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", [name.replace("o.", "in.") for name in NAMES])
def test_every_format_into_every_other(run, oracle, source, target):
    rows = [{"n": i, **row, "messages2": [USER, GOOD]} for i, row in enumerate(conversations(7))]
    write(source, rows)
    path = run("--batch-window", "3", source=source, name=target)
    got = read(path)
    assert len(got) == 7
    for row, scored in zip(rows, got, strict=True):
        assert list(scored) == [*row, "reward"]
        reward = float(scored.pop("reward"))
        turns = [{"role": "user", "content": row["prompt"]}]
        turns.append({"role": "assistant", "content": row["response"]})
        assert np.allclose(reward, oracle(turns), atol=1e-5)
        if "csv" in source or "csv" in target:  # where everything is text
            row = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
        assert scored == row
    if target == "o.parquet":
        assert parquet.read_schema(path).field("reward").type == pyarrow.float32()
        assert not Path(f"{path}.parts").exists()


@pytest.mark.parametrize("target", NAMES)
def test_several_scores_a_row(run, target):
    write("in.jsonl", [{"prompt": "p", "responses": ["a"] * k} for k in (1, 3)])
    got = read(run(name=target))
    rewards = [json.loads(r) if isinstance(r := row["rewards"], str) else r for row in got]
    assert [len(row) for row in rewards] == [1, 3]
    assert len({reward for row in rewards for reward in row}) == 1


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", ["in.jsonl", "in.csv", "in.parquet"])
def test_no_rows(run, source, target):
    if source == "in.parquet":
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), source)
    else:
        Path(source).write_text("text\n" if source == "in.csv" else "")
    path = run(source=source, name=target)
    assert read(path) == []
    columns = ["reward"] if source == "in.jsonl" else ["text", "reward"]
    if "csv" in target or "parquet" in target:
        assert files.Reader(path).columns == columns
    if target.endswith(".gz"):
        header = ",".join(columns) if "csv" in target else ""
        assert gzip.decompress(path.read_bytes()).decode().strip() == header
    assert not Path(f"{path}.errors.jsonl").exists()


def test_lines_of_json_stay_as_they_are(run):
    text = '{ "text" : "é\\u00e9😀",  "n": 1.50, "big": 12345678901234567890123, "s": "\\ud800" }'
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\n" + text.encode())
    run()
    first, second = Path("o.jsonl").read_text(encoding="utf-8").splitlines()
    assert first == second
    assert first.startswith(text[:-2] + ', "reward": ')


def test_rewards_are_the_shortest_decimals_of_their_fp32(run):
    write("in.jsonl", conversations(20))
    run("--overwrite")
    run(name="o.parquet")
    exact = parquet.read_table("o.parquet")["reward"].to_numpy()
    for line, reward in zip(Path("o.jsonl").read_text().splitlines(), exact, strict=True):
        written = line.rpartition(" ")[2].rstrip("}")
        assert np.float32(written) == reward
        assert len(written.strip("-")) <= len(repr(float(reward)).strip("-"))


def test_parquet_keeps_its_types(run):
    pytest.importorskip("pandas", reason="pandas is not installed: pyarrow reads nanoseconds by it")
    fields = {
        "text": pyarrow.array(["a", "b", "c"], pyarrow.large_string()),
        "small": pyarrow.array([1, None, 3], pyarrow.int8()),
        "when": pyarrow.array([1, 2, 3], pyarrow.timestamp("ns", "Europe/Paris")),
        "kind": pyarrow.array(["x", "y", "x"]).dictionary_encode(),
        "raw": pyarrow.array([b"\xff", b"", None]),
    }
    before = pyarrow.table(fields).replace_schema_metadata({"made": "here"})
    parquet.write_table(before, "in.parquet", row_group_size=2)
    path = run("--batch-window", "2", source="in.parquet", name="o.parquet")
    after = parquet.read_table(path)
    assert after.drop(["reward"]).equals(before)
    assert after.schema.metadata[b"made"] == b"here"
    run(source="in.parquet", name="o.jsonl")
    (first, *_) = lines("o.jsonl")
    assert (first["raw"], first["small"]) == ("/w==", 1)


def test_types_of_parquet_are_those_of_the_first_rows(run):
    values = {
        "numbers": [1, 2.5, None, 4],
        "words": ["a", None, "", "é"],
        "lists": [[], [1], None, [2.5]],
        "nothing": [None] * 4,
        "objects": [None, {"a": 1}, {}, {"b": "x"}],
    }
    rows = [{"text": "t", **{name: column[i] for name, column in values.items()}} for i in range(4)]
    rows[3]["late"] = "x"
    write("in.jsonl", rows)
    for window in ("1", "2", "9"):
        path = run("--batch-window", window, "--overwrite", name="o.parquet")
        table = parquet.read_table(path)
        assert [str(kind) for kind in table.schema.types] == [
            "string", "double", "string", "list<element: double>", "null",
            "struct<a: int64, b: string>", "string", "float",
        ]  # fmt: skip
        values["objects"] = [x and {"a": x.get("a"), "b": x.get("b")} for x in values["objects"]]
        values["objects"][2] = {"a": None, "b": None}
        for name, column in values.items():
            assert table[name].to_pylist() == column
        assert table["late"].to_pylist() == [None, None, None, "x"]


def test_a_later_row_of_another_type_is_an_error(run, monkeypatch):
    monkeypatch.setattr(score_source, "LOOK", 2)
    first = {"text": "t", "n": 1, "x": 0.5, "o": {"a": [1]}, "none": None}
    later = [
        ({"n": 2.5}, '"n" is a number that is not of the column\'s type int64: write JSON lines'),
        ({"n": "2"}, '"n" is text that'),
        ({"n": True}, '"n" is true or false that'),
        ({"n": 10**30}, '"n" is a number that'),
        ({"x": 2**60 + 1}, '"x" is a number that'),
        ({"x": True}, '"x" is true or false that'),
        ({"o": {"a": [1], "b": 2}}, '"o" is an object that'),
        ({"o": {"a": [1.5]}}, '"o" is an object that'),
        ({"none": 1}, '"none" is a number that is not of the column\'s type null'),
        ({"new": 1}, '"new" is not among the columns of the first rows: write JSON lines'),
    ]
    rows = [first, first, *({**first, **other} for other, _ in later), {"text": "t", "x": 2}]
    write("in.jsonl", rows)
    got = read(run(name="o.parquet", code=1))
    assert [row["x"] for row in got] == [0.5, 0.5, 2.0]
    errors = lines("o.parquet.errors.jsonl")
    assert [error["line"] for error in errors] == [*range(3, 13)]
    for error, (_, said) in zip(errors, later, strict=True):
        assert said in error["reason"]
    run(code=0)  # JSON lines keep them all


@pytest.mark.parametrize("values", [[1, "x"], [{}, {}], [[1], {"a": 1}], [1, 10**30]])
def test_columns_that_parquet_cannot_hold(run, capsys, monkeypatch, values):
    monkeypatch.setattr(loading, "load", None)  # it is told before a model is loaded
    write("in.jsonl", [{"text": "t", "x": value} for value in values])
    run(name="o.parquet", code=2)
    assert 'no type holds the values of "x"' in capsys.readouterr().err
    assert [file.name for file in Path().iterdir()] == ["in.jsonl"]


def test_parquet_has_the_types_of_a_data_set(run):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    kinds = {"text": datasets.Value("large_string"), "n": datasets.Value("int8")}
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "n": [None, 2]}, datasets.Features(kinds)
    )
    data.save_to_disk("data")
    table = parquet.read_table(run(source="data", name="o.parquet"))
    assert [str(kind) for kind in table.schema.types] == ["large_string", "int8", "float"]
    assert table["n"].to_pylist() == [None, 2]


def test_a_data_set_with_json_inside(run, capsys):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no column of JSON")
    Path("data").mkdir()
    write("data/train.jsonl", [{"text": "a", "x": [1, "y"]}, {"text": "b", "x": {"z": 1}}])
    run(source="data", name="o.parquet", code=2)
    assert '"x" is extension<arrow.json>: write JSON lines instead' in capsys.readouterr().err
    assert [row["x"] for row in read(run(source="data"))] == [[1, "y"], {"z": 1}]


def test_small_windows_make_row_groups_of_a_good_size(run, monkeypatch):
    write("in.jsonl", [{"text": "t" * 100} for _ in range(40)])
    path = run("--batch-window", "4", name="o.parquet")
    assert parquet.ParquetFile(path).num_row_groups == 1
    monkeypatch.setattr(score_parquet, "_GROUP", 1000)
    path = run("--batch-window", "4", "--overwrite", name="o.parquet")
    assert parquet.ParquetFile(path).num_row_groups == 4
    assert len(read(path)) == 40


def test_csv_has_the_columns_of_the_first_rows(run, monkeypatch):
    monkeypatch.setattr(score_source, "LOOK", 2)
    write("in.jsonl", [{"text": "a"}, {"b": None, "text": "b"}, {"text": "c", "late": 1}])
    got = read(run(name="o.csv", code=1))
    assert [list(row.values())[:2] for row in got] == [["a", ""], ["b", ""]]
    (error,) = lines("o.csv.errors.jsonl")
    assert error["line"] == 3 and '"late" is not among the columns' in error["reason"]


@pytest.mark.parametrize("target", ["o.csv", "o.parquet"])
def test_what_only_json_lines_can_keep(run, target):
    Path("in.jsonl").write_text('{"text": "a", "x": "\\ud800"}\n{"text": "b", "x": "\\\\ud800"}\n')
    (got,) = read(run(name=target, code=1))
    assert got["x"] == "\\ud800"
    assert "half a surrogate pair" in lines(f"{target}.errors.jsonl")[0]["reason"]


def test_a_folder_of_data(run):
    pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    Path("data").mkdir()
    write("data/test.jsonl", [{"text": f"é{i}"} for i in range(5)])
    got = read(run("--split", "test", "--limit", "3", source="data"))
    assert [row["text"] for row in got] == ["é0", "é1", "é2"]


def test_a_folder_that_changed_is_another_input(run, monkeypatch, capsys):
    pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    Path("data").mkdir()
    write("data/b.jsonl", conversations(20))
    interrupted(run, monkeypatch, source="data")
    before = Path("o.jsonl").read_bytes()
    write("data/a.jsonl", conversations(5, seed=1))
    run("--batch-window", "4", "--resume", source="data", code=2)
    assert "the files of --input changed; --overwrite" in capsys.readouterr().err
    assert Path("o.jsonl").read_bytes() == before
    Path("data/a.jsonl").unlink()
    run("--batch-window", "4", "--resume", source="data")
    assert [row["response"] for row in read("o.jsonl")] == [
        row["response"] for row in conversations(20)
    ]


def test_data_loaders_read_the_outputs_and_nothing_else(run):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: rmfast[data]")
    for end in ("jsonl", "parquet"):
        Path(end).mkdir()
        for number in range(2):
            write("in.jsonl", conversations(4, seed=number))
            run(name=f"{end}/{number}.{end}")
        data = datasets.load_dataset(f"./{end}", split="train", cache_dir="cache")
        assert (len(data), data.column_names) == (8, ["prompt", "response", "reward"])


@pytest.mark.parametrize("source", ["[ab].jsonl", "a.jsonl,b.jsonl", "a.jsonl,[b-d].jsonl"])
def test_several_files_of_which_one_has_a_bad_row(run, monkeypatch, source):
    rows = conversations(20)
    write("a.jsonl", rows[:7])
    write("b.jsonl", rows[7:])
    Path("b.jsonl").write_text("bad\n" + Path("b.jsonl").read_text())
    interrupted(run, monkeypatch, source=source)
    run("--batch-window", "4", "--resume", source=source, code=1)
    assert [row["response"] for row in read("o.jsonl")] == [row["response"] for row in rows]
    (error,) = lines("o.jsonl.errors.jsonl")
    assert error["line"] == "b.jsonl:1"


def test_input_may_be_named_again(run):
    write("in.jsonl", conversations(3))
    write("b.jsonl", conversations(4))
    assert len(read(run("--input", "b.jsonl"))) == 7


def test_shards_make_up_the_whole(run, monkeypatch, capsys):
    write("in.jsonl", conversations(22))
    whole = read(run("--no-chat"))
    parts = []
    for i in range(3):
        shard = ("--no-chat", "--shard", f"{i}/3", "--limit", "20")
        if i == 1:
            interrupted(run, monkeypatch, *shard, name="1.jsonl", windows=1)
            other = (*shard[:2], "2/3", *shard[3:])
            run("--batch-window", "4", "--resume", *other, name="1.jsonl", code=2)
            assert '--shard was "1/3", now it is "2/3"' in capsys.readouterr().err
            shard = ("--batch-window", "4", *shard, "--resume")
        parts.append(read(run(*shard, name=f"{i}.jsonl")))
    for n, row in enumerate(whole[:20]):
        assert parts[n % 3][n // 3]["response"] == row["response"]
        assert parts[n % 3][n // 3]["reward"] == pytest.approx(row["reward"], rel=1e-5)
    assert sum(map(len, parts)) == 20


def test_from_stdin_to_stdout(run, monkeypatch, capfdbinary):
    rows = conversations(6)
    data = "".join(json.dumps(row) + "\n" for row in rows[:3]) + "bad\n"
    data = (data + "".join(json.dumps(row) + "\n" for row in rows[3:])).encode()

    def stdin() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    stdin()
    path = run("--batch-window", "4", source="-", name="o.jsonl", code=1)
    capfdbinary.readouterr()
    stdin()
    run("--batch-window", "4", source="-", name="-", code=1)
    out, err = capfdbinary.readouterr()
    assert out == path.read_bytes()
    assert b'{"line": 4, "reason": "not JSON' in err and b"6 of 7 rows scored: stdout" in err
    left = {".o.jsonl.report.json", ".o.jsonl.state.json", "o.jsonl", "o.jsonl.errors.jsonl"}
    assert {file.name for file in path.parent.iterdir()} == left
    stdin()
    run("--batch-window", "4", "--resume", source="-", code=1)  # the same text again: complete
    run("--resume", source="-", name="-", code=2)
    assert b"nothing can --resume" in capfdbinary.readouterr().err


@pytest.mark.parametrize("name", ["in.json", "in.jsonl.gz"])
def test_a_list_of_json(run, name):
    rows = conversations(4)
    for text in (json.dumps(rows), json.dumps(rows, indent=1)):
        data = text.encode()
        Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        got = read(run("--overwrite", source=name))
        assert [(row["prompt"], row["response"]) for row in got] == [
            (row["prompt"], row["response"]) for row in rows
        ]


# --- rows that cannot be scored


BAD_ROWS: list[tuple[str | bytes, str]] = [
    ('{"messages": [', "not JSON: Expecting value"),
    ("nonsense", "not JSON: Expecting value"),
    ('{"messages": [], }', "not JSON"),
    ('{"a": 1} {"a": 2}', "not JSON: Extra data"),
    (b'{"messages": "\xff"}', "not UTF-8 at byte 15"),
    (b"\x00\x00\x00", "not JSON"),
    (b'{"messages": "a\x00b"}', "not JSON: Invalid control character"),
    (b'\xef\xbb\xbf{"messages": []}', "not JSON: Unexpected UTF-8 BOM"),
    ("[1, 2]", "a line must be a JSON object, this is a list"),
    ('"text"', "a line must be a JSON object, this is text"),
    ("null", "a line must be a JSON object, this is null"),
    ("17", "a line must be a JSON object, this is a number"),
    ("{}", '"messages" is missing'),
    ('{"text": "other"}', '"messages" is missing'),
    ('{"messages": null}', '"messages" must be a list of messages, not null'),
    ('{"messages": "hello"}', '"messages" must be a list of messages, not text'),
    ('{"messages": 3}', '"messages" must be a list of messages, not a number'),
    ('{"messages": {"role": "user"}}', '"messages" must be text or a list of messages, not an obj'),
    ('{"messages": []}', '"messages" is empty'),
    ('{"messages": ["hello"]}', "message 0 must be an object with role and content, not text"),
    ('{"messages": [[{"role": "user", "content": "x"}]]}', "message 0 must be an object"),
    ('{"messages": [{"content": "x"}]}', 'message 0: "role" must be text, is missing'),
    ('{"messages": [{"role": "user"}]}', 'message 0: "content" must be text, is missing'),
    ('{"messages": [{"role": "user", "content": 5}]}', '"content" must be text, is a number'),
    ('{"messages": [{"role": "user", "content": null}]}', '"content" must be text, is null'),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', '"role" must be text, is a list'),
    ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "must be text, is null"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a surrogate pair"),
    ('{"messages": [{"role": "critic", "content": "x"}]}', "refuses the messages: no such role"),
    ('{"messages": ' + "[" * 500 + "]" * 500 + "}", "message 0 must be an object"),
    ('{"messages": ' + "[" * 9999 + "]" * 9999 + "}", "not JSON that can be read"),
    ('{"messages": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ('{"messages": [{"role": "user", "content": "x"}], "reward": 1}', '"reward" already'),
    (json.dumps({"messages": [{"role": "user", "content": "x" * 300}]}), "tokens, more than max_"),
]


@pytest.mark.parametrize("target", ["o.jsonl", "o.parquet"])
def test_bad_rows_are_told_by_line_and_left_out(run, monkeypatch, capsys, target):
    monkeypatch.setattr(score_source, "LOOK", 1)
    good = [json.dumps({"messages": [USER, GOOD], "n": i}) for i in range(len(BAD_ROWS) + 1)]
    raw = [line if isinstance(line, bytes) else line.encode() for line, _ in BAD_ROWS]
    both = [line for pair in zip(good, raw, strict=False) for line in pair] + good[-1:]
    data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in both)
    Path("in.jsonl").write_bytes(data)
    path = run("--batch-window", "16", name=target, code=1)
    assert [row["n"] for row in read(path)] == list(range(len(good)))
    errors = lines(f"{target}.errors.jsonl")
    assert len(BAD_ROWS) >= 30
    assert [error["line"] for error in errors] == [2 * i + 2 for i in range(len(BAD_ROWS))]
    for error, (_, reason) in zip(errors, BAD_ROWS, strict=True):
        assert reason in error["reason"]
        assert error["kind"] == ("overlong" if "tokens" in reason else "bad")
    report = json.loads(Path(f".{target}.report.json").read_text())
    counts = (len(good) + len(raw), len(good), 1, len(raw) - 1)
    assert tuple(report[x] for x in ("rows", "scored", "overlong", "errors")) == counts
    assert f"left out           {len(raw)} (1 too long)" in capsys.readouterr().out


def test_only_bad_rows(run, capsys):
    Path("in.jsonl").write_text("no\n{\n[]\nno\n")
    for target in NAMES:
        assert read(run(name=target, code=1)) == []
        assert [error["line"] for error in lines(f"{target}.errors.jsonl")] == [1, 2, 3, 4]
        said = capsys.readouterr().out
        assert "line 1: not JSON: " in said and "line 3: a line must be a JSON object" in said
        assert "line 4" not in said


@pytest.mark.parametrize(
    "policy, code, scored", [("error", 1, 2), ("skip", 0, 2), ("truncate-left", 0, 3)]
)
def test_rows_that_are_too_long(run, oracle, policy, code, scored):
    write("in.jsonl", [{"text": "a" * n} for n in (3, 30, 20)])
    run("--max-length", "20", "--on-overlong", policy, code=code)
    got = lines("o.jsonl")
    assert len(got) == scored
    if scored == 3:
        assert np.allclose(got[1]["reward"], oracle("a" * 20), atol=1e-5)
    else:
        assert [row["kind"] for row in lines("o.jsonl.errors.jsonl")] == ["overlong"]
    assert run("--max-length", "20", "--on-overlong", policy, "--resume", code=code)
    if policy == "skip":
        run("--max-length", "20", "--on-overlong", policy, "--strict", "--overwrite")


def test_strict_stops_at_the_first_bad_row_and_resume_goes_on(run, capsys):
    rows = [json.dumps(row) for row in conversations(30)]
    rows.insert(17, "bad")
    Path("in.jsonl").write_text("\n".join(rows))
    for target in NAMES:
        whole = run("--batch-window", "4", name="whole" + target[1:], code=1)
        capsys.readouterr()
        path = run("--batch-window", "4", "--strict", name=target, code=2)
        said = capsys.readouterr().err
        assert "in.jsonl:18: not JSON" in said and "--resume without --strict" in said
        if target != "o.parquet":
            assert len(read(path)) == 17
        run("--batch-window", "4", "--strict", "--resume", name=target, code=2)
        run("--batch-window", "4", "--resume", name=target, code=1)
        assert path.read_bytes() == whole.read_bytes()
        errors = [Path(f"{p}.errors.jsonl").read_bytes() for p in (path, whole)]
        assert errors[0] == errors[1]


def test_scores_that_are_not_finite_are_errors(run, loaded):
    write("in.jsonl", [{"text": "a"}, {"text": "b"}])
    weight = loaded.model.score.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        run(code=1)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert lines("o.jsonl") == []
    assert all("its score is nan" in row["reason"] for row in lines("o.jsonl.errors.jsonl"))


# --- stopped and resumed


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory) -> list[dict]:
    """What became of runs that were killed or interrupted, and then went on."""
    folder = tmp_path_factory.mktemp("killed")
    rows = [json.dumps(row, ensure_ascii=False) for row in conversations(60)]
    for i in range(5, 60, 17):
        rows.insert(i, "bad")
    (folder / "in.jsonl").write_text("\n".join(rows), encoding="utf-8")
    job = {
        "model": model,
        "argv": ["--input", str(folder / "in.jsonl"), "--batch-window", "8"],
        "folder": str(folder),
        "jobs": [
            {"do": "kill", "name": "o.jsonl", "calls": 9, "timers": 2},
            {"do": "kill", "name": "o.csv.gz", "calls": 4, "timers": 0},
            {"do": "kill", "name": "o.parquet", "calls": 9, "timers": 2},
            {"do": "chain", "name": "o.parquet", "share": 0.6},
            {"do": "interrupt", "name": "o.jsonl"},
        ],
    }
    root = Path(score_job.__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_anywhere_and_resumed_is_the_same_byte_for_byte(stopped):
    tries = [x for x in stopped if x["do"] == "kill"]
    kills = [x for x in tries if x["ended"] == -9]
    assert len(kills) >= 20
    assert all(isinstance(x["at"], float) for x in tries if x not in kills)  # was done before
    assert [x for x in tries if not x["same"]] == []
    for name in ("o.jsonl", "o.csv.gz", "o.parquet"):
        assert len({x["rows"] for x in kills if x["name"] == name}) >= 3  # not all at the start
    left = ["", "..report.json", "..state.json", ".errors.jsonl"]
    assert [x for x in tries if x["left"] != left] == []


def test_killed_again_and_again(stopped):
    (chain,) = (x for x in stopped if x["do"] == "chain")
    assert chain["kills"] >= 3
    assert chain["same"]


def test_interrupted_it_says_how_to_go_on(stopped):
    both = [x for x in stopped if x["do"] == "interrupt"]
    assert len(both) == 2
    for x in both:
        assert x["ended"] == 130
        assert 0 < x["rows"] < 64
        assert x["said"].strip().endswith("the same command with --resume continues")
        assert "Traceback" not in x["said"]
        assert x["same"]


def interrupted(
    run, monkeypatch, *argv: str, windows: int = 2, error=KeyboardInterrupt, **names: str
) -> None:
    """A run that ends after some windows."""
    whole = scorer.Scorer.windows

    def some(self, rows):
        for number, window in enumerate(whole(self, rows)):
            if number == windows:
                raise error
            yield window

    with monkeypatch.context() as patch:
        patch.setattr(scorer.Scorer, "windows", some)
        run("--batch-window", "4", *argv, code=130 if error is KeyboardInterrupt else 2, **names)


def test_resume_is_for_the_same_run_only(run, monkeypatch, capsys, model):
    write("in.jsonl", conversations(20))
    interrupted(run, monkeypatch)
    before = Path("o.jsonl").read_bytes()
    capsys.readouterr()

    def refused(*argv: str, said: str, source: str = "in.jsonl") -> None:
        run(*argv, source=source, code=2)
        assert said in capsys.readouterr().err
        assert Path("o.jsonl").read_bytes() == before

    refused("--batch-window", "4", said="8 rows done: --resume continues, --overwrite starts again")
    refused("--resume", said="--batch-window was 4, now it is 1024")
    same = ("--resume", "--batch-window", "4")
    refused(*same, "--max-length", "9", said="--max-length was not given, now it is 9")
    refused(*same, "--no-chat", said="--chat was ")
    refused(*same, "--response-column", "x", said="--response-column was not given")
    refused(*same, "--system-prompt", "é", said='--system-prompt was not given, now it is "é"')
    Path("t.jinja").write_text("x")
    refused(*same, "--chat-template", "t.jinja", said="the text of --chat-template was not given")
    write("other.jsonl", conversations(20))
    refused(*same, said="path of --input was", source="other.jsonl")
    config = Path(model) / "config.json"
    was = config.stat()
    os.utime(config, (1, 1))
    refused(*same, said="a file of --model changed;")
    os.utime(config, ns=(was.st_atime_ns, was.st_mtime_ns))
    os.utime("in.jsonl", (1, 1))
    refused(*same, said="time of --input changed;")


def test_resume_where_there_is_nothing_to_go_on_with(run, capsys):
    write("in.jsonl", conversations(5))
    Path("o.jsonl").write_text("precious")
    for argv in ((), ("--resume",)):
        run(*argv, code=2)
        assert "o.jsonl already exists" in capsys.readouterr().err
        assert Path("o.jsonl").read_text() == "precious"
    run("--overwrite")
    whole = Path("o.jsonl").read_bytes()
    assert whole != b"precious"
    run("--resume")
    assert "already complete: 5 rows" in capsys.readouterr().out
    run(code=2)
    assert "o.jsonl already exists and is complete: --overwrite" in capsys.readouterr().err
    Path("o.jsonl").unlink()
    run("--resume", code=2)
    assert "o.jsonl is gone" in capsys.readouterr().err
    Path(".o.jsonl.state.json").write_text("{")
    run("--resume", code=2)
    assert "o.jsonl.state.json cannot be read" in capsys.readouterr().err
    Path(".o.jsonl.state.json").unlink()
    run("--resume")
    assert Path("o.jsonl").read_bytes() == whole


def test_a_finished_run_that_had_bad_rows_says_so_again(run):
    Path("in.jsonl").write_text('{"text": "a"}\nbad\n')
    run(code=1)
    run("--resume", code=1)


@pytest.mark.parametrize("name", ["o.jsonl", "o.parquet"])
def test_resume_notices_that_something_was_cut_off(run, monkeypatch, capsys, name):
    write("in.jsonl", conversations(20))
    interrupted(run, monkeypatch, name=name)
    if name == "o.jsonl":
        Path(name).write_text("{}\n")
    else:
        Path("o.parquet.parts/000001.parquet").unlink()
    run("--batch-window", "4", "--resume", name=name, code=2)
    assert "start again with --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv.gz", "o.parquet"])
def test_two_runs_never_write_one_output(run, monkeypatch, capsys, name):
    write("in.jsonl", conversations(20))
    whole = run("--batch-window", "4", name=f"whole{name[1:]}").read_bytes()
    windows = scorer.Scorer.windows

    def busy(self, rows):
        for number, window in enumerate(windows(self, rows)):
            yield window
            for argv in ((), ("--resume",), ("--overwrite",)) if number == 1 else ():
                run("--batch-window", "4", *argv, name=name, code=2)

    with monkeypatch.context() as patch:
        patch.setattr(scorer.Scorer, "windows", busy)
        path = run("--batch-window", "4", name=name)
    said = capsys.readouterr().err
    assert said.count(f"{name} is being written by another run (process {os.getpid()} on ") == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["o.jsonl.errors.jsonl", "o.jsonl.parts"])
def test_what_is_somebody_elses_stays(run, capsys, name):
    write("in.jsonl", conversations(5))
    file = Path(name) / "000000.parquet" if name.endswith("parts") else Path(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    for argv in ((), ("--overwrite",), ("--resume",)):
        run(*argv, code=2)
        assert f"{name} is there, and no run" in capsys.readouterr().err
        assert file.read_text() == "precious" and not Path("o.jsonl").exists()


def test_a_report_that_is_there_is_not_replaced(run, monkeypatch, capsys):
    write("in.jsonl", conversations(20))
    Path("r.json").write_text("precious")
    run("--report", "r.json", code=2)
    assert "--report r.json already exists: --overwrite" in capsys.readouterr().err
    interrupted(run, monkeypatch, "--report", "mine.json")
    run("--batch-window", "4", "--resume", "--report", "r.json", code=2)
    assert Path("r.json").read_text() == "precious"
    Path("mine.json").write_text("a report that was written just before a kill")
    run("--batch-window", "4", "--resume", "--report", "mine.json")
    assert json.loads(Path("mine.json").read_text())["rows"] == 20


def test_without_its_output_a_state_blocks_nothing(run):
    write("in.jsonl", conversations(20))
    for name in ("o.csv", "o.parquet"):
        whole = run("--batch-window", "4", name=name).read_bytes()
        Path(name).unlink()
        assert run("--batch-window", "4", name=name).read_bytes() == whole


def test_what_failed_before_the_first_window_is_in_nobodys_way(run, capsys, loaded, monkeypatch):
    write("in.jsonl", conversations(5))
    monkeypatch.setattr(loaded.tokenizer, "chat_template", None)
    run(code=2)
    assert "--chat-template FILE" in capsys.readouterr().err
    run("--no-chat")
    assert len(lines("o.jsonl")) == 5


def test_overwriting_forgets_errors_and_parts(run, monkeypatch):
    Path("in.jsonl").write_text('{"text": "a"}\nbad\n{"text": "b"}\n' * 5)
    for name in ("o.jsonl", "o.parquet"):
        interrupted(run, monkeypatch, name=name)
        assert Path(f"{name}.errors.jsonl").exists()
    Path("in.jsonl").write_text('{"text": "a"}\n')
    for name in ("o.jsonl", "o.parquet"):
        assert len(read(run("--overwrite", name=name))) == 1
        assert not Path(f"{name}.errors.jsonl").exists()
        assert not Path(f"{name}.parts").exists()


def test_max_tokens_found_once_holds_for_the_whole_run(run, monkeypatch):
    write("in.jsonl", conversations(20))
    interrupted(run, monkeypatch)
    state = json.loads(Path(".o.jsonl.state.json").read_text())
    state["max_tokens"] = 77  # as if there had been less memory then
    Path(".o.jsonl.state.json").write_text(json.dumps(state))
    run("--batch-window", "4", "--resume")
    assert json.loads(Path(".o.jsonl.report.json").read_text())["max_tokens"] == 77


def test_a_full_disk_loses_nothing(run, monkeypatch, capsys):
    write("in.jsonl", conversations(20))
    whole = run("--batch-window", "4", name="whole.jsonl").read_bytes()
    left = [12]

    def full(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run("--batch-window", "4", code=2)
    said = capsys.readouterr().err
    assert "No space left on device" in said and "--resume continues" in said
    assert run("--batch-window", "4", "--resume").read_bytes() == whole


@pytest.mark.parametrize(
    "name, share",
    [
        ("o.csv", 0.3),
        ("o.csv", 0.7),
        ("o.jsonl", 0.7),
        ("o.csv.gz", 0.3),
        ("o.jsonl.zst", 0.5),
        ("o.parquet", 0.3),
        ("o.parquet", 0.7),
    ],
)
def test_a_disk_that_is_full_in_the_middle_of_a_write(run, capsys, name, share):
    rows = [{"x": os.urandom(150).hex(), **row} for row in conversations(40)]  # more than the state
    write("in.jsonl", rows)
    whole = run("--batch-window", "8", name=f"whole{name[1:]}").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(whole) * share), limits[1]))
    try:
        run("--batch-window", "8", name=name, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"{name}" in said and "cannot be written: " in said and "--resume continues" in said
    state = json.loads(Path(f".{name}.state.json").read_text())
    assert state["rows"] < 40 or name == "o.parquet"  # whose parts are joined at the end
    assert not state["done"]
    assert run("--batch-window", "8", "--resume", name=name).read_bytes() == whole


def test_out_of_memory_is_told_and_can_go_on(run, monkeypatch, capsys):
    write("in.jsonl", conversations(20))
    interrupted(run, monkeypatch, error=MemoryError("out of memory with 16 tokens"))
    said = capsys.readouterr().err
    assert "out of memory with 16 tokens; --resume continues" in said
    run("--batch-window", "4", "--resume")
    assert len(lines("o.jsonl")) == 20


def test_a_file_that_ends_in_damage_gives_what_came_before(run, capsys):
    rows = [{"text": "".join(random.Random(i).choices("abc", k=50))} for i in range(16)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet", row_group_size=8)
    where = parquet.ParquetFile("in.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(Path("in.parquet").read_bytes())
    data[where : where + 30] = b"\xff" * 30
    Path("in.parquet").write_bytes(data)
    run("--batch-window", "4", source="in.parquet", code=2)
    assert "in.parquet: damaged after row 8" in capsys.readouterr().err
    assert [row["text"] for row in read("o.jsonl")] == [row["text"] for row in rows[:8]]
    data = gzip.compress("\n".join(map(json.dumps, rows)).encode(), 0)
    Path("in.jsonl.gz").write_bytes(data[:-100])
    path = run("--batch-window", "4", "--overwrite", source="in.jsonl.gz", code=1)
    assert 8 < len(read(path)) < 16
    assert "damaged gzip file" in lines("o.jsonl.errors.jsonl")[-1]["reason"]


# --- what is said


def test_report(run, capsys):
    rows = conversations(20)
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nbad\n")
    run("--report", "r.json", code=1)
    report = json.loads(Path("r.json").read_text())
    assert not Path(".o.jsonl.report.json").exists()
    assert (report["rows"], report["scored"], report["errors"]) == (21, 20, 1)
    assert report["conversations"] == 20
    assert report["distinct_prefixes"] == report["tokens_run"] < report["tokens"]
    assert report["sharing_saved"] == 1 - report["distinct_prefixes"] / report["tokens"]
    assert report["tokens_per_second"] == report["tokens"] / report["seconds"] > 0
    assert (report["level"], report["dtype"], report["device"]) == ("trie", "float32", "cpu")
    assert set(report["versions"]) == {"rmfast", "torch", "transformers", "python"}
    said = capsys.readouterr().out
    assert "20 of 21 rows scored" in said
    assert f"{report['tokens']:,}, {report['tokens_per_second']:,.0f} a second" in said
    assert "o.jsonl.errors.jsonl" in said


def test_nothing_is_said_to_be_shared_where_batches_are_padded(run, monkeypatch):
    write("in.jsonl", conversations(60))
    bloom = tiny.model("bloom", vocab_size=tiny.WORDS)
    monkeypatch.setattr(
        loading, "load", lambda *_, **__: loading.Loaded(bloom, tiny.tokenizer(), [])
    )
    run("--max-tokens", "300")
    report = json.loads(Path(".o.jsonl.report.json").read_text())
    assert report["level"] == "head"
    assert report["sharing_saved"] == 0 and report["tokens_run"] > report["tokens"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(run, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    Path("in.jsonl").write_text("\n".join(map(json.dumps, conversations(20))) + "\nbad\n")
    run("--batch-window", "4", code=1)
    last = capsys.readouterr().err.strip().replace("\n", "\r").split("\r")[-1]
    report = json.loads(Path(".o.jsonl.report.json").read_text())
    assert "100%" in last and f"21 rows, {report['tokens']:,} tokens, " in last
    assert f"{report['sharing_saved']:.0%} saved by sharing, 1 left out" in last


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--output", "o.txt"], "its name must end with .jsonl"),
        (["--output", "."], "its name must end with"),
        (["--output", "no/o.jsonl"], "there is no folder no"),
        (
            ["--output", "o.jsonl", "--report", "no/r.json"],
            "--report no/r.json: there is no folder",
        ),
        (["--output", "in.jsonl"], "is the input"),
        (["--output", "o.jsonl", "--report", "in.jsonl"], "--report in.jsonl is the input"),
        (["--output", "o.jsonl", "--report", "o.jsonl"], "--report o.jsonl is the output"),
        (["--output", "o.jsonl", "--report", ".o.jsonl.state.json"], "is the report"),
        (["--output", "d.jsonl/o.jsonl", "--input", "d.jsonl"], "in a folder that --input reads"),
        (["--output", "o.jsonl", "--shard", "4/4"], "--shard must be i/n, from 0/n to n-1/n"),
        (["--output", "o.jsonl", "--shard", "1"], "--shard must be i/n"),
        (["--output", "d.jsonl"], "is a folder"),
        (["--output", "o.jsonl", "--chat-template", "no.jinja"], "--chat-template no.jinja"),
        (["--output", "o.jsonl", "--input", "no.jsonl"], "no.jsonl: no such file"),
        (["--output", "o.jsonl", "--attention", "flex"], "one of auto, triton, sdpa, got 'flex'"),
        (["--output", "o.jsonl", "--normalize"], "mean and std"),
    ],
)
def test_what_cannot_run(run, tmp_path, capsys, loaded, monkeypatch, argv, said):
    write("in.jsonl", conversations(2))
    Path("d.jsonl").mkdir()
    monkeypatch.setattr(loaded.model.config, "mean", None)
    assert main.main(["score", "--model", "m", "--input", "in.jsonl", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rmfast score: ") and said in err and err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"in.jsonl", "d.jsonl"}
