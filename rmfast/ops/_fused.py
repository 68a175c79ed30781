"""Head and pairwise loss as one op."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rmfast import reference
from rmfast.ops._common import (
    check_devices,
    check_pair_values,
    check_places,
    no_second_derivative,
    op,
    present,
    use_kernels,
    without_autocast,
)
from rmfast.ops._head import RULE, check_head, check_padded, check_rows
from rmfast.ops._pairwise import check_pairs


@op(
    "reward_head_pairwise_loss",
    "(Tensor hidden, Tensor? index, Tensor weight, Tensor? bias, Tensor? pairs, Tensor? margin, "
    f"Tensor? target, Tensor? pair_weight, {RULE}, str layout, float label_smoothing, "
    "float center, float gamma, str reduction, bool needs_hidden, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # its kernel keeps a counter between launches, which memory of a CUDA graph cannot hold
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _reward_head_pairwise_loss(*inputs):
    """Loss, scores, metrics, rows found, gradients of a pair's scores, partial of the weight."""
    from rmfast.kernels import fused_loss as kernel

    *out, grads, partial = kernel.fused_loss(*inputs)
    return *out, *present(out[1], grads, partial)


@op(
    "reward_head_pairwise_loss_backward",
    "(Tensor grad, Tensor grads, Tensor? partial, Tensor hidden, Tensor index, Tensor weight, "
    "Tensor? bias, Tensor? pairs, str layout, bool needs_hidden) -> (Tensor, Tensor, Tensor)",
)
def _reward_head_pairwise_loss_backward(grad, grads, partial, hidden, *rest):
    # of hidden only the shape, and that autograd sees a second derivative asked for
    from rmfast.kernels import fused_loss as kernel

    *rest, needs_hidden = rest
    like = (hidden.shape, hidden.dtype)
    out = kernel.fused_loss_backward(grad, grads, partial, *rest, *like, needs_hidden)
    return present(hidden, *out)


@_reward_head_pairwise_loss.register_fake
def _(hidden, index, weight, bias, pairs, *rest):
    *_, needs_hidden, needs_weight = rest
    batch, (*rows, width) = (hidden if index is None else index).shape[0], hidden.shape
    count = batch // 2 if pairs is None else pairs.shape[0]
    acc = reference.wide(hidden.dtype)
    partial = (0,)
    if needs_weight:
        from rmfast.kernels import fused_loss as kernel

        parts, *_ = kernel.programs(count, batch, math.prod(rows), width, hidden.dtype, True)
        partial = (parts, width)
    grads = (2, count) if needs_hidden or needs_weight else (0,)
    shapes = ((), (batch,), (6,), grads, partial)
    out = [hidden.new_empty(shape, dtype=acc) for shape in shapes]
    found = hidden.new_empty(batch if index is None else 0, dtype=torch.int64)
    return *out[:3], found, *out[3:]


@_reward_head_pairwise_loss_backward.register_fake
def _(grad, grads, partial, hidden, index, weight, bias, pairs, layout, needs_hidden):
    out = [hidden.new_empty(hidden.shape) if needs_hidden else None, None, None]
    if partial is not None:
        out[1:] = weight.new_empty(weight.shape), None if bias is None else bias.new_empty(1)
    return present(hidden, *out)


no_second_derivative(_reward_head_pairwise_loss_backward, "reward_head_pairwise_loss")


def _reward_head_pairwise_loss_setup(ctx, inputs, output):
    hidden, index, weight, bias, pairs, *_ = inputs
    *_, found, grads, partial = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    index = found if index is None else index
    ctx.save_for_backward(grads, partial, hidden, index, weight, bias, pairs)
    needs = ctx.needs_input_grad
    ctx.needs = (needs[0], needs[2], needs[3])
    ctx.layout = inputs[12]


def _reward_head_pairwise_loss_autograd(ctx, grad, *_):
    needs_hidden, needs_weight, needs_bias = ctx.needs
    out = (None, None, None)
    if grad is not None and any(ctx.needs):
        grads, partial, *saved = ctx.saved_tensors
        partial = partial if needs_weight or needs_bias else None
        more = (*saved, ctx.layout, needs_hidden)
        out = _reward_head_pairwise_loss_backward(grad, grads, partial, *more)
        out = [g if need else None for g, need in zip(out, ctx.needs, strict=True)]
    return out[0], None, out[1], out[2], *[None] * 15


_reward_head_pairwise_loss.register_autograd(
    _reward_head_pairwise_loss_autograd, setup_context=_reward_head_pairwise_loss_setup
)


class RewardHeadPairwiseLoss(NamedTuple):
    """What :func:`reward_head_pairwise_loss` gives; the metrics are :class:`PairwiseLoss`'s."""

    loss: Tensor  # []
    scores: Tensor  # [B], not differentiable here
    accuracy: Tensor  # []
    ties: Tensor  # []
    margin: Tensor  # []
    reward: Tensor  # []
    reward_min: Tensor  # []
    reward_max: Tensor  # []


def reward_head_pairwise_loss(
    hidden: Tensor,  # [M, H], or [B, T, H] of a padded batch
    index: Tensor | None,  # int64 [B]; None of a padded batch
    weight: Tensor,  # [1, H]
    bias: Tensor | None = None,  # [1]
    pairs: str | Tensor = "halves",
    *,
    input_ids: Tensor | None = None,  # int [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
    pad_token_id: int | None = None,
    pooling: str = "hf",
    margin: Tensor | None = None,  # [P]
    target: Tensor | None = None,  # [P]
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,  # [P]
    center: float = 0.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> RewardHeadPairwiseLoss:
    """:func:`reward_head` and :func:`pairwise_loss` as one op: two launches a training step.

    The gradient of ``weight`` is summed up while the rows are read for their scores. Of a padded
    batch, given by ``input_ids``, the pooled tokens are found in the same launch, as
    :func:`pooled_reward_head` finds them, and the gradient of ``hidden`` is dense.

    Args:
        hidden: hidden states ``[M, H]``, of a padded batch ``[B, T, H]``, any floating dtype.
        index: int64 ``[B]``, the row of each sequence's score, ``0 <= index < M`` (not checked on
            a GPU); rows may repeat. None of a padded batch.
        weight: ``[1, H]``.
        bias: ``[1]`` or None.
        pairs: as in :func:`pairwise_loss`, of the ``B`` scores.
        input_ids: int ``[B, T]`` of a padded batch; ``attention_mask``, ``pad_token_id`` and
            ``pooling`` as in :func:`pooled_reward_head`.
        margin: as in :func:`pairwise_loss`; so are ``target``, ``label_smoothing``, ``center``
            and ``gamma``.
        pair_weight: :func:`pairwise_loss`'s ``weight``.
        reduction: ``"mean"`` over the pairs or ``"sum"``.

    Returns:
        :class:`RewardHeadPairwiseLoss`, in fp32 (fp64 for fp64 inputs). Only ``loss`` is
        differentiable, by hidden, weight and bias: ``scores`` carries no gradient. Where
        something else depends on the scores, call the two ops one after the other.

    Raises:
        ValueError: shapes that do not match, no pair, an unknown ``pairs`` or ``reduction``, or a
            margin, target or weight that requires a gradient; on a CPU, one that is not finite, or
            a target outside [0, 1]. The message names the argument.
    """
    if (index is None) == (input_ids is None):
        raise ValueError("give index of rows [M, H], or input_ids of a padded batch [B, T, H]")
    if index is None:
        attention_mask = check_padded(hidden, input_ids, attention_mask, pooling)
    else:
        check_rows(hidden, index)
    check_head(hidden, weight, bias)
    if weight.shape[0] != 1:
        raise ValueError(f"weight must be [1, H]: one score a sequence, got {tuple(weight.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction must be 'mean' or 'sum', got {reduction!r}: for the loss of each pair, "
            "call reward_head and pairwise_loss"
        )
    name, batch = ("input_ids", len(input_ids)) if index is None else ("index", len(index))
    layout, rows = check_pairs(
        batch, pairs, margin, target, pair_weight, label_smoothing, gamma, (name, "pair_weight")
    )
    check_devices(
        hidden=hidden, index=index, input_ids=input_ids, attention_mask=attention_mask,
        weight=weight, bias=bias, pairs=rows, margin=margin, target=target, pair_weight=pair_weight,
    )  # fmt: skip
    rule = (input_ids, attention_mask, pad_token_id, pooling)
    options = (label_smoothing, center, gamma, reduction)
    if not use_kernels(hidden, weight, bias):
        check_places("index", index, hidden.shape[0])
        check_places("pairs", rows, batch)
        check_pair_values(margin=margin, target=target, pair_weight=pair_weight)
        use = layout if rows is None else rows
        index = reference.pooled_rows(*rule) if index is None else index
        run = without_autocast(reference.reward_head_pairwise_loss)
        loss, scores, metrics = run(
            hidden, index, weight, bias, use, margin, target, pair_weight, *options
        )
        return RewardHeadPairwiseLoss(loss, scores.detach(), *metrics.unbind())
    needs_hidden = torch.is_grad_enabled() and hidden.requires_grad
    needs_weight = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    loss, scores, metrics, *_ = _reward_head_pairwise_loss(
        hidden, index, weight, bias, rows, margin, target, pair_weight, *rule, layout, *options,
        needs_hidden, needs_weight,
    )  # fmt: skip
    return RewardHeadPairwiseLoss(loss, scores, *metrics.unbind())
