"""LLaMA-Factory's stage ``rm``: its loading, data and trainer, whole and with LoRA.

Stood in for are torchaudio, of which nothing is called, and its checks of versions, which know none
as new as these.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny

PINS = [
    "llamafactory==0.9.5", "trl==0.24.0", "omegaconf==2.4.0", "av==18.1.0",
    "transformers==5.6.0", "huggingface-hub==1.33.0", "tokenizers==0.22.2", "httpx==0.28.1",
    "httpcore==1.0.9",
]  # fmt: skip
pytest.importorskip("llamafactory", reason="llamafactory is not installed: make programs")

os.environ["DISABLE_VERSION_CHECK"] = "1"
if importlib.util.find_spec("torchaudio") is None:
    stand_in = sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.data import (  # noqa: E402
    PairwiseDataCollatorWithPadding,
    get_dataset,
    get_template_and_fix_tokenizer,
)
from llamafactory.hparams import get_train_args  # noqa: E402
from llamafactory.model import load_model, load_tokenizer  # noqa: E402
from llamafactory.train.rm.trainer import PairwiseTrainer  # noqa: E402

ANSWERS = [("yes", "no"), ("yes, so it is", "no, not at all"), ("so", "so it is not")]


@pytest.fixture
def trainer(tmp_path):
    """Its trainer on a tiny model, as its ``run_rm`` makes it."""

    def made(**options):
        tiny.model(vocab_size=tiny.WORDS, cls=AutoModelForCausalLM).save_pretrained(tmp_path)
        tiny.tokenizer().save_pretrained(tmp_path)
        rows = [
            {"instruction": "Is it?", "input": "", "chosen": chosen, "rejected": rejected}
            for chosen, rejected in ANSWERS
        ]
        (tmp_path / "pairs.json").write_text(json.dumps(rows))
        columns = {"prompt": "instruction", "query": "input"}
        columns |= {"chosen": "chosen", "rejected": "rejected"}
        info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        arguments = {
            "stage": "rm", "do_train": True, "finetuning_type": "full", "template": "default",
            "model_name_or_path": str(tmp_path), "dataset": "pairs", "dataset_dir": str(tmp_path),
            "output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True,
            "per_device_train_batch_size": 3, "disable_gradient_checkpointing": True,
        } | options  # fmt: skip
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(arguments)
        parts = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(parts["tokenizer"], data_args)
        data = get_dataset(template, model_args, data_args, training_args, stage="rm", **parts)
        model = load_model(
            parts["tokenizer"], model_args, finetuning_args, True, add_valuehead=True
        )
        collator = PairwiseDataCollatorWithPadding(
            template=template, model=model, pad_to_multiple_of=8, **parts
        )
        return PairwiseTrainer(
            model=model, args=training_args, finetuning_args=finetuning_args,
            data_collator=collator, **data, **parts,
        )  # fmt: skip

    return made


KINDS = {
    "full": {},
    "lora": {"finetuning_type": "lora", "lora_target": "all"},
    "checkpointed": {"disable_gradient_checkpointing": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_its_trainer(kind, trainer, same):
    one = trainer(**KINDS[kind])
    batch = next(iter(one.get_train_dataloader()))
    torch.nn.init.normal_(one.model.v_head.summary.weight)
    assert (batch["attention_mask"] == 0).any() and len(batch["input_ids"]) == 6

    def run():
        torch.manual_seed(0)  # the value head has dropout
        loss, (_, *scores) = one.compute_loss(one.model, batch, return_outputs=True)
        return torch.cat([loss[None], *scores])

    assert same(run, one.model)[0].level == "backbone"
