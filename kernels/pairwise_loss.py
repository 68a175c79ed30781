"""Pairwise log-sigmoid loss of B scores in P pairs, with its gradient and its metrics.

With c and r the scores of a pair, z = c - r - margin and t its target (1 - label smoothing):

    loss = weight * (t * softplus(-z) + (1 - t) * softplus(z)) + center * (c + r)**2

or, with gamma, where t is 1, the focal ranking loss (arXiv 2403.17297):

    loss = weight * min(1, 2 * sigmoid(-z))**gamma * softplus(-z) + center * (c + r)**2

forward, 1 launch: one program goes over the pairs and leaves the loss, its derivative by c and r,
    and the metrics. At least ``B*s + 8*P`` bytes for B scores of s bytes, and what is given of
    margin, target and weight.
backward, 1 launch: at least ``8*P + B*s`` bytes, each score's gradient written once.

``pairs`` adds its ``16*P`` bytes to each launch. Sums run in fp32 (fp64 for fp64 scores), in an
order that depends on P alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # pairs at a time in the forward, scores a program in the backward
_USES = 32  # of the pairs' scores at a time, where a score may be in many pairs


@triton.jit
def item_of(use, inside, pairs, count, LAYOUT: tl.constexpr):
    """Sequence whose score is chosen in pair ``use``, or rejected in pair ``use - count``."""
    if LAYOUT == "halves":
        item = use.to(tl.int64)
    elif LAYOUT == "interleaved":
        item = (use % count * 2 + use // count).to(tl.int64)
    else:  # pairs [count, 2]
        item = tl.load(pairs + use % count * 2 + use // count, mask=inside, other=0)
    return item


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1: the rounding of 1 + x is divided out again (Kahan)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * x / tl.where(above == 1.0, 1.0, above - 1.0))


@triton.jit
def pair_loss(
    chosen, rejected, pair, inside, margin, target, weight,
    HAS_MARGIN: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, CENTER: tl.constexpr, GAMMA: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss of the pairs and its derivatives by the chosen and the rejected score."""
    z = chosen - rejected
    if HAS_MARGIN:
        z -= tl.load(margin + pair, mask=inside, other=0).to(ACC)
    small = tl.exp(-tl.abs(z))  # never overflows
    below = tl.where(z >= 0, small, 1.0) / (1.0 + small)  # sigmoid(-z)
    above = tl.where(z >= 0, 1.0, small) / (1.0 + small)  # sigmoid(z)
    tail = log1p(small)
    lost = tail + tl.maximum(-z, 0.0)  # softplus(-z)
    if HAS_TARGET:
        t = tl.load(target + pair, mask=inside, other=0).to(ACC)
        loss = t * lost + (1.0 - t) * (tail + tl.maximum(z, 0.0))
        slope = (1.0 - t) * above - t * below
    elif GAMMA != 0.0:
        g = tl.full([], GAMMA, ACC)
        log = tl.full([], 0.6931471805599453, ACC) - tail - z  # of 2 * sigmoid(-z), for z > 0
        focus = tl.where(z > 0, tl.exp(g * tl.minimum(log, 0.0)), 1.0)
        loss = focus * lost
        slope = -focus * (below + tl.where(z > 0, g * above * lost, 0.0))
    elif SMOOTHING == 0.0:
        loss = lost
        slope = -below
    else:
        s = tl.full([], SMOOTHING, ACC)
        loss = (1.0 - s) * lost + s * (tail + tl.maximum(z, 0.0))
        slope = s * above - (1.0 - s) * below
    if HAS_WEIGHT:
        w = tl.load(weight + pair, mask=inside, other=0).to(ACC)
        loss *= w
        slope *= w
    if CENTER == 0.0:
        return loss, slope, -slope
    else:
        both = (chosen + rejected) * tl.full([], CENTER, ACC)
        return loss + both * (chosen + rejected), 2.0 * both + slope, 2.0 * both - slope


@triton.jit
def _forward_kernel(
    scores, pairs, margin, target, weight, loss, metrics, grads,
    count, batch, stride,
    LAYOUT: tl.constexpr, REDUCTION: tl.constexpr,
    HAS_MARGIN: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, CENTER: tl.constexpr, GAMMA: tl.constexpr,
    GRADS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK], ACC)
    right = tl.zeros([BLOCK], ACC)
    ties = tl.zeros([BLOCK], ACC)
    margins = tl.zeros([BLOCK], ACC)
    rewards = tl.zeros([BLOCK], ACC)
    low = tl.full([BLOCK], float("inf"), ACC)
    high = tl.full([BLOCK], float("-inf"), ACC)
    for start in range(0, count, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        inside = pair < count
        item = item_of(pair, inside, pairs, count, LAYOUT)
        chosen = tl.load(scores + item * stride, mask=inside, other=0.0).to(ACC)
        item = item_of(pair + count, inside, pairs, count, LAYOUT)
        rejected = tl.load(scores + item * stride, mask=inside, other=0.0).to(ACC)
        value, up, down = pair_loss(
            chosen, rejected, pair, inside, margin, target, weight,
            HAS_MARGIN, HAS_TARGET, HAS_WEIGHT, SMOOTHING, CENTER, GAMMA, ACC,
        )  # fmt: skip
        if REDUCTION == "none":
            tl.store(loss + pair, value, mask=inside)
        if REDUCTION == "mean":
            up = up / count
            down = down / count
        if GRADS:
            tl.store(grads + pair, up, mask=inside)
            tl.store(grads + count + pair, down, mask=inside)
        total += tl.where(inside, value, 0.0)
        right += tl.where(inside & (chosen > rejected), 1.0, 0.0)
        ties += tl.where(inside & (chosen == rejected), 1.0, 0.0)
        margins += chosen - rejected
        if LAYOUT != "index":
            rewards += chosen + rejected
            low = tl.minimum(low, tl.where(inside, tl.minimum(chosen, rejected), float("inf")))
            high = tl.maximum(high, tl.where(inside, tl.maximum(chosen, rejected), float("-inf")))
    if LAYOUT == "index":  # a score may be in many pairs, or in none
        for start in range(0, batch, BLOCK):
            item = start + tl.arange(0, BLOCK).to(tl.int64)
            score = tl.load(scores + item * stride, mask=item < batch, other=0.0).to(ACC)
            rewards += score
            low = tl.minimum(low, tl.where(item < batch, score, float("inf")))
            high = tl.maximum(high, tl.where(item < batch, score, float("-inf")))
    if REDUCTION == "mean":
        tl.store(loss, tl.sum(total, axis=0) / count)
    if REDUCTION == "sum":
        tl.store(loss, tl.sum(total, axis=0))
    tl.store(metrics, tl.sum(right, axis=0) / count)
    tl.store(metrics + 1, tl.sum(ties, axis=0) / count)
    tl.store(metrics + 2, tl.sum(margins, axis=0) / count)
    tl.store(metrics + 3, tl.sum(rewards, axis=0) / batch)
    tl.store(metrics + 4, tl.min(low, axis=0))
    tl.store(metrics + 5, tl.max(high, axis=0))


@triton.jit
def _backward_kernel(
    upstream, grads, pairs, grad_scores,
    count, batch, stride,
    LAYOUT: tl.constexpr, REDUCED: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, USES: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < batch
    if LAYOUT == "index":
        grad = tl.zeros([BLOCK], ACC)
        for start in range(0, 2 * count, USES):
            use = start + tl.arange(0, USES)
            there = use < 2 * count
            g = tl.load(grads + use, mask=there, other=0.0)
            if not REDUCED:
                at = upstream + (use % count).to(tl.int64) * stride
                g *= tl.load(at, mask=there, other=0.0).to(ACC)
            same = item_of(use, there, pairs, count, LAYOUT)[None, :] == item[:, None]
            grad += tl.sum(tl.where(same & there[None, :], g[None, :], 0.0), axis=1)
    else:
        use = item
        if LAYOUT == "interleaved":
            use = item % 2 * count + item // 2
        grad = tl.load(grads + use, mask=inside, other=0.0)
        if not REDUCED:
            at = upstream + (use % count).to(tl.int64) * stride
            grad *= tl.load(at, mask=inside, other=0.0).to(ACC)
    if REDUCED:
        grad *= tl.load(upstream).to(ACC)
    tl.store(grad_scores + item, grad, mask=inside)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def options(
    layout: str,  # "halves", "interleaved" or "index"
    margin: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    center: float,
    gamma: float,
) -> dict:
    """What the kernels of this loss are compiled for."""
    return {
        "LAYOUT": layout, "HAS_MARGIN": margin is not None, "HAS_TARGET": target is not None,
        "HAS_WEIGHT": weight is not None, "SMOOTHING": float(label_smoothing),
        "CENTER": float(center), "GAMMA": float(gamma),
    }  # fmt: skip


def packed(*tensors: Tensor | None, instead: Tensor) -> list[Tensor]:
    """The tensors without gaps; ``instead`` where there is none, for the kernel not to read."""
    return [instead if x is None else x.contiguous() for x in tensors]


def pairwise_loss(
    scores: Tensor,  # [B], any stride
    pairs: Tensor | None,  # int64 [P, 2] with layout "index"
    margin: Tensor | None,  # [P]
    target: Tensor | None,  # [P]
    weight: Tensor | None,  # [P]
    layout: str,
    label_smoothing: float,
    center: float,
    gamma: float,
    reduction: str,
    gradients: bool = True,
    *,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss ([] or [P]), metrics [6], and the loss by its pairs' scores [2, P]: all fp32."""
    batch = scores.shape[0]
    count = batch // 2 if pairs is None else pairs.shape[0]
    acc, device = wide(scores.dtype), scores.device
    loss = torch.empty((count,) if reduction == "none" else (), dtype=acc, device=device)
    metrics = torch.empty(6, dtype=acc, device=device)
    grads = torch.empty(2, count, dtype=acc, device=device) if gradients else None
    block = min(block, triton.next_power_of_2(count))
    _forward_kernel[(1,)](
        scores, *packed(pairs, margin, target, weight, instead=scores), loss, metrics,
        grads if gradients else scores,
        count, batch, scores.stride(0),
        **options(layout, margin, target, weight, label_smoothing, center, gamma),
        REDUCTION=reduction, GRADS=gradients, ACC=accumulator(scores.dtype), BLOCK=block,
        num_warps=max(1, min(8, block // 128)),
    )  # fmt: skip
    return loss, metrics, grads


def pairwise_loss_backward(
    grad: Tensor,  # [] or [P], any stride: as the loss
    grads: Tensor,  # [2, P]
    pairs: Tensor | None,  # int64 [P, 2]
    layout: str,
    batch: int,
    dtype: torch.dtype,
    *,
    block: int | None = None,
) -> Tensor:  # [B] of `dtype`
    out = torch.empty(batch, dtype=dtype, device=grads.device)
    if block is None:
        block = 128 if layout == "index" else _BLOCK
    block = min(block, triton.next_power_of_2(batch))
    _backward_kernel[(triton.cdiv(batch, block),)](
        grad, grads, *packed(pairs, instead=grads), out,
        grads.shape[1], batch, grad.stride(0) if grad.ndim else 0,
        LAYOUT=layout, REDUCED=grad.ndim == 0, ACC=accumulator(grads.dtype),
        BLOCK=block, USES=_USES, num_warps=4,
    )  # fmt: skip
    return out
