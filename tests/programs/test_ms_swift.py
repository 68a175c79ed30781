"""ms-swift's ``rlhf --rlhf_type rm``: its loading, data and reward trainer.

Stood in for is aiohttp, of which nothing is called.
"""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny

PINS = [
    "ms-swift==4.6.0", "trl==0.24.0", "einops==0.8.2", "json-repair==0.64.6", "dacite==1.9.2",
    "addict==2.4.0", "modelscope==1.40.2", "modelscope-hub==0.5.1", "cryptography==50.0.2",
    "cffi==2.1.1", "pycparser==3.12",
    "transformers==5.17.0", "huggingface-hub==1.33.0", "tokenizers==0.23.2", "httpx==0.28.1",
    "httpcore==1.0.9",
]  # fmt: skip
if importlib.util.find_spec("swift") is None:
    pytest.skip("ms-swift is not installed: make programs", allow_module_level=True)
if importlib.util.find_spec("aiohttp") is None:
    stand_in = sys.modules["aiohttp"] = types.ModuleType("aiohttp")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("aiohttp", None)

from swift.model import get_model_processor  # noqa: E402
from swift.pipelines.train.rlhf import SwiftRLHF  # noqa: E402

ANSWERS = [("yes", "no"), ("yes, so it is", "no, not at all"), ("so", "so it is not")]


class Pipeline(SwiftRLHF):
    """Its own, up to the first step: what it made is looked at."""

    def train(self, trainer):
        return trainer


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    def made(**options):
        tiny.model(vocab_size=tiny.WORDS, cls=AutoModelForCausalLM).save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "Is it?"},
                    {"role": "assistant", "content": chosen},
                ],
                "rejected_response": rejected,
            }
            for chosen, rejected in ANSWERS
        ]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = {
            "rlhf_type": "rm", "model": str(tmp_path), "model_type": "llama", "template": "chatml",
            "dataset": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "out"),
            "report_to": "none", "per_device_train_batch_size": "3", "torch_dtype": "float32",
            "use_cpu": "true", "tuner_type": "full", "split_dataset_ratio": "0",
            "check_model": "false", "gradient_checkpointing": "false",
        } | options  # fmt: skip
        line = [text for name, value in arguments.items() for text in (f"--{name}", value)]
        return Pipeline(line).main()

    return made


KINDS = {
    "full": {},
    "lora": {"tuner_type": "lora", "target_modules": "all-linear"},
    "checkpointed": {"gradient_checkpointing": "true"},
}


def losses(one, batch):
    loss, outputs = one.compute_loss(one.model, dict(batch), return_outputs=True)
    return torch.cat([loss[None], *(scores.flatten() for scores in outputs.values())])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_its_trainer(kind, trainer, same):
    one = trainer(**KINDS[kind])
    batch = next(iter(one.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any() and len(batch["input_ids"]) == 6
    assert same(lambda: losses(one, batch), one.model)[0].level == "trie"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_made_of_a_language_model(side, tmp_path, same):
    """As it makes them where transformers has no such class for a family, and for rerankers."""
    tiny.model(vocab_size=tiny.WORDS, cls=AutoModelForCausalLM).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = get_model_processor(
        str(tmp_path), torch_dtype=torch.float32, device_map="cpu", model_type="llama",
        auto_model_cls=AutoModelForCausalLM, task_type="seq_cls", num_labels=1,
    )  # fmt: skip
    assert type(model).__name__ == "LlamaForCausalLM" and model.score.out_features == 1
    batch = tiny.padded(tiny.rows(), side)
    options = {"padding_side": side}
    assert same(lambda: model(**batch, **options).logits, model)[0].level == "backbone"
