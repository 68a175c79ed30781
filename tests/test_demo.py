"""``rmfast demo`` from end to end, on a tiny model, and what it says when it cannot run."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from rmfast.commands.main import main
from rmfast.demo import demo
from rmfast.demo.options import DemoOptions
from rmfast.resume import locked

WORDS = "<unk> </s> user assistant : good bad what is this that one two three".split()
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def transformers_speaks_as_before():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def save_model(
    folder: Path, template: str | None = TEMPLATE, vocabulary: int = len(WORDS), **options
) -> str:
    """A random Llama and a tokenizer of one token a word, without a pad token."""
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, num_labels=1, **{**TINY, **HEADS, **options})
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def conversations(folder: Path, count: int = 30, *more: dict) -> str:
    """Pairs of which the good one is good."""
    lines = list(more)
    for i in range(count):
        numbers = " ".join(("one", "two", "three")[i // 3**place % 3] for place in range(4))
        user = {"role": "user", "content": f"what is {numbers}"}
        good, bad = ({"role": "assistant", "content": f"this is {x}"} for x in ("good", "bad"))
        lines.append({"prompt": [user], "chosen": [good], "rejected": [bad]})
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_from_end_to_end(tmp_path, model, capsys):
    long = {"chosen": [{"role": "user", "content": "what " * 80}], "rejected": []}
    long["rejected"] = [*long["chosen"], {"role": "assistant", "content": "bad"}]
    data, output = conversations(tmp_path, 30, long), tmp_path / "trained"
    options = "--steps 25 --batch-pairs 4 --learning-rate 0.01 --dtype float32".split()
    code = main(["demo", "--model", model, "--data", data, "--output", str(output), *options])
    out = capsys.readouterr().out
    assert code == 0
    assert "pad token: '</s>' (1), the end of text, for want of another" in out
    assert "dropped: 1 × longer than --max-length\n" in out  # the positions that the model has
    assert "rmfast: level trie" in out and "ran unpacked" not in out
    assert float(re.search(r"largest difference: (\S+) of", out)[1]) < 1e-4
    left, right = re.search(r"same order: (\d+) of (\d+)", out).groups()
    assert left == right
    assert re.search(r"held-out accuracy after +100\.0%", out)
    ratios = re.findall(r"^.* (\d+\.\d\d) +(\d+\.\d\d) +\d+\.\d\dx$", out, re.MULTILINE)
    assert len(ratios) == 2  # seconds of scoring and of training
    slots, tokens, nodes = (
        int(x)
        for x in re.search(r"(\d+) token slots.*, (\d+) tokens, (\d+) distinct", out).groups()
    )
    assert slots >= tokens > nodes

    trained = AutoModelForSequenceClassification.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert trained.config.pad_token_id == tokenizer.pad_token_id == WORDS.index("</s>")
    inputs = tokenizer(["this is good", "this is bad"], return_tensors="pt")
    good, bad = trained(**inputs).logits[:, 0].tolist()
    assert good > bad


def test_runs_on_the_embedded_pairs(tmp_path, capsys, monkeypatch):
    folder = save_model(tmp_path, max_position_embeddings=256)
    monkeypatch.setattr(demo, "_seconds", lambda model, batches, train: (2.0, 1.0))
    assert main(["demo", "--model", folder, "--steps", "1", "--dtype", "mixed"]) == 0
    out = capsys.readouterr().out
    assert "a function of Python's standard library" in out and "step 1 of 1: loss" in out
    assert re.search(r"data: \d+ pairs to train on, \d+ held out; 8 pairs a batch", out)
    assert re.search(r"scoring, s +2\.00 +1\.00 +2\.00x", out)


# --- errors


def fails(capsys, *argv: str) -> str:
    capsys.readouterr()  # what the test itself made transformers say
    assert main(["demo", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rmfast demo: ") and said.count("\n") == 1
    return said


def test_says_what_is_wrong_with_the_data(tmp_path, model, capsys):
    said = fails(capsys, "--model", model, "--data", str(tmp_path / "none.jsonl"))
    assert "none.jsonl: no such file" in said
    path = tmp_path / "bad.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}\n')
    said = fails(capsys, "--model", model, "--data", str(path))
    assert 'bad.jsonl:2: "rejected" is missing' in said
    path.write_text('{"prompt": "this", "chosen": "one", "rejected": "two"}\n')
    said = fails(capsys, "--model", model, "--data", str(path))
    assert "bad.jsonl: needs pairs of two different prompts" in said
    data = conversations(tmp_path)
    said = fails(capsys, "--model", model, "--data", data, "--max-length", "3")
    assert "pairs.jsonl: no pairs left to train on" in said


def test_says_what_is_wrong_with_the_model(tmp_path, capsys):
    data = conversations(tmp_path)
    none = str(tmp_path / "none")
    assert f"there is no folder {none}" in fails(capsys, "--model", none, "--data", data)
    small = save_model(tmp_path / "small", vocabulary=5)
    said = fails(capsys, "--model", small, "--data", data)
    assert "pairs.jsonl:" in said and "and the model has embeddings for 5" in said
    (tmp_path / "small" / "model.safetensors").write_bytes(b"cut")
    assert "small cannot be loaded" in fails(capsys, "--model", small, "--data", data)


def test_says_what_to_pass_without_a_chat_template(tmp_path, capsys):
    bare, data = save_model(tmp_path / "bare", template=None), conversations(tmp_path)
    said = fails(capsys, "--model", bare, "--data", data)
    assert "pairs.jsonl has messages" in said and "--chat-template FILE" in said
    file = tmp_path / "template.jinja"
    said = fails(capsys, "--model", bare, "--data", data, "--chat-template", str(file))
    assert "--chat-template" in said and "No such file" in said
    file.write_text("{{ raise_exception('not these') }}")
    said = fails(capsys, "--model", bare, "--data", data, "--chat-template", str(file))
    assert "the chat template refuses the messages: not these" in said


def test_says_what_is_wrong_with_the_rest(tmp_path, model, capsys):
    (tmp_path / "file").touch()
    said = fails(capsys, "--model", model, "--output", str(tmp_path / "file" / "inside"))
    assert "--output" in said
    said = fails(capsys, "--model", model, "--output", f"{model}/../{Path(model).name}")
    assert "is the model: give it another name" in said
    data = conversations(tmp_path)
    said = fails(capsys, "--model", model, "--data", data, "--output", str(tmp_path))
    assert "is not empty: name another folder" in said
    with locked(tmp_path):
        said = fails(capsys, "--model", model, "--output", str(tmp_path))
        assert "is being written by another run" in said
    said = fails(capsys, "--model", model, "--device", "nowhere")
    assert "--device must be one of cpu, cuda, got 'nowhere'" in said


# --- parts


def test_pairs_of_one_question_stay_together(tmp_path):
    rows = [
        {"prompt": f"question {i // 3}\n", "chosen": f"{i}", "rejected": "b"} for i in range(60)
    ]
    random.Random(0).shuffle(rows)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    def orders(seed: int) -> list[list[str]]:
        options = DemoOptions(data=str(path), steps=10, batch_pairs=3, seed=seed)
        return [[pair.prompt for pair in side] for side in demo._preferences(options)]

    train, held_out = orders(1)
    assert len(train) == 30 and len(held_out) == 12
    assert not set(train) & set(held_out)
    assert all(len(set(train[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert orders(1) == [train, held_out] and orders(2) != [train, held_out]


def test_batches_have_the_chosen_first():
    rows = [{"chosen_ids": np.array([i]), "rejected_ids": np.array([10 * i])} for i in (1, 2, 3)]
    assert demo._batches(rows, 2) == [[[1], [2], [10], [20]], [[3], [30]]]
