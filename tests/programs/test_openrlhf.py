"""OpenRLHF's reward model, critic and actor, and an epoch of its reward trainer.

Stood in for: deepspeed, of which one function is called, that does nothing but with ZeRO-3; what
the trainer asks of its strategy, in one process; flash-attn's padding functions. SDPA attends.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import flash
import tiny
from rmfast.demo import embedded

PINS = ["openrlhf==0.11.2", "pylatexenc==2.11", "einops==0.8.2"]
pytest.importorskip("openrlhf", reason="openrlhf is not installed: make programs")


flash.package()
if importlib.util.find_spec("deepspeed") is None:
    flash.module("deepspeed")
    flash.module("deepspeed.utils", set_z3_leaf_modules=lambda model, classes: None)

from openrlhf.datasets import RewardDataset  # noqa: E402
from openrlhf.models import Actor, get_llm_for_sequence_regression  # noqa: E402
from openrlhf.trainer.rm_trainer import RewardModelTrainer  # noqa: E402

pytestmark = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def loaded(folder, kind, packed, **options):
    """Its model from a folder, in fp32: it loads 16 bits alone."""
    options |= {"param_dtype": "bf16", "attn_implementation": "sdpa", "packing_samples": packed}
    torch.manual_seed(0)
    if kind == "actor":
        return Actor(str(folder), **options).float().eval()
    return get_llm_for_sequence_regression(str(folder), kind, **options).float().eval()


def tiny_one(folder, kind, packed, family="llama"):
    cls = AutoModelForCausalLM if kind == "actor" else AutoModel
    tiny.model(family, cls=cls, vocab_size=tiny.WORDS).save_pretrained(folder)
    return loaded(folder, kind, packed)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_reward_model(family, side, packed, tmp_path, same):
    model = tiny_one(tmp_path, "reward", packed, family)
    assert getattr(model.config, "output_router_logits", False) == (family == "qwen3_moe")
    batch = tiny.padded(tiny.rows(), side)
    same(lambda: model(**batch), model)


@pytest.mark.parametrize("kind", ["critic", "actor"])
def test_values_and_log_probabilities_of_actions(kind, packed, tmp_path, same):
    model = tiny_one(tmp_path, kind, packed)
    ids, mask = tiny.padded(tiny.rows(), "left").values()
    same(lambda: model(ids, torch.ones(len(ids), 5), mask), model)


class Strategy:
    """What its trainer asks of DeepSpeed, in one process; the optimiser takes no step."""

    accumulated_gradient, ring_attn_group = 1, None

    def __init__(self, packed, templates):
        logger = SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None)
        logger.logging_steps = 1
        self.args = SimpleNamespace(
            logger=logger,
            model=SimpleNamespace(
                aux_loss_coef=0, margin_loss_enable=False, compute_fp32_loss_enable=False
            ),
            data=SimpleNamespace(
                chosen_key="chosen", rejected_key="rejected", apply_chat_template=templates
            ),
            ds=SimpleNamespace(packing_samples=packed),
            train=SimpleNamespace(batch_size=1),
            eval=SimpleNamespace(steps=-1),
            ckpt=SimpleNamespace(save_steps=-1),
        )
        self.losses = []

    def is_rank_0(self):
        return False

    def print(self, *said):
        pass

    def backward(self, loss, model, optimizer):
        self.losses.append(loss.item())
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        pass

    def get_grad_norm(self, model):
        return 0.0

    def all_reduce(self, logs):
        return logs


def epoch(model, tokenizer, pairs, packed):
    """An epoch of its reward trainer, 4 pairs a step: the losses."""
    strategy = Strategy(packed, tokenizer.chat_template is not None)
    rows = RewardDataset(Dataset.from_list(pairs), tokenizer, 1024, strategy, num_processors=None)
    loader = DataLoader(rows, batch_size=4, collate_fn=rows.collate_fn)
    scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    trainer = RewardModelTrainer(
        model, strategy, None, loader, None, scheduler, tokenizer, max_epochs=1
    )

    def run():
        strategy.losses.clear()
        trainer.fit(strategy.args)
        return torch.tensor(strategy.losses)

    return run


def test_its_trainer(packed, tmp_path, same):
    model, tokenizer = tiny_one(tmp_path, "reward", packed), tiny.tokenizer(template=False)
    tokenizer.padding_side = "left"
    pairs = [{"chosen": f"What is {i}? {i}.", "rejected": f"What is {i}? No."} for i in range(8)]
    same(epoch(model, tokenizer, pairs, packed), model)


def test_speed_of_its_trainer(packed, timed):
    folder = embedded.checkpoint()
    model, tokenizer = loaded(folder, "reward", packed), AutoTokenizer.from_pretrained(folder)
    pairs = [{"chosen": x.chosen, "rejected": x.rejected} for x in embedded.pairs("train")[:8]]
    name = "packing_samples" if packed else "padded"
    timed(f"RewardModelTrainer, {name}", epoch(model, tokenizer, pairs, packed), model)
