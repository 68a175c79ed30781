"""The specification of attention over a trie."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast.reference.head import wide


def trie_mask(
    queries: Tensor,  # int [M], packed indices
    keys: Tensor,  # int [L], packed indices
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    window: int | None,
) -> Tensor:  # bool [M, L]
    """True where the query may see the key: ``k <= q < subtree_end[k]``, nearer than ``window``."""
    q = queries[:, None]
    allowed = (keys <= q) & (q < subtree_end[keys])
    if window is not None:
        allowed &= position_ids[q] - position_ids[keys] < window
    return allowed


def trie_attention(
    query: Tensor,  # [1, Hq, M, D]
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    seen: tuple[
        Tensor, Tensor, Tensor | None
    ],  # subtree_end, position_ids, queries (None: the last M)
    sinks: Tensor | None,  # [Hq], one more logit per head that takes weight and gives none
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # [1, M, Hq, Dv]
    """Softmax attention under :func:`trie_mask`, written out; [M, N] logits are in memory.

    Soft cap: Gemma 2, arXiv 2408.00118, section 2. Sinks: gpt-oss, arXiv 2508.10925.
    """
    subtree_end, position_ids, queries = seen
    acc, nodes = wide(query.dtype), torch.arange(len(subtree_end), device=query.device)
    rows = nodes[-query.shape[2] :] if queries is None else queries
    allowed = trie_mask(rows, nodes, subtree_end, position_ids, window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query.to(acc) @ key.to(acc).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        extra = sinks.to(acc)[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, extra], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : len(nodes)]
    return (weights @ value.to(acc)).to(value.dtype).transpose(1, 2)
