"""Last-token pooling and the scalar head."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import reference
from rmfast.ops._common import (
    check_choice,
    check_devices,
    check_floating,
    check_places,
    no_second_derivative,
    op,
    present,
    use_kernels,
    without_autocast,
)

RULE = "Tensor? input_ids, Tensor? attention_mask, int? pad_token_id, str pooling"  # last_token's


@op(
    "reward_head",
    f"(Tensor hidden, Tensor? index, Tensor weight, Tensor? bias, {RULE}) -> (Tensor, Tensor)",
)
def _reward_head(*inputs):
    """Scores; the rows that they are read from, found where no index is given."""
    from rmfast.kernels import reward_head as kernel

    return kernel.reward_head(*inputs)


@op(
    "reward_head_backward",
    "(Tensor grad, Tensor hidden, Tensor index, Tensor weight, Tensor? bias, bool needs_hidden, "
    "bool needs_weight) -> (Tensor, Tensor, Tensor)",
)
def _reward_head_backward(grad, hidden, *rest):
    from rmfast.kernels import reward_head as kernel

    return present(hidden, *kernel.reward_head_backward(grad, hidden, *rest))


@_reward_head.register_fake
def _(hidden, index, weight, *_):
    batch = (hidden if index is None else index).shape[0]
    scores = hidden.new_empty(batch, weight.shape[0], dtype=reference.wide(hidden.dtype))
    return scores, hidden.new_empty(batch if index is None else 0, dtype=torch.int64)


@_reward_head_backward.register_fake
def _(grad, hidden, index, weight, bias, needs_hidden, needs_weight):
    wanted = (needs_hidden, needs_weight, needs_weight and bias is not None)
    grads = zip(wanted, (hidden, weight, bias), strict=True)
    return present(hidden, *(x.new_empty(x.shape) if want else None for want, x in grads))


no_second_derivative(_reward_head_backward, "reward_head")


def _setup(ctx, inputs, output):
    hidden, index, weight, bias, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, output[1] if index is None else index, weight, bias)
    needs = ctx.needs_input_grad
    ctx.needs = (needs[0], needs[2], needs[3])


def _autograd(ctx, grad, _):
    hidden, weight, bias = ctx.needs
    grads = (None, None, None)
    if grad is not None and any(ctx.needs):
        grads = _reward_head_backward(grad, *ctx.saved_tensors, hidden, weight or bias)
        grads = [g if need else None for g, need in zip(grads, ctx.needs, strict=True)]
    return grads[0], None, *grads[1:], *[None] * 4


_reward_head.register_autograd(_autograd, setup_context=_setup)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not hidden.shape[-1] or (weight.ndim == 2 and not weight.shape[0]):
        raise ValueError("hidden and weight are empty: no column, or no label")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [num_labels, {hidden.shape[-1]}] like hidden, "
            f"got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    check_floating(hidden=hidden, weight=weight, bias=bias)


def check_padded(
    hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None, pooling: str
) -> Tensor | None:
    """The mask, where it is read."""
    if hidden.ndim != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be [B, T, H] with T > 0, got shape {tuple(hidden.shape)}")
    if input_ids.shape != hidden.shape[:2] or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be int {list(hidden.shape[:2])} like hidden, "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    check_choice("pooling", pooling, ("hf", "mask"))
    if pooling == "hf" or attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)} like input_ids, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    return attention_mask


def check_rows(hidden: Tensor, index: Tensor) -> None:
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [M, H], got shape {tuple(hidden.shape)}")
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
    check_rows(hidden, index)
    check_head(hidden, weight, bias)
    check_devices(hidden=hidden, index=index, weight=weight, bias=bias)
    if use_kernels(hidden, weight, bias):
        return _reward_head(hidden, index, weight, bias, None, None, None, "hf")[0]
    check_places("index", index, hidden.shape[0])
    return without_autocast(reference.reward_head)(hidden, index, weight, bias)


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
    attention_mask = check_padded(hidden, input_ids, attention_mask, pooling)
    check_head(hidden, weight, bias)
    check_devices(
        hidden=hidden, input_ids=input_ids, weight=weight, bias=bias, attention_mask=attention_mask
    )
    rule = (input_ids, attention_mask, pad_token_id, pooling)
    if use_kernels(hidden, weight, bias):
        return _reward_head(hidden, None, weight, bias, *rule)[0]
    index = reference.pooled_rows(*rule)
    return without_autocast(reference.reward_head)(hidden, index, weight, bias)
