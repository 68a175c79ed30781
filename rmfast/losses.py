"""Losses of reward models, and of policies that imply a reward.

All take scores of any floating dtype and give fp32 (fp64 for fp64 scores), a scalar or one value a
pair, group or score. Those of pairs and groups are :mod:`rmfast.ops`: on a GPU, a kernel each way.

They are tensors like any other, so terms add up, and so do their gradients. GRM (arXiv 2406.10216)
trains the backbone on a text-generation loss as well, with a language head beside the scalar one::

    loss = (1 - alpha) * losses.bradley_terry(chosen, rejected) + alpha * language_loss
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmfast import ops
from rmfast.ops._common import check_choice, check_devices, check_floating, checks_values
from rmfast.reference.head import wide

__all__ = [
    "all_pairs",
    "bradley_terry",
    "dpo",
    "focal",
    "implicit_reward",
    "plackett_luce",
    "regression",
]


def bradley_terry(
    chosen: Tensor,  # [P] or [P, 1]
    rejected: Tensor,  # [P] or [P, 1]
    *,
    margin: Tensor | None = None,  # [P]
    target: Tensor | None = None,  # [P]
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,  # [P]
    center: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of preferences (Bradley and Terry 1952; InstructGPT, 2203.02155).

    ::

        z = chosen - rejected - margin
        loss = weight * -(t * log sigmoid(z) + (1 - t) * log sigmoid(-z))
               + center * (chosen + rejected)**2

    Where the scores are one tensor, :func:`rmfast.ops.pairwise_loss` spares joining them; where
    they are still rows of hidden states, :func:`rmfast.ops.reward_head_pairwise_loss`. Both give
    metrics.

    Args:
        chosen: scores ``[P]`` or ``[P, 1]``, any floating dtype.
        rejected: as ``chosen``.
        margin: ``[P]``, by how much chosen should be ahead (Llama 2, arXiv 2307.09288, equation 2).
        target: ``[P]`` in [0, 1], soft labels: the probability ``t`` that chosen is preferred.
            1 when not given.
        label_smoothing: the same ``t = 1 - label_smoothing`` for all pairs.
        weight: ``[P]``; the mean still divides by ``P``.
        center: how much the scores of a pair are drawn to a sum of 0 (Eisenstein et al., arXiv
            2312.09244); TRL's ``center_rewards_coefficient``.
        reduction: ``"mean"`` or ``"sum"`` over the pairs, or ``"none"``.

    Returns:
        A scalar, or ``[P]`` with ``reduction="none"``, in fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no pair, an unknown option, both
            ``target`` and ``label_smoothing``; on a CPU, a margin, target or weight that is not
            finite, or a target outside [0, 1] (a GPU would have to be waited for).
    """
    return ops.pairwise_loss(
        _joined(chosen=chosen, rejected=rejected), margin=margin, target=target,
        label_smoothing=label_smoothing, weight=weight, center=center, reduction=reduction,
    ).loss  # fmt: skip


def focal(
    chosen: Tensor,  # [P] or [P, 1]
    rejected: Tensor,  # [P] or [P, 1]
    *,
    gamma: float = 2.0,
    margin: Tensor | None = None,  # [P]
    weight: Tensor | None = None,  # [P]
    center: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Focal ranking loss of InternLM2 (arXiv 2403.17297): pairs already in order count less.

    ::

        p = sigmoid(chosen - rejected - margin)
        loss = weight * -(1 - 2 * max(0, p - 1/2))**gamma * log(p) + center * (chosen + rejected)**2

    A pair in the wrong order has Bradley and Terry's loss. At a tie the loss has a kink; the
    derivative there is the one from below, that of Bradley and Terry's loss.

    Args:
        gamma: how fast a pair in order fades, 0 or more; 0 is :func:`bradley_terry`.
        chosen: as in :func:`bradley_terry`; so are all others. Labels are hard here.

    Returns:
        As :func:`bradley_terry`.

    Raises:
        ValueError: as :func:`bradley_terry`; a ``gamma`` below 0 or not finite.
    """
    return ops.pairwise_loss(
        _joined(chosen=chosen, rejected=rejected), margin=margin, weight=weight, center=center,
        gamma=gamma, reduction=reduction,
    ).loss  # fmt: skip


def all_pairs(
    scores: Tensor,  # [G, K], or [B] or [B, 1] with offsets
    ranks: Tensor,  # as scores
    offsets: Tensor | None = None,  # int64 [G + 1]
    *,
    reduction: str = "mean",
    max_size: int | None = None,
) -> Tensor:
    """Loss of all pairs in groups of K ranked answers to a prompt (arXiv 2203.02155, equation 1).

    ::

        loss of a group = -1 / (K choose 2) * sum of log sigmoid(s[i] - s[j]) over i better than j

    A tied pair gives no term and counts in the divisor. A group of one has the loss 0.

    Args:
        scores: ``[G, K]``; or ``[B]`` or ``[B, 1]``, the groups one after another, with
            ``offsets``. Any floating dtype, at most 64 answers a group.
        ranks: int or float, of the same shape; lower is better, equal is a tie. Only compared
            inside a group.
        offsets: int64 ``[G + 1]``, rising from 0 to ``B``: group ``g`` is ``offsets[g]`` up to
            ``offsets[g + 1]``.
        reduction: ``"mean"`` or ``"sum"`` over the groups, or ``"none"``.
        max_size: of the largest group, or more. With ``offsets`` and without this, a GPU is waited
            for (see :func:`rmfast.ops.listwise_loss`).

    Returns:
        A scalar, or ``[G]`` with ``reduction="none"``, in fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a group of more than 64, an unknown
            option; on a CPU, ranks that are NaN and offsets that do not rise.
    """
    return _listwise("all_pairs", scores, ranks, offsets, reduction, max_size)


def plackett_luce(
    scores: Tensor,  # [G, K], or [B] or [B, 1] with offsets
    ranks: Tensor,  # as scores
    offsets: Tensor | None = None,  # int64 [G + 1]
    *,
    reduction: str = "mean",
    max_size: int | None = None,
) -> Tensor:
    """Negative log-likelihood of the order of K answers (Plackett 1975; Luce 1959).

    ::

        loss of a group = sum over i of log(sum of exp(s[j]) over j ranked no better than i) - s[i]

    Tied answers are chosen one by one from the same ones, themselves included (Breslow 1974). A
    group of one has the loss 0. DPO's appendix A.3 has the same for policies (arXiv 2305.18290):
    give it :func:`implicit_reward`.

    Args, Returns, Raises: as :func:`all_pairs`.
    """
    return _listwise("plackett_luce", scores, ranks, offsets, reduction, max_size)


def regression(
    scores: Tensor,  # [B], [B, 1] or [B, A]
    targets: Tensor,  # as scores, or [B] for [B, 1]
    *,
    mask: Tensor | None = None,  # bool, as targets
    weight: Tensor | None = None,  # [B]; [B, A], [B, 1] or [1, A]
    reduction: str = "mean",
) -> Tensor:
    """Squared error of ratings; with ``mask``, of several attributes that not every row has.

    ::

        loss = sum of weight * (scores - targets)**2 over mask / number of True in mask

    As HelpSteer2 (arXiv 2406.08673) and ArmoRM (arXiv 2406.12845) regress on ``A`` attributes.

    Args:
        scores: ``[B]``, ``[B, 1]`` or ``[B, A]``, any floating dtype.
        targets: ratings of the same shape, int or float. Where ``mask`` is False anything, NaN too.
        mask: bool, True where there is a rating. None: everywhere. All False: the loss is 0 with
            the gradient 0.
        weight: of a row ``[B, 1]`` (``[B]`` where scores are), of an attribute ``[1, A]``, or both
            ``[B, A]``; the mean still divides by the number of ratings.
        reduction: ``"mean"`` or ``"sum"`` over the ratings, or ``"none"``.

    Returns:
        A scalar, or like ``targets`` with ``reduction="none"``, in fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no score, an unknown option; on a
            CPU, outside ``torch.compile`` and ``torch.func``, a target under the mask that is not
            finite.
    """
    # plain torch: of so few numbers a kernel of our own would gain nothing
    check_floating(scores=scores)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if scores.ndim == 2 and scores.shape[1] == 1 and targets.ndim == 1:
        scores = scores[:, 0]
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores must be [B], [B, 1] or [B, A], got shape {tuple(scores.shape)}")
    if scores.numel() == 0:
        raise ValueError(f"scores is empty, {tuple(scores.shape)}: at least one rating is needed")
    shape = tuple(scores.shape)
    if targets.shape != shape or targets.is_complex():
        raise ValueError(f"targets must be {shape} like scores, got {tuple(targets.shape)}")
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
    if weight is not None:
        fits = zip(weight.shape, shape, strict=False)
        if weight.ndim != scores.ndim or any(have not in (1, want) for have, want in fits):
            allowed = "[B]" if scores.ndim == 1 else "[B, A], [B, 1] or [1, A]"
            raise ValueError(
                f"weight must be {allowed} for scores {shape}, got {tuple(weight.shape)}"
            )
    for name, x in (("targets", targets), ("weight", weight)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} gets no gradient here: detach it")
    check_devices(scores=scores, targets=targets, mask=mask, weight=weight)
    if checks_values(targets):
        wrong = ~targets.isfinite() if mask is None else mask & ~targets.isfinite()
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"targets{place} is {targets[tuple(place)].item()}: leave it out with mask"
            )
    acc = wide(scores.dtype)
    gap = scores.to(acc) - targets.to(acc)
    if mask is not None:
        gap = torch.where(mask, gap, 0.0)  # before the square, whose gradient would be 0 * NaN
    loss = gap.square()
    if weight is not None:
        loss = loss * weight.to(acc)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (scores.numel() if mask is None else mask.sum().clamp(min=1))


def implicit_reward(
    policy: Tensor,  # [...]
    reference: Tensor,  # as policy
    beta: float = 0.1,
) -> Tensor:
    """Reward that a policy implies, ``beta * (policy - reference)`` (DPO, 2305.18290, equation 5).

    Without the term of the prompt alone, which cancels among answers to one prompt.

    Args:
        policy: ``log pi(y | x)``, summed over the answer's tokens, any shape, any floating dtype.
        reference: the same of the model it was trained from; not differentiated.
        beta: above 0.

    Returns:
        Like ``policy``, in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a reference that requires a
            gradient, or a ``beta`` that is not above 0.
    """
    return _implicit(beta, policy=policy, reference=reference)


def dpo(
    policy_chosen: Tensor,  # [P]
    policy_rejected: Tensor,  # [P]
    reference_chosen: Tensor,  # [P]
    reference_rejected: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    :func:`bradley_terry` of :func:`implicit_reward`::

        z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
        loss = -(1 - label_smoothing) * log sigmoid(z) - label_smoothing * log sigmoid(-z)

    With ``label_smoothing``, conservative DPO (Mitchell 2023, "A note on DPO with noisy
    preferences"); TRL's ``loss_type="robust"`` is another one (arXiv 2403.00409). The sums may come
    from a patched causal language model: its logits are the model's own.

    Args:
        policy_chosen: ``log pi(y | x)`` of the chosen answers, summed over the answer's tokens,
            ``[P]``, any floating dtype (a sum in bf16 has lost its digits).
        policy_rejected: of the rejected ones.
        reference_chosen: of the model it was trained from, not differentiated.
        reference_rejected: likewise.
        beta: how near the policy is kept to it; above 0.
        label_smoothing: probability in [0, 1] that a preference is the wrong way round.
        reduction: ``"mean"`` or ``"sum"`` over the pairs, or ``"none"``.

    Returns:
        A scalar, or ``[P]`` with ``reduction="none"``, in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no pair, a reference that requires a
            gradient, or an option out of range.
    """
    chosen = _implicit(beta, policy_chosen=policy_chosen, reference_chosen=reference_chosen)
    rejected = _implicit(
        beta, policy_rejected=policy_rejected, reference_rejected=reference_rejected
    )
    scores = _joined(policy_chosen=chosen, policy_rejected=rejected)
    return ops.pairwise_loss(scores, label_smoothing=label_smoothing, reduction=reduction).loss


def _joined(**sides: Tensor) -> Tensor:  # [P] or [P, 1] each -> [2 P]
    check_floating(**sides)
    check_devices(**sides)
    for name, x in sides.items():
        if x.ndim != 1 and (x.ndim != 2 or x.shape[1] != 1):
            raise ValueError(f"{name} must be [P] or [P, 1], got shape {tuple(x.shape)}")
    (one, left), (other, right) = sides.items()
    if len(left) != len(right):
        raise ValueError(f"{one} has {len(left)} scores, {other} {len(right)}: pair them")
    if len(left) == 0:
        raise ValueError(f"{one} and {other} are empty: at least one pair is needed")
    return torch.cat([left.flatten(), right.flatten()])


def _listwise(
    kind: str,
    scores: Tensor,
    ranks: Tensor,
    offsets: Tensor | None,
    reduction: str,
    max_size: int | None,
) -> Tensor:
    if offsets is None:
        if scores.ndim != 2 or not 2 <= scores.shape[1] <= 64 or len(scores) == 0:
            raise ValueError(
                "scores must be [G, K], K from 2 to 64, or come with offsets, "
                f"got shape {tuple(scores.shape)}"
            )
        if ranks.shape != scores.shape:
            raise ValueError(
                f"ranks must be {tuple(scores.shape)} like scores, got {tuple(ranks.shape)}"
            )
        max_size = scores.shape[1]
        offsets = torch.arange(0, scores.numel() + 1, max_size, device=scores.device)
        scores, ranks = scores.flatten(), ranks.flatten()
    return ops.listwise_loss(
        scores, ranks, offsets, kind=kind, reduction=reduction, max_size=max_size
    )


def check_beta(beta: float) -> None:
    """Raises ValueError unless ``beta`` is above 0, and finite."""
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be above 0, and finite, got {beta}")


def _implicit(beta: float, **both: Tensor) -> Tensor:
    (one, policy), (other, reference) = both.items()
    check_floating(**both)
    check_devices(**both)
    if policy.shape != reference.shape:
        raise ValueError(
            f"{other} must be {tuple(policy.shape)} like {one}, got {tuple(reference.shape)}"
        )
    if reference.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{other} gets no gradient: compute it under torch.no_grad()")
    check_beta(beta)
    acc = wide(torch.promote_types(policy.dtype, reference.dtype))
    return beta * (policy.to(acc) - reference.to(acc))
