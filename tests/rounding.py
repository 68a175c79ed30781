"""How far a result may lie from its definition in fp64: counted in roundings, never picked."""

import torch
from torch import Tensor

from rmfast import reference


def unit(dtype: torch.dtype) -> float:
    """What one rounding changes, relative, where sums over ``dtype`` run."""
    return torch.finfo(reference.wide(dtype)).eps / 2


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours in ``dtype`` near ``x``; bf16 stores of the interpreter truncate."""
    info = torch.finfo(dtype)
    return info.eps * x.abs().clamp_min(info.smallest_normal)


def pair_errors(
    scores: Tensor,  # fp64 [B]
    errors: Tensor | float,  # of the scores, [B]
    u: float,
    pairs: str | Tensor,
    margin: Tensor | None = None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [P], [P]
    """Greatest error of the loss of a pair, and of its derivative by either score."""
    c, r = reference.pair_scores(scores.abs(), pairs)
    error = sum(reference.pair_scores(torch.zeros_like(scores) + errors, pairs))
    size = c + r + (0 if margin is None else margin.double().abs())
    w = 1.0 if weight is None else weight.double().abs()
    error_z = error + 2 * u * size
    # softplus has slope <= 1. Its parts are at most 1 + |z|, and a dozen operations are done on
    # them: exp (whose argument may be rounded: |z| exp(-|z|) < 1), log, the fractions, the mix
    loss = w * (error_z + 12 * u * (1 + size))
    # sigmoid has slope <= 1/4, and at most 1 is rounded as often
    slope = w * (error_z / 4 + 12 * u)
    if gamma:
        loss, slope = _focal_errors(scores, pairs, margin, size, error_z, u, gamma)
        loss, slope = w * loss, w * slope
    both = c + r
    return (
        loss + center * (2 * both * error + error**2 + 5 * u * both**2),
        slope + 2 * center * (error + 5 * u * both),
    )


def _focal_errors(
    scores: Tensor, pairs: str | Tensor, margin: Tensor | None, size: Tensor, error_z: Tensor,
    u: float, gamma: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of F(z) = f softplus(-z) and of F'(z), where f = (2 sigmoid(-z))**gamma for z > 0, else 1.

    For z > 0, F' = -f (sigmoid(-z) + g), g = gamma sigmoid(z) softplus(-z) <= 0.35 gamma, so that
    |F'| <= 1/2 + 0.35 gamma, and |F''| <= (1 + 2 gamma) / 4 + gamma**2 / 5; at 0, F' jumps by
    0.35 gamma. The exponent of f, x = gamma log(2 sigmoid(-z)) <= 0, is off by at most
    u (4 gamma + 3 |x|), and |x| exp(x) < 0.4: f is off by at most u (4 gamma + 4).
    """
    c, r = reference.pair_scores(scores, pairs)
    z = c - r if margin is None else c - r - margin.double()
    steep = max(1.0, 0.5 + 0.35 * gamma)
    loss = steep * error_z + (16 + 4 * gamma) * u * (1 + size)
    slope = ((1 + 2 * gamma) / 4 + gamma**2 / 5) * error_z + steep * (16 + 4 * gamma) * u
    return loss, slope + 0.35 * gamma * (z.abs() <= error_z)
