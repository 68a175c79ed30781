"""The examples run, and say what they promise, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

from transformers import AutoModelForCausalLM

import tiny
from rmfast.data import Pair
from rmfast.demo import embedded

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = "what is it a cat dog one two yes no".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    options = {"vocab_size": tiny.WORDS, "max_position_embeddings": 256}
    tiny.model(cls=AutoModelForCausalLM, **options).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def words(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))


def test_rmfast_beside_trl(model, tmp_path, monkeypatch, capsys):
    draw = random.Random(0)
    rows = []
    for _ in range(40):
        prompt = f"\n\nHuman: {words(draw)}\n\nAssistant: "
        rows.append({"chosen": prompt + words(draw) + " yes", "rejected": prompt + words(draw)})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "reward_model.py", "--model", model, "--data", str(data), "--trainer", "both",
        "--steps", "12", "--held-out", "10", "--output", str(tmp_path / "out"),
        "--learning-rate", "1e-4",
    ]  # fmt: skip
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / argv[0])
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def here(command: list[str], check: bool) -> None:  # a process for each trainer takes seconds
        with monkeypatch.context() as inside:
            inside.setattr(sys, "argv", command[1:])
            example.main()

    monkeypatch.setattr(example, "subprocess", SimpleNamespace(run=here))
    monkeypatch.setattr(sys, "argv", argv)
    example.main()
    said = capsys.readouterr().out
    apart = float(re.search(r"at most apart: (\S+)", said)[1])
    losses = {
        name: json.loads((tmp_path / "out" / name / "result.json").read_text())["losses"]
        for name in ("trl", "rmfast")
    }
    assert len(losses["trl"]) == len(losses["rmfast"]) == 12
    # fp32, and losses around one: the rounding of a few hundred operations
    assert apart < 1e-4 and losses["rmfast"] == pytest.approx(losses["trl"], abs=1e-4)
    assert said.count("held-out accuracy") == 4
    assert (tmp_path / "out" / "rmfast" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments", [["kwise", "--loss", "plackett_luce"], ["dpo"]], ids=lambda x: x[0]
)
def test_variants(model, arguments, monkeypatch, capsys):
    draw = random.Random(1)

    def pairs(split: str) -> list[Pair]:
        out = []
        for i in range(6):
            question = {"role": "user", "content": f"{split} {i} {words(draw)}"}
            sides = [[question, {"role": "assistant", "content": words(draw)}] for _ in range(3)]
            out += [Pair(sides[0], side) for side in sides[1:]]
        return out

    monkeypatch.setattr(embedded, "checkpoint", lambda: Path(model))
    monkeypatch.setattr(embedded, "pairs", pairs)
    monkeypatch.setattr(sys, "argv", ["variants.py", *arguments, "--steps", "3"])
    runpy.run_path(str(EXAMPLES / "variants.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"after: held-out accuracy \d+\.\d% \(95 %: ", said)
    if arguments[0] == "dpo":
        assert "step 0: loss 0.693" in said  # log 2: the policy is its reference still
