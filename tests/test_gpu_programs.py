"""The programs for a GPU, dry: all of it runs, failures stay where they are, and are told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import interpreter

from rmfast.benchmarks import gpu_check, gpu_common, gpu_report, gpu_table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What both printed, and the file that they share."""
    out = tmp_path_factory.mktemp("gpu")
    env = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    said = []
    for program in (["gpu_check", "--jobs", "1"], ["gpu_report"]):
        command = [sys.executable, "-m", f"rmfast.benchmarks.{program[0]}", *program[1:]]
        done = subprocess.run(
            [*command, "--dry", "--out", str(out)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    return (*said, json.loads((out / "dry-run.json").read_text()))


@interpreter.NEEDED
def test_every_check(dry):
    said, _, found = dry
    checks = found["check"]["found"]
    assert set(checks) == {*gpu_check.CHECKS, "tests"}
    assert all(one["ok"] and one["rows"] for one in checks.values())
    for name in checks:
        assert f"ok   {name}" in said
    assert f"{len(checks)} of {len(checks)} ok" in said
    assert checks["tests"]["rows"][0]["PASSED"] == 3


@interpreter.NEEDED
def test_every_section(dry):
    _, said, found = dry
    sections = found["report"]["found"]
    assert list(sections) == list(gpu_report.SECTIONS)
    for name, one in sections.items():
        assert one["ok"] and f"## {name}" in said
        assert one["rows"] or name == "tuning"  # the interpreter has nothing to tune
    goals = [row for one in sections.values() for row in one["rows"] if "goal" in row]
    assert f"{sum(row['reached'] for row in goals)} of {len(goals)} goals reached" in said
    begin = {row["goal"].partition(",")[0] for row in goals}
    assert begin >= {
        "scoring 0.6B", "scoring 8B", "training 0.6B", "training 8B", "DualKV's shape",
        "head and loss", "attention forward", "attention forward + backward",
    }  # fmt: skip
    made = gpu_table.table(found)
    assert made.count("\n| ") == len(goals) + 1 and "Checks passed: 26 of 26." in made


def works():
    yield 1
    yield 2


def raises():
    yield 1
    raise ValueError("not so")


def dies():
    yield 1
    os.kill(os.getpid(), 9)


def hangs():
    yield 1
    time.sleep(100)


def test_a_task_fails_alone(tmp_path):
    tasks = {
        work: gpu_common.Task(tmp_path / work.__name__, 3 if work is hangs else 60, work)
        for work in (hangs, works, raises, dies)
    }
    for task in tasks.values():
        while not task.ended():
            time.sleep(0.02)
    found = {work: task.result() for work, task in tasks.items()}
    assert found[works]["ok"] and found[works]["rows"] == [1, 2]
    assert not any(found[work]["ok"] for work in (raises, dies, hangs))
    assert [found[work]["rows"] for work in (raises, dies, hangs)] == [[1]] * 3
    assert found[raises]["error"] == "ValueError: not so" and "raises" in found[raises]["trace"]
    assert found[dies]["error"] == "died, exit code -9"
    assert found[hangs]["error"] == "cut off: no time left"


@pytest.mark.parametrize("program", [gpu_check, gpu_report])
def test_a_gpu_is_asked_for(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(gpu_common, "device_name", lambda: "")
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2 and "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "needed", "most", "reached"),
    [
        (0.9, 0.9, False, True), (0.89, 0.9, False, False), (133.4, 133, True, False),
        (133.0, 133, True, True), (None, 1.0, False, False), (None, 1.0, True, False),
    ],
)  # fmt: skip
def test_goal(measured, needed, most, reached):
    row = gpu_report.goal("so fast", measured, needed, most)
    assert row["reached"] is reached and row["needed"] == f"{'≤' if most else '≥'} {needed:.2f}"


# --- the table


def test_the_readme_has_the_newest_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = gpu_table.newest(ROOT / "benchmarks" / "results")
    assert gpu_table.put(text, gpu_table.table(found)) == text


def test_table(tmp_path):
    text = tmp_path / "text.md"
    text.write_text(f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    results = tmp_path / "results"
    results.mkdir()
    argv = [str(text), "--results", str(results)]
    gpu_table.main(argv)
    assert text.read_text().splitlines()[1:4] == [gpu_table.BEGIN, gpu_table.NONE, gpu_table.END]
    peaks = {"peak GB": 3.21, "HF peak GB": 9.0}
    goals = [
        gpu_report.goal("fast", 1.234, 1.0, **peaks), gpu_report.goal("small", None, 2, most=True)
    ]  # fmt: skip
    for day, device in ((1, "old"), (2, "new")):
        about = {"date": f"2027-01-0{day}T00:00:00", "device": device}
        about["packages"] = {"torch": "2.11.0", "triton": "3.6.0"}
        checks = {"a": {"ok": True, "rows": []}, "b": {"ok": False, "rows": []}}
        gpu_common.keep(results, "check", about, checks)
        gpu_common.keep(results, "report", about, {"x": {"ok": True, "rows": goals}})
    gpu_table.main(argv)
    lines = text.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines[2] == (
        "new, torch 2.11.0, triton 3.6.0, 2027-01-02. Checks passed: 1 of 2; failed: b."
    )
    assert "| fast | 1.23 | ≥ 1.00 | yes | 3.2, 9.0 |" in lines
    assert "| small | – | ≤ 2.00 | no |  |" in lines
    with pytest.raises(ValueError, match="once"):
        gpu_table.put("nothing", "made")
