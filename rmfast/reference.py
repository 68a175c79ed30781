"""What every kernel computes, in plain torch: the specification, and the path taken on a CPU.

Nothing here knows of models. Sums run in fp32 (in fp64 for fp64 inputs) whatever the dtype of
the inputs.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_SHORT = 64  # packed rows are joined into tiles of up to this many queries
_LONG = 256  # a row that has ancestors is cut into tiles of this many queries
_POOLED = 16  # pooled queries lie far apart, so few share keys


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# --- last-token pooling and the scalar head


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


def reward_head(
    hidden: Tensor,  # [M, H]
    index: Tensor,  # int64 [B], rows of hidden
    weight: Tensor,  # [L, H]
    bias: Tensor | None,  # [L]
) -> Tensor:  # fp32 [B, L]
    """``hidden[index] @ weight.T + bias`` in fp32."""
    acc = wide(hidden.dtype)
    bias = bias.to(acc) if bias is not None else None
    return torch.nn.functional.linear(hidden[index].to(acc), weight.to(acc), bias)


def reward_head_backward(
    grad: Tensor,  # fp32 [B, L]
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # hidden [M, H], weight [L, H], bias [L] (fp32)
    """Gradients of :func:`reward_head`; rows picked twice get the sum."""
    acc = wide(hidden.dtype)
    grad = grad.to(acc)
    grad_hidden = torch.zeros(hidden.shape, dtype=acc, device=hidden.device)
    grad_hidden.index_add_(0, index, grad @ weight.to(acc))
    grad_weight = grad.mT @ hidden[index].to(acc)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad.sum(0)


# --- attention under the trie


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


def attend(
    query: Tensor,  # [1, Hq, M, D]
    key: Tensor,  # [1, Hk, L, D]
    value: Tensor,  # [1, Hk, L, Dv]
    allowed: Tensor,  # bool [M, L]
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq], one more logit per head that takes weight and gives none
    dropout: float = 0.0,
) -> Tensor:  # [1, Hq, M, Dv]
    """Softmax attention with grouped heads, soft-capped logits and attention sinks, written out.

    Soft cap: Gemma 2, arXiv 2408.00118, section 2. Sinks: gpt-oss, arXiv 2508.10925.
    """
    groups = query.shape[1] // key.shape[1]
    acc = wide(query.dtype)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = torch.matmul(query.to(acc), key.to(acc).mT) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc)[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights.to(value.dtype), value)


def attend_backward(
    grad: Tensor,  # [1, Hq, M, Dv]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`attend` without dropout; the weights are computed again."""
    acc = wide(query.dtype)
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    q, k, v, g = (x.to(acc) for x in (query, key, value, grad))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    logits = torch.matmul(q, k.mT) * scale
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits = tanh * softcap
    logits = logits.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.to(acc)[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    grad_weights = torch.matmul(g, v.mT)
    rest = weights[..., k.shape[2] :]  # of the sink, whose value is zero
    weights = weights[..., : k.shape[2]]
    mean = (weights * grad_weights).sum(-1, keepdim=True)
    grad_logits = weights * (grad_weights - mean)
    if softcap is not None:
        grad_logits = grad_logits * (1 - tanh * tanh)
    grad_q = torch.matmul(grad_logits, k) * scale
    grad_k, grad_v = (
        torch.matmul(grad_logits.mT, q) * scale,
        torch.matmul(weights.mT, g),
    )
    grad_k, grad_v = (x.unflatten(1, (kv_heads, groups)).sum(2) for x in (grad_k, grad_v))
    grad_sinks = None if sinks is None else -(rest * mean).sum((0, 2, 3))
    return grad_q, grad_k, grad_v, grad_sinks


class Tile(NamedTuple):
    """Some queries and all the keys that any of them may see."""

    queries: slice  # of the query tensor
    keys: slice | Tensor  # of the packed keys
    allowed: Tensor | None  # bool [M, L]; None: a causal square


_tiles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def tiles(
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,  # int64 [M], rising packed indices; None: every node
    window: int | None,
) -> list[Tile]:
    """Cut the work so that each tile is one dense attention call. Cached by ``subtree_end``."""
    if queries is not None:
        return _cut(subtree_end, position_ids, queries, window)
    cache = _tiles.setdefault(subtree_end, {})
    if window not in cache:
        cache[window] = _cut(subtree_end, position_ids, None, window)
    return cache[window]


def _cut(
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,
    window: int | None,
) -> list[Tile]:
    end = subtree_end.cpu().numpy()
    position = position_ids.cpu().numpy()
    nodes = np.arange(end.size) if queries is None else queries.cpu().numpy()
    if queries is None:
        bounds = _bounds(end)
    else:
        bounds = [(a, min(a + _POOLED, nodes.size)) for a in range(0, nodes.size, _POOLED)]
    out = []
    for start, stop in bounds:
        q = nodes[start:stop]
        first, last = int(q[0]), int(q[-1])
        if last - first + 1 == q.size:  # ancestors of the first, then the queries themselves
            keys = np.concatenate([np.flatnonzero(end[:first] > first), q])
        else:
            keys = np.arange(last + 1)
        allowed = (keys <= q[:, None]) & (q[:, None] < end[keys])
        if window is not None:
            allowed &= position[q][:, None] - position[keys] < window
        needed = allowed.any(axis=0)
        keys, allowed = keys[needed], allowed[:, needed]
        causal = keys.size == q.size and np.array_equal(allowed, np.tri(q.size, dtype=bool))
        dense = keys[-1] - keys[0] + 1 == keys.size
        device = subtree_end.device
        out.append(
            Tile(
                slice(start, stop),
                slice(int(keys[0]), int(keys[-1]) + 1)
                if dense
                else torch.from_numpy(keys).to(device),
                None if causal else torch.from_numpy(np.ascontiguousarray(allowed)).to(device),
            )
        )
    return out


def _bounds(end: np.ndarray) -> list[tuple[int, int]]:
    """Packed ranges, one a tile: whole rows of the trie, short ones joined, long ones cut."""
    leaf = np.flatnonzero(end == np.arange(1, end.size + 1))
    out: list[tuple[int, int]] = []
    start = 0
    for stop in (leaf + 1).tolist():
        joined = bool(out) and stop - out[-1][0] <= _SHORT
        if joined:
            out[-1] = (out[-1][0], stop)
        elif start == 0 or (end[:start] <= start).all():  # a root: torch skips above the diagonal
            out.append((start, stop))
        else:
            cuts = [*range(start, stop, _LONG), stop]
            out.extend(itertools.pairwise(cuts))
        start = stop
    return out


def _bias(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def _is_plain(query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether torch's own CPU kernel computes it."""
    same_width = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and same_width and softcap is None and sinks is None


def tokens_first(like: Tensor, dtype: torch.dtype) -> Tensor:  # [1, heads, tokens, width]
    """An empty tensor of this shape, a token's heads side by side in memory."""
    _, heads, tokens, width = like.shape
    return like.new_empty(1, tokens, heads, width, dtype=dtype).transpose(1, 2)


def trie_attention(
    query: Tensor,  # [1, Hq, M, D]
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    queries: Tensor | None,  # int64 [M], rising packed indices of the queries; None: all, M == N
    sinks: Tensor | None,  # [Hq]
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [1, M, Hq, Dv], log-sum-exp fp32 [1, Hq, M]
    """Attention under ``k <= q < subtree_end[k]``, tile by tile: no tensor has N x N elements."""
    _, heads, rows, _ = query.shape
    out = query.new_empty(1, rows, heads, value.shape[-1])
    lse = query.new_zeros(1, heads, rows, dtype=wide(query.dtype))  # read by torch's kernel alone
    plain = _is_plain(query, value, softcap, sinks)
    for tile in tiles(subtree_end, position_ids, queries, window):
        q, k, v = (
            query[:, :, tile.queries],
            key[:, :, tile.keys],
            value[:, :, tile.keys],
        )
        if plain:
            bias = _bias(tile.allowed, q.dtype)
            o, lse[:, :, tile.queries] = _flash(
                q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale
            )
        else:
            o = attend(q, k, v, dense(tile, q), scale, softcap, sinks)
        out[:, tile.queries] = o.transpose(1, 2)
    return out, lse


def trie_attention_backward(
    grad: Tensor,  # [1, M, Hq, Dv]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # query, key, value, sinks
    """Gradients of :func:`trie_attention`; a shared token's are summed in fp32."""
    acc = wide(query.dtype)
    grad_q = torch.empty_like(query)
    grad_k, grad_v = (
        torch.zeros_like(key, dtype=acc),
        torch.zeros_like(value, dtype=acc),
    )
    grad_s = torch.zeros_like(sinks, dtype=acc) if sinks is not None else None
    plain = _is_plain(query, value, softcap, sinks)
    for tile in tiles(subtree_end, position_ids, queries, window):
        q, k, v = (
            query[:, :, tile.queries],
            key[:, :, tile.keys],
            value[:, :, tile.keys],
        )
        g = grad[:, tile.queries].transpose(1, 2)
        if plain:
            bias = _bias(tile.allowed, q.dtype)
            o, total = out[:, tile.queries].transpose(1, 2), lse[:, :, tile.queries]
            gq, gk, gv = _flash_backward(
                g, q, k, v, o, total, 0.0, bias is None, attn_mask=bias, scale=scale
            )
        else:
            gq, gk, gv, gs = attend_backward(g, q, k, v, dense(tile, q), scale, softcap, sinks)
            if gs is not None:
                grad_s += gs
        grad_q[:, :, tile.queries] = gq
        if isinstance(tile.keys, slice):
            grad_k[:, :, tile.keys] += gk
            grad_v[:, :, tile.keys] += gv
        else:
            grad_k.index_add_(2, tile.keys, gk.to(acc))
            grad_v.index_add_(2, tile.keys, gv.to(acc))
    if grad_s is not None:
        grad_s = grad_s.to(sinks.dtype)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype), grad_s


def dense(tile: Tile, query: Tensor) -> Tensor:  # bool [M, L]
    """The tile's mask, written out where it is a causal square."""
    if tile.allowed is not None:
        return tile.allowed
    rows = query.shape[2]
    return torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril_()
