"""``rmfast demo`` from end to end, on a tiny model, and what it says when it cannot run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
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
from rmfast.data import Pair, by_question
from rmfast.demo import demo
from rmfast.errors import UserError

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


def save_model(folder: Path, template: str | None = TEMPLATE, vocabulary: int = len(WORDS)) -> str:
    """A random Llama and a tokenizer of one token a word, without a pad token."""
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, num_labels=1, **TINY, **HEADS)
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
    assert "the tokenizer has no pad token: taking its eos token, '</s>'" in out
    assert (
        "dropped, because a side is longer than 64 tokens: 1\n" in out
    )  # the positions that the model has
    assert "rmfast: level trie" in out and "ran unpacked" not in out
    assert float(re.search(r"largest difference: (\S+) of", out)[1]) < 1e-4
    left, right = re.search(r"same order: (\d+) of (\d+)", out).groups()
    assert left == right
    assert re.search(r"held-out accuracy after +100\.0%", out)
    ratios = re.findall(r"^.* (\d+\.\d\d) +(\d+\.\d\d) +\d+\.\d\dx$", out, re.MULTILINE)
    assert len(ratios) == 4  # seconds and memory of scoring and of training
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


def test_runs_on_the_embedded_pairs(model, capsys, monkeypatch):
    figures = {"scoring": {"seconds": 2.0, "memory": 1.0}}
    figures["training"] = figures["scoring"]
    monkeypatch.setattr(demo, "_measure", lambda job: [figures, figures])
    assert main(["demo", "--model", model, "--steps", "1", "--dtype", "mixed"]) == 0
    out = capsys.readouterr().out
    assert "documentation of Python" in out and "2e-5" not in out
    assert re.search(r"scoring, s +2\.00 +2\.00 +1\.00x", out)


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
    assert "bad.jsonl: pairs of two different prompts are the least" in said
    data = conversations(tmp_path)
    said = fails(capsys, "--model", model, "--data", data, "--max-length", "3")
    assert "too few pairs of 3 tokens or fewer a side" in said


def test_says_what_is_wrong_with_the_model(tmp_path, capsys):
    data = conversations(tmp_path)
    assert "no such folder" in fails(capsys, "--model", str(tmp_path / "none"), "--data", data)
    (tmp_path / "empty").mkdir()
    said = fails(capsys, "--model", str(tmp_path / "empty"), "--data", data)
    assert "the tokenizer of" in said and "cannot be loaded" in said
    small = save_model(tmp_path / "small", vocabulary=5)
    said = fails(capsys, "--model", small, "--data", data)
    assert "the model embeddings for 5 only" in said
    (tmp_path / "small" / "model.safetensors").write_bytes(b"cut")
    assert "the model" in fails(capsys, "--model", small, "--data", data)


def test_says_what_to_pass_without_a_chat_template(tmp_path, capsys):
    bare, data = save_model(tmp_path / "bare", template=None), conversations(tmp_path)
    said = fails(capsys, "--model", bare, "--data", data)
    assert "pairs.jsonl:" in said and "--chat-template FILE" in said
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
    assert "--device nowhere" in fails(capsys, "--model", model, "--device", "nowhere")


def test_a_measuring_process_that_ends_is_reported(tmp_path):
    job = demo.Job(str(tmp_path / "none"), False, "float32", "cpu", 0, 0, batches=[])
    with pytest.raises(UserError, match=r"ended with 1: .*none"), demo._Process(job) as process:
        process.ask("scoring")

    with pytest.raises(UserError, match="ended with -9"), demo._Process(job) as process:
        process.process.kill()
        process.process.wait()
        process.ask("scoring")


# --- parts


def test_split_keeps_questions_whole_and_apart():
    pairs = [Pair(str(i), "b", prompt=f"question {i // 3}\n") for i in range(60)]
    train, held_out = demo._split(by_question(pairs), 30, seed=1)
    assert sum(map(len, train)) == 30 and sum(map(len, held_out)) == 12
    questions = [
        {pair.question() for group in groups for pair in group} for groups in (train, held_out)
    ]
    assert not questions[0] & questions[1]
    assert demo._split(by_question(pairs), 30, seed=1) == [train, held_out]
    assert demo._split(by_question(pairs), 30, seed=2) != [train, held_out]


def test_batches_go_round_and_keep_questions_together():
    groups = [[([i], [10 * j]) for j in range(2)] for i in range(5)]
    batches = demo._batches(groups, 4, seed=0)
    ten = [next(batches) for _ in range(10)]
    assert all(len(batch) == 4 for batch in ten)
    assert all(batch[k][0] == batch[k + 1][0] for batch in ten for k in (0, 2))
    counts = {i: sum(pair[0] == [i] for batch in ten for pair in batch) for i in range(5)}
    assert counts == dict.fromkeys(range(5), 8)
