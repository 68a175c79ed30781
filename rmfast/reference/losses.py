"""The specification of the losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rmfast.reference.head import reward_head, wide


def pair_scores(scores: Tensor, pairs: str | Tensor) -> tuple[Tensor, Tensor]:  # [P], [P]
    """Scores of the chosen and of the rejected: ``pairs`` is "halves", "interleaved" or [P, 2]."""
    if isinstance(pairs, Tensor):
        return scores.index_select(0, pairs[:, 0]), scores.index_select(0, pairs[:, 1])
    if pairs == "interleaved":
        return scores[0::2], scores[1::2]
    half = scores.shape[0] // 2
    return scores[:half], scores[half:]


def advantage(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    target: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor | float]:
    """The argument of the sigmoid, and the probability that chosen is preferred."""
    z = chosen - rejected
    if margin is not None:
        z = z - margin.to(z.dtype)
    return z, 1 - label_smoothing if target is None else target.to(z.dtype)


def focus(z: Tensor, gamma: float) -> Tensor:
    """``(1 - 2 max(0, sigmoid(z) - 1/2))**gamma`` (arXiv 2403.17297), with no 1 - 1 in it."""
    log = math.log(2) + nn.functional.logsigmoid(-z.clamp(min=0))  # of 2 (1 - sigmoid(z))
    return torch.where(z > 0, torch.exp(gamma * log), 1.0)


def pairwise_loss(
    scores: Tensor,  # [B]
    pairs: str | Tensor,
    margin: Tensor | None = None,  # [P]
    target: Tensor | None = None,  # [P]
    weight: Tensor | None = None,  # [P]
    label_smoothing: float = 0.0,
    center: float = 0.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:  # [] or [P]; [6]
    """Negative log-likelihood of the preferences under Bradley and Terry's model, and metrics.

    With ``gamma`` each is multiplied by :func:`focus`, and all targets are 1.
    The metrics: share of pairs with chosen > rejected, share of ties, mean of chosen - rejected;
    mean, least and greatest score.
    """
    scores = scores.to(wide(scores.dtype))
    chosen, rejected = pair_scores(scores, pairs)
    z, t = advantage(chosen, rejected, margin, target, label_smoothing)
    logsigmoid = nn.functional.logsigmoid
    loss = -(t * logsigmoid(z))
    if target is not None or label_smoothing:
        loss = loss - (1 - t) * logsigmoid(-z)
    if gamma:
        loss = loss * focus(z, gamma)
    if weight is not None:
        loss = loss * weight.to(z.dtype)
    loss = loss + center * (chosen + rejected) ** 2 if center else loss
    with torch.no_grad():
        metrics = torch.stack(
            [
                (chosen > rejected).to(z.dtype).mean(),
                (chosen == rejected).to(z.dtype).mean(),
                (chosen - rejected).mean(),
                scores.mean(),
                scores.min(),
                scores.max(),
            ]
        )
    if reduction == "none":
        return loss, metrics
    return (loss.mean() if reduction == "mean" else loss.sum()), metrics


def reward_head_pairwise_loss(
    hidden: Tensor,  # [M, H] or [B, T, H]
    index: Tensor,  # int64 [B], rows of hidden.flatten(0, -2)
    weight: Tensor,  # [1, H]
    bias: Tensor | None,  # [1]
    pairs: str | Tensor,
    *options: Tensor | float | str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [] or [P]; [B]; [6]
    """:func:`reward_head`, then :func:`pairwise_loss` with its ``options``."""
    scores = reward_head(hidden, index, weight, bias)[:, 0]
    loss, metrics = pairwise_loss(scores, pairs, *options)
    return loss, scores, metrics


def listwise_loss(
    scores: Tensor,  # [B]
    ranks: Tensor,  # int or float [B], lower is better
    offsets: Tensor,  # int64 [G + 1], rising from 0 to B
    kind: str,  # "all_pairs" | "plackett_luce"
    max_size: int | None = None,  # of the largest group, or more
) -> Tensor:  # fp32 [G]
    """Loss of each group of items.

    With K items in a group: all pairs (InstructGPT, arXiv 2203.02155, eq. 1) is
    ``-log sigmoid(better - worse)`` summed over the pairs that are not tied, over K choose 2.
    Plackett-Luce (Plackett 1975) is ``logsumexp(scores ranked no better) - score`` summed over
    the items: tied items see each other (Breslow 1974).
    """
    sizes = offsets.diff()
    most = max_size or max([1, *sizes.tolist()])
    item = torch.arange(most, device=scores.device)
    inside = item < sizes[:, None]  # [G, K]
    places = torch.where(inside, offsets[:-1, None] + item, len(scores))  # past the end: zeros
    s, r = (nn.functional.pad(x, (0, 1))[places] for x in (scores.to(wide(scores.dtype)), ranks))
    both = inside[:, :, None] & inside[:, None, :]
    if kind == "all_pairs":
        better = both & (r[:, :, None] < r[:, None, :])  # [G, K, K], row better than column
        gap = s[:, :, None] - s[:, None, :]
        pairs = (sizes * (sizes - 1) // 2).clamp(min=1).to(s.dtype)
        terms = -nn.functional.logsigmoid(gap).masked_fill(~better, 0.0)
        return terms.sum((1, 2)) / pairs
    # of each row: the items left when it is chosen; a row past the end sees itself
    left = (both & (r[:, None, :] >= r[:, :, None])) | (item[:, None] == item)
    logits = s[:, None, :].masked_fill(~left, float("-inf"))
    return (logits.logsumexp(2) - s).sum(1)
