"""RMSNorm, rotary embedding and gated activation: what a decoder layer does element by element.

Computed in fp32 and rounded once, or where transformers rounds, whatever the dtype (fp32, fp16 or
bf16). With R rows of H elements of s bytes, each byte counted once:

rms_norm, 1 launch: whole rows a program. ``2*R*H*s + H*s`` bytes. Backward, 1 launch and with the
    gradient of the weight 2: it computes the scale of a row again. ``3*R*H*s + H*s``; for the
    weight at most 512 programs each sum ``H`` values in fp32, written, and read by a second launch.
rotary, 1 launch: some heads of some tokens a program, of queries or of keys. Each of their elements
    is read and written once, each of the two tables read once. The backward is the same with the
    matrix of a rotation transposed.
gated, 1 launch: ``3*R*H*s``. Backward, 1 launch: ``5*R*H*s``; it computes the activation again.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.fused_loss import sum_parts

_TILE = 2048  # elements that a program holds at once, where they need not be a whole row
_ROOT_8_OVER_PI = tl.constexpr(math.sqrt(8 / math.pi))
_CUBE = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, weight, out, rows, width, stride, eps, offset,
    LATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    h = tl.load(x + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + offset
    normed = h * tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)[:, None]
    if not LATE:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row[:, None] * width + col[None, :], normed * w[None, :], mask=inside)


@triton.jit(do_not_specialize=["rows", "span"])
def _norm_backward_kernel(
    grad, x, weight, grad_x, parts, rows, width, span, stride_grad, stride, eps, offset,
    NEEDS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With ``n = x * scale``: ``scale * (g - n * mean(g * n))`` where ``g = grad * weight``."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + offset
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, span, ROWS):
        row = program * span + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        at = row[:, None] * stride + col[None, :]
        h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        at = row[:, None] * stride_grad + col[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(h * h, axis=1) / width + eps)[:, None]
        normed = h * scale
        if NEEDS_WEIGHT:
            total += g * normed
        g *= w[None, :]
        mean = (tl.sum(g * normed, axis=1) / width)[:, None]
        at = grad_x + row[:, None] * width + col[None, :]
        tl.store(at, scale * (g - normed * mean), mask=inside)
    if NEEDS_WEIGHT:
        tl.store(parts + program * width + col, tl.sum(total, axis=0), mask=col < width)


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(parts, out, count, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    total = sum_parts(parts, col, col < width, count, width, tl.float32, PARTS, BLOCK)
    tl.store(out + col, total, mask=col < width)


@triton.jit
def _turn(
    block, x, out, cos, sin, tokens, rows, heads, half,
    stride_batch, stride_head, stride_token,
    stride_cos_batch, stride_cos_token, stride_sin_batch, stride_sin_token,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``[a, b]`` to ``[a, b] * cos + [-b, a] * sin``; row ``t * heads + h``: head h of token t."""
    row = block * ROWS + tl.arange(0, ROWS)  # fits int32, in which division is fast
    place, head = row // heads, (row % heads).to(tl.int64)
    batch, token = (place // tokens).to(tl.int64), (place % tokens).to(tl.int64)
    col = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (col < half)
    at = cos + (batch * stride_cos_batch + token * stride_cos_token)[:, None] + col
    cos_1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    at = sin + (batch * stride_sin_batch + token * stride_sin_token)[:, None] + col
    sin_1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1
    at = (batch * stride_batch + head * stride_head + token * stride_token)[:, None] + col
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    at = out + row.to(tl.int64)[:, None] * (2 * half) + col
    tl.store(at, a * cos_1 - b * sin_1, mask=inside)
    tl.store(at + half, b * cos_2 + a * sin_2, mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows_q", "rows_k"])
def _rotary_kernel(
    q, k, cos, sin, out_q, out_k, tokens, rows_q, rows_k, heads_q, heads_k, half,
    stride_q_batch, stride_q_head, stride_q_token, stride_k_batch, stride_k_head, stride_k_token,
    stride_cos_batch, stride_cos_token, stride_sin_batch, stride_sin_token,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks_q = tl.cdiv(rows_q, ROWS)
    if block < blocks_q:
        _turn(
            block, q, out_q, cos, sin, tokens, rows_q, heads_q, half,
            stride_q_batch, stride_q_head, stride_q_token,
            stride_cos_batch, stride_cos_token, stride_sin_batch, stride_sin_token,
            BACKWARD, ROWS, HALF,
        )  # fmt: skip
    else:
        _turn(
            block - blocks_q, k, out_k, cos, sin, tokens, rows_k, heads_k, half,
            stride_k_batch, stride_k_head, stride_k_token,
            stride_cos_batch, stride_cos_token, stride_sin_batch, stride_sin_token,
            BACKWARD, ROWS, HALF,
        )  # fmt: skip


@triton.jit
def _gate(g, GELU: tl.constexpr):
    """The activation, ``g * sigmoid(z(g))``, and its derivative.

    silu: z is g. gelu, approximated by tanh: 0.5 * (1 + tanh(z / 2)) is sigmoid(z).
    """
    z, slope = g, 1.0
    if GELU:
        z = _ROOT_8_OVER_PI * (g + _CUBE * g * g * g)
        slope = _ROOT_8_OVER_PI * (1.0 + 3.0 * _CUBE * g * g)
    e = tl.exp(-tl.abs(z))  # never overflows
    s = tl.where(z < 0, e, 1.0) / (1.0 + e)
    return g * s, s + g * s * (1.0 - s) * slope


@triton.jit
def _gated_kernel(gate, up, out, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    act, _ = _gate(g, GELU)
    tl.store(out + at, act * u, mask=at < count)


@triton.jit
def _gated_backward_kernel(
    grad, gate, up, grad_gate, grad_up, count, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
    act, slope = _gate(g, GELU)
    tl.store(grad_gate + at, d * u * slope, mask=at < count)
    tl.store(grad_up + at, d * act, mask=at < count)


def _rows(x: Tensor) -> Tensor:
    """``x`` as ``[R, H]`` whose rows have no gaps; copied only where it must be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def _norm_sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512))}


def rms_norm(
    x: Tensor,  # [..., H], any strides
    weight: Tensor,  # [H]
    eps: float,
    offset: float,
    late: bool,
) -> Tensor:  # [..., H]
    """As :func:`rmfast.ops.rms_norm`, whose ``late`` and ``offset`` these are."""
    dtype = x.dtype if late else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    flat = _rows(x)
    sizes = _norm_sizes(flat.shape[1])
    _norm_kernel[(triton.cdiv(flat.shape[0], sizes["ROWS"]),)](
        flat, weight.contiguous(), out, *flat.shape, flat.stride(0), eps, offset,
        LATE=late, **sizes,
    )  # fmt: skip
    return out


def rms_norm_backward(
    grad: Tensor,  # like the output, any strides
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    needs_weight: bool = True,
    *,
    most: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and weight; None where not needed."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, grad = _rows(x), _rows(grad)
    rows, width = flat.shape
    sizes = _norm_sizes(width)
    tiles = programs = triton.cdiv(rows, sizes["ROWS"])
    if needs_weight:
        # about two a multiprocessor; of short rows, whose sums are small, more
        programs = min(most or (512 if width <= 1024 else 256), programs)
    span = triton.cdiv(tiles, max(1, programs)) * sizes["ROWS"]
    grad_weight = parts = None
    if needs_weight:
        parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        grad_weight = torch.empty(width, dtype=weight.dtype, device=x.device)
    _norm_backward_kernel[(programs,)](
        grad, flat, weight.contiguous(), grad_x, parts if needs_weight else grad,
        rows, width, span, grad.stride(0), flat.stride(0), eps, offset,
        NEEDS_WEIGHT=needs_weight, **sizes,
    )  # fmt: skip
    if needs_weight:
        _sum_kernel[(triton.cdiv(width, 32),)](
            parts, grad_weight, programs, width, PARTS=128, BLOCK=32
        )
    return grad_x, grad_weight


def rotary(
    q: Tensor,  # [B, Hq, N, D], any strides
    k: Tensor,  # [B, Hk, N, D], any strides
    cos: Tensor,  # [B or 1, N, D]
    sin: Tensor,  # [B or 1, N, D]
    backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`rmfast.ops.rotary`; ``backward``: by the transposed matrix.

    The answers lie in memory as ``[B, N, heads, D]``, as projections leave them.
    """
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    batch, _, tokens, size = q.shape
    outs = [
        torch.empty(
            batch, tokens, x.shape[1], size,
            dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device,
        )
        for x in (q, k)
    ]  # fmt: skip
    rows = [batch * tokens * x.shape[1] for x in (q, k)]
    half = triton.next_power_of_2(size // 2)
    tall = max(1, _TILE // half)
    _rotary_kernel[(sum(triton.cdiv(x, tall) for x in rows),)](
        q, k, cos, sin, *outs, tokens, *rows, q.shape[1], k.shape[1], size // 2,
        *q.stride()[:3], *k.stride()[:3],
        *cos.expand(batch, -1, -1).stride()[:2], *sin.expand(batch, -1, -1).stride()[:2],
        BACKWARD=backward, ROWS=tall, HALF=half,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in outs)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:  # of any shape, the same
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated_kernel[(triton.cdiv(out.numel(), _TILE),)](
        gate.contiguous(), up.contiguous(), out, out.numel(), GELU=gelu, BLOCK=_TILE
    )
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up)]
    _gated_backward_kernel[(triton.cdiv(gate.numel(), _TILE),)](
        grad.contiguous(), gate.contiguous(), up.contiguous(), *grads, gate.numel(),
        GELU=gelu, BLOCK=_TILE,
    )  # fmt: skip
    return tuple(grads)
