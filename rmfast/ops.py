"""The operations as torch.library ops: one name, one implementation a device, autograd once.

Every op runs :mod:`rmfast.reference` on a CPU, and a kernel of :mod:`rmfast.kernels` on a GPU
where Triton is installed. Second derivatives are not implemented.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rmfast import reference


def _exact(function: Callable) -> Callable:
    """Keeps autocast out: it would round the fp32 sums inside to bf16."""

    @functools.wraps(function)
    def run(first: Tensor, *args):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _use_kernels(x: Tensor) -> bool:
    """Whether Triton runs what is asked of ``x``; under its interpreter, on a CPU too."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return x.is_cuda and _HAS_TRITON


def _no_second_derivative(op: torch.library.CustomOpDef, name: str) -> None:
    """``op``, the backward of ``rmfast.ops.name``, says so when it is differentiated."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"rmfast.ops.{name} has no second derivative: for one, write the operation in plain "
            "torch, as rmfast/reference.py does"
        )

    op.register_autograd(refuse)


def _check_devices(**tensors: Tensor | None) -> None:
    first, *others = ((name, x.device) for name, x in tensors.items() if x is not None)
    for name, device in others:
        if device != first[1]:
            raise ValueError(f"{name} is on {device}, {first[0]} on {first[1]}: move one of them")


@torch.library.custom_op("rmfast::reward_head", mutates_args=())
@_exact
def _reward_head(hidden: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _use_kernels(hidden):
        from rmfast.kernels import reward_head as kernel

        return kernel.reward_head(hidden, index, weight, bias)
    return reference.reward_head(hidden, index, weight, bias)


@torch.library.custom_op("rmfast::pooled_reward_head", mutates_args=())
@_exact
def _pooled_reward_head(
    hidden: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
    pooling: str,
) -> tuple[Tensor, Tensor]:
    rule = (attention_mask, pad_token_id, pooling)
    if _use_kernels(hidden):
        from rmfast.kernels import reward_head as kernel

        return kernel.pooled_reward_head(hidden, input_ids, weight, bias, *rule)
    return reference.pooled_reward_head(hidden, input_ids, weight, bias, *rule)


@torch.library.custom_op("rmfast::reward_head_backward", mutates_args=())
@_exact
def _reward_head_backward(
    grad: Tensor,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    used_only: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if _use_kernels(hidden):
        from rmfast.kernels import reward_head as kernel

        grads = kernel.reward_head_backward(
            grad, hidden, index, weight, bias, used_only, needs_hidden, needs_weight
        )
    else:
        grad_hidden, grad_weight, grad_bias = reference.reward_head_backward(
            grad, hidden, index, weight, used_only
        )
        has_bias = needs_weight and bias is not None
        grads = (
            grad_hidden if needs_hidden else None,
            grad_weight if needs_weight else None,
            grad_bias.to(bias.dtype) if has_bias else None,
        )
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_reward_head.register_fake
def _(hidden, index, weight, bias):
    acc = reference.wide(hidden.dtype)
    return hidden.new_empty(index.shape[0], weight.shape[0], dtype=acc)


@_pooled_reward_head.register_fake
def _(hidden, input_ids, weight, bias, attention_mask, pad_token_id, pooling):
    acc = reference.wide(hidden.dtype)
    scores = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=acc)
    return scores, hidden.new_empty(hidden.shape[0], dtype=torch.int64)


@_reward_head_backward.register_fake
def _(grad, hidden, index, weight, bias, used_only, needs_hidden, needs_weight):
    grad_hidden = grad_weight = grad_bias = None
    if needs_hidden:
        shape = (index.shape[0], hidden.shape[-1]) if used_only else hidden.shape
        grad_hidden = hidden.new_empty(shape)
    if needs_weight:
        grad_weight = weight.new_empty(weight.shape)
        grad_bias = bias.new_empty(bias.shape) if bias is not None else None
    grads = (grad_hidden, grad_weight, grad_bias)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


_no_second_derivative(_reward_head_backward, "reward_head")


def _reward_head_grads(ctx, grad, hidden, index, weight, bias):
    """Gradients of hidden, weight and bias for the ``ctx`` of an op with these as inputs."""
    needs_hidden, needs_weight, needs_bias = ctx.needs
    if not any(ctx.needs):
        return None, None, None
    grads = _reward_head_backward(
        grad, hidden, index, weight, bias, False, needs_hidden, needs_weight or needs_bias
    )
    return tuple(g if need else None for g, need in zip(grads, ctx.needs, strict=True))


def _reward_head_setup(ctx, inputs, output):
    hidden, index, weight, bias = inputs
    ctx.save_for_backward(hidden, index, weight, bias)
    needs = ctx.needs_input_grad
    ctx.needs = (needs[0], needs[2], needs[3])


def _reward_head_autograd(ctx, grad):
    grad_hidden, grad_weight, grad_bias = _reward_head_grads(ctx, grad, *ctx.saved_tensors)
    return grad_hidden, None, grad_weight, grad_bias


_reward_head.register_autograd(_reward_head_autograd, setup_context=_reward_head_setup)


def _pooled_reward_head_setup(ctx, inputs, output):
    hidden, _, weight, bias, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, output[1], weight, bias)
    needs = ctx.needs_input_grad
    ctx.needs = (needs[0], needs[2], needs[3])


def _pooled_reward_head_autograd(ctx, grad, _):
    grad_hidden, grad_weight, grad_bias = _reward_head_grads(ctx, grad, *ctx.saved_tensors)
    return grad_hidden, None, grad_weight, grad_bias, None, None, None


_pooled_reward_head.register_autograd(
    _pooled_reward_head_autograd, setup_context=_pooled_reward_head_setup
)


def _check_floating(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}: convert it")


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [num_labels, {hidden.shape[-1]}] like hidden, "
            f"got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    _check_floating(hidden=hidden, weight=weight, bias=bias)


def _check_rows(hidden: Tensor, index: Tensor) -> None:
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [M, H], got shape {tuple(hidden.shape)}")
    _check_index(index)


def _check_index(index: Tensor) -> None:
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [B], got {index.dtype} {tuple(index.shape)}")


def reward_head(
    hidden: Tensor,  # [M, H]
    index: Tensor,  # int64 [B]
    weight: Tensor,  # [num_labels, H]
    bias: Tensor | None = None,  # [num_labels]
) -> Tensor:
    """Last-token pooling and the scalar head in one op: ``hidden[index] @ weight.T + bias``.

    Args:
        hidden: hidden states ``[M, H]``, any floating dtype.
        index: int64 ``[B]``, the row that carries each sequence's score, ``0 <= index < M`` (not
            checked on a GPU); rows may repeat.
        weight: ``[num_labels, H]``.
        bias: ``[num_labels]`` or None.

    Returns:
        Scores ``[B, num_labels]`` in fp32 (fp64 for fp64 inputs), whatever the input dtype: a
        bf16 backbone does not round the reward.

    Raises:
        ValueError: shapes that do not match; the message names the argument.
    """
    _check_rows(hidden, index)
    _check_head(hidden, weight, bias)
    _check_devices(hidden=hidden, index=index, weight=weight, bias=bias)
    return _reward_head(hidden, index, weight, bias)


def pooled_reward_head(
    hidden: Tensor,  # [B, T, H]
    input_ids: Tensor,  # int [B, T]
    weight: Tensor,  # [num_labels, H]
    bias: Tensor | None = None,  # [num_labels]
    *,
    attention_mask: Tensor | None = None,  # [B, T]
    pad_token_id: int | None = None,
    pooling: str = "hf",
) -> Tensor:
    """:func:`reward_head` of a padded batch: the pooled tokens are found in the same launch.

    Args:
        hidden: hidden states ``[B, T, H]``, any floating dtype, any strides.
        input_ids: int ``[B, T]``.
        weight: ``[num_labels, H]``.
        bias: ``[num_labels]`` or None.
        attention_mask: ``[B, T]``, non-zero where a token counts. Read with ``pooling="mask"``.
        pad_token_id: read with ``pooling="hf"``. None: there is no padding.
        pooling: ``"hf"``, Hugging Face's rule: the rightmost token that is not the pad token
            (column 0 of a row of pads; the last column without a pad token), whatever the mask
            says. ``"mask"``: the rightmost token the mask lets through.

    Returns:
        Scores ``[B, num_labels]`` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not match, or an unknown ``pooling``; the message names the
            argument.
    """
    if hidden.ndim != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be [B, T, H] with T > 0, got shape {tuple(hidden.shape)}")
    if input_ids.shape != hidden.shape[:2] or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be int {list(hidden.shape[:2])} like hidden, "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if pooling not in ("hf", "mask"):
        raise ValueError(f"pooling must be 'hf' or 'mask', got {pooling!r}")
    if pooling == "hf":
        attention_mask = None
    elif attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)} like input_ids, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    _check_head(hidden, weight, bias)
    _check_devices(
        hidden=hidden, input_ids=input_ids, weight=weight, bias=bias, attention_mask=attention_mask
    )
    rule = (attention_mask, pad_token_id, pooling)
    return _pooled_reward_head(hidden, input_ids, weight, bias, *rule)[0]


def reward_head_backward(
    grad: Tensor,  # [B, num_labels]
    hidden: Tensor,  # [M, H] or [B, T, H]
    index: Tensor,  # int64 [B]
    weight: Tensor,  # [num_labels, H]
    *,
    used_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`reward_head` by hand, for code that does not go through autograd.

    Args:
        grad: gradient of the scores ``[B, num_labels]``.
        hidden: as it was given to :func:`reward_head`, or a padded batch's ``[B, T, H]``.
        index: int64 ``[B]``, rows of ``hidden.flatten(0, -2)``.
        weight: ``[num_labels, H]``.
        used_only: instead of a gradient with a row for each row of ``hidden``, ``[B, H]``: row
            ``i`` belongs to row ``index[i]`` where ``i`` is its first use, with all its uses
            summed, and is zero at later ones.

    Returns:
        Gradients of hidden (in its dtype), of weight (in its dtype) and of a bias (fp32, fp64
        for fp64 inputs).

    Raises:
        ValueError: shapes that do not match; the message names the argument.
    """
    if hidden.ndim not in (2, 3):
        raise ValueError(f"hidden must be [M, H] or [B, T, H], got shape {tuple(hidden.shape)}")
    _check_index(index)
    _check_head(hidden, weight, None)
    if grad.shape != (index.shape[0], weight.shape[0]):
        raise ValueError(
            f"grad must be [{index.shape[0]}, {weight.shape[0]}], got shape {tuple(grad.shape)}"
        )
    _check_devices(grad=grad, hidden=hidden, index=index, weight=weight)
    bias = weight.new_empty(weight.shape[0], dtype=reference.wide(hidden.dtype))
    return _reward_head_backward(grad, hidden, index, weight, bias, used_only, True, True)


@torch.library.custom_op("rmfast::pairwise_loss", mutates_args=())
@_exact
def _pairwise_loss(
    scores: Tensor,
    pairs: Tensor | None,
    margin: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    layout: str,
    label_smoothing: float,
    center: float,
    reduction: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (label_smoothing, center, reduction)
    if _use_kernels(scores):
        from rmfast.kernels import pairwise_loss as kernel

        loss, metrics, grads = kernel.pairwise_loss(
            scores, pairs, margin, target, weight, layout, *options, needs_grad
        )
        return loss, metrics, metrics.new_empty(0) if grads is None else grads
    args = (scores, layout if pairs is None else pairs, margin, target, weight, *options)
    loss, metrics = reference.pairwise_loss(*args)
    return (
        loss,
        metrics,
        (reference.pairwise_gradients(*args) if needs_grad else metrics.new_empty(0)),
    )


@torch.library.custom_op("rmfast::pairwise_loss_backward", mutates_args=())
@_exact
def _pairwise_loss_backward(
    grad: Tensor, grads: Tensor, scores: Tensor, pairs: Tensor | None, layout: str
) -> Tensor:
    # of scores only the shape, and that autograd sees a second derivative asked for
    batch, dtype = scores.shape[0], scores.dtype
    if _use_kernels(grads):
        from rmfast.kernels import pairwise_loss as kernel

        return kernel.pairwise_loss_backward(grad, grads, pairs, layout, batch, dtype)
    use = layout if pairs is None else pairs
    return reference.pairwise_loss_backward(grad, grads, use, batch).to(dtype)


@_pairwise_loss.register_fake
def _(scores, pairs, margin, target, weight, layout, smoothing, center, reduction, needs_grad):
    count = scores.shape[0] // 2 if pairs is None else pairs.shape[0]
    acc = reference.wide(scores.dtype)
    loss = scores.new_empty((count,) if reduction == "none" else (), dtype=acc)
    grads = scores.new_empty((2, count) if needs_grad else (0,), dtype=acc)
    return loss, scores.new_empty(6, dtype=acc), grads


@_pairwise_loss_backward.register_fake
def _(grad, grads, scores, pairs, layout):
    return scores.new_empty(scores.shape)


_no_second_derivative(_pairwise_loss_backward, "pairwise_loss")


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
    return grad_scores, *[None] * 9


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


def _check_pairs(
    batch: int,
    pairs: str | Tensor,
    margin: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
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
        if x.requires_grad:
            raise ValueError(f"{name} gets no gradient here: detach it")
    if target is not None and label_smoothing:
        raise ValueError("target and label_smoothing say the same thing: give one of them")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
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
        reduction: ``"mean"`` over the pairs, ``"sum"`` or ``"none"``.

    Returns:
        :class:`PairwiseLoss`: the loss and metrics in fp32 (fp64 for fp64 scores). Only the loss
        is differentiable. Mean, least and greatest reward are of all ``B`` scores; where one is
        NaN, so is the mean, and the other two are undefined.

    Raises:
        ValueError: shapes that do not match, no pair, an unknown ``pairs`` or ``reduction``, or a
            margin, target or weight that requires a gradient; the message names the argument.
    """
    if scores.ndim != 1 and (scores.ndim != 2 or scores.shape[1] != 1):
        raise ValueError(f"scores must be [B] or [B, 1], got shape {tuple(scores.shape)}")
    _check_floating(scores=scores)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    layout, index = _check_pairs(
        scores.shape[0], pairs, margin, target, weight, label_smoothing, ("scores", "weight")
    )
    _check_devices(scores=scores, pairs=index, margin=margin, target=target, weight=weight)
    needs_grad = torch.is_grad_enabled() and scores.requires_grad
    scores = scores.squeeze(1) if scores.ndim == 2 else scores
    loss, metrics, _ = _pairwise_loss(
        scores, index, margin, target, weight, layout, label_smoothing, center, reduction,
        needs_grad,
    )  # fmt: skip
    return PairwiseLoss(loss, *metrics.unbind())


@torch.library.custom_op("rmfast::reward_head_pairwise_loss", mutates_args=())
@_exact
def _reward_head_pairwise_loss(
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Tensor | None,
    margin: Tensor | None,
    target: Tensor | None,
    pair_weight: Tensor | None,
    layout: str,
    label_smoothing: float,
    center: float,
    reduction: str,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (label_smoothing, center, reduction)
    if _use_kernels(hidden):
        from rmfast.kernels import fused_loss as kernel

        loss, scores, metrics, grads, partial = kernel.fused_loss(
            hidden, index, weight, bias, pairs, margin, target, pair_weight, layout, *options,
            needs_hidden, needs_weight,
        )  # fmt: skip
    else:
        rest = (layout if pairs is None else pairs, margin, target, pair_weight, *options)
        loss, scores, metrics = reference.reward_head_pairwise_loss(
            hidden, index, weight, bias, *rest
        )
        scores, grads, partial = scores.contiguous(), None, None
        if needs_hidden or needs_weight:
            grads = reference.pairwise_gradients(scores, *rest)
        if needs_weight:
            by_score = reference.pairwise_loss_backward(
                grads.new_ones(()), grads, rest[0], len(scores)
            )
            partial = by_score[None] @ hidden[index].to(scores.dtype)
    left = (scores.new_empty(0) if x is None else x for x in (grads, partial))
    return loss, scores, metrics, *left


@torch.library.custom_op("rmfast::reward_head_pairwise_loss_backward", mutates_args=())
@_exact
def _reward_head_pairwise_loss_backward(
    grad: Tensor,
    grads: Tensor,
    partial: Tensor | None,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Tensor | None,
    layout: str,
    needs_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # of hidden only the shape, and that autograd sees a second derivative asked for
    rows, dtype = hidden.shape[0], hidden.dtype
    if _use_kernels(weight):
        from rmfast.kernels import fused_loss as kernel

        out = kernel.fused_loss_backward(
            grad, grads, partial, index, weight, bias, pairs, layout, rows, dtype, needs_hidden
        )
    else:
        by_score = reference.pairwise_loss_backward(
            grad, grads, layout if pairs is None else pairs, index.shape[0]
        )
        out = [None, None, None]
        if needs_hidden:
            out[0] = reference.rows_gradient(by_score[:, None], index, weight, hidden.shape, dtype)
        if partial is not None:
            out[1] = (partial.sum(0, keepdim=True) * grad).to(weight.dtype)
            out[2] = None if bias is None else by_score.sum(0, keepdim=True).to(bias.dtype)
    return tuple(weight.new_empty(0) if x is None else x for x in out)


@_reward_head_pairwise_loss.register_fake
def _(
    hidden, index, weight, bias, pairs, margin, target, pair_weight, layout, label_smoothing,
    center, reduction, needs_hidden, needs_weight,
):  # fmt: skip
    batch, width = index.shape[0], hidden.shape[1]
    count = batch // 2 if pairs is None else pairs.shape[0]
    acc = reference.wide(hidden.dtype)
    parts = 1
    if needs_weight and _use_kernels(hidden):
        from rmfast.kernels import fused_loss as kernel

        parts = kernel.programs(count, batch, hidden.shape[0], width, hidden.dtype, True)[0]
    return (
        hidden.new_empty((), dtype=acc),
        hidden.new_empty(batch, dtype=acc),
        hidden.new_empty(6, dtype=acc),
        hidden.new_empty((2, count) if needs_hidden or needs_weight else (0,), dtype=acc),
        hidden.new_empty((parts, width) if needs_weight else (0,), dtype=acc),
    )


@_reward_head_pairwise_loss_backward.register_fake
def _(grad, grads, partial, hidden, index, weight, bias, pairs, layout, needs_hidden):
    out = [None, None, None]
    if needs_hidden:
        out[0] = hidden.new_empty(hidden.shape)
    if partial is not None:
        out[1] = weight.new_empty(weight.shape)
        out[2] = None if bias is None else bias.new_empty(1)
    return tuple(weight.new_empty(0) if x is None else x for x in out)


_no_second_derivative(_reward_head_pairwise_loss_backward, "reward_head_pairwise_loss")


def _reward_head_pairwise_loss_setup(ctx, inputs, output):
    hidden, index, weight, bias, pairs, *_ = inputs
    *_, grads, partial = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grads, partial, hidden, index, weight, bias, pairs)
    needs = ctx.needs_input_grad
    ctx.needs = (needs[0], needs[2], needs[3])
    ctx.layout = inputs[8]


def _reward_head_pairwise_loss_autograd(ctx, grad, *_):
    needs_hidden, needs_weight, needs_bias = ctx.needs
    out = (None, None, None)
    if grad is not None and any(ctx.needs):
        grads, partial, *saved = ctx.saved_tensors
        partial = partial if needs_weight or needs_bias else None
        out = _reward_head_pairwise_loss_backward(
            grad, grads, partial, *saved, ctx.layout, needs_hidden
        )
        out = [g if need else None for g, need in zip(out, ctx.needs, strict=True)]
    return out[0], None, out[1], out[2], *[None] * 10


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
    hidden: Tensor,  # [M, H]
    index: Tensor,  # int64 [B]
    weight: Tensor,  # [1, H]
    bias: Tensor | None = None,  # [1]
    pairs: str | Tensor = "halves",
    *,
    margin: Tensor | None = None,  # [P]
    target: Tensor | None = None,  # [P]
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,  # [P]
    center: float = 0.0,
    reduction: str = "mean",
) -> RewardHeadPairwiseLoss:
    """:func:`reward_head` and :func:`pairwise_loss` as one op: two launches a training step.

    The gradient of ``weight`` is summed up while the rows are read for their scores.

    Args:
        hidden: hidden states ``[M, H]``, any floating dtype.
        index: int64 ``[B]``, the row of each sequence's score, ``0 <= index < M`` (not checked on
            a GPU); rows may repeat.
        weight: ``[1, H]``.
        bias: ``[1]`` or None.
        pairs: as in :func:`pairwise_loss`, of the ``B`` scores.
        margin: as in :func:`pairwise_loss`; so are ``target``, ``label_smoothing`` and ``center``.
        pair_weight: :func:`pairwise_loss`'s ``weight``.
        reduction: ``"mean"`` over the pairs or ``"sum"``.

    Returns:
        :class:`RewardHeadPairwiseLoss`, in fp32 (fp64 for fp64 inputs). Only ``loss`` is
        differentiable, by hidden, weight and bias: ``scores`` carries no gradient. Where
        something else depends on the scores, call the two ops one after the other.

    Raises:
        ValueError: shapes that do not match, no pair, an unknown ``pairs`` or ``reduction``, or a
            margin, target or weight that requires a gradient; the message names the argument.
    """
    _check_rows(hidden, index)
    _check_head(hidden, weight, bias)
    if weight.shape[0] != 1:
        raise ValueError(f"weight must be [1, H]: one score a sequence, got {tuple(weight.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction must be 'mean' or 'sum', got {reduction!r}: for the loss of each pair, "
            "call reward_head and pairwise_loss"
        )
    layout, rows = _check_pairs(
        index.shape[0], pairs, margin, target, pair_weight, label_smoothing,
        ("index", "pair_weight"),
    )  # fmt: skip
    _check_devices(
        hidden=hidden, index=index, weight=weight, bias=bias, pairs=rows, margin=margin,
        target=target, pair_weight=pair_weight,
    )  # fmt: skip
    needs_hidden = torch.is_grad_enabled() and hidden.requires_grad
    needs_weight = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    loss, scores, metrics, _, _ = _reward_head_pairwise_loss(
        hidden, index, weight, bias, rows, margin, target, pair_weight, layout, label_smoothing,
        center, reduction, needs_hidden, needs_weight,
    )  # fmt: skip
    return RewardHeadPairwiseLoss(loss, scores, *metrics.unbind())


# --- losses of ranked groups

LARGEST_GROUP = 64  # as in kernels/listwise_loss.py


@torch.library.custom_op("rmfast::listwise_loss", mutates_args=())
@_exact
def _listwise_loss(
    scores: Tensor, ranks: Tensor, offsets: Tensor, kind: str, max_size: int
) -> tuple[Tensor, Tensor]:
    if _use_kernels(scores):
        from rmfast.kernels import listwise_loss as kernel

        return kernel.listwise_loss(scores, ranks, offsets, kind, max_size)
    _check_offsets(offsets.tolist(), scores.shape[0], max_size)
    return reference.listwise_loss(scores, ranks, offsets, kind)


@torch.library.custom_op("rmfast::listwise_loss_backward", mutates_args=())
@_exact
def _listwise_loss_backward(
    grad: Tensor, slope: Tensor, scores: Tensor, offsets: Tensor, max_size: int
) -> Tensor:
    # of scores only the dtype, and that autograd sees a second derivative asked for
    if _use_kernels(slope):
        from rmfast.kernels import listwise_loss as kernel

        return kernel.listwise_loss_backward(grad, slope, offsets, max_size, scores.dtype)
    return reference.listwise_loss_backward(grad, slope, offsets, scores.dtype)


@_listwise_loss.register_fake
def _(scores, ranks, offsets, kind, max_size):
    acc = reference.wide(scores.dtype)
    loss = scores.new_empty(offsets.shape[0] - 1, dtype=acc)
    return loss, scores.new_empty(scores.shape, dtype=acc)


@_listwise_loss_backward.register_fake
def _(grad, slope, scores, offsets, max_size):
    return scores.new_empty(scores.shape)


_no_second_derivative(_listwise_loss_backward, "listwise_loss")


def _listwise_loss_setup(ctx, inputs, output):
    scores, _, offsets, _, max_size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], scores, offsets)
    ctx.max_size = max_size


def _listwise_loss_autograd(ctx, grad, _):
    grad_scores = None
    if grad is not None:
        grad_scores = _listwise_loss_backward(grad, *ctx.saved_tensors, ctx.max_size)
    return grad_scores, None, None, None, None


_listwise_loss.register_autograd(_listwise_loss_autograd, setup_context=_listwise_loss_setup)


def _check_offsets(ends: list[int], items: int, max_size: int | None) -> int:
    """The size of the largest group."""
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != items or min(sizes, default=0) < 0:
        raise ValueError(f"offsets must rise from 0 to {items}, the number of scores")
    largest = max(sizes, default=0)
    if max_size is not None and largest > max_size:
        raise ValueError(f"offsets hold a group of {largest}, more than max_size = {max_size}")
    return largest


def listwise_loss(
    scores: Tensor,  # [B] or [B, 1]
    ranks: Tensor,  # [B]
    offsets: Tensor,  # int64 [G + 1]
    *,
    kind: str = "all_pairs",
    reduction: str = "mean",
    max_size: int | None = None,
) -> Tensor:
    """Loss of groups of ranked answers to one prompt each, of up to 64.

    ``"all_pairs"`` (InstructGPT, arXiv 2203.02155, eq. 1) is the mean of
    ``-log sigmoid(better - worse)`` over the K (K - 1) / 2 pairs of a group. A pair of equal rank
    gives no term but still counts in the divisor. ``"plackett_luce"`` (Plackett, "The analysis of
    permutations", 1975) is minus the log-likelihood of the order, best first; items of equal rank
    are taken as chosen one by one from the same remaining items, themselves all included
    (Breslow's approximation, 1974). A group of one item or none has the loss 0 and counts in the
    mean.

    Args:
        scores: ``[B]`` or ``[B, 1]``, any floating dtype, the groups one after another.
        ranks: int or float ``[B]``; lower is better, equal is a tie. Only compared inside a group.
        offsets: int64 ``[G + 1]``, rising from 0 to B: group ``g`` is ``offsets[g]`` up to
            ``offsets[g + 1]``.
        kind: ``"all_pairs"`` or ``"plackett_luce"``.
        reduction: ``"mean"`` or ``"sum"`` over the groups, or ``"none"``.
        max_size: items in the largest group, or more, at most 64. None: ``offsets`` is read to
            find it, for which the host waits for a GPU, and which ``torch.compile`` cannot
            trace. Given, ``offsets`` is not checked on a GPU, and a larger group's loss is NaN.

    Returns:
        In fp32 (fp64 for fp64 scores) a scalar, or ``[G]`` with ``reduction="none"``.

    Raises:
        ValueError: shapes that do not match, a group of more than 64 items, or an unknown option;
            the message names the argument.
    """
    if scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if scores.ndim != 1:
        raise ValueError(f"scores must be [B] or [B, 1], got shape {tuple(scores.shape)}")
    _check_floating(scores=scores)
    if ranks.shape != scores.shape or ranks.is_complex() or ranks.dtype == torch.bool:
        raise ValueError(
            f"ranks must be int or float [{scores.shape[0]}] like scores, "
            f"got {ranks.dtype} {tuple(ranks.shape)}"
        )
    if ranks.requires_grad:
        raise ValueError("ranks is not differentiated: detach it")
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or not offsets.shape[0]:
        raise ValueError(
            f"offsets must be int64 [G + 1], got {offsets.dtype} {tuple(offsets.shape)}"
        )
    if kind not in ("all_pairs", "plackett_luce"):
        raise ValueError(f"kind must be 'all_pairs' or 'plackett_luce', got {kind!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    _check_devices(scores=scores, ranks=ranks, offsets=offsets)
    if max_size is None:
        max_size = max(1, _check_offsets(offsets.tolist(), scores.shape[0], None))
        if max_size > LARGEST_GROUP:
            raise ValueError(
                f"offsets hold a group of {max_size}, more than {LARGEST_GROUP}: split it"
            )
    elif not 1 <= max_size <= LARGEST_GROUP:
        raise ValueError(f"max_size must be 1 to {LARGEST_GROUP}, got {max_size}")
    loss, _ = _listwise_loss(scores, ranks, offsets, kind, max_size)
    return loss if reduction == "none" else getattr(loss, reduction)()


# --- attention under the trie


@torch.library.custom_op("rmfast::trie_attention", mutates_args=())
@_exact
def _trie_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    triton: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The second output is what the Triton backward needs besides: empty elsewhere."""
    rule = (subtree_end, position_ids, queries, sinks, scale, window, softcap)
    if triton:
        from rmfast.kernels import trie_attention as kernels

        return kernels.trie_attention(query, key, value, *rule, keep)
    lse = query.new_empty(1, 0, dtype=torch.float32)
    return reference.trie_attention(query, key, value, *rule), lse


@torch.library.custom_op("rmfast::trie_attention_backward", mutates_args=())
@_exact
def _trie_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (query, key, value, subtree_end, position_ids, queries, sinks, scale, window, softcap)
    if lse is not None:
        from rmfast.kernels import trie_attention as kernels

        *grads, grad_sinks = kernels.trie_attention_backward(grad, *inputs, out, lse)
    else:
        *grads, grad_sinks = reference.trie_attention_backward(grad, *inputs)
    return *grads, query.new_empty(0) if grad_sinks is None else grad_sinks


@_trie_attention.register_fake
def _(
    query, key, value, subtree_end, position_ids, queries, sinks, scale, window, softcap, triton,
    keep,
):  # fmt: skip
    _, heads, rows, _ = query.shape
    shape = (heads, (rows + 15) // 16 * 16) if triton and keep else (1, 0)
    lse = query.new_empty(shape, dtype=torch.float32)
    return query.new_empty(1, rows, heads, value.shape[-1]), lse


@_trie_attention_backward.register_fake
def _(
    grad, query, key, value, subtree_end, position_ids, queries, sinks, scale, window, softcap,
    out, lse,
):  # fmt: skip
    grad_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(reference.tokens_first(x, x.dtype) for x in (query, key, value)), grad_sinks


def _trie_attention_setup(ctx, inputs, output):
    *tensors, scale, window, softcap, triton, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(output if triton else (None, None)))
    ctx.options = (scale, window, softcap)


def _trie_attention_autograd(ctx, grad, _):
    *saved, out, lse = ctx.saved_tensors  # once: checkpointing lets go of them after
    *grads, grad_sinks = _trie_attention_backward(grad, *saved, *ctx.options, out, lse)
    has_sinks = saved[-1] is not None
    return *grads, None, None, None, grad_sinks if has_sinks else None, *(None,) * 5


_trie_attention.register_autograd(_trie_attention_autograd, setup_context=_trie_attention_setup)
_no_second_derivative(_trie_attention_backward, "trie_attention")


def why_not_triton(query: Tensor, value: Tensor, scale: float) -> str | None:
    """Why the Triton attention kernel cannot take these; None: it can."""
    if not _use_kernels(query):
        return f"tensors are on {query.device}, and Triton is for GPUs"
    widest = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}.get(query.dtype)
    if widest is None:
        return f"it knows fp32, fp16 and bf16, not {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > widest:
        return f"it holds head_dim up to {widest} in {query.dtype}"
    return None if scale > 0 else f"scale is {scale}, not above zero"


def trie_attention(
    query: Tensor,  # [1, Hq, M, D]
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    *,
    queries: Tensor | None = None,  # int64 [M]
    sinks: Tensor | None = None,  # [Hq]
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over a packed trie: query ``q`` sees key ``k`` iff ``k <= q < subtree_end[k]``.

    Args:
        query: ``[1, Hq, M, D]``; ``Hq`` a multiple of ``Hk`` (grouped heads).
        key: ``[1, Hk, N, D]``, one key per trie node.
        value: ``[1, Hk, N, Dv]``.
        subtree_end: int32 ``[N]``, see :class:`rmfast.PackedTrie`.
        position_ids: int64 ``[N]``; read only with ``window``.
        queries: int64 ``[M]``, packed indices of the queries, rising. None: every node, ``M = N``.
        sinks: ``[Hq]``, attention-sink logits.
        scale: factor on the logits, ``D ** -0.5`` when not given.
        window: sliding window, in positions: a key is seen when nearer than this.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        backend: ``"triton"``, the kernel (GPU; fp16 and bf16 with D and Dv up to 256,
            fp32 up to 128); ``"sdpa"``, torch's own operations tile by tile, anywhere; ``"auto"``,
            the first that can.

    Returns:
        ``[1, M, Hq, Dv]``, the layout attention functions of transformers return.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or inputs ``backend`` cannot take;
            the message names the argument.
    """
    nodes = subtree_end.shape[0]
    rows = nodes if queries is None else queries.shape[0]
    if query.ndim != 4 or query.shape[0] != 1 or query.shape[2] != rows:
        raise ValueError(f"query must be [1, Hq, {rows}, D], got shape {tuple(query.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[0] != 1 or x.shape[2] != nodes:
            raise ValueError(f"{name} must be [1, Hk, {nodes}, D], got shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype} and query {query.dtype}: cast one of them")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key has head_dim {key.shape[3]}, query {query.shape[3]}")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}, value {value.shape[1]}: need "
            "as many key as value heads, and a multiple of them as query heads"
        )
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks must be [{query.shape[1]}], got shape {tuple(sinks.shape)}")
    if position_ids.shape != (nodes,):
        raise ValueError(f"position_ids must be [{nodes}], got shape {tuple(position_ids.shape)}")
    _check_devices(
        query=query, key=key, value=value, subtree_end=subtree_end, position_ids=position_ids,
        queries=queries, sinks=sinks,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend not in ("auto", "triton", "sdpa"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'sdpa', got {backend!r}")
    why_not = None if backend == "sdpa" else why_not_triton(query, value, scale)
    if backend == "triton" and why_not is not None:
        raise ValueError(f"backend='triton' cannot run: {why_not}; 'auto' takes what can")
    triton = backend != "sdpa" and why_not is None
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, sinks)
    )
    out, _ = _trie_attention(
        query, key, value, subtree_end, position_ids, queries, sinks, scale, window, softcap,
        triton, keep,
    )  # fmt: skip
    return out
