"""The command line: what it prints, what it hands on, and its exit codes."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest

import rmfast
import rmfast.demo
from rmfast import errors
from rmfast.commands import bench, main

SCORE = "score --model m --input i.jsonl --output o.jsonl".split()
TRAIN = "train --model m --data d.jsonl --output o".split()


@pytest.fixture
def work(monkeypatch):
    """Stands for the module that ``rmfast demo`` runs, which needs TRL."""
    module = types.ModuleType("rmfast.demo.demo")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(rmfast.demo, "demo", module, raising=False)
    return module


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rmfast {rmfast.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [["--help"], *([name, "--help"] for name in "demo score eval train run bench doctor".split())],
)
def test_help(capsys, argv):
    assert main.main(argv) == 0
    assert capsys.readouterr().out.strip().startswith("Usage: rmfast")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["fly"], "No such command 'fly'"),
        (["demo", "--steps", "0"], "--steps must be a positive integer, got 0"),
        (["demo", "--steps", "1.5"], "Invalid value for '--steps'"),
        (
            [*TRAIN, "--learning-rate", "nan"],
            "--learning-rate must be a number above 0 and below 1, got nan",
        ),
        (
            [*TRAIN, "--dtype", "int8"],
            "--dtype must be one of mixed, float32, bfloat16, got 'int8'",
        ),
        (["score"], "Missing option '--model'"),
        ([*SCORE, "--on-overlong", "cut"], "--on-overlong must be one of error, skip"),
        ([*SCORE, "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        ([*SCORE, "--limit", "0"], "--limit must be a positive integer"),
        ([*TRAIN, "--epochs", "0"], "--epochs must be a number above 0, got 0.0"),
        ([*TRAIN, "--eval-split", "1"], "--eval-split must be a number at least 0 and below 1"),
        ([*TRAIN, "--seed", "-1"], "--seed must be a whole number at least 0 and below 4294967296"),
        ([*TRAIN, "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["bench", "fly"], "no benchmark 'fly'"),
        (["doctor"], "Missing option '--model'"),
        (["run", "--attention", "x", "a.py"], "Invalid value for '--attention'"),
        (["run", "--", "fly"], "there is no program 'fly' on PATH"),
    ],
)
def test_wrong_options_end_with_2(capsys, argv, said):
    assert main.main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, calls",
    [
        (["bench"], [("score", []), ("train", [])]),
        (["bench", "train"], [("train", [])]),
        (["bench", "score", "--help"], [("score", ["--help"])]),
        (
            ["bench", "score", "--data", "x.jsonl", "--pairs", "3"],
            [("score", ["--data", "x.jsonl", "--pairs", "3"])],
        ),
    ],
)
def test_bench_hands_on_what_follows_the_name(monkeypatch, argv, calls):
    seen = []
    for name in bench.BENCHMARKS:
        module = types.ModuleType(f"rmfast.benchmarks.{name}")
        module.main = lambda rest, name=name: seen.append((name, list(rest)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main.main(argv) == 0
    assert seen == calls


def test_errors_of_the_user_are_one_line(work, capsys):
    def stop(args):
        raise errors.UserError("one\n  thing")

    work.run = stop
    assert main.main(["demo"]) == 2
    assert capsys.readouterr() == ("", "rmfast demo: one thing\n")


@pytest.mark.parametrize("name", ["demo", "bench"])
def test_an_interrupt_ends_without_a_traceback(name, work, capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    work.run = work.main = interrupt
    monkeypatch.setitem(sys.modules, "rmfast.benchmarks.score", work)
    assert main.main([name]) == 130
    assert capsys.readouterr().err == f"\nrmfast {name}: interrupted\n"


def test_an_interrupt_before_a_command_begins(monkeypatch):
    class Interrupted:
        def find_spec(*_):
            raise KeyboardInterrupt

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "typer")
        patch.setattr(sys, "meta_path", [Interrupted])
        spec = importlib.util.spec_from_file_location("again", main.__file__)
        with pytest.raises(SystemExit) as ended:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert ended.value.code == 130
    monkeypatch.setattr(main, "app", interrupted)
    assert main.main(["score"]) == 130


def test_errors_of_the_program_keep_their_traceback(work):
    def break_down(args):
        raise ValueError("a bug")

    work.run = break_down
    with pytest.raises(ValueError, match="a bug"):
        main.main(["demo"])
