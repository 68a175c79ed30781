"""The specification of the reward head and of last-token pooling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def last_token(
    input_ids: Tensor,  # int [B, T]
    attention_mask: Tensor | None,  # [B, T]
    pad_token_id: int | None,
    pooling: str,
) -> Tensor:  # int64 [B]
    """Column of the token that carries a sequence's score.

    ``"hf"`` is Hugging Face's rule, bug for bug: the rightmost token that is not the pad token,
    whatever the mask says; column 0 for a row of pads; the last column where there is no pad
    token. ``"mask"`` is the rightmost token the mask lets through.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    if pooling == "mask":
        counts = attention_mask != 0 if attention_mask is not None else None
    else:
        counts = input_ids != pad_token_id if pad_token_id is not None else None
    if counts is None:
        return columns[-1].expand(input_ids.shape[0])
    return (columns * counts).argmax(-1)


def until_scored(row: np.ndarray, pad_token_id: int | None) -> np.ndarray:  # int [T] -> [<= T]
    """One sequence up to the token that :func:`last_token` picks by ``"hf"``.

    What comes after that token changes nothing in a causal decoder.
    """
    if pad_token_id is None:
        return row
    counts = np.flatnonzero(row != pad_token_id)
    return row[: counts[-1] + 1 if counts.size else 1]


def gathered(hidden: Tensor, index: Tensor) -> Tensor:  # [M, H] or [B, T, H] -> [B, H]
    """Rows ``index`` of ``hidden.flatten(0, -2)``."""
    if hidden.ndim == 2:  # whose gradients are summed in order: indexing would add in any
        return hidden.index_select(0, index)
    return hidden[index // hidden.shape[1], index % hidden.shape[1]]  # no copy, whatever strides


def reward_head(
    hidden: Tensor,  # [M, H] or [B, T, H]
    index: Tensor,  # int64 [B], rows of hidden.flatten(0, -2)
    weight: Tensor,  # [L, H]
    bias: Tensor | None,  # [L]
) -> Tensor:  # fp32 [B, L]
    """``hidden[index] @ weight.T + bias`` in fp32; so are the gradients of a row that repeats."""
    acc = wide(hidden.dtype)
    bias = bias.to(acc) if bias is not None else None
    if hidden.requires_grad and hidden.dtype != acc:  # else repeats would be summed in bf16
        used, use = index.unique(return_inverse=True)
        rows = gathered(hidden, used).to(acc).index_select(0, use)
    else:
        rows = gathered(hidden, index).to(acc)
    # no matrix product: autocast would round it in a backward that runs under it
    scores = (rows[:, None] * weight.to(acc)).sum(-1)
    return scores if bias is None else scores + bias


def pooled_rows(
    input_ids: Tensor,  # int [B, T]
    attention_mask: Tensor | None,  # [B, T]
    pad_token_id: int | None,
    pooling: str,
) -> Tensor:  # int64 [B]
    """The rows of ``hidden.flatten(0, 1)`` of the tokens that :func:`last_token` picks."""
    column = last_token(input_ids, attention_mask, pad_token_id, pooling)
    return torch.arange(len(column), device=column.device) * input_ids.shape[1] + column
