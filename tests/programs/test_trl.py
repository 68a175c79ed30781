"""TRL: a step of GRPO and RLOO, policy and reward model patched, and what PPO scores with.

Nothing is stood in for, but that rollouts are given to the trainers instead of generated.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from rmfast.benchmarks.peers.workloads import Draw
from rmfast.demo import embedded

pytest.importorskip("trl", reason="TRL is not installed: rmfast[train]")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.utils import get_reward

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
pytestmark = pytest.mark.usefixtures("accelerate_anew")


def step(name, policy, reward_model, tokenizer, prompts, completions, folder):
    """A step of its trainer, without generating and without AdamW: ``run()`` for ``same``.

    Args:
        prompts: texts, one for each completion, equal ones side by side.
        completions: token ids.
    """
    trainer_class, config = TRAINERS[name]
    args = config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", beta=0.0,
        per_device_train_batch_size=len(prompts), num_generations=len(prompts) // len({*prompts}),
        num_iterations=2, max_completion_length=max(map(len, completions)),
        gradient_checkpointing=False,
    )  # fmt: skip
    inputs = [{"prompt": prompt} for prompt in prompts]
    trainer = trainer_class(
        model=policy,
        reward_funcs=reward_model,
        args=args,
        train_dataset=Dataset.from_list(inputs),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
    )
    generated = (completions, None) if name == "grpo" else completions
    trainer._generate_single_turn = lambda *_, **__: generated
    trainer.current_gradient_accumulation_steps = 1

    def run():
        policy.train()
        data = trainer._generate_and_score_completions(inputs)
        trainer.compute_loss(policy, data).backward()
        log_probabilities = data["old_per_token_logps" if name == "grpo" else "old_logps"]
        return torch.cat([data["advantages"].flatten(), log_probabilities.flatten()])

    return run


PROMPTS = ["What is the tallest mountain of them all? "] * 4 + ["Hello "] * 4
ANSWERS = ["Mont Blanc", "K2, and then Everest", "Mount", "Mont Blanc", "to you", "you", "t", "u"]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step(name, tmp_path, same):
    policy = tiny.model("llama", cls=AutoModelForCausalLM, vocab_size=tiny.WORDS)
    reward_model, tokenizer = tiny.model("qwen3", vocab_size=tiny.WORDS), tiny.tokenizer()
    completions = tokenizer(ANSWERS)["input_ids"]
    run = step(name, policy, reward_model, tokenizer, PROMPTS, completions, tmp_path)
    levels = [report.level for report in same(run, policy, reward_model)]
    assert levels == ["backbone", "trie"]


def test_what_ppo_scores_with(same):
    """It calls the backbone, and the head on all hidden states; so do XPO and Nash-MD."""
    model = tiny.model("qwen2")
    ids, _ = tiny.padded(tiny.rows()).values()
    ids = torch.cat([ids, torch.full((len(ids), 1), tiny.PAD)], 1)
    same(lambda: get_reward(model, ids, tiny.PAD, 9)[1], model)


def test_speed_of_a_grpo_step(tmp_path, timed):
    folder = embedded.checkpoint()
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(
        message["content"] for pair in embedded.pairs("train") for message in pair.chosen
    )
    prompt = tokenizer.decode(tokenizer(text)["input_ids"][:600])
    completions = Draw(len(tokenizer)).group(0, [60] * 8)
    run = step("grpo", policy, reward_model, tokenizer, [prompt] * 8, completions, tmp_path)
    timed("GRPO step, prompt of 600, 8 completions of 60", run, policy, reward_model)
