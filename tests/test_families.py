"""Configs of all classifiers that transformers has: no attribute is taken for granted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers import models as tokenizer_models
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForMaskedLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

import rmfast
import tiny
from rmfast import loading
from rmfast.commands.main import main
from rmfast.packed import models
from rmfast.score import memory
from rmfast.train import begin

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_configs_of_all_classifiers():
    """No model is built: what reads a config must do with what every family has."""
    lacking = set()
    for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        config = kind()
        text = config.get_text_config()
        lacking |= {name for name in ("use_cache", "eos_token_id") if not hasattr(text, name)}
        model = SimpleNamespace(config=config)
        assert models.pad_token(model) is None or models.pad_token(model) >= 0
        assert models.eos_tokens(text) <= set(range(10**6))
        assert models.position_limit(text) > 0
        assert memory.bytes_a_token(text, torch.float32) > 0
        tokens = SimpleNamespace(num_special_tokens_to_add=lambda pair: 2 + pair)
        assert models.takes_pairs(config, tokens) in (True, False)
    assert lacking == {"use_cache", "eos_token_id"}  # else this test shows nothing


# --- encoders, which read a prompt and its response as two segments


def bert() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def roberta() -> RobertaTokenizer:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *LETTERS]
    return RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def two_bos() -> PreTrainedTokenizerFast:
    """Llama's way: each of two texts begins with a BOS, and nothing is between them."""
    inner = Tokenizer(tokenizer_models.BPE({"<s>": 0, "a": 1}, []))
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.mark.parametrize(
    "family, tokenizer, pairs",
    [
        ("bert", bert, True),
        ("roberta", roberta, True),
        ("deberta-v2", bert, True),
        ("modernbert", bert, True),
        ("distilbert", bert, True),
        ("bert", tiny.tokenizer, False),  # which knows no pairs
        ("llama", two_bos, False),
        ("qwen3", bert, False),
        ("gpt2", two_bos, False),
    ],
)
def test_who_takes_pairs(family, tokenizer, pairs):
    assert models.takes_pairs(tiny.CONFIG_MAPPING[family](), tokenizer()) is pairs


def test_an_encoder_made_a_decoder_takes_none():
    assert not models.takes_pairs(tiny.CONFIG_MAPPING["bert"](is_decoder=True), bert())


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert"])
def test_an_encoder_is_trained(family, tmp_path):
    pytest.importorskip("trl")
    sizes = {"dim": 32, "hidden_dim": 48} if family == "distilbert" else {}
    language = tiny.model(family, cls=AutoModelForMaskedLM, vocab_size=57, **sizes)
    language.save_pretrained(tmp_path / "lm")
    bert().save_pretrained(tmp_path / "lm")
    began = begin.load_to_train(str(tmp_path / "lm"))
    assert "classifier.weight" in began.start.new and not began.start.warnings
    rows = [f'{{"chosen": "{x} is good", "rejected": "{x} is bad"}}\n' for x in LETTERS]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    arguments = ["train", "--model", str(tmp_path / "lm"), "--data", str(tmp_path / "rows.jsonl")]
    arguments += ["--output", str(tmp_path / "rm"), "--max-steps", "2", "--device", "cpu"]
    assert main([*arguments, "--dtype", "float32", "--eval-split", "0"]) == 0
    model, tokenizer, _ = loading.load(str(tmp_path / "rm"), device="cpu")
    scores = rmfast.Scorer(model, tokenizer).score(["a is good", "b is bad"])
    assert scores[0] != scores[1]
