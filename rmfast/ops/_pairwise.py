"""The pairwise log-sigmoid loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rmfast import reference
from rmfast.ops._common import (
    check_choice,
    check_devices,
    check_floating,
    check_pair_values,
    check_places,
    no_second_derivative,
    op,
    present,
    use_kernels,
    without_autocast,
)


@op(
    "pairwise_loss",
    "(Tensor scores, Tensor? pairs, Tensor? margin, Tensor? target, Tensor? weight, str layout, "
    "float label_smoothing, float center, float gamma, str reduction, bool needs_grad) "
    "-> (Tensor, Tensor, Tensor)",
)
def _pairwise_loss(*inputs):
    """Loss, metrics, and the gradients of a pair's two scores."""
    from rmfast.kernels import pairwise_loss as kernel

    loss, metrics, grads = kernel.pairwise_loss(*inputs)
    return loss, metrics, *present(metrics, grads)


@op(
    "pairwise_loss_backward",
    "(Tensor grad, Tensor grads, Tensor scores, Tensor? pairs, str layout) -> Tensor",
)
def _pairwise_loss_backward(grad, grads, scores, *layout):
    # of scores only the shape, and that autograd sees a second derivative asked for
    from rmfast.kernels import pairwise_loss as kernel

    return kernel.pairwise_loss_backward(grad, grads, *layout, scores.shape[0], scores.dtype)


@_pairwise_loss.register_fake
def _(scores, pairs, *rest):
    *_, reduction, needs_grad = rest
    count = scores.shape[0] // 2 if pairs is None else pairs.shape[0]
    acc = reference.wide(scores.dtype)
    loss = scores.new_empty((count,) if reduction == "none" else (), dtype=acc)
    grads = scores.new_empty((2, count) if needs_grad else (0,), dtype=acc)
    return loss, scores.new_empty(6, dtype=acc), grads


@_pairwise_loss_backward.register_fake
def _(grad, grads, scores, *_):
    return scores.new_empty(scores.shape)


no_second_derivative(_pairwise_loss_backward, "pairwise_loss")


def _pairwise_loss_setup(ctx, inputs, output):
    scores, pairs, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], scores, pairs)
    ctx.layout = inputs[5]


def _pairwise_loss_autograd(ctx, grad, *_):
    grad_scores = None
    if grad is not None:
        grad_scores = _pairwise_loss_backward(grad, *ctx.saved_tensors, ctx.layout)
    return grad_scores, *[None] * 10


_pairwise_loss.register_autograd(_pairwise_loss_autograd, setup_context=_pairwise_loss_setup)


class PairwiseLoss(NamedTuple):
    """What :func:`pairwise_loss` gives: all on the device, nothing waits for it."""

    loss: Tensor  # [], or [P] with reduction="none"
    accuracy: Tensor  # [], share of pairs with chosen > rejected
    ties: Tensor  # [], share of pairs with chosen == rejected
    margin: Tensor  # [], mean of chosen - rejected
    reward: Tensor  # [], mean of the scores
    reward_min: Tensor  # []
    reward_max: Tensor  # []


def check_pairs(
    batch: int,
    pairs: str | Tensor,
    margin: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    gamma: float,
    names: tuple[str, str],  # of the scores and of the weight of a pair, in messages
) -> tuple[str, Tensor | None]:
    """The layout and the tensor of pairs that the ops take."""
    if isinstance(pairs, Tensor):
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
            raise ValueError(f"pairs must be int64 [P, 2], got {pairs.dtype} {tuple(pairs.shape)}")
        layout, count, index = "index", pairs.shape[0], pairs
    elif pairs in ("halves", "interleaved"):
        if batch % 2:
            raise ValueError(
                f"{names[0]} has {batch} scores: pairs={pairs!r} needs an even number of them"
            )
        layout, count, index = pairs, batch // 2, None
    else:
        raise ValueError(
            f"pairs must be 'halves', 'interleaved' or an int64 tensor [P, 2], got {pairs!r}"
        )
    if count == 0:
        name = "pairs" if index is not None else names[0]
        raise ValueError(f"{name} is empty: at least one pair is needed")
    for name, x in (("margin", margin), ("target", target), (names[1], weight)):
        if x is None:
            continue
        if x.shape != (count,):
            raise ValueError(f"{name} must be [{count}], one a pair, got shape {tuple(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} gets no gradient here: detach it")
    if target is not None and label_smoothing:
        raise ValueError("target and label_smoothing say the same thing: give one of them")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be 0 or more, and finite, got {gamma}")
    if gamma and (target is not None or label_smoothing):
        name = "label_smoothing" if target is None else "target"
        raise ValueError(f"{name} cannot go with gamma: the focal loss is one of hard labels")
    return layout, index


def pairwise_loss(
    scores: Tensor,  # [B] or [B, 1]
    pairs: str | Tensor = "halves",
    *,
    margin: Tensor | None = None,  # [P]
    target: Tensor | None = None,  # [P]
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,  # [P]
    center: float = 0.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> PairwiseLoss:
    """Negative log-likelihood of preferences, ``-log sigmoid(chosen - rejected - margin)``.

    Bradley and Terry (1952), as InstructGPT has it (arXiv 2203.02155, equation 1)::

        z = chosen - rejected - margin
        loss = weight * (t * softplus(-z) + (1 - t) * softplus(z)) + center * (chosen + rejected)**2

    Forward and backward are one launch each; the metrics come with the forward and cost no sync.

    Args:
        scores: ``[B]`` or ``[B, 1]``, any floating dtype, any stride.
        pairs: ``"halves"``: the first half is chosen, the second rejected, in order (TRL's
            collation). ``"interleaved"``: chosen, rejected, chosen, … Or int64 ``[P, 2]``, the
            places in ``scores`` of the chosen and the rejected (not checked on a GPU); a score may
            be in many pairs, or in none.
        margin: ``[P]``, by how much chosen should be ahead (Llama 2, arXiv 2307.09288, equation 2).
        target: ``[P]`` in [0, 1], the probability ``t`` that chosen is preferred, 1 when not given.
        label_smoothing: the same ``t = 1 - label_smoothing`` for all pairs.
        weight: ``[P]``; the sum is divided by ``P`` all the same, as torch does in
            ``binary_cross_entropy``, and centering is not weighted.
        center: coefficient of ``(chosen + rejected)**2``, which keeps the scores around zero
            (arXiv 2312.09244); TRL's ``center_rewards_coefficient``.
        gamma: above 0, the focal ranking loss of InternLM2 (arXiv 2403.17297): ``softplus(-z)`` is
            multiplied by ``(1 - 2 * max(0, sigmoid(z) - 1/2))**gamma``, so that pairs already in
            order count less. Not with ``target`` or ``label_smoothing``. Where ``z`` is 0 the loss
            has a kink, and the derivative is the one from below, ``-1/2``.
        reduction: ``"mean"`` over the pairs, ``"sum"`` or ``"none"``.

    Returns:
        :class:`PairwiseLoss`: the loss and metrics in fp32 (fp64 for fp64 scores). Only the loss
        is differentiable. Mean, least and greatest reward are of all ``B`` scores; where one is
        NaN, so is the mean, and the other two are undefined.

    Raises:
        ValueError: shapes that do not match, no pair, an unknown ``pairs`` or ``reduction``, or a
            margin, target or weight that requires a gradient; on a CPU, one that is not finite, or
            a target outside [0, 1]. The message names the argument.
    """
    if scores.ndim != 1 and (scores.ndim != 2 or scores.shape[1] != 1):
        raise ValueError(f"scores must be [B] or [B, 1], got shape {tuple(scores.shape)}")
    check_floating(scores=scores)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    layout, index = check_pairs(
        scores.shape[0], pairs, margin, target, weight, label_smoothing, gamma,
        ("scores", "weight"),
    )  # fmt: skip
    check_devices(scores=scores, pairs=index, margin=margin, target=target, weight=weight)
    needs_grad = torch.is_grad_enabled() and scores.requires_grad
    scores = scores.squeeze(1) if scores.ndim == 2 else scores
    options = (label_smoothing, center, gamma, reduction)
    if use_kernels(scores):
        loss, metrics, _ = _pairwise_loss(
            scores, index, margin, target, weight, layout, *options, needs_grad
        )
    else:
        check_places("pairs", index, scores.shape[0])
        check_pair_values(margin=margin, target=target, weight=weight)
        pairs = layout if index is None else index
        run = without_autocast(reference.pairwise_loss)
        loss, metrics = run(scores, pairs, margin, target, weight, *options)
    return PairwiseLoss(loss, *metrics.unbind())
