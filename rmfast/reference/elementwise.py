"""The specification of what a decoder layer does element by element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rmfast.reference.head import wide


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    offset: float = 0.0,
    late: bool = False,
) -> Tensor:  # [..., H]
    """``(offset + weight) * x / rms(x)``; rounded to x's dtype before the product, or ``late``."""
    normed = x.to(wide(x.dtype))
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    if late:
        return (normed * (offset + weight.to(normed.dtype))).to(x.dtype)
    return (offset + weight) * normed.to(x.dtype)


def rotary(
    q: Tensor,  # [B, Hq, N, D]
    k: Tensor,  # [B, Hk, N, D]
    cos: Tensor,  # [B or 1, N, D]
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """``[a, b] * cos + [-b, a] * sin``, a and b being the halves of a head."""

    def turned(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, cos.dtype)
        c, s, x = (y.to(wide(dtype)) for y in (cos[:, None], sin[:, None], x))
        a, b = x.chunk(2, -1)
        return (x * c + torch.cat([-b, a], -1) * s).to(dtype)

    return turned(q), turned(k)


def gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:  # of one shape
    """``silu(gate) * up``, or gelu approximated by tanh, rounded once."""
    x = gate.to(wide(gate.dtype))
    act = F.gelu(x, approximate="tanh") if gelu else F.silu(x)
    return (act * up.to(x.dtype)).to(gate.dtype)
