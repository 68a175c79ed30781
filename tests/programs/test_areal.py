"""AReaL's FSDP engine: values of a critic and log-probabilities of an actor, in packed rows.

The engine is AReaL's own, from loading to the backward pass: FSDP2 over one process, lengths beside
positions, and pads at the end of a row. Stood in for: flash-attn's two functions (``flash.py``).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import tiny

PINS = [
    "areal==1.0.4", "aiofiles==25.1.0", "aiohappyeyeballs==2.7.1", "aiohttp==3.14.5",
    "aiosignal==1.4.0", "antlr4-python3-runtime==4.9.3", "blinker==1.9.0", "colorlog==6.12.0",
    "einops==0.8.2", "flask==3.1.3", "frozenlist==1.8.0", "httpx==0.28.1", "hydra-core==1.3.8",
    "itsdangerous==2.2.0", "jiter==0.19.0", "lark==1.3.1", "llvmlite==0.50.0", "multidict==7.2.1",
    "numba==0.68.1", "omegaconf==2.3.0", "openai==3.57.0", "orjson==3.13.0", "propcache==0.5.4",
    "sniffio==1.3.1", "tenacity==9.2.1", "torchdata==0.11.0", "uvloop==0.23.0", "werkzeug==3.1.9",
    "yarl==1.25.1",
]  # fmt: skip
pytest.importorskip("areal", reason="areal is not installed: make programs")

from areal.api import FinetuneSpec  # noqa: E402
from areal.api.cli_args import OptimizerConfig, TrainEngineConfig  # noqa: E402
from areal.engine.fsdp_engine import FSDPEngine  # noqa: E402

CLASSES = {"critic": AutoModelForTokenClassification, "actor": AutoModelForCausalLM}
pytestmark = pytest.mark.usefixtures("one_process", "flash_attention")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])  # masks: a dict of None, and none
def test_its_engine(family, kind, tmp_path, monkeypatch, same):
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    tiny.model(family, cls=CLASSES[kind], vocab_size=tiny.WORDS).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = TrainEngineConfig(
        experiment_name="tests", trial_name="tests", path=str(tmp_path), backend="fsdp:d1",
        attn_impl="flash_attention_2", dtype="float32", is_critic=kind == "critic",
        disable_dropout=True, gradient_checkpointing=False, optimizer=OptimizerConfig(lr=0.0),
    )  # fmt: skip
    engine = FSDPEngine(config)
    engine.create_process_group()
    engine.initialize(None, FinetuneSpec(1, dataset_size=8, train_batch_size=8))
    engine.optimizer_step = dict  # it logs what the step returns
    found = []

    def loss(values, *_, **__):  # values or log-probabilities, [N]
        found.append(values.detach())
        return (values * torch.linspace(-1, 2, len(values))).sum()

    def run():
        batch = tiny.padded(tiny.rows())
        batch["attention_mask"] = batch["attention_mask"].bool()
        engine.train()
        engine.train_batch(batch, loss, lambda batch: torch.tensor(1.0))
        return found.pop()

    assert same(run, engine.model)[0].level == "backbone"
