"""A user's program. mypy accepts it, and knows the types that ``assert_type`` names."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import rmfast
from rmfast import data, losses, ops


class RewardModel(nn.Module):
    pass


def patching(model: RewardModel) -> RewardModel:
    assert_type(rmfast.patch(model, pooling="mask"), RewardModel)
    with rmfast.patched(model, share_prefixes=False) as inside:
        assert_type(inside, RewardModel)
    report = rmfast.report(model)
    assert_type(report, rmfast.Report)
    assert_type(report.warnings, list[str])
    return rmfast.unpatch(model)


def scoring(model: RewardModel, tokenizer: Any) -> Iterator[float]:
    scorer = rmfast.Scorer(model, tokenizer, max_tokens=4096, on_overlong="truncate_left")
    assert_type(scorer.model, nn.Module)
    assert_type(scorer.max_tokens, int)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rewards = scorer.score([messages, ("a prompt", "a response"), "a text", [1, 2, 3]])
    mean: float = rewards.mean()
    scorer.score_pairs([("chosen", "rejected"), {"chosen": "a", "rejected": "b"}])
    yield mean
    yield from scorer.stream(iter(["a text"]))


def training(chosen: Tensor, rejected: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    loss = losses.bradley_terry(chosen, rejected, margin=torch.ones(4), center=0.01)
    loss = loss + losses.focal(chosen, rejected)
    loss = loss + losses.plackett_luce(chosen[None], torch.arange(4)[None])
    result = ops.reward_head_pairwise_loss(hidden, torch.arange(8), weight)
    assert_type(result.accuracy, Tensor)
    return loss + result.loss


def packing(rows: list[list[int]]) -> Tensor:
    trie = rmfast.pack(rows)
    assert_type(trie, rmfast.PackedTrie)
    return trie.subtree_end


def reading() -> list[str]:
    found = data.preferences("pairs.jsonl", ratings="groups")
    assert_type(found, data.Preferences)
    return [str(record.chosen) for record in found.records if isinstance(record, data.Pair)]


def diagnosing(model: RewardModel) -> list[str]:
    found = rmfast.doctor(model, source="a folder")
    assert_type(found, rmfast.Diagnosis)
    assert_type(found.wrong, bool)
    return [finding.status for finding in found.findings]
