"""The comparison with other libraries: who is right, what is counted, and what is written.

The alternatives of most tests are files of a few lines that need no model, in processes as the real
ones are.
"""

import csv
import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rmfast.benchmarks.peers import environments, harness, models, report, roof, workloads
from rmfast.benchmarks.peers.workloads import Workload

PEER = """
import math, os

PEERS = {{"{name}": {{}}}}


class Peer:
    tokens = 7

    def __init__(self, model, dtype, device, batch=8):
        self.off = 0.0 if dtype == "float32" else 0.01

    def scores(self, rows):
        return [self.one(sum(row) % 13, row) for row in rows]

    def one(self, score, row):
        {body}
"""
BODIES = {
    "baseline": "return score + self.off",
    "as-good": "return score - 2 * self.off",
    "sigmoid": "return 1 / (1 + math.exp(-score))",
    "other-token": "return sum(row[:-1]) % 13",
    "nan": "return math.nan",
    "dies": "os._exit(3) if len(row) == 3 else None; return score",
    "raises": "raise ValueError('no such row')",
    "missing": "return score",
}
ROWS = [[1, 2, 3], [1, 2, 4, 4], [5, 6], [9, 9, 9, 9, 1]]
FLOPS = 1000.0


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a contest of all of them found at two workloads, by workload and name."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, body in BODIES.items():
        text = PEER.format(name=name, body=body)
        if name == "missing":
            text = "import a_package_that_is_not_there\n" + text
        (folder / f"{name}.py").write_text(text)
    rates = "class Peer:\n    def __init__(self, **_): pass\n"
    rates += f"    def scores(self, rows): return [{FLOPS}, 1e6, 2e6]\n"
    (folder / "rates").write_text(rates)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "PAUSE", 0.0)
        rates = folder / "rates.py"
        (folder / "rates").rename(rates)
        known = {
            name: environments.Alternative(name, folder / f"{name}.py", {}, [], False)
            for name in BODIES
        }
        patch.setattr(harness, "ROOF", environments.Alternative("roof", rates, {}, [], False))
        said = []
        contest = harness.Contest(
            known, folder, {"main": folder / "model"}, "bfloat16", "cpu", {}, said.append
        )
        works = [Workload("short", ROWS), Workload("long", [[4, *row, 1] for row in ROWS])]
        rows = contest.run(works, "baseline", 1, starts=2)
        assert said.count("starting as-good") == 2 and said.count("starting missing") == 1
        rows = report.compared(rows, "baseline", contest.versions)
        assert any("oracle" in line for line in said)
        said.clear()
        contest.oracle(known["baseline"], works[0])
        assert said == []  # it is on the disk
    return {(row["workload"], row["alternative"]): row for row in rows}


def test_only_who_is_right_has_a_time(found):
    for work in ("short", "long"):
        right = {name for name in BODIES if found[work, name]["verdict"] == "right"}
        assert right == {"baseline", "as-good"} | ({"dies"} if work == "long" else set())
        for name in BODIES:
            assert ("seconds" in found[work, name]) == (name in right), name
        for name in ("sigmoid", "other-token"):
            assert found[work, name]["verdict"] == "wrong"
            assert found[work, name]["difference"] > found[work, name]["allowed"]
        assert found[work, "nan"]["difference"] == float("inf")


def test_who_dies_is_named_and_the_others_go_on(found):
    assert found["short", "dies"]["verdict"].startswith("died with exit code 3")
    assert found["short", "raises"]["verdict"].endswith("ValueError: no such row")
    assert found["long", "raises"]["verdict"].startswith("died with exit code 1")
    missing = "not run: No module named 'a_package_that_is_not_there'"
    assert found["short", "missing"]["verdict"] == missing
    assert found["long", "dies"]["verdict"] == "right"  # in a new process


def test_what_is_made_of_the_times(found):
    row = found["short", "as-good"]
    assert (row["rows"], row["tokens"], row["nodes"]) == (4, 14, 12)
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
    assert row["tokens_run"] == 7 and row["trie_share"] == 12 / 7
    assert row["floor_seconds"] == pytest.approx(12 * FLOPS / 2e6)  # at the better rate
    assert row["floor_share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert row["ratio"] == found["short", "baseline"]["seconds"] / row["seconds"]
    assert f"torch {importlib.metadata.version('torch')}" in row["versions"]
    assert found["short", "baseline"]["ratio"] == 1.0
    assert "ratio" not in found["short", "sigmoid"]


def test_training_has_a_floor_of_three_passes():
    work = Workload("pairs, training", ROWS, trains=True)
    one = {"seconds": 2.0, "answers": {}, "tokens": None}
    row = harness.measured("x", work, [one] * 4, 0.0, 1.0, None, [[FLOPS, 5.0, 0.0]] * 3)
    assert row["floor_seconds"] == 3 * 12 * FLOPS / 5.0 and row["trie_share"] is None
    assert row["seconds"] == 2.0 and row["tokens_per_second"] == 7.0


def test_without_a_baseline_nobody_is_judged(tmp_path):
    file = tmp_path / "baseline.py"
    file.write_text(PEER.format(name="baseline", body="os._exit(1)"))
    one = environments.Alternative("baseline", file, {}, [], False)
    contest = harness.Contest(
        {"baseline": one}, tmp_path, {"main": tmp_path}, "bfloat16", "cpu", {}, print
    )
    with pytest.raises(SystemExit, match=r"the baseline .*died with exit code 1"):
        contest.run([Workload("w", ROWS)], "baseline", 1)


def test_differences_are_in_standard_deviations():
    exact = {"score": [0.0, 2.0], "loss": [4.0, 4.0]}  # deviations 1 and, of equal ones, 4
    assert harness.difference({"score": [0.0, 2.5], "loss": [4.0, 5.0]}, exact) == 0.5
    assert harness.difference({"score": [0.0, 2.0], "loss": [0.0, 4.0]}, exact) == 1.0
    assert harness.difference({"score": [0.0, 2.0]}, exact) == float("inf")
    assert harness.difference({"score": [0.0], "loss": [4.0, 4.0]}, exact) == float("inf")
    nan = {**exact, "score": [float("nan"), 2.0]}
    assert harness.difference(nan, exact) == float("inf")
    eps = torch.finfo(torch.bfloat16).eps
    assert harness.allowed(0.1, exact, "bfloat16") == harness.FACTOR * (0.1 + 2 * eps)


# --- workloads


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "nodes"),
    [
        ("best-of-16", 32, 32 * 1100, 2 * 2600),
        ("turns-12", 24, 2 * 7800, 2 * 1200),
        ("equal", 16, 16 * 256, 16 * 256),
        ("long", 4, 4 * (8192 + 64), 8192 + 4 * 64),
        ("n-1", 1, 275, 275),
        ("n-64", 64, 64 * 275, 250 + 64 * 25),
    ],
)
def test_shapes_of_workloads(name, rows, tokens, nodes):
    made = workloads.made(
        ["long", "curve", *workloads.GENERATORS], None, 0.25, {"main": 10**6, "tiny": 10**6}, ""
    )
    found = {one.name: one for one in made}
    assert set(found) == {"long", *workloads.GENERATORS, *(f"n-{n}" for n in workloads.GROUPS)}
    one = found[name]
    assert (len(one.rows), one.tokens, one.nodes) == (rows, tokens, nodes)
    assert one.model == ("tiny" if name == "long" else "main")


def test_shapes_of_irregular_workloads():
    draw = workloads.Draw(1000)
    groups = workloads.groups_of_4(draw, 0.5)
    assert len(groups) == 4 * 24 and len({tuple(row[:8]) for row in groups}) == 24
    texts = workloads.system_prompt(draw, 0.1)
    assert len(texts) == 100 and len({tuple(row[:300]) for row in texts}) == 1
    assert {len(row) for row in texts} <= set(range(320, 381))
    unequal = workloads.unequal(draw, 1)
    assert len(unequal) == 64 and len({len(row) for row in unequal}) > 32
    assert all(100 <= token < 900 for row in groups + texts + unequal for token in row)


def test_pairs_are_read_as_in_training(tmp_path):
    import tiny

    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.config("llama").save_pretrained(tmp_path)
    lines = [{"prompt": f"w{i} w2", "chosen": " w3", "rejected": " w4 w5"} for i in range(5)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored, trained = workloads.made(["pairs"], data, 0.03, {"main": 99}, str(tmp_path))
    assert len(scored.rows) == 6 and scored.rows == trained.rows  # 3 of 5 pairs
    assert trained.trains and not scored.trains


def test_the_bound_of_the_curve():
    assert workloads.bound(1, 1) == 1.0
    assert workloads.bound(1, 64) == (1000 + 6400) / 1100
    draw = workloads.Draw(10**6)
    nodes = [Workload("", workloads.curve(draw, 0.1, n)).nodes for n in (1, 8)]
    assert nodes[1] / nodes[0] == workloads.bound(0.1, 8)


# --- adapters, models, processes


def test_adapters_are_small_and_import_nothing_of_rmfast():
    known = environments.alternatives()
    assert {"hf-sorted", "vllm", "vllm-no-cache", "rmfast", "trl"} <= set(known)
    assert known["vllm"].options == {"cache": True} and known["trl"].trains
    for one in known.values():
        text = one.file.read_text()
        assert len(text.splitlines()) <= 60, one.file
        lines = [line for line in text.splitlines() if "import rmfast" in line or "rmfast." in line]
        assert not lines or one.file.stem in ("rmfast", "hf", "trl"), one.file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.folder(tmp_path_factory.mktemp("peers"), "tiny", None)


def test_a_models_tokenizer_reads_ids(folder):
    from transformers import AutoTokenizer

    given = models.folder(folder.parent.parent, "main", str(folder))
    assert given != folder and models.vocabulary(given) == 1000
    for path in (folder, given):
        read = AutoTokenizer.from_pretrained(path)
        assert read("12 0 999 1 2").input_ids == [12, 0, 999, 1, 2] and len(read) == 1000
        assert read.pad_token_id == 0


def test_adapters_score_the_same(folder):
    """In this process: what has its packages here."""
    from rmfast.benchmarks.peers import worker

    rows, scores = workloads.Draw(1000).group(9, [3, 1, 7, 2, 5]), {}
    for name in ("hf", "hf-sorted", "rmfast-patched", "pipeline", "rmfast"):
        one = environments.alternatives()[name]
        peer = worker.load(one.file).Peer(str(folder), "float32", "cpu", **one.options)
        answers = []
        lines = [json.dumps(rows), "null", json.dumps(rows[:1])]
        worker.serve(peer, lines, lambda _to=answers, **answer: _to.append(answer))
        scores[name] = torch.tensor(answers[0]["answers"]["score"])
        assert answers[1]["answers"] == answers[0]["answers"]
        nodes, slots = 9 + 18, 5 * 16
        expected = nodes if name.startswith("rmfast") else slots
        assert [one["tokens"] for one in answers] == [expected, expected, len(rows[0])], name
    for name, found in scores.items():
        torch.testing.assert_close(found, scores["hf"], rtol=0, atol=1e-5, msg=name)


def test_what_only_a_gpu_runs_says_so(folder):
    one = environments.alternatives()["hf-flex"]
    start = environments.environment(one, folder.parent.parent, {})
    options = {"model": str(folder), "dtype": "bfloat16", "device": "cpu"}
    with pytest.raises(harness.Ended, match="not run: it runs on a GPU only"):
        harness.Process(one, options, start, folder.parent / "log")


def test_rates_of_products(folder):
    peer = roof.Peer(str(folder), "float32", "cpu")
    flops, plain, prepacked = peer.scores([[1] * 40])
    attention, mlp = 64 * (2 * 64 + 2 * 32), 3 * 64 * 128
    assert flops == 2 * 2 * (attention + mlp) and plain > 0
    assert (prepacked > 0) == torch.backends.mkldnn.is_available()


def test_packages_are_installed_once(tmp_path, monkeypatch):
    pytest.importorskip("uv")
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    (tmp_path / "list.txt").write_text("a==1\n")
    one = environments.Alternative("x", tmp_path / "x.py", {}, ["b==2", "-r list.txt"], False)
    (tmp_path / "env" / "x").mkdir(parents=True)
    monkeypatch.setattr(environments.shutil, "rmtree", lambda *_, **__: None)
    for _ in range(2):
        python, variables = environments.environment(one, tmp_path, {})
        assert python == sys.executable
        assert variables["PYTHONPATH"].startswith(str(tmp_path / "env" / "x"))
    assert len(calls) == 1 and calls[0][-3:] == ["b==2", "-r", "list.txt"]
    (tmp_path / "list.txt").write_text("a==3\n")
    environments.environment(one, tmp_path, {})
    assert len(calls) == 2
    assert environments.environment(one, tmp_path, {"x": "python9"})[0] == "python9"


# --- the report


def test_report(found, tmp_path):
    pytest.importorskip("matplotlib")
    options = {"model": None, "data": None, "dtype": "bfloat16", "device": "cpu"}
    about = report.facts(SimpleNamespace(**options, size=0.5, rounds=2, starts=1))
    rows = [row for row in found.values() if row["workload"] == "short"]
    for count in (1, 4, 64):
        more = {"workload": f"n-{count}", "alternative": "rmfast", "verdict": "right"}
        more |= {"difference": 0.0, "allowed": 1.0, "rows": count, "tokens": 9, "nodes": 9}
        rows.append({**more, "seconds": count / 2, "tokens_per_second": 1.0, "baseline": "x"})
    text = report.write(tmp_path, rows, about, 0.5)
    assert text == (tmp_path / "peers.md").read_text()
    (line,) = (x for x in text.splitlines() if x.startswith("| sigmoid | **wrong** |"))
    assert line == "| sigmoid | **wrong** |  |  |  |"
    assert "| sigmoid | wrong |  |  |  | " in text and "(no such row)" not in text
    assert "| raises | died with exit code 1: ValueError: no such row |" in text
    assert "4 rows, 14 tokens, 12 distinct prefixes" in text
    with (tmp_path / "peers.csv").open(newline="") as file:
        written = {(x["workload"], x["alternative"]): x for x in csv.DictReader(file)}
    assert len(written) == len(rows) and written["short", "sigmoid"]["seconds"] == ""
    assert float(written["short", "baseline"]["ratio"]) == 1.0
    assert written["n-64", "rmfast"]["size"] == "0.5"
    for name in ("throughput.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (axes,) = report.curve(rows, 0.5, "").axes
    bound, ours = axes.lines
    assert bound.get_ydata()[-1] == workloads.bound(0.5, 64)
    assert [*ours.get_xdata()] == [1, 4, 64] and [*ours.get_ydata()] == [1.0, 4.0, 64.0]
