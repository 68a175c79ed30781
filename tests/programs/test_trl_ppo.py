"""PPO, XPO and Nash-MD of TRL 0.27, the last that had them, and its value heads.

Nothing is stood in for.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny

PINS = ["trl==0.27.0"]
ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL has no PPO: make programs")

from trl.experimental.nash_md import NashMDTrainer  # noqa: E402
from trl.experimental.ppo.ppo_trainer import PolicyAndValueWrapper, forward, get_reward  # noqa: E402
from trl.experimental.xpo import XPOTrainer  # noqa: E402


def rollouts():
    """Token ids [B, T], and which of them are read: rows end with one pad more at least."""
    batch = tiny.padded([*tiny.rows(), tiny.rows()[3] + [5] * 9])
    return batch["input_ids"], batch["attention_mask"].bool()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_forward_of_policy_and_values(family, same):
    policy, values = tiny.model(family, cls=AutoModelForCausalLM), tiny.model(family)
    both, (ids, read) = PolicyAndValueWrapper(policy, values), rollouts()

    def run():
        output, value = forward(both, ids, tiny.PAD)
        return torch.cat([output.logits[read].flatten(), value[read].flatten()])

    assert [report.level for report in same(run, policy, values)] == ["backbone", "trie"]


def test_values_and_scores(same):
    model, (ids, read) = tiny.model(), rollouts()
    same(lambda: get_reward(model, ids, tiny.PAD, 9)[0][read], model)


@pytest.mark.parametrize("trainer", [XPOTrainer, NashMDTrainer])
def test_rewards_of_two_generations(trainer, same):
    model, (ids, _) = tiny.model(), rollouts()
    its = SimpleNamespace(
        reward_funcs=model,
        processing_class=SimpleNamespace(pad_token_id=tiny.PAD),
        args=SimpleNamespace(missing_eos_penalty=None),
    )
    ids = torch.cat([ids, torch.full((len(ids), 1), tiny.PAD)], 1)
    first, second = ({"input_ids": some} for some in (ids[:4], ids[4:]))
    same(lambda: torch.cat(trainer._compute_rewards(its, first, second, 9)), model)


def test_a_value_head(same):
    model = tiny.model(cls=AutoModelForCausalLM)
    torch.manual_seed(0)
    valued = ppo.AutoModelForCausalLMWithValueHead.from_pretrained(model).eval()
    ids, read = rollouts()
    same(lambda: valued(ids, attention_mask=read.long())[2][read], valued)
