"""transformers' pipeline, and process reward models, which give each token a value."""

import pytest
import torch
from transformers import AutoModelForTokenClassification, pipeline

import tiny

TEXTS = ["one prompt: an answer", "one prompt: another one", "one prompt: an answer", "a stranger"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_pipeline_of_text_classification(side, same):
    model, tokenizer = tiny.model(vocab_size=tiny.WORDS), tiny.tokenizer()
    tokenizer.padding_side = side
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")

    def run():
        found = pipe(TEXTS, batch_size=4, function_to_apply="none")
        return torch.tensor([one["score"] for one in found])

    assert same(run, pipe.model)[0].level == "trie"


def test_a_pipeline_loads_and_patches_by_itself(tmp_path, same):
    tiny.model(vocab_size=tiny.WORDS).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-classification", str(tmp_path), device="cpu")
    same(lambda: torch.tensor([one["score"] for one in pipe(TEXTS, batch_size=2)]), pipe.model)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_process_reward_model(family, side, same):
    """Where a step of the reasoning ends stands a label; the model's own loss reads those alone."""
    model = tiny.model(family, num_labels=2, cls=AutoModelForTokenClassification)
    batch = tiny.padded(tiny.rows(), side)
    real = batch["attention_mask"] == 1
    ends = real & (batch["input_ids"] % 3 == 0)
    labels = torch.where(ends, batch["input_ids"] % 2, -100)

    def run():
        out = model(**batch, labels=labels)
        return torch.cat([out.loss[None], out.logits[real].flatten()])

    assert same(run, model)[0].level == "backbone"
