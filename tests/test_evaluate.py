"""``rmfast eval`` from end to end, against Hugging Face's scores and sums written out."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from rmfast import loading
from rmfast.commands.main import main
from rmfast.data.rows import Row, RowReader
from rmfast.errors import RowError
from rmfast.evaluate import job as eval_job
from rmfast.evaluate import output as eval_output
from rmfast.evaluate import show
from rmfast.resume import locked

LOAD = functools.cache(loading.load)
WORDS = "what is it a cat dog one two good bad ünïcode 猫 yes no".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.model(vocab_size=tiny.WORDS, max_position_embeddings=256).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> list[str]:
    out = []
    for name in ("policy", "reference"):
        folder = tmp_path_factory.mktemp(name)
        lm = tiny.model(
            cls=AutoModelForCausalLM, vocab_size=tiny.WORDS, max_position_embeddings=256
        )
        with torch.no_grad():
            torch.manual_seed(len(name))
            for parameter in lm.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        lm.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        out.append(str(folder))
    return out


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """A model of this module is read from the disk once."""
    monkeypatch.setattr(loading, "load", LOAD)


def some_text(draw: random.Random, most: int = 6) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def pairs(count: int = 24) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "id": i,
            "prompt": some_text(draw),
            "chosen": some_text(draw),
            "rejected": some_text(draw),
            "subset": draw.choice(["chat", "math"]),
        }
        for i in range(count)
    ]


def triples(count: int = 6) -> list[dict]:
    draw = random.Random(1)
    sides = ("chosen", "rejected")
    return [
        {"prompt": some_text(draw)} | {x: [some_text(draw) for _ in range(3)] for x in sides}
        for _ in range(count)
    ]


def lines(path: Path, rows: list) -> str:
    text = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{row}\n" for row in text), encoding="utf-8")
    return str(path)


def templated(prompt: str, answer: str) -> str:
    return f"user: {prompt}</s>assistant: {answer}</s>"


class HuggingFace:
    """The scores of an unpatched model, one conversation at a time."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def __call__(self, prompt: str, answer: str) -> tuple[float, int]:
        ids = self.ids(templated(prompt, answer))
        with torch.no_grad():
            return self.model(ids).logits.item(), ids.numel()


@pytest.fixture(scope="module")
def hf(model) -> HuggingFace:
    return HuggingFace(model)


def run(*argv: object) -> int:
    return main(["eval", *map(str, argv)])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def needs_matplotlib():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: rmfast[eval]")


def test_pairs(model, hf, tmp_path, capsys):
    needs_matplotlib()
    rows = pairs()
    rows.append({"prompt": "a tie", "chosen": "the same", "rejected": "the same", "subset": None})
    data = lines(tmp_path / "in.jsonl", rows)
    out = {name: tmp_path / name for name in ("out.json", "out.png", "out.jsonl")}
    code = run(
        "--model", model, "--input", data, "--json", out["out.json"], "--figure", out["out.png"],
        "--scores", out["out.jsonl"], "--max-tokens", 64, "--batch-window", 7,
    )  # fmt: skip
    assert code == 0
    expected = [[hf(row["prompt"], row[x]) for x in ("chosen", "rejected")] for row in rows]
    spread = np.std([score for pair in expected for score, _ in pair])
    for number, (line, row, pair) in enumerate(
        zip(read_lines(out["out.jsonl"]), rows, expected, strict=True), start=1
    ):
        assert line["line"] == number
        assert line.get("subset") == row["subset"]
        for name, (score, tokens) in zip(("chosen", "rejected"), pair, strict=True):
            assert line[name] == pytest.approx(score, abs=1e-4 * spread)
            assert line[f"{name}_tokens"] == tokens
    summary = json.loads(out["out.json"].read_text(encoding="utf-8"))
    margin = [pair[0][0] - pair[1][0] for pair in expected]
    wins = sum(m > 0 for m in margin[:-1])
    assert summary["rows"] | {"interval": None} == {
        "n": 25, "wins": wins, "ties": 1, "losses": 24 - wins, "accuracy": wins / 25,
        "interval": None, "accuracy_ties_shared": pytest.approx((wins + 0.5) / 25),
    }  # fmt: skip
    for name, tally in summary["subsets"].items():
        inside = [m for m, row in zip(margin, rows, strict=True) if row["subset"] == name]
        assert (tally["n"], tally["wins"]) == (len(inside), sum(m > 0 for m in inside))
    assert summary["margin"]["mean"] == pytest.approx(np.mean(margin), abs=1e-4 * spread)
    right = [math.log1p(math.exp(-m)) for m in margin]
    assert summary["calibration"]["log_loss"] == pytest.approx(np.mean(right), abs=1e-4 * spread)
    assert summary["run"]["conversations"] == 50
    assert summary["run"]["nodes"] == summary["run"]["tokens_run"] < summary["run"]["tokens"]
    assert summary["left_out"] == {"bad": 0, "overlong": 0, "rows": []}
    assert out["out.png"].read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert show.table(summary) in said
    assert "25 rows, 50 answers" in said
    assert all(f"written: {path}" in said for path in out.values())


def test_rm_bench_as_one_list(model, hf, tmp_path):
    rows = triples()
    data = tmp_path / "in.json"
    data.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert run("--model", model, "--input", data, "--json", tmp_path / "out.json") == 0
    summary = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    matrix, best, won = np.zeros((3, 3)), 0, 0
    for row in rows:
        scores = {
            x: [hf(row["prompt"], answer)[0] for answer in row[x]] for x in ("chosen", "rejected")
        }
        best += max(scores["chosen"]) > max(scores["rejected"])
        for i, chosen in enumerate(scores["chosen"]):
            for j, rejected in enumerate(scores["rejected"]):
                matrix[i, j] += (chosen > rejected) / len(rows)
                won += chosen > rejected
    assert summary["rows"]["wins"] == best
    assert (summary["pairs"]["n"], summary["pairs"]["wins"]) == (54, won)
    found = summary["rm_bench"]
    assert np.array(found["matrix"]) == pytest.approx(matrix)
    assert found["hard"] == pytest.approx((matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3)
    assert found["normal"] == pytest.approx(np.trace(matrix) / 3)
    assert found["easy"] == pytest.approx((matrix[1, 0] + matrix[2, 0] + matrix[2, 1]) / 3)


def test_the_same_from_every_kind_of_file(model, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [*pairs(4), *({**row, "id": -1, "subset": "groups"} for row in triples(2))]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows.append({"id": 9, "prompt": "", "subset": "", "chosen": turns,
        "rejected": [turns[0], {**turns[1], "content": "b"}]})  # fmt: skip
    lines(tmp_path / "in.jsonl", rows)
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            writer.writerow(cells)
    same_kind = [row for row in rows if isinstance(row["chosen"], str)]
    parquet.write_table(pyarrow.Table.from_pylist(same_kind), tmp_path / "in.parquet")
    kinds = {}
    for name in ("in.jsonl", "in.csv", "in.parquet"):
        out = tmp_path / "scores.jsonl"
        assert (
            run("--model", model, "--input", tmp_path / name, "--scores", out, "--overwrite") == 0
        )
        kinds[name] = read_lines(out)
    for line in kinds["in.csv"]:
        line["line"] -= 1  # the header
    assert kinds["in.csv"] == kinds["in.jsonl"]
    assert len(kinds["in.jsonl"]) == 7
    for line, same in zip(kinds["in.parquet"], kinds["in.jsonl"][:4], strict=True):
        near = {x: pytest.approx(same[x], abs=1e-4) for x in ("chosen", "rejected")}
        assert line == same | near  # another window, another order of sums


def test_bad_rows_are_told_and_left_out(model, tmp_path, capsys):
    good = pairs(3)
    data = lines(
        tmp_path / "in.jsonl",
        [good[0], '{"chosen": ', {"chosen": "a"}, good[1], {**good[2], "rejected": []}, good[2]],
    )
    out = tmp_path / "out.json"
    scores = tmp_path / "scores.jsonl"
    assert run("--model", model, "--input", data, "--json", out, "--scores", scores) == 1
    summary = json.loads(out.read_text(encoding="utf-8"))
    assert summary["rows"]["n"] == 3
    assert [one["line"] for one in summary["left_out"]["rows"]] == [2, 3, 5]
    assert [line["line"] for line in read_lines(scores)] == [1, 2, 3, 4, 5, 6]
    missing = '"rejected" is missing: there are chosen'
    assert read_lines(scores)[2] == {"line": 3, "error": missing, "kind": "bad"}
    assert "left out: 3 bad rows, 0 too long\n  line 2: not JSON" in capsys.readouterr().out
    assert run("--model", model, "--input", data, "--strict") == 2
    assert "line 2: not JSON" in capsys.readouterr().err


def test_rows_too_long(model, tmp_path, capsys):
    rows = pairs(3)
    rows[1]["chosen"] = "x" * 200
    data = lines(tmp_path / "in.jsonl", rows)
    command = ("--model", model, "--input", data, "--max-length", 150)
    assert run(*command) == 1
    assert "0 bad rows, 1 too long\n  line 2: conversation 1 of 2: " in capsys.readouterr().out
    assert run(*command, "--on-overlong", "skip", "--strict") == 0
    assert run(*command, "--force_truncation", "--json", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["rows"]["n"] == 3


def test_scores_that_are_no_numbers(tmp_path, capsys):
    broken = tiny.model(vocab_size=tiny.WORDS)
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    data = lines(tmp_path / "in.jsonl", pairs(2))
    assert run("--model", tmp_path, "--input", data) == 2
    assert "there is no row to evaluate; line 1: its score is nan" in capsys.readouterr().err


def test_rewardbench_command_and_files(model, tmp_path, capsys):
    rows = pairs(12)
    data = lines(tmp_path / "in.json", rows)
    code = run(
        "--model", model, "--dataset", data, "--split", "filtered", "--tokenizer", model,
        "--batch_size", 8, "--max_length", 200, "--torch_dtype", "float32",
        "--attn_implementation", "flash_attention_2", "--load_json", "--trust_remote_code",
        "--debug", "--output_dir", tmp_path / "results", "--save_all", "--force_truncation",
    )  # fmt: skip
    assert code == 0
    said = capsys.readouterr()
    assert "--batch_size changes nothing here" in said.err
    stem = tmp_path / "results" / Path(model).relative_to("/")  # nothing is written outside
    outputs = read_lines(Path(f"{stem}_outputs.jsonl"))
    assert len(outputs) == 10  # --debug
    for line, row in zip(outputs, rows, strict=False):
        assert list(line)[:6] == [
            "prompt", "results", "scores_chosen", "scores_rejected", "text_chosen",
            "text_rejected",
        ]  # fmt: skip
        assert line["prompt"] == f"user: {row['prompt']}</s>"
        assert line["text_chosen"] == templated(row["prompt"], row["chosen"])
        assert line["text_rejected"] == templated(row["prompt"], row["rejected"])
        assert line["results"] == int(line["scores_chosen"] > line["scores_rejected"])
        assert {k: line[k] for k in ("id", "chosen", "rejected", "subset")} == {
            k: row[k] for k in ("id", "chosen", "rejected", "subset")
        }
    about = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
    inside = {
        name: [line["results"] for line in outputs if line["subset"] == name]
        for name in ("chat", "math")
    }
    assert about == {
        "accuracy": sum(line["results"] for line in outputs) / 10,
        "num_prompts": 10,
        "model": model,
        "ref_model": None,
        "tokenizer": model,
        "chat_template": None,
        "extra_results": {name: sum(x) / len(x) for name, x in inside.items()},
    }
    assert read_lines(Path(f"{stem}_all.jsonl")) == [
        {"chosen": line["scores_chosen"], "rejected": line["scores_rejected"]} for line in outputs
    ]


def test_rewardbench_files_of_groups_and_of_conversations(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [turns[0], {"role": "assistant", "content": "b"}]
    rows = [*triples(2), {"chosen": turns, "rejected": other}, {"chosen": "x", "rejected": "y z"}]
    data = lines(tmp_path / "in.jsonl", rows)
    assert run("--model", model, "--input", data, "--rewardbench-files") == 0
    stem = tmp_path / "results" / Path(model).relative_to("/")
    outputs = read_lines(Path(f"{stem}_outputs.jsonl"))
    assert [len(line["scores_chosen"]) for line in outputs[:2]] == [3, 3]
    assert outputs[0]["text_rejected"][2] == templated(rows[0]["prompt"], rows[0]["rejected"][2])
    best = [max(line["scores_chosen"]) > max(line["scores_rejected"]) for line in outputs[:2]]
    assert [line["results"] for line in outputs[:2]] == best
    assert outputs[2]["prompt"] == "user: q</s>" and outputs[2]["text_rejected"].endswith("b</s>")
    assert outputs[3]["prompt"] == "" and outputs[3]["text_chosen"] == "x</s>"
    assert json.loads(Path(f"{stem}.json").read_text())["extra_results"] is None
    assert not Path(f"{stem}_all.jsonl").exists()


def test_policy_and_reference(policies, tmp_path):
    rows = pairs(6)
    data = lines(tmp_path / "in.jsonl", rows)
    scores = tmp_path / "scores.jsonl"
    out = tmp_path / "out.json"
    code = run(
        "--model", policies[0], "--ref_model", policies[1], "--beta", 0.3, "--dataset", data,
        "--scores", scores, "--json", out, "--max-tokens", 100,
    )  # fmt: skip
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(policies[0])
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in policies]

    def likelihood(lm, prompt: str, answer: str) -> float:
        ids = tokenizer(templated(prompt, answer), add_special_tokens=False)["input_ids"]
        begins = len(
            tokenizer(f"user: {prompt}</s>assistant: ", add_special_tokens=False).input_ids
        )
        with torch.no_grad():
            logits = lm(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(logits[i - 1, ids[i]].item() for i in range(begins, len(ids)))

    expected = [
        [
            0.3 * (likelihood(models[0], row["prompt"], row[x])
                - likelihood(models[1], row["prompt"], row[x]))
            for x in ("chosen", "rejected")
        ]
        for row in rows
    ]  # fmt: skip
    got = [[line["chosen"], line["rejected"]] for line in read_lines(scores)]
    assert np.array(got) == pytest.approx(np.array(expected), abs=1e-4 * np.std(expected))
    summary = json.loads(out.read_text(encoding="utf-8"))
    assert summary["ref_model"] == policies[1]
    assert summary["rows"]["wins"] == sum(c > r for c, r in expected)
    assert summary["run"]["nodes"] == summary["run"]["tokens_run"]


@pytest.mark.parametrize(
    "extra, said",
    [
        (["--figure", "x.png", "--json", "no/such/x.json"], "--json no/such/x.json: there is no"),
        (["--figure", "x.txt"], "--figure x.txt: its name must end with"),
        (["--beta", "0.2"], "--beta belongs to --ref-model"),
        (["--ref-model", "MODEL"], "--ref-model is the model itself"),
        (["--ref-model", "y", "--pooling", "mask"], "--pooling belongs to a reward model's head"),
        (["--chat_template", "llama-2"], "names of FastChat's templates are not known here"),
        (["--chosen-column", "good"], '"good" is missing'),
    ],
)
def test_what_cannot_run_ends_with_2(model, tmp_path, monkeypatch, capsys, extra, said):
    monkeypatch.chdir(tmp_path)
    data = lines(tmp_path / "in.jsonl", pairs(1))
    if "--figure" in extra:
        needs_matplotlib()
    extra = [model if word == "MODEL" else word for word in extra]
    assert run("--model", model, "--input", data, *extra) == 2
    err = capsys.readouterr().err
    assert said in err and err.strip().splitlines()[-1].startswith("rmfast eval: ")


def test_no_chat_template(tmp_path, capsys):
    tiny.model(vocab_size=tiny.WORDS).save_pretrained(tmp_path)
    tiny.tokenizer(template=False).save_pretrained(tmp_path)
    data = lines(tmp_path / "in.jsonl", pairs(2))
    assert run("--model", tmp_path, "--input", data) == 2
    assert "--chat-template" in capsys.readouterr().err
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert run("--model", tmp_path, "--input", data, "--chat_template", tmp_path / "own.jinja") == 0


def test_options_may_be_spelled_both_ways(monkeypatch):
    seen = []
    monkeypatch.setattr(eval_job, "run", lambda args: seen.append(vars(args)) or 0)
    words = "--max-length 9 --on-overlong skip --trust-remote-code --rewardbench-files".split()
    assert run("--model", "m", "--input", "d", *words) == 0
    assert run("--model", "m", "--dataset", "d", *(word.replace("-", "_").replace("__", "--")
        for word in words)) == 0  # fmt: skip
    assert seen[0] == seen[1]
    assert (seen[0]["max_length"], seen[0]["on_overlong"]) == (9, "skip")
    assert seen[0]["trust_remote_code"] is seen[0]["rewardbench_files"] is True
    assert seen[0]["output_dir"] is None and seen[0]["batch_window"] == 1024


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "there is no row to evaluate"),
        ("[1, 2", "a list of JSON that cannot be read"),
        ('[1, "x"]', "an item must be a JSON object, this is a number"),
    ],
)
def test_files_without_rows(model, tmp_path, capsys, text, said):
    (tmp_path / "in.json").write_text(text)
    assert run("--model", model, "--input", tmp_path / "in.json") == 2
    assert said in capsys.readouterr().err


def read(record: dict, cells: bool = False, **columns: str) -> Row:
    """A row as the command reads it."""
    columns = {"prompt": "prompt", "subset": "subset", **columns}
    return RowReader(columns, cells=cells, lists=True).read(record, "pair")


def test_rows_are_read_as_what_they_are():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = read({"prompt": "p", "chosen": "c", "rejected": ["r", "s"], "subset": 3})
    assert (row.chosen, row.rejected, row.subset) == ([("p", "c")], [("p", "r"), ("p", "s")], "3")
    row = read({"chosen": turns, "rejected": [turns, turns[:1]]})
    assert (row.chosen, row.rejected, row.prompt) == ([turns], [turns, turns[:1]], None)
    row = read({"prompt": turns[:1], "chosen": [turns[1:]], "rejected": "r"})
    assert row.chosen == [(turns[:1], turns[1:])]
    columns = {"a": "x", "b": "y", "c": "z", "d": None}
    row = read(columns, prompt="c", chosen="a", rejected="b", subset="d")
    assert (row.chosen, row.subset) == ([("z", "x")], None)
    cells = {"prompt": "[not JSON", "chosen": '["a", "b"]', "rejected": '["[1]"]', "subset": ""}
    row = read(cells, cells=True)
    assert row.chosen == [("[not JSON", "a"), ("[not JSON", "b")]
    assert row.rejected == [("[not JSON", "[1]")] and row.subset is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"chosen": None}, '"chosen" must be text or a list of messages, not null'),
        ({"chosen": 1}, '"chosen" must be text or a list of messages, not a number'),
        ({"chosen": ""}, '"chosen" is empty'),
        ({"chosen": []}, '"chosen" is empty'),
        ({"chosen": ["a", ""]}, '"chosen" item 1 is empty'),
        ({"chosen": ["a", 3]}, '"chosen" item 1 must be text or a list of messages'),
        ({"chosen": [{"role": "user"}]}, '"chosen" message 0: "content" must be text, is missing'),
        ({"chosen": "\ud800"}, '"chosen" has half a surrogate pair'),
        ({"prompt": 7}, '"prompt" must be text'),
        ({"prompt": ["a"]}, '"prompt" message 0 must be an object'),
        ({"subset": ["a"]}, '"subset" must be a name, not a list'),
        (
            {"prompt": None, "rejected": [{"role": "user", "content": "x"}]},
            '"chosen", "rejected" must all be text, or all be lists of messages',
        ),
    ],
)
def test_rows_that_are_none(change, said):
    with pytest.raises(RowError) as error:
        read({"prompt": "p", "chosen": "c", "rejected": "r", **change})
    assert error.value.reason.startswith(said)


def test_plain_text(model, hf, tmp_path, capsys):
    data = lines(tmp_path / "in.jsonl", [{"prompt": "what ", "chosen": "is", "rejected": "it"}])
    scores = tmp_path / "scores.jsonl"
    assert run("--model", model, "--input", data, "--no-chat", "--scores", scores) == 0
    with torch.no_grad():
        texts = ("what is</s>", "what it</s>")  # as TRL ends them
        expected = [hf.model(hf.ids(text)).logits.item() for text in texts]
    (line,) = read_lines(scores)
    assert [line["chosen"], line["rejected"]] == pytest.approx(expected, rel=1e-4)
    assert "as TRL trains" in capsys.readouterr().out


# --- runs that stop


class Stopped:
    """A run of ``rmfast eval`` with windows of three rows, and what it writes."""

    def __init__(self, model: str, folder: Path, rows: list) -> None:
        folder.mkdir()
        self.folder = folder
        self.data = lines(folder / "in.jsonl", rows)
        self.scores, self.json = folder / "scores.jsonl", folder / "out.json"
        self.argv = [
            "--model", model, "--input", self.data, "--scores", self.scores, "--json", self.json,
            "--batch-window", 6, "--output-dir", folder / "results", "--save-all",
        ]  # fmt: skip

    def __call__(self, *more: object) -> int:
        return run(*self.argv, *more)

    def found(self) -> dict:
        """What was written, without what is another in every run."""
        out = {path.name: path.read_bytes() for path in (self.folder / "results").rglob("*.json*")}
        summary = json.loads(self.json.read_text(encoding="utf-8"))
        del summary["input"], summary["run"]["seconds"]
        return out | {"scores": self.scores.read_bytes(), "summary": summary}


def mixed_rows() -> list:
    rows: list = [*pairs(9), *({**row, "id": -1, "subset": "chat"} for row in triples(3))]
    rows[1]["chosen"] = "x" * 300  # too long
    rows[4] = '{"chosen": '
    return rows


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict:
    job = Stopped(model, tmp_path_factory.mktemp("whole") / "run", mixed_rows())
    assert job() == 1
    return job.found()


def stop_after(monkeypatch, saves: int) -> None:
    """Interrupt the run when it has put so many windows on the disk."""
    save, count = eval_output.RowFiles.save, []

    def stopping(files, *new: int) -> None:
        if len(count) > saves:  # one before the first window
            raise KeyboardInterrupt
        count.append(1)
        save(files, *new)

    monkeypatch.setattr(eval_output.RowFiles, "save", stopping)


def test_going_on_replaces_its_own_files_alone(model, tmp_path, capsys):
    data, scores = lines(tmp_path / "in.jsonl", pairs(3)), tmp_path / "scores.jsonl"
    foreign, own = tmp_path / "a.json", tmp_path / "my_a.json"
    foreign.write_text("keep")
    argv = ["--model", model, "--input", data, "--scores", scores]
    assert run(*argv, "--json", own) == 0
    assert run(*argv, "--json", own, "--resume") == 0
    assert run(*argv, "--json", foreign, "--resume") == 2
    assert "already exists" in capsys.readouterr().err and foreign.read_text() == "keep"


@pytest.mark.parametrize("saves", [0, 1, 3])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    model, tmp_path, monkeypatch, capsys, whole, saves
):
    job = Stopped(model, tmp_path / "run", mixed_rows())
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        assert job() == 130
    before = read_lines(job.scores)
    assert f"interrupted, {len(before)} rows are in {job.scores}" in capsys.readouterr().err
    assert bool(before) == bool(saves)
    with job.scores.open("ab") as file:
        file.write(b'{"line": 7, "cho')  # a window that was being written
    if saves:
        assert job() == 2
        assert "--resume continues" in capsys.readouterr().err
    assert job("--resume") == 1
    assert job.found() == whole
    assert job("--resume") == 1  # complete: the figures again, without a forward pass
    assert job() == 2
    assert f"{job.scores} already exists: --overwrite replaces it" in capsys.readouterr().err
    assert job.found() == whole


def test_a_full_disk_loses_nothing(model, tmp_path, capsys, whole):
    resource = pytest.importorskip("resource")
    job = Stopped(model, tmp_path / "run", mixed_rows())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # bytes of any file
    try:
        assert job() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large; --resume continues" in capsys.readouterr().err
    assert job("--resume") == 1
    assert job.found() == whole


def test_a_full_disk_without_scores_promises_nothing(model, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    data = lines(tmp_path / "in.jsonl", pairs(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for extra in (["--json", tmp_path / "x"], ["--rewardbench-files", "--output-dir", tmp_path]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
        try:
            assert run("--model", model, "--input", data, *extra) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        err = capsys.readouterr().err
        assert "cannot be written: File too large" in err and "--resume" not in err


def test_strict_stops_and_resume_without_it_goes_on(model, tmp_path, capsys, whole):
    job = Stopped(model, tmp_path / "run", mixed_rows())
    assert job("--strict", "--on-overlong", "error") == 2
    assert "line 2: conversation 1 of 2" in capsys.readouterr().err
    assert job("--resume") == 1
    assert job.found() == whole


@pytest.mark.parametrize(
    "change, said",
    [
        (["--max-length", 99], "--max-length was not given, now it is 99"),
        (["--subset-column", "id"], '--subset-column was "subset", now it is "id"'),
        (["--batch-window", 7], "--batch-window was 6, now it is 7"),
        (["--limit", 4], "--limit was not given, now it is 4"),
        (["--overwrite"], "--resume and --overwrite exclude each other"),
        ("input", "of --input changed"),
        ('{"line": 4', "has other rows than"),
        ('["line": 3', "has other rows than"),
        ("one answer", "has other rows than"),
        ("state", "--resume cannot continue it without"),
        ("shorter", "is shorter than when it was last written"),
    ],
)
def test_another_run_is_not_resumed(model, tmp_path, monkeypatch, capsys, change, said):
    job = Stopped(model, tmp_path / "run", mixed_rows())
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert job() == 130
    written = job.scores.read_bytes()
    if change == "input":
        lines(Path(job.data), [*pairs(12)])
        said = "of --input"
    elif change == "one answer":  # of a file that seems to be the same
        stat, text = Path(job.data).stat(), Path(job.data).read_bytes()
        Path(job.data).write_bytes(text.replace(b'"chosen"', b'"Chosen"'))
        os.utime(job.data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change[1:8] == '"line":':
        text = written.decode().replace('{"line": 3', change, 1)
        job.scores.write_text(text, encoding="utf-8")
    elif change == "state":
        next(path for path in job.folder.iterdir() if "state" in path.name).unlink()
    elif change == "shorter":
        job.scores.write_bytes(written[:-9])
    assert job("--resume", *(change if isinstance(change, list) else ())) == 2
    assert said in capsys.readouterr().err


def test_resume_needs_scores(model, tmp_path, capsys):
    data = lines(tmp_path / "in.jsonl", pairs(1))
    assert run("--model", model, "--input", data, "--resume") == 2
    assert "--resume continues what is in --scores" in capsys.readouterr().err


def test_other_policies_are_another_run(policies, tmp_path, capsys):
    data, scores = lines(tmp_path / "in.jsonl", pairs(2)), tmp_path / "scores.jsonl"
    argv = ["--model", policies[0], "--ref-model", policies[1], "--input", data, "--scores", scores]
    assert run(*argv) == 0
    assert run(*argv, "--resume") == 0
    assert run(*argv, "--resume", "--beta", 0.2) == 2
    assert "--beta was not given, now it is 0.2" in capsys.readouterr().err
    argv[:4] = ["--model", policies[1], "--ref-model", policies[0]]
    assert run(*argv, "--resume") == 2
    assert "--model was" in capsys.readouterr().err


# --- paths


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--scores", "in.jsonl"], "--scores in.jsonl is the input"),
        (["--json", "./in.jsonl"], "--json in.jsonl is the input"),
        (["--figure", "link.png"], "--figure link.png is the input"),
        (["--scores", "x", "--json", "sub/../x"], "--json sub/../x is the scores"),
        (["--json", "t.jinja", "--chat-template", "t.jinja"], "is the chat-template"),
        (["--output-dir", ".", "--save-all", "--model", "x", "--scores", "x_all.jsonl"], "x_all"),
    ],
)
def test_no_two_paths_meet(model, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "in.jsonl", pairs(2))
    Path("sub").mkdir()
    Path("t.jinja").write_text("{{ messages }}")
    Path("link.png").symlink_to("in.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for more in ([], ["--overwrite"]):
        assert run("--model", model, "--input", "in.jsonl", *argv, *more) == 2
        assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["--json", "--figure", "--scores", "MODEL.json"])
def test_nothing_is_replaced_unless_told(model, tmp_path, monkeypatch, capsys, name):
    needs_matplotlib()
    monkeypatch.chdir(tmp_path)
    argv = ["--model", model, "--input", lines(tmp_path / "in.jsonl", pairs(2))]
    there = tmp_path / "there.png"
    if name == "MODEL.json":
        argv += ["--rewardbench-files", "--output-dir", "out"]
        there = tmp_path / "out" / f"{model[1:]}.json"
        there.parent.mkdir(parents=True)
    else:
        argv += [name, there]
    there.write_text("somebody else's")
    for more in ([], *([["--scores", "new.jsonl", "--resume"]] if name != "--scores" else ())):
        assert run(*argv, *more) == 2
        assert "already exists: --overwrite replaces it" in capsys.readouterr().err
        assert there.read_text() == "somebody else's"
    assert run(*argv, "--overwrite") == 0
    assert there.read_bytes() != b"somebody else's"


def test_two_runs_do_not_write_one_file(model, tmp_path, capsys):
    data, scores = lines(tmp_path / "in.jsonl", pairs(2)), tmp_path / "scores.jsonl"
    with locked(scores):
        assert run("--model", model, "--input", data, "--scores", scores) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert run("--model", model, "--input", data, "--scores", scores) == 0
