"""Attention over a trie in torch's own operations: dense calls on tiles of queries.

Sums run in fp32 (fp64 for fp64 inputs). :func:`rmfast.reference.trie_attention` specifies it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmfast.reference.head import wide

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_TILE = 32  # packed queries in a tile; twice as many where they see many keys
_MANY = 512  # keys
_POOLED = 16  # pooled queries in a tile: they lie far apart, so few share keys
_BUNDLE = 1 << 16  # queries x keys in a bundle, padding included
_EVEN = 0.75  # shortest to longest tile of a bundle


def attend(
    query: Tensor,  # [G, Hq, M, D]
    key: Tensor,  # [G, Hk, L, D]
    value: Tensor,  # [G, Hk, L, Dv]
    bias: Tensor,  # [G, 1, M, L], -inf where the query may not see the key, else 0
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq], one more logit per head that takes weight and gives none
    dropout: float = 0.0,
    once: bool = False,  # bf16: round the weights, and no more than that; else undo it
) -> Tensor:  # [G, Hq, M, Dv]
    """Softmax attention with grouped heads, soft-capped logits and attention sinks, written out.

    Soft cap: Gemma 2, arXiv 2408.00118, section 2. Sinks: gpt-oss, arXiv 2508.10925.
    """
    weights, _, sink = _weights(query, key, bias, scale, softcap, sinks)
    weights = weights.to(value.dtype if _in_two(value) else weights.dtype)
    shape = (*query.shape[:3], value.shape[-1])
    if once and _in_two(value):
        out = torch.bmm(_fold(weights, key.shape[1]), value.flatten(0, 1))
        return out.view(shape)
    total = weights.sum(-1, keepdim=True, dtype=wide(value.dtype)) if sink is None else 1.0
    weights = torch.nn.functional.dropout(weights, dropout)
    out = _product(_fold(weights, key.shape[1]), value.flatten(0, 1).to(weights.dtype))
    return (out.view(shape) / total).to(value.dtype)  # what weights lost when they were rounded


def attend_backward(
    grad: Tensor,  # [G, Hq, M, Dv]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`attend` without dropout; the weights are computed again."""
    kv_heads = key.shape[1]
    weights, tanh, sink = _weights(query, key, bias, scale, softcap, sinks)
    q, g = _fold(query, kv_heads), _fold(grad, kv_heads)
    k, v = key.flatten(0, 1), value.flatten(0, 1)
    grad_v = torch.bmm(_fold(weights, kv_heads).to(v.dtype).mT, g)
    grad_logits = _product(g, v.mT).view(weights.shape)
    mean = (weights * grad_logits).sum(-1, keepdim=True)
    grad_logits = grad_logits.sub_(mean).mul_(weights)
    if tanh is not None:
        grad_logits *= 1 - tanh * tanh
    grad_logits = _fold(grad_logits.mul_(scale), kv_heads).to(q.dtype)
    grad_q = torch.bmm(grad_logits, k).view(query.shape)
    grad_k = torch.bmm(grad_logits.mT, q).view(key.shape)
    grad_sinks = None if sinks is None else -(sink * mean).sum((0, 2, 3))
    return grad_q, grad_k, grad_v.view(value.shape), grad_sinks


def _fold(x: Tensor, kv_heads: int) -> Tensor:  # [G, Hq, M, D] -> [G * Hk, Hq / Hk * M, D]
    """Stack the query heads that share a key head, so that no key is repeated."""
    groups = x.shape[1] // kv_heads
    return x.reshape(x.shape[0] * kv_heads, groups * x.shape[2], x.shape[3])


def _in_two(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _product(left: Tensor, right: Tensor) -> Tensor:  # [B, M, K], [B, K, L] -> wide [B, M, L]
    """``left @ right``, not rounded to bf16.

    A product in bf16 adds up in fp32 and rounds at the end. A second one finds what the first
    rounded away, to 18 bits in all: on a CPU that knows bf16 quicker than one in fp32.
    """
    acc = wide(left.dtype)
    if not _in_two(left):
        return torch.bmm(left.to(acc), right.to(acc))
    first = torch.bmm(left, right)
    return first.to(acc).add_(torch.baddbmm(first, left, right, beta=-1))


def _weights(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax weights [G, Hq, M, L] in fp32; tanh of the capped logits; the sink's weights."""
    logits = _product(_fold(query, key.shape[1]), key.flatten(0, 1).mT)
    logits = logits.view(*query.shape[:3], key.shape[2])
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(logits * (scale / softcap))
        logits, scale = tanh, softcap
    logits = torch.add(bias, logits, alpha=scale)
    if sinks is None:
        return torch.softmax(logits, dim=-1), tanh, None
    sink = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
    weights = torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)
    return weights[..., :-1], tanh, weights[..., -1:]


class Bundle(NamedTuple):
    """Tiles of about the same size, padded: one dense attention call."""

    queries: Tensor  # int64 [G, M], rows of the query tensor; a short tile repeats its last
    keys: Tensor  # int64 [G, L], packed indices; a short tile repeats its last
    hidden: Tensor  # bool [G, 1, M, L]
    repeats: Tensor | None  # bool [G, 1, M, 1], True for repeated queries; None: there are none
    made: dict[Any, Tensor]  # what the layers of a batch ask for again and again

    def bias(self, dtype: torch.dtype) -> Tensor:  # [G, 1, M, L]
        """``hidden`` as what is added to the logits."""
        if dtype not in self.made:
            zero = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            self.made[dtype] = zero.masked_fill_(self.hidden, float("-inf"))
        return self.made[dtype]

    def rows(self, of: str, x: Vectors) -> Tensor:  # int64 [G * H * M]
        """The rows of ``x`` that belong to the "queries" or to the "keys", heads outside."""
        key = (of, x.heads, x.steps)
        if key not in self.made:
            index: Tensor = getattr(self, of)
            head = torch.arange(x.heads, device=index.device)[:, None]
            self.made[key] = (head * x.steps[0] + index[:, None] * x.steps[1]).flatten()
        return self.made[key]

    def pick(self, of: str, x: Vectors) -> Tensor:  # [G, H, M, D]
        shape = (len(self.queries), x.heads, -1, x.rows.shape[1])
        return x.rows.index_select(0, self.rows(of, x)).view(shape)


class Vectors:
    """A tensor [1, H, N, D] as rows of D numbers, in the order in which they lie in memory."""

    def __init__(self, x: Tensor) -> None:
        self.heads, nodes = x.shape[1:3]
        by_token = x.stride(1) < x.stride(2)
        self.steps = (1, self.heads) if by_token else (nodes, 1)  # to the next head, node
        self.rows = (x[0].transpose(0, 1) if by_token else x[0]).flatten(0, 1)


def bundles(
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,  # int64 [M], rising packed indices; None: the last ``rows`` nodes
    rows: int,
    window: int | None,
    made: dict | None = None,  # bundles of this batch, for other layers
) -> list[Bundle]:
    """Cut the work into dense attention calls."""
    if made is None:
        return _bundles(subtree_end, position_ids, queries, rows, window)
    if ("bundles", window) not in made:
        made["bundles", window] = _bundles(subtree_end, position_ids, queries, rows, window)
    return made["bundles", window]


def _bundles(
    subtree_end: Tensor, position_ids: Tensor, queries: Tensor | None, rows: int,
    window: int | None,
) -> list[Bundle]:  # fmt: skip
    end, position = subtree_end.cpu().numpy(), position_ids.cpu().numpy()
    nodes = np.arange(end.size)[-rows:] if queries is None else queries.cpu().numpy()
    if (np.diff(nodes) <= 0).any():
        raise ValueError("queries must rise: sort them, without repeats")
    size = _TILE if nodes[-1] - nodes[0] + 1 == nodes.size else _POOLED
    tiles, start = [], 0
    while start < nodes.size:
        first = int(nodes[start])
        path = np.flatnonzero(end[:first] > first)
        count = 2 * size if size == _TILE and path.size >= _MANY else size
        q = nodes[start : start + count]
        rows, last, start = np.arange(start, start + q.size), int(q[-1]), start + q.size
        together = last - first + 1 == q.size  # they see what the first one sees, and themselves
        keys = np.concatenate([path, q]) if together else np.arange(last + 1)
        allowed = (keys <= q[:, None]) & (q[:, None] < end[keys])
        if window is not None:
            allowed &= position[q][:, None] - position[keys] < window
        needed = allowed.any(axis=0)
        tiles.append((rows, keys[needed], allowed[:, needed]))
    tiles.sort(key=lambda tile: tile[1].size)
    out, group = [], [tiles.pop()]
    longest = group[0][1].size
    while tiles:
        tile = tiles.pop()
        full = (len(group) + 1) * group[0][0].size * longest > _BUNDLE
        if full or tile[1].size < _EVEN * longest:
            out.append(_bundle(group, subtree_end.device))
            group, longest = [], tile[1].size
        group.append(tile)
    return [*out, _bundle(group, subtree_end.device)]


def _bundle(tiles: list[tuple[np.ndarray, ...]], device: torch.device) -> Bundle:
    rows = max(tile[0].size for tile in tiles)
    width = max(tile[1].size for tile in tiles)
    queries = np.empty((len(tiles), rows), np.int64)
    keys = np.empty((len(tiles), width), np.int64)
    hidden = np.ones((len(tiles), 1, rows, width), bool)
    repeats = np.zeros((len(tiles), 1, rows, 1), bool)
    for i, (q, k, allowed) in enumerate(tiles):
        queries[i], keys[i] = q[-1], k[-1]
        queries[i, : q.size], keys[i, : k.size] = q, k
        hidden[i, 0, : q.size, : k.size] = ~allowed
        hidden[i, 0, q.size :, : k.size] = ~allowed[-1]
        repeats[i, 0, q.size :] = True
    arrays = (queries, keys, hidden, repeats if repeats.any() else None)
    return Bundle(*(a if a is None else torch.from_numpy(a).to(device) for a in arrays), {})


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
    queries: Tensor | None,  # int64 [M], rising packed indices; None: the last M nodes
    sinks: Tensor | None,  # [Hq]
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float = 0.0,
    made: dict | None = None,
    once: bool = False,  # as in attend
) -> Tensor:  # [1, M, Hq, Dv]
    """Attention under ``k <= q < subtree_end[k]``: no tensor has N x N elements."""
    _, heads, count, width = query.shape
    out = query.new_empty(1, count, heads, value.shape[-1])
    # torch's own kernel where it is faster than writing it out
    special = dropout or softcap is not None or sinks is not None or width != value.shape[-1]
    torchs = query.device.type == "cpu" and query.dtype != torch.bfloat16 and not special
    outs, queries_, keys, values = map(Vectors, (out.transpose(1, 2), query, key, value))
    for b in bundles(subtree_end, position_ids, queries, query.shape[2], window, made):
        q, k, v = b.pick("queries", queries_), b.pick("keys", keys), b.pick("keys", values)
        if torchs:
            part, _ = _flash(q, k, v, 0.0, False, attn_mask=b.bias(q.dtype), scale=scale)
        else:
            part = attend(q, k, v, b.bias(wide(q.dtype)), scale, softcap, sinks, dropout, once)
        rows, part = b.rows("queries", outs), part.flatten(0, 2)
        if dropout and b.repeats is not None:  # they drew noise of their own
            keep = ~b.repeats.expand(*q.shape[:3], 1).flatten()
            rows, part = rows[keep], part[keep]
        outs.rows.index_copy_(0, rows, part)
    return out


def trie_attention_backward(
    grad: Tensor,  # [1, M, Hq, Dv]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    subtree_end: Tensor,
    position_ids: Tensor,
    queries: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    made: dict | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # query, key, value, sinks
    """Gradients of :func:`trie_attention`; a shared token's are summed in fp32."""
    acc = wide(query.dtype)
    grad_q = tokens_first(query, query.dtype)
    grad_k, grad_v = tokens_first(key, acc).zero_(), tokens_first(value, acc).zero_()
    grad_s = None if sinks is None else torch.zeros_like(sinks, dtype=acc)
    grads_q, grads_k, grads_v = map(Vectors, (grad_q, grad_k, grad_v))
    grads, queries_, keys, values = map(Vectors, (grad.transpose(1, 2), query, key, value))
    for b in bundles(subtree_end, position_ids, queries, query.shape[2], window, made):
        q, k, v = b.pick("queries", queries_), b.pick("keys", keys), b.pick("keys", values)
        g = b.pick("queries", grads)
        if b.repeats is not None:
            g = g.masked_fill_(b.repeats, 0.0)
        bias = b.bias(wide(q.dtype))
        gq, gk, gv, gs = attend_backward(g, q, k, v, bias, scale, softcap, sinks)
        rows, gq = b.rows("queries", grads_q), gq.flatten(0, 2)
        if b.repeats is not None:
            keep = ~b.repeats.expand(*q.shape[:3], 1).flatten()
            rows, gq = rows[keep], gq[keep]
        grads_q.rows.index_copy_(0, rows, gq)
        for total, part in ((grads_k, gk), (grads_v, gv)):
            total.rows.index_add_(0, b.rows("keys", total), part.flatten(0, 2).to(acc))
        if gs is not None:
            grad_s += gs
    grad_s = None if grad_s is None else grad_s.to(sinks.dtype)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype), grad_s
