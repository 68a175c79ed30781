"""Last-token pooling and scalar head: ``scores[b, l] = hidden[index[b]] . weight[l] + bias[l]``.

One program a score. The rows are read where they lie, once per label, and summed in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward_kernel(
    hidden, index, weight, bias, scores,
    width, labels,
    stride_row, stride_col, stride_label, stride_weight,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, label = tl.program_id(0), tl.program_id(1)
    row = tl.load(index + sequence).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = col < width
        h = tl.load(hidden + row * stride_row + col * stride_col, mask=inside, other=0.0)
        w = tl.load(
            weight + label.to(tl.int64) * stride_label + col * stride_weight,
            mask=inside,
            other=0.0,
        )
        total += h.to(tl.float32) * w.to(tl.float32)
    score = tl.sum(total, axis=0)
    if HAS_BIAS:
        score += tl.load(bias + label).to(tl.float32)
    tl.store(scores + sequence.to(tl.int64) * labels + label, score)


def reward_head(
    hidden: Tensor,  # [M, H], any strides
    index: Tensor,  # int64 [B], contiguous
    weight: Tensor,  # [L, H], any strides
    bias: Tensor | None,  # [L]
) -> Tensor:  # fp32 [B, L]
    batch, labels, width = index.shape[0], weight.shape[0], hidden.shape[1]
    scores = torch.empty(batch, labels, dtype=torch.float32, device=hidden.device)
    block = min(_BLOCK, triton.next_power_of_2(width))
    _forward_kernel[(batch, labels)](
        hidden, index, weight, bias if bias is not None else weight, scores,
        width, labels,
        *hidden.stride(), *weight.stride(),
        HAS_BIAS=bias is not None, BLOCK=block,
    )  # fmt: skip
    return scores
