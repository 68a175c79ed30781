"""The command line: what it prints, what it hands on, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

import rmfast
from rmfast import cli


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"rmfast {rmfast.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [["--help"], *([name, "--help"] for name in "demo score eval train bench doctor".split())],
)
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: rmfast")


def test_help_needs_no_heavy_import():
    code = (
        "import sys, types; package = types.ModuleType('rmfast'); package.__path__ = [sys.argv[1]];"
        "sys.modules['rmfast'] = package; from rmfast import cli; cli._parser().format_help();"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    folder = str(Path(cli.__file__).parent)
    out = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert out.stdout == "[]\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--steps", "0"], "--steps: need a whole number from 1 on, got '0'"),
        (["demo", "--batch-pairs", "1.5"], "--batch-pairs: need a whole number from 1 on"),
        (["demo", "--learning-rate", "nan"], "--learning-rate: need a number between 0 and 1"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["score"], "required: --model, --input, --output"),
        (["score", "--on-overlong", "cut"], "invalid choice: 'cut'"),
        (["score", "--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["score", "--limit", "0"], "--limit: need a whole number from 1 on"),
        (["train", "--epochs", "0"], "--epochs: need a number above 0, got '0'"),
        (["train", "--eval-split", "1"], "--eval-split: need a number from 0 on and below 1"),
        (["train", "--seed", "-1"], "--seed: need a whole number from 0 to 2**32 - 1, got '-1'"),
        (["train", "--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["bench", "fly"], "invalid choice: 'fly'"),
        (["doctor"], "the following arguments are required: --model"),
    ],
)
def test_wrong_options_end_with_2(capsys, argv, said):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
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
    for name in cli.BENCHMARKS:
        module = types.ModuleType(f"rmfast.benchmarks.{name}")
        module.main = lambda rest, name=name: seen.append((name, list(rest)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main(argv) == 0
    assert seen == calls


def test_errors_of_the_user_are_one_line(monkeypatch, capsys):
    def stop(args):
        raise cli.UserError("one\n  thing")

    monkeypatch.setattr(cli, "_demo", stop)
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr() == ("", "rmfast demo: one thing\n")


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\nrmfast demo: interrupted\n"


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    def break_down(args):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "_demo", break_down)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["demo"])
