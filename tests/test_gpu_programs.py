"""The programs for a GPU, dry: all of it runs, failures stay where they are, and are told."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import interpreter

import rmfast
from rmfast.benchmarks import gpu_check, gpu_common, gpu_kernels, gpu_report, gpu_table
from rmfast.ops import _cpu as cpu

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
        assert one["ok"] and one["rows"] and f"## {name}" in said
    goals = [row for one in sections.values() for row in one["rows"] if "goal" in row]
    assert f"{sum(row['reached'] for row in goals)} of {len(goals)} goals reached" in said
    begin = {row["goal"].partition(",")[0] for row in goals}
    assert begin >= {
        "scoring 0.6B", "scoring 8B", "training 0.6B", "training 8B", "DualKV's shape",
        "head and loss", "attention forward", "attention forward + backward",
    }  # fmt: skip
    winners = {
        row["goal"]: (row["fastest"], row["HF's fastest"]) for row in goals if "bound" in row
    }
    for what, (ours, theirs) in winners.items():  # the same work on the clock
        before = "batches made before" in what
        assert "rmfast" in ours and "HF, sorted" in theirs
        assert before == ours.endswith("before") == theirs.endswith("before")
    assert sum("batches made before" in what for what in winners) == 4  # 2 models, 2 kinds
    made = gpu_table.table(found)
    assert made.count("\n| ") == len(goals) + 1 and "Checks passed: 28 of 28." in made


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


def has_a_child():
    yield subprocess.Popen(["sleep", "100"]).pid
    time.sleep(100)


ENDED = """
import os, sys, time
from rmfast.benchmarks import gpu_check, gpu_common
import test_gpu_programs as tests
gpu_common.device_name = lambda: "none"

def begin(parser, begin=gpu_common.begin):
    args = begin(parser)
    task = gpu_common.Task(args.out / str(os.getpid()), 100, tests.has_a_child)
    while not task.result()["rows"]:
        time.sleep(0.05)
    print(*task.result()["rows"], flush=True)
    exec(how)
    os._exit(0)

gpu_common.begin = begin
for how in tests.HOW:
    if not os.fork():
        gpu_check.main()
    os.wait()
"""
HOW = ("task.ended(now=True)", "os.kill(os.getpid(), 15)", "sys.exit()")


def test_a_task_takes_its_children_along(tmp_path):
    command = [sys.executable, "-c", ENDED, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "tests", timeout=100, stdout=subprocess.PIPE)
    pids = done.stdout.split()
    assert len(pids) == len(HOW)
    for pid, how in zip(pids, HOW, strict=True):
        state = Path(f"/proc/{int(pid)}/stat")
        for _ in range(100):  # until whoever adopted it has seen its end
            if not state.exists() or ") Z" in state.read_text():
                break
            time.sleep(0.05)
        else:
            os.kill(int(pid), signal.SIGKILL)
            pytest.fail(f"a child of a task outlived {how}")


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


# --- what the checks see


@pytest.fixture
def tiny(monkeypatch):
    """The programs' sizes and device as in a dry run, in this process."""
    for module in (gpu_check, gpu_common, gpu_kernels, gpu_report):
        monkeypatch.setattr(module, "DRY", True)
        monkeypatch.setattr(module, "DEV", "cpu")
    monkeypatch.setattr(gpu_report, "ATTENTION", "sdpa")


def test_a_wrong_row_is_seen_among_many():
    true = torch.ones(65_536, 8)
    true[:100] = 0  # no size of their own
    got = true.clone()
    got[:100] += 1e-3
    got[-1] = 0
    whole, worst = gpu_check.off(got, true)
    assert whole < gpu_check.ROUND[torch.bfloat16] and worst == pytest.approx(1, rel=0.01)
    assert gpu_check.off(got[:-1], true[:-1])[1] < 0.0011
    for spoiled in (float("nan"), float("inf")):
        got[3, 3] = spoiled
        for pair in ((got, true), (true, got)):
            with pytest.raises(AssertionError, match="NaN or infinity"):
                gpu_check.off(*pair)


def test_nan_passes_no_check_of_models(tiny, monkeypatch):
    list(gpu_check.model("0.6B", "sdpa"))
    patched = rmfast.patched

    @contextlib.contextmanager
    def spoiled(net, **options):
        hook = net.model.norm.weight.register_hook(lambda g: g * float("nan"))
        with patched(net, **options):
            yield
        hook.remove()

    monkeypatch.setattr(rmfast, "patched", spoiled)
    with pytest.raises(AssertionError, match="nan"):
        list(gpu_check.model("0.6B", "sdpa"))


@pytest.mark.parametrize("head", [0, 3, None])
def test_the_first_and_the_last_heads_are_compared(head, tiny, monkeypatch):
    monkeypatch.setattr(gpu_check, "DRY", False)

    def forward(*args):
        out = cpu.trie_attention(*args[:-1])
        if head is not None:
            out[:, 5, head] = 0
        return out, None

    backward = lambda grad, *args: cpu.trie_attention_backward(grad, *args[:-2])  # noqa: E731
    fake = SimpleNamespace(trie_attention=forward, trie_attention_backward=backward)
    monkeypatch.setattr(gpu_check, "kernels", fake)
    run = gpu_check.attention(d=16, h=(4, 2), dtype=torch.float32, times=1)
    if head is None:
        assert [row["group"] for row in run] == [0, 1]
    else:
        with pytest.raises(AssertionError, match=r"out.*worst row"):
            list(run)


@pytest.mark.parametrize("section", ["against", "dualkv", "heads"])
def test_a_goal_is_told_where_nothing_was_measured(section, tiny, monkeypatch):
    lacks = ("rmfast", "rmfast, one op", "forward + backward")
    only = lambda calls, rounds, clock: {n: [1.0] for n in calls if n not in lacks}  # noqa: E731
    monkeypatch.setattr(gpu_kernels.bench, "measure", only)
    goals = [row for row in getattr(gpu_kernels, section)(True) if "goal" in row]
    assert len(goals) == {"against": 4, "dualkv": 1, "heads": 1}[section]
    assert all(row["measured"] is None and row["reached"] is False for row in goals)


@pytest.mark.parametrize("program", [gpu_check, gpu_report])
def test_what_was_not_reached_is_told(program, tmp_path, monkeypatch, capsys):
    def main(only):
        monkeypatch.setattr(sys, "argv", ["x", "--only", only, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            program.main()
        return end.value.code

    monkeypatch.setattr(gpu_common, "device_name", lambda: "some")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_common, "Task", lambda *_: sys.exit(9))
    assert main("nothing so") == 2 and "'nothing so'" in capsys.readouterr().err
    assert main("roof") == 9
    ((part, kept),) = json.loads((tmp_path / "some.json").read_text()).items()
    names = {"check": [*gpu_check.CHECKS, *gpu_check.TESTS], "report": list(gpu_report.SECTIONS)}
    nothing = {"ok": False, "rows": [], "error": "not reached"}
    assert kept["found"] == dict.fromkeys(names[part], nothing)
    assert f"ed: 0 of {len(names[part])}; " in gpu_table.table({part: kept})


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("timeout")), reason="needs make")
@pytest.mark.parametrize("fails", ["gpu_check", "gpu_report", "nothing"])
def test_make_gpu_ends_as_the_verdicts_say(fails, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho $3 >> said\ntouch build/gpu/x.json\n"
        + f"[ $2 != rmfast.benchmarks.{fails} ]"
    )
    python.chmod(0o755)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    command = ["make", "-f", str(ROOT / "Makefile"), "gpu", "PYTHON=./python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (fails == "nothing"), done.stdout + done.stderr
    assert (tmp_path / "said").read_text().split() == ["--out", "--seconds", "README.md"]
    assert (tmp_path / "benchmarks" / "results" / "x.json").exists()


# --- the table


@pytest.mark.parametrize("name", ["README.md", "docs/gpu.md"])
def test_pages_have_the_newest_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert gpu_table.put(text, gpu_table.newest(ROOT / "benchmarks" / "results")) == text


def test_table(tmp_path):
    text = tmp_path / "text.md"
    text.write_text(f"before\n{gpu_table.ALL}\nold\n{gpu_table.END}\nafter\n")
    results = tmp_path / "results"
    results.mkdir()
    argv = [str(text), "--results", str(results)]
    gpu_table.main(argv)
    assert text.read_text().splitlines()[1:4] == [gpu_table.ALL, gpu_table.NONE, gpu_table.END]
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
        "new, torch 2.11.0, triton 3.6.0, 2027-01-02. Checks passed: 1 of 2; failed: b. "
        "Sections of timings finished: 1 of 1."
    )
    assert "| fast | 1.23 | ≥ 1.00 | yes | 3.2, 9.0 |" in lines
    assert "| small | – | ≤ 2.00 | no |  |" in lines
    assert "small" not in gpu_table.put(
        f"{gpu_table.WHOLE}\n{gpu_table.END}", found := gpu_table.newest(results)
    )
    assert "| fast |" in gpu_table.table(found, every=False)
    assert "Checks: not run." in gpu_table.table({"report": {"facts": about, "found": {}}})
    with pytest.raises(ValueError, match="once"):
        gpu_table.put("nothing", None)
