"""Losses of ranked groups: all pairs of InstructGPT, and Plackett-Luce.

Items ``offsets[g]`` to ``offsets[g + 1]`` are group g, of K items; a lower rank is better. With
softplus(x) = log(1 + exp(x)), s the scores, r the ranks:

    all pairs       1 / (K choose 2) * sum over i, j with r[i] < r[j] of softplus(s[j] - s[i])
                    (arXiv 2203.02155, eq. 1; ties give no term, the divisor stays)
    Plackett-Luce   sum over i of log(sum over j with r[j] >= r[i] of exp(s[j])) - s[i]
                    (Plackett 1975; tied items see each other, Breslow 1974)

A program a group, which it keeps in registers as a [K, K] block. Forward, one launch: the loss of
each group and its gradient by each item. Backward, one launch: that times the group's gradient.
Bytes, least: scores, ranks and offsets once, loss and slope written; slope, the groups' gradients
and offsets once, the items' gradients written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.pairwise_loss import accumulator, log1p, wide


def _warps(size: int, acc: torch.dtype) -> int:
    """Of a [size, size] block: about 8 registers a thread for one value an element."""
    return min(max(1, size * size * acc.itemsize // 1024), 8)


@triton.jit
def _forward_kernel(
    scores, ranks, offsets, loss, slope,
    max_size,
    stride_score, stride_rank, stride_offset,
    ALL_PAIRS: tl.constexpr, ACC: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + group * stride_offset)
    size = tl.load(offsets + (group + 1) * stride_offset) - begin
    item = tl.arange(0, SIZE)
    inside = item < size
    at = begin + item
    s = tl.load(scores + at * stride_score, mask=inside, other=0.0).to(ACC)
    r = tl.load(ranks + at * stride_rank, mask=inside, other=0).to(RANK)
    both = inside[:, None] & inside[None, :]
    if ALL_PAIRS:
        better = both & (r[:, None] < r[None, :])
        gap = s[:, None] - s[None, :]
        e = tl.exp(-tl.abs(gap))
        pairs = tl.maximum(size * (size - 1) // 2, 1).to(ACC)
        terms = tl.where(better, tl.maximum(-gap, 0.0) + log1p(e), 0.0)
        total = tl.sum(tl.sum(terms, axis=1), axis=0) / pairs
        wrong = tl.where(better, tl.where(gap >= 0, e, 1.0) / (1.0 + e), 0.0)  # sigmoid(-gap)
        out = (tl.sum(wrong, axis=0) - tl.sum(wrong, axis=1)) / pairs
    else:
        # of row i: the items left when i is chosen; a row past the end sees itself
        left = (both & (r[None, :] >= r[:, None])) | (item[:, None] == item[None, :])
        top = tl.max(tl.where(left, s[None, :], float("-inf")), axis=1)
        e = tl.where(left, tl.exp(tl.where(left, s[None, :] - top[:, None], 0.0)), 0.0)
        mass = tl.sum(e, axis=1)
        total = tl.sum(tl.where(inside, top - s + tl.log(mass), 0.0), axis=0)
        chance = tl.where(both, e / mass[:, None], 0.0)
        out = tl.sum(chance, axis=0) - 1.0
    # nothing else can be said of a group that does not fit without asking the host
    tl.store(loss + group, tl.where(size > max_size, float("nan"), total))
    tl.store(slope + at, out, mask=inside)


@triton.jit
def _backward_kernel(
    grad, slope, offsets, out,
    max_size,
    stride_grad, stride_offset,
    SIZE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + group * stride_offset)
    size = tl.load(offsets + (group + 1) * stride_offset) - begin
    factor = tl.load(grad + group * stride_grad).to(slope.dtype.element_ty)
    factor = tl.where(size > max_size, float("nan"), factor)
    for start in range(0, size, SIZE):
        item = start + tl.arange(0, SIZE)
        inside = item < size
        value = tl.load(slope + begin + item, mask=inside, other=0.0) * factor
        tl.store(out + begin + item, value, mask=inside)


def listwise_loss(
    scores: Tensor,  # [B], any stride
    ranks: Tensor,  # int or float [B], any stride
    offsets: Tensor,  # int64 [G + 1], rising from 0 to B
    kind: str,  # "all_pairs" | "plackett_luce"
    max_size: int,  # of a group; a larger one gets the loss NaN
) -> tuple[Tensor, Tensor]:  # fp32 (fp64 for fp64 scores) [G], [B]
    """Loss of each group, and its gradient by each item's score."""
    groups = offsets.shape[0] - 1
    acc = wide(scores.dtype)
    loss = torch.empty(groups, dtype=acc, device=scores.device)
    slope = torch.empty(scores.shape, dtype=acc, device=scores.device)
    rank = accumulator(ranks.dtype) if ranks.dtype.is_floating_point else tl.int64
    size = triton.next_power_of_2(max_size)
    _forward_kernel[(groups,)](
        scores, ranks, offsets, loss, slope,
        max_size,
        scores.stride(0), ranks.stride(0), offsets.stride(0),
        ALL_PAIRS=kind == "all_pairs", RANK=rank, SIZE=size, ACC=accumulator(scores.dtype),
        num_warps=_warps(size, acc),
    )  # fmt: skip
    return loss, slope


def listwise_loss_backward(
    grad: Tensor,  # [G], any stride
    slope: Tensor,  # [B], from the forward
    offsets: Tensor,  # int64 [G + 1]
    max_size: int,
    dtype: torch.dtype,
) -> Tensor:  # dtype [B]
    """``grad`` of each group times ``slope``."""
    groups = offsets.shape[0] - 1
    out = torch.empty(slope.shape, dtype=dtype, device=slope.device)
    _backward_kernel[(groups,)](
        grad, slope, offsets, out,
        max_size,
        grad.stride(0), offsets.stride(0),
        SIZE=triton.next_power_of_2(max_size), num_warps=1,
    )  # fmt: skip
    return out
