"""Quantised reward models, and LoRA on them: torchao and bitsandbytes, which transformers loads."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

import rmfast
import tiny

PINS = ["torchao==0.18.0", "bitsandbytes==0.50.2"]
for name in ("peft", "torchao", "bitsandbytes"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make programs", allow_module_level=True)

from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402


def bits(**options):
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)


KINDS = {
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "fp4": bits(load_in_4bit=True),
    "nf4": bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": bits(load_in_8bit=True, llm_int8_threshold=0.0),
}


def quantised(folder, config):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # blocks are of 64
    tiny.model(**sizes).save_pretrained(folder)
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(folder, quantization_config=config, dtype=torch.float32).eval()
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    return model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_what_is_not_quantised_trains(kind, side, tmp_path, same):
    model, batch = quantised(tmp_path, KINDS[kind]), tiny.padded(tiny.rows(), side)
    (report,) = same(lambda: model(**batch).logits, model)
    assert report.level == "trie" and not report.warnings


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_on_it(kind, tmp_path, same):
    model = prepare_model_for_kbit_training(quantised(tmp_path, KINDS[kind]))
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["score"])
    model, batch = get_peft_model(model, lora).train(), tiny.padded(tiny.rows())
    assert same(lambda: model(**batch).logits, model)[0].level == "trie"


def test_where_a_batch_has_outliers_scores_depend_on_it(tmp_path):
    """bitsandbytes leaves columns in 16 bits where any token of the batch, or a pad, is large."""
    model, rows = quantised(tmp_path, bits(load_in_8bit=True)), tiny.rows()
    with torch.no_grad():
        theirs = model(**tiny.padded(rows)).logits
        alone = torch.cat([model(torch.tensor([row])).logits for row in rows])
        with rmfast.patched(model):
            ours = model(**tiny.padded(rows)).logits
            (warning,) = rmfast.report(model).warnings
    assert 1e-3 < tiny.score_error(ours, theirs) < tiny.score_error(alone, theirs)
    assert "scores depend on the batch" in warning
