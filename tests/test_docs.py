"""The code in README.md, CONTRIBUTING.md and docs/ runs, and its commands name options that exist.

Blocks of a page run in order and share their names, as in one program. They run in a folder where
each model and data set of the pages is a folder with a tiny one: transformers and datasets take a
folder for a name of the hub. A block after a comment ``<!-- not run: reason -->`` is compiled only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import pkgutil
import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from rmfast.commands import bench
from rmfast.commands.main import app
from rmfast.packed.families import TRIE_BACKBONES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (not run): [^\n]+ -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMANDS = typer.main.get_command(app).commands

REWARD_MODELS = ["Skywork/Skywork-Reward-V2-Qwen3-0.6B"]
LANGUAGE_MODELS = ["Qwen/Qwen3-0.6B", "POLICY", "REFERENCE"]
PAIRS = [
    {"prompt": f"What is {i} + 1? ", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
    for i in range(4)
]
DIALOGUES = [
    {
        side: f"\n\nHuman: {pair['prompt']}\n\nAssistant: {pair[side]}"
        for side in ("chosen", "rejected")
    }
    for pair in PAIRS
]
RATED = [
    {
        "instruction": pair["prompt"],
        "completions": [
            {"response": pair["chosen"], "overall_score": 5},
            {"response": pair["rejected"], "overall_score": 1},
        ],
    }
    for pair in PAIRS
]
ROWS = {
    "pairs.jsonl": PAIRS,
    "Anthropic/hh-rlhf/train.jsonl": DIALOGUES,
    "openbmb/UltraFeedback/train.jsonl": RATED,
}
NEEDED = {"datasets": "data.preferences", "trl": "integrations.trl", "peft": "import LoraConfig"}


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, where the code begins
    runs: bool


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(3)) + 1
        yield Block(found[2], found[3], line, runs=found[1] is None)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- Python


def run(text: str, page: str) -> int:
    """Run a page's blocks of Python; returns how many ran."""
    names = {"__name__": "__main__"}
    count = 0
    for block in blocks(text):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.code, page, "exec")
        if block.runs:
            exec(code, names)
            check_shapes(block.code, names)
            count += 1
    return count


def check_shapes(code: str, names: dict[str, Any]) -> None:
    """A comment such as ``# fp32 [2]`` after an assignment is true."""
    for variable, shape in re.findall(r"^(\w+) = .*# fp32 \[([\d, ]+)\]", code, re.MULTILINE):
        value = names[variable]
        assert str(value.dtype).endswith("float32"), variable
        assert list(value.shape) == [int(size) for size in shape.split(",")], variable


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    models = [(AutoModelForSequenceClassification, one) for one in REWARD_MODELS]
    models += [(AutoModelForCausalLM, one) for one in LANGUAGE_MODELS]
    for cls, model in models:
        tiny.model(cls=cls, vocab_size=tiny.WORDS).save_pretrained(folder / model)
        tiny.tokenizer().save_pretrained(folder / model)
    for file, rows in ROWS.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


PROGRAMS = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PROGRAMS, ids=name)
def test_python_runs(page, workspace, monkeypatch):
    text = page.read_text(encoding="utf-8")
    for package, sign in NEEDED.items():
        if sign in text:
            pytest.importorskip(package)
    monkeypatch.chdir(workspace)
    with torch.random.fork_rng():
        assert run(text, name(page))


def test_few_blocks_are_not_run():
    found = [b for p in PAGES for b in blocks(p.read_text(encoding="utf-8")) if not b.runs]
    assert len(found) == 1


def test_every_block_names_its_language():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = list(blocks(text))
        assert text.count("```") == 2 * len(found), name(page)
        assert {block.language for block in found} <= {"python", "bash", "text"}, name(page)


# --- commands


class Parsed(Exception):
    """The command line was read, and the command would begin."""


def check(line: str) -> None:
    """Raise an error where a line of a shell could not run."""
    command, *arguments = shlex.split(line, comments=True) or [""]
    if command == "rmfast" and arguments[0] == "bench":
        assert arguments[1] in bench.BENCHMARKS
        check_parser(arguments[1], arguments[2:])
    elif command == "rmfast" and "--config" in arguments:  # the file has what the line lacks
        check(line.replace("--config", "--model M --data D --output"))
    elif command == "rmfast":
        COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:])
    elif command == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {one for one in arguments if "=" not in one} <= {*targets}
    elif command == "pip":
        known = re.findall(
            r'^        "(\w+)": [A-Z]+,', (ROOT / "setup.py").read_text(), re.MULTILINE
        )
        assert arguments[0] in ("install", "wheel")
        for extras in re.findall(r"\[(.+?)\]", line):
            assert set(extras.split(",")) <= set(known)
    elif command == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1])
    else:
        assert command == "", f"what is {command!r}?"


def check_parser(benchmark: str, arguments: list[str]) -> None:
    """Let a benchmark read its command line, and stop it there."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, argv=None, namespace=None):
        read(self, argv, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        importlib.import_module(f"rmfast.benchmarks.{benchmark}").main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "bash":
            for line in block.code.splitlines():
                try:
                    check(line)
                except (Exception, SystemExit) as error:
                    pytest.fail(f"{name(page)}: {line!r}: {error!r}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_sentences_exist(page):
    known = {
        flag
        for command in COMMANDS.values()
        for option in command.params
        for flag in (*option.opts, *option.secondary_opts)
    }
    known |= {"--pairs", "--rounds", "--contestants", "--groups", "--oracle", "--trainer"}
    known |= {"--help", "--benchmark-only", "--only", "--out", "--python", "--size"}
    known |= {"--speed", "--starts"}
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`\n]+)`", text):
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert flag.replace("_", "-") in known, code


# --- what can go wrong is found


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import rmfast.nothing", ImportError),
        ("a =", SyntaxError),
        ("import torch\nx = torch.ones(2)  # fp32 [3]", AssertionError),
    ],
)
def test_a_wrong_program_is_found(code, error):
    text = f"# Title\n\n```python\nx = 1\n```\n\n```python\n{code}\n```\n"
    with pytest.raises(error):
        run(text, "page.md")


def test_blocks_share_names_and_lines_are_the_page_s():
    text = "```python\nx = 1\n```\n\n```python\nassert x == 1\n1 / 0\n```\n"
    with pytest.raises(ZeroDivisionError) as caught:
        run(text, "page.md")
    assert traceback.extract_tb(caught.tb)[-1][:2] == ("page.md", 7)


@pytest.mark.parametrize(
    "line",
    [
        "rmfast score --model M --input i.jsonl",
        "rmfast score --model M --input i.jsonl --output o.jsonl --colour red",
        "rmfast bench score --colour red",
        "rmfast fly",
        "make coffee",
        "pip install '.[coffee]'",
        "python -m rmfast.benchmarks.coffee",
        "coffee",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((Exception, SystemExit)):
        check(line)


# --- what pages say twice, or point at


def test_the_readme_lists_the_families_that_run_as_a_trie():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(
        r"^\| `trie` \| `\*ForSequenceClassification` on ([^|]+) \|", text, re.MULTILINE
    )
    assert row.split(", ") == sorted(TRIE_BACKBONES)


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"(?<![\w./-])[a-z_]+/[\w./]*\w\.py\b", text)
    files += re.findall(r"`((?:benchmarks|docs|examples|kernels|rmfast|tests)/[\w./]+)`", text)
    assert [
        x for x in files if not any((top / x).exists() for top in (ROOT, ROOT / "rmfast"))
    ] == []


def test_names_that_docstrings_point_at_exist():
    role = re.compile(r":(?:func|class|meth|mod|data|attr):`~?(rmfast[\w.]*)`")
    files = [
        file for top in ("rmfast", "kernels", "benchmarks") for file in (ROOT / top).rglob("*.py")
    ]
    found = {one for file in files for one in role.findall(file.read_text(encoding="utf-8"))}
    assert "rmfast.patch" in found
    for one in sorted(found):
        pkgutil.resolve_name(one)  # an ImportError or AttributeError names it
