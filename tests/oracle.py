"""Gradients of :mod:`rmfast.reference` written out by hand, for tests to hold autograd and kernels
against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast.reference import pair_scores, wide
from rmfast.reference.head import gathered
from rmfast.reference.losses import advantage, focus


def pairwise_gradients(
    scores: Tensor,
    pairs: str | Tensor,
    margin: Tensor | None = None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center: float = 0.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> Tensor:  # [2, P]
    """:func:`pairwise_loss` by the chosen and by the rejected score of each pair."""
    chosen, rejected = pair_scores(scores.to(wide(scores.dtype)), pairs)
    z, t = advantage(chosen, rejected, margin, target, label_smoothing)
    slope = (1 - t) * torch.sigmoid(z) - t * torch.sigmoid(-z)
    if gamma:  # a tie, where the loss has a kink, gets the derivative from the left
        fall = gamma * torch.sigmoid(z) * torch.nn.functional.logsigmoid(z)
        slope = focus(z, gamma) * (slope + torch.where(z > 0, fall, 0.0))
    if weight is not None:
        slope = slope * weight.to(z.dtype)
    grads = torch.stack([slope, -slope])
    if center:
        grads = grads + 2 * center * (chosen + rejected)
    return grads / len(z) if reduction == "mean" else grads


def pairwise_loss_backward(
    grad: Tensor,  # [] or [P]
    grads: Tensor,  # [2, P]
    pairs: str | Tensor,
    batch: int,
) -> Tensor:  # [B], fp32
    """Gradient of the scores: a score in many pairs gets the sum, one in none zero."""
    items = torch.arange(batch, device=grads.device)
    use = torch.stack(pair_scores(items, pairs)).flatten()
    out = torch.zeros(batch, dtype=grads.dtype, device=grads.device)
    return out.index_add_(0, use, (grads * grad).flatten())


def reward_head_backward(
    grad: Tensor,  # fp32 [B, L]
    hidden: Tensor,  # [M, H] or [B, T, H]
    index: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # like hidden, [L, H], [L]
    """Gradients of :func:`reward_head`; rows picked twice get the sum."""
    acc = wide(hidden.dtype)
    grad = grad.to(acc)
    grad_hidden = rows_gradient(grad, index, weight, hidden.shape, hidden.dtype)
    grad_weight = grad.mT @ gathered(hidden, index).to(acc)
    return grad_hidden, grad_weight.to(weight.dtype), grad.sum(0)


def rows_gradient(
    grad: Tensor,  # fp32 [B, L]
    index: Tensor,  # int64 [B]
    weight: Tensor,  # [L, H]
    shape: torch.Size,  # of hidden
    dtype: torch.dtype,  # of hidden
) -> Tensor:
    """The part of :func:`reward_head_backward` that belongs to hidden."""
    rows, use = index.unique(return_inverse=True)
    sums = grad.new_zeros(rows.shape[0], shape[-1])
    sums.index_add_(0, use, grad @ weight.to(grad.dtype))
    out = torch.zeros(shape, dtype=dtype, device=grad.device)
    out.view(-1, shape[-1])[rows] = sums.to(dtype)
    return out


def listwise_slope(scores: Tensor, ranks: Tensor, offsets: Tensor, kind: str) -> Tensor:  # [B]
    """Gradient of the sum of :func:`rmfast.reference.listwise_loss` by each score."""
    sizes = offsets.diff()
    item = torch.arange(max(1, int(sizes.max())) if len(sizes) else 1, device=scores.device)
    inside = item < sizes[:, None]  # [G, K]
    s = scores.new_zeros(inside.shape, dtype=wide(scores.dtype))
    s = s.masked_scatter(inside, scores.to(s.dtype))
    r = ranks.new_zeros(inside.shape).masked_scatter(inside, ranks)
    both = inside[:, :, None] & inside[:, None, :]
    if kind == "all_pairs":
        better = both & (r[:, :, None] < r[:, None, :])
        gap = s[:, :, None] - s[:, None, :]
        pairs = (sizes * (sizes - 1) // 2).clamp(min=1).to(s.dtype)
        wrong = torch.sigmoid(-gap).masked_fill(~better, 0.0)
        slope = (wrong.sum(1) - wrong.sum(2)) / pairs[:, None]
    else:
        left = (both & (r[:, None, :] >= r[:, :, None])) | (item[:, None] == item)
        logits = s[:, None, :].masked_fill(~left, float("-inf"))
        slope = logits.softmax(2).masked_fill(~both, 0.0).sum(1) - 1
    return slope[inside]


def listwise_loss_backward(
    grad: Tensor,  # [G]
    slope: Tensor,  # [B]
    offsets: Tensor,  # int64 [G + 1]
    dtype: torch.dtype,
) -> Tensor:  # dtype [B]
    """Gradient of the scores: each group's gradient times the slope of its items."""
    return (grad.repeat_interleave(offsets.diff()) * slope).to(dtype)
