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


@op("reward_head", "(Tensor hidden, Tensor index, Tensor weight, Tensor? bias) -> Tensor")
def _reward_head(*inputs):
    from rmfast.kernels import reward_head as kernel

    return kernel.reward_head(*inputs)


@op(
    "pooled_reward_head",
    "(Tensor hidden, Tensor input_ids, Tensor weight, Tensor? bias, Tensor? attention_mask, "
    "int? pad_token_id, str pooling) -> (Tensor, Tensor)",
)
def _pooled_reward_head(*inputs):
    """The second output are the pooled rows."""
    from rmfast.kernels import reward_head as kernel

    return kernel.pooled_reward_head(*inputs)


@op(
    "reward_head_backward",
    "(Tensor grad, Tensor hidden, Tensor index, Tensor weight, Tensor? bias, bool needs_hidden, "
    "bool needs_weight) -> (Tensor, Tensor, Tensor)",
)
def _reward_head_backward(grad, hidden, *rest):
    from rmfast.kernels import reward_head as kernel

    return present(hidden, *kernel.reward_head_backward(grad, hidden, *rest))


@_reward_head.register_fake
def _(hidden, index, weight, bias):
    acc = reference.wide(hidden.dtype)
    return hidden.new_empty(index.shape[0], weight.shape[0], dtype=acc)


@_pooled_reward_head.register_fake
def _(hidden, input_ids, weight, *_):
    acc = reference.wide(hidden.dtype)
    scores = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=acc)
    return scores, hidden.new_empty(hidden.shape[0], dtype=torch.int64)


@_reward_head_backward.register_fake
def _(grad, hidden, index, weight, bias, needs_hidden, needs_weight):
    wanted = (needs_hidden, needs_weight, needs_weight and bias is not None)
    grads = zip(wanted, (hidden, weight, bias), strict=True)
    return present(hidden, *(x.new_empty(x.shape) if want else None for want, x in grads))


no_second_derivative(_reward_head_backward, "reward_head")


def _setup(ctx, inputs, output):
    """Of both ops: of the pooled one the rows are found in the forward."""
    hidden, index, weight, bias, *rule = inputs
    if rule:
        index = output[1]
        ctx.mark_non_differentiable(index)
    ctx.save_for_backward(hidden, index, weight, bias)
    needs = ctx.needs_input_grad
    ctx.needs, ctx.rule = (needs[0], needs[2], needs[3]), len(rule)


def _autograd(ctx, grad, *_):
    hidden, weight, bias = ctx.needs
    grads = (None, None, None)
    if any(ctx.needs):
        grads = _reward_head_backward(grad, *ctx.saved_tensors, hidden, weight or bias)
        grads = [g if need else None for g, need in zip(grads, ctx.needs, strict=True)]
    return grads[0], None, *grads[1:], *[None] * ctx.rule


_reward_head.register_autograd(_autograd, setup_context=_setup)
_pooled_reward_head.register_autograd(_autograd, setup_context=_setup)


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
        return _reward_head(hidden, index, weight, bias)
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
    if hidden.ndim != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be [B, T, H] with T > 0, got shape {tuple(hidden.shape)}")
    if input_ids.shape != hidden.shape[:2] or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be int {list(hidden.shape[:2])} like hidden, "
            f"got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    check_choice("pooling", pooling, ("hf", "mask"))
    if pooling == "hf":
        attention_mask = None
    elif attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)} like input_ids, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    check_head(hidden, weight, bias)
    check_devices(
        hidden=hidden, input_ids=input_ids, weight=weight, bias=bias, attention_mask=attention_mask
    )
    rule = (attention_mask, pad_token_id, pooling)
    run = without_autocast(reference.pooled_reward_head)
    run = _pooled_reward_head if use_kernels(hidden, weight, bias) else run
    return run(hidden, input_ids, weight, bias, *rule)[0]
