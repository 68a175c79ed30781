"""Value heads of TRL 0.24, beside a transformers that programs with an old TRL have.

Nothing is stood in for. rmfast's own trainer needs newer ones, and is not needed here.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny

PINS = [
    "trl==0.24.0",
    "transformers==5.0.0",
    "huggingface-hub==1.33.0",
    "tokenizers==0.22.2",
    "httpx==0.28.1",
    "httpcore==1.0.9",
]
trl = pytest.importorskip("trl", reason="TRL is not installed: make programs")
if not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
    pytest.skip("TRL has no value heads any more: make programs", allow_module_level=True)


def with_value_head(family):
    decoder = tiny.model(family, cls=AutoModelForCausalLM)
    torch.manual_seed(0)
    return trl.AutoModelForCausalLMWithValueHead.from_pretrained(decoder)


@pytest.mark.parametrize(
    ("family", "side"),
    [("llama", "right"), ("llama", "left"), ("qwen3", "left"), ("gpt2", "right")],
)
def test_values_and_logits(family, side, same):
    model = with_value_head(family).eval()
    inputs = tiny.padded(tiny.rows(), side)
    read = inputs["attention_mask"].bool()

    def run():
        logits, _, values = model(**inputs)
        return torch.cat([logits[read].flatten(), values[read]])

    assert same(run, model)[0].level == "backbone"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_value_of_the_last_token_is_a_score(family, same):
    model = with_value_head(family).eval()
    inputs = tiny.padded(tiny.rows())
    last = inputs["attention_mask"].sum(1) - 1
    same(lambda: model(**inputs)[2][torch.arange(len(last)), last], model)
