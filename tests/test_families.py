"""Configs of all classifiers that transformers has: no attribute is taken for granted."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors
from tokenizers import models as tokenizer_models
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForMaskedLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

import rmfast
import tiny
from rmfast import loading
from rmfast.commands.main import main
from rmfast.errors import DataError, UserError
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


# --- a head that pools by another rule


COUNTING = """
class CountingForSequenceClassification(Base):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.base_model(input_ids, attention_mask=attention_mask)[0]
        last = (input_ids != self.config.pad_token_id).sum(-1) - 1
        return Output(logits=self.score(hidden)[range(len(hidden)), last])
"""


@pytest.mark.parametrize("family", ["biogpt", "gpt2", "gpt_neox"])
def test_a_family_that_counts_tokens_keeps_its_own_head(family):
    """As biogpt did up to transformers 5.12: with pads on the left, it scores another token."""
    model = tiny.model(family, torch.float64)
    if family not in tiny.LOWER:
        assert models.find(model)[0] is model
    names = {"Base": type(model), "Output": SequenceClassifierOutputWithPast}
    own = os.path.join(os.path.dirname(transformers.__file__), "counting.py")
    exec(compile(COUNTING, own, "exec"), names)  # as if it were of transformers
    model.__class__ = names["CountingForSequenceClassification"]
    for side in ("left", "right"):
        batch = tiny.padded(tiny.rows(), side)
        with torch.no_grad():
            theirs = model(**batch).logits
            with rmfast.patched(model):
                ours, report = model(**batch).logits, rmfast.report(model)
        assert tiny.score_error(ours, theirs) < 1e-6  # rotary frequencies are fp32
        assert report.level == "backbone"
        assert "the head of CountingForSequenceClassification is its own" in report.reasons[0]


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


@pytest.mark.parametrize(
    "family, pad, most",
    [("bert", 0, 128), ("roberta", 3, 124), ("mpnet", 1, 126), ("llama", 0, 128)],
)
def test_positions(family, pad, most):
    assert models.positions(tiny.model(family, vocab_size=57, pad_token_id=pad)) == most
    assert models.positions(xlnet()) is None


def xlnet():
    torch.manual_seed(0)
    sizes = {"vocab_size": 57, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    found = transformers.XLNetConfig(**sizes, num_labels=1, pad_token_id=0)
    return transformers.XLNetForSequenceClassification(found).eval()


def test_two_turns_are_two_segments():
    model, tokenizer = tiny.model("roberta", vocab_size=57, pad_token_id=0), roberta()
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    with torch.no_grad():
        want = model(**tokenizer("ab", "ba", return_tensors="pt")).logits.item()
    scorer = rmfast.Scorer(model, tokenizer)
    assert scorer.score([turns, ("ab", "ba")]) == pytest.approx([want] * 2, rel=1e-5)
    with pytest.raises(DataError, match="has no chat template"):
        scorer.score([[*turns, *turns]])


@pytest.mark.parametrize("family", ["xlnet", "bart"])
def test_a_model_whose_own_forward_pools(family):
    model = xlnet() if family == "xlnet" else tiny.model(family, vocab_size=57)
    rows = [[*range(4, n), 2] for n in (6, 9, 17)]
    with torch.no_grad():
        want = [model(torch.tensor([row])).logits.item() for row in rows]
    assert rmfast.Scorer(model).score(rows) == pytest.approx(want, rel=1e-4)
    assert rmfast.report(model).level == "head"


def test_a_model_that_reads_pads_is_not_trained(tmp_path):
    xlnet().save_pretrained(tmp_path)
    bert().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"reads what pads a batch, .* let XLNetForSequenceClassif"):
        begin.load_to_train(str(tmp_path))


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert"])
def test_a_training_begins_with_an_encoder(family, tmp_path):
    sizes = {"dim": 32, "hidden_dim": 48} if family == "distilbert" else {}
    language = tiny.model(family, cls=AutoModelForMaskedLM, vocab_size=57, **sizes)
    language.save_pretrained(tmp_path / "lm")
    bert().save_pretrained(tmp_path / "lm")
    start = begin.load_to_train(str(tmp_path / "lm")).start
    assert "classifier.weight" in start.new and not start.warnings
    if family != "distilbert":
        return
    pytest.importorskip("trl")  # this config has no use_cache
    rows = [f'{{"chosen": "{x} is good", "rejected": "{x} is bad"}}\n' for x in LETTERS]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    arguments = ["train", "--model", str(tmp_path / "lm"), "--data", str(tmp_path / "rows.jsonl")]
    arguments += ["--output", str(tmp_path / "rm"), "--max-steps", "2", "--device", "cpu"]
    assert main([*arguments, "--dtype", "float32", "--eval-split", "0"]) == 0
    model, tokenizer, _ = loading.load(str(tmp_path / "rm"), device="cpu")
    scores = rmfast.Scorer(model, tokenizer).score(["a is good", "b is bad"])
    assert scores[0] != scores[1]
