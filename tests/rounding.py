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
    both = c + r
    return (
        loss + center * (2 * both * error + error**2 + 5 * u * both**2),
        slope + 2 * center * (error + 5 * u * both),
    )
