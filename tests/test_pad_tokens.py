"""Pad tokens that have no embedding, as old conversions have -1: right at every level."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

import rmfast
import tiny
from rmfast import Scorer, loading
from rmfast.errors import UserError
from rmfast.packed import models
from rmfast.packed.step import Step
from rmfast.train import begin
from rmfast.train.batches import Collator
from rmfast.train.objective import Objective

BEYOND = 10**6
CASES = [("llama", -1), ("gpt2", -1), ("bloom", -1), ("gpt2", BEYOND), ("opt", -1)]
CASES += [("gpt_neox", tiny.VOCAB), ("phi3", -1)]


def model(family: str, pad: int | None, **options):
    made = tiny.model(family, **options)
    made.config.pad_token_id = pad
    return made


class Valued(torch.nn.Module):
    """A head of its own, which scores the last attended token."""

    def __init__(self, decoder):
        super().__init__()
        self.config, self.model = decoder.config, decoder
        self.value = torch.nn.Linear(32, 1)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scores = self.value(hidden[torch.arange(len(hidden)), mask.sum(1) - 1])
        return SequenceClassifierOutput(logits=scores)


@torch.no_grad()
def one_by_one(made) -> np.ndarray:
    """Hugging Face's own scores, in fp64, a row at a time."""
    exact = copy.deepcopy(made).double()
    return np.array([exact(torch.tensor([row])).logits.item() for row in tiny.rows()])


def close(ours, theirs) -> bool:
    return np.abs(ours - theirs).max() < 1e-4 * np.std(theirs)


@pytest.mark.parametrize("family, pad", CASES)
def test_the_scorer(family, pad):
    made = model(family, pad)
    theirs = one_by_one(made)
    assert models.pad_token(made) is None
    assert close(Scorer(made).score(tiny.rows()), theirs)


def test_a_head_of_its_own():
    made = Valued(model("llama", -1).model)
    theirs = one_by_one(made)
    assert close(Scorer(made).score(tiny.rows()), theirs)


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("pad", [-1, None])
def test_a_packed_batch_that_runs_padded(family, pad):
    made = model(family, pad)
    theirs = one_by_one(made)
    rmfast.patch(made)
    made.config.output_hidden_states = True  # which no packed batch gives
    rows = tiny.rows()
    pairs = zip(rows[:3], rows[3:], strict=True)
    batch = Collator()([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs])
    step = Step(batch, Objective())
    made(input_ids=batch["input_ids"][None], rmfast_step=step)
    report = rmfast.report(made)  # at level head nothing is packed, and that is what it says
    assert bool(report.fallbacks) == (report.level == "trie")
    assert close(step.scores.detach().numpy(), theirs)


@pytest.mark.parametrize("family, pad", CASES)
def test_a_padded_batch_is_scored_as_before(family, pad):
    """Hugging Face takes what fills up a row for a token; so does the patched model."""
    made, batch = model(family, pad), tiny.padded(tiny.rows())
    with torch.no_grad():
        theirs = made(**batch).logits
        ours = rmfast.patch(made)(**batch).logits
    assert tiny.score_error(ours, theirs) < 1e-5


def test_a_training_begins_with_another(tmp_path):
    made = model("llama", None, cls=AutoModelForCausalLM, vocab_size=300)
    made.config.pad_token_id = -1
    made.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    began = begin.load_to_train(str(tmp_path))
    assert began.model.config.pad_token_id == began.tokenizer.pad_token_id == tiny.PAD
    made.config.pad_token_id = BEYOND
    made.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its config\.pad_token_id has no embedding: set another"):
        loading.load(str(tmp_path), device="cpu")
