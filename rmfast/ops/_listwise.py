"""Losses of ranked groups."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rmfast import reference
from rmfast.ops._common import (
    check_choice,
    check_devices,
    check_floating,
    checks_values,
    no_second_derivative,
    op,
    use_kernels,
    without_autocast,
)

_LARGEST = 64  # items whose pairs fit the registers of a program


@op(
    "listwise_loss",
    "(Tensor scores, Tensor ranks, Tensor offsets, str kind, int max_size) -> (Tensor, Tensor)",
)
def _listwise_loss(*inputs):
    from rmfast.kernels import listwise_loss as kernel

    return kernel.listwise_loss(*inputs)


@op(
    "listwise_loss_backward",
    "(Tensor grad, Tensor slope, Tensor scores, Tensor offsets, int max_size) -> Tensor",
)
def _listwise_loss_backward(grad, slope, scores, *groups):
    # of scores only the dtype, and that autograd sees a second derivative asked for
    from rmfast.kernels import listwise_loss as kernel

    return kernel.listwise_loss_backward(grad, slope, *groups, scores.dtype)


@_listwise_loss.register_fake
def _(scores, ranks, offsets, kind, max_size):
    acc = reference.wide(scores.dtype)
    loss = scores.new_empty(offsets.shape[0] - 1, dtype=acc)
    return loss, scores.new_empty(scores.shape, dtype=acc)


@_listwise_loss_backward.register_fake
def _(grad, slope, scores, offsets, max_size):
    return scores.new_empty(scores.shape)


no_second_derivative(_listwise_loss_backward, "listwise_loss")


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
            trace. Given, ``offsets`` is not checked on a GPU: a larger group's loss is NaN, and
            gradients of scores past the last offset are not written.

    Returns:
        In fp32 (fp64 for fp64 scores) a scalar, or ``[G]`` with ``reduction="none"``.

    Raises:
        ValueError: shapes that do not match, a group of more than 64 items, or an unknown option;
            on a CPU, a rank that is NaN. The message names the argument.
    """
    if scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if scores.ndim != 1:
        raise ValueError(f"scores must be [B] or [B, 1], got shape {tuple(scores.shape)}")
    check_floating(scores=scores)
    if ranks.shape != scores.shape or ranks.is_complex() or ranks.dtype == torch.bool:
        raise ValueError(
            f"ranks must be int or float [{scores.shape[0]}] like scores, "
            f"got {ranks.dtype} {tuple(ranks.shape)}"
        )
    if ranks.requires_grad:
        raise ValueError("ranks is not differentiated: detach it")
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 2:
        raise ValueError(
            f"offsets must be int64 [G + 1], got {offsets.dtype} {tuple(offsets.shape)}"
        )
    check_choice("kind", kind, ("all_pairs", "plackett_luce"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_devices(scores=scores, ranks=ranks, offsets=offsets)
    if max_size is None:
        max_size = max(1, _check_offsets(offsets.tolist(), scores.shape[0], None))
        if max_size > _LARGEST:
            raise ValueError(f"offsets hold a group of {max_size}, more than {_LARGEST}: split it")
    elif not 1 <= max_size <= _LARGEST:
        raise ValueError(f"max_size must be 1 to {_LARGEST}, got {max_size}")
    if use_kernels(scores):
        loss, _ = _listwise_loss(scores, ranks, offsets, kind, max_size)
    else:
        if checks_values(scores):
            _check_offsets(offsets.tolist(), scores.shape[0], max_size)
            if ranks.is_floating_point() and ranks.isnan().any():
                where = int(ranks.isnan().nonzero()[0])
                raise ValueError(f"ranks[{where}] is NaN: it can't be compared")
        run = without_autocast(reference.listwise_loss)
        loss = run(scores, ranks, offsets, kind, max_size)
    return loss if reduction == "none" else getattr(loss, reduction)()
