"""Attention over a packed trie by other people's kernels: FlexAttention and flash-attn.

Both do what :func:`rmfast.ops.trie_attention` does, with the autograd of their own library: a check
on our kernel, and a way out should it fail on some chip. flash-attn was **not yet run on a GPU.**
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmfast import ops, reference

BACKENDS = ("triton", "sdpa", "flex", "flash")


def why_not(name: str) -> str | None:
    """Why this installation has no backend ``name``; None: it has, or ``name`` is ``"auto"``."""
    if name != "auto" and name not in BACKENDS:
        return f"attention must be one of {('auto', *BACKENDS)}, got {name!r}"
    package = {"triton": "triton", "flash": "flash_attn"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"attention={name!r} needs a package: pip install {package.replace('_', '-')}"
    return None


def trie_attention(
    backend: str,
    query: Tensor,  # [1, Hq, M, D]
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    plan: ops.TriePlan,
    *,
    sinks: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # [1, M, Hq, Dv]
    """:func:`rmfast.ops.trie_attention` by a backend of this module."""
    rule = {"sinks": sinks, "scale": scale, "window": window, "softcap": softcap}
    if backend == "flex":
        return _flex(query, key, value, plan, **rule)
    if backend == "flash":
        return _flash(query, key, value, plan, **rule)
    return ops.trie_attention(query, key, value, plan, backend=backend, **rule)


# --- FlexAttention


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


_BLOCK = 128  # queries, and nodes, that FlexAttention looks up together


def _block_mask(plan: ops.TriePlan, window: int | None) -> Any:
    """The mask from the extrema of blocks: create_block_mask tests all pairs of nodes."""
    from torch.nn.attention.flex_attention import BlockMask

    end, position, row = plan.tensors
    nodes = torch.arange(len(end), device=plan.device)
    row = nodes[plan.first :] if row is None else row

    def seen(batch, head, q, k):
        allowed = (k <= row[q]) & (row[q] < end[k])
        if window is not None:
            allowed = allowed & (position[row[q]] - position[k] < window)
        return allowed

    (first, last), (key, last_key), ends = _extrema(row), _extrema(nodes), _extrema(end)
    first, last = first[:, None], last[:, None]
    some = (key <= last) & (first < ends.max)
    full = (last_key <= first) & (last < ends.min)
    if window is not None:
        of_row, of_key = _extrema(position[row]), _extrema(position)
        some &= of_row.min[:, None] - of_key.max < window
        full &= of_row.max[:, None] - of_key.min < window
    full &= _whole(row)[:, None] & _whole(nodes)  # as create_block_mask has it
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=seen,
        seq_lengths=(row.shape[0], nodes.shape[0]),
    )  # fmt: skip


def _extrema(x: Tensor) -> torch.return_types.aminmax:  # int [n] -> [blocks], [blocks]
    last = x.shape[0] - 1
    place = torch.arange(-(-x.shape[0] // _BLOCK) * _BLOCK, device=x.device).clamp(max=last)
    return x[place.view(-1, _BLOCK)].aminmax(dim=1)


def _whole(x: Tensor) -> Tensor:  # [n] -> bool [blocks]
    return torch.arange(_BLOCK, x.shape[0] + _BLOCK, _BLOCK, device=x.device) <= x.shape[0]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:  # bool [Q, K] -> int32 [1, 1, Q], [.., Q, K]
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]


def _flex(query, key, value, plan, *, sinks, scale, window, softcap) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    cap = None
    if softcap is not None:
        limit = torch.full((), softcap, device=query.device)  # a float breaks the graph

        def cap(score, batch, head, q, k):
            return limit * torch.tanh(score / limit)

    run = _compiled_flex() if query.is_cuda else flex_attention
    out, aux = run(
        query, key, value, score_mod=cap, scale=scale, enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        block_mask=plan.once(("flex", window), lambda: _block_mask(plan, window)),
    )  # fmt: skip
    if sinks is not None:  # one more logit in the denominator
        kept = torch.sigmoid(aux.lse - sinks[None, :, None].to(aux.lse.dtype))
        out = out * kept[..., None].to(out.dtype)
    return out.transpose(1, 2)


# --- flash-attn


class Varlen(NamedTuple):
    """The trie as sequences: each row's new tokens are queries, its whole path the keys."""

    keys: Tensor  # int64 [sum of the paths' lengths], packed indices, path after path
    cu_seqlens_q: Tensor  # int32 [rows + 1]
    cu_seqlens_k: Tensor  # int32 [rows + 1]
    max_seqlen_q: int
    max_seqlen_k: int


def varlen(plan: ops.TriePlan) -> Varlen:
    """Rows in preorder; with queries each of them is a row of its own."""
    end, queries, first = plan.subtree_end.cpu().numpy(), plan.queries, plan.first
    if queries is None:  # a new row begins where a node is not the child of the one before it
        stray = end[first:-1] <= np.arange(first + 1, end.size)
        starts = first + np.flatnonzero(np.r_[True, stray])
        last = np.r_[starts[1:], end.size] - 1
    else:
        starts = last = queries.cpu().numpy()
    paths = [np.flatnonzero(end[: node + 1] > node) for node in last]
    lengths = np.array([path.size for path in paths])
    new = last - starts + 1
    arrays = (
        np.concatenate(paths),
        *(np.r_[0, x.cumsum()].astype(np.int32) for x in (new, lengths)),
    )
    on = [torch.from_numpy(a).to(plan.device) for a in arrays]
    return Varlen(*on, int(new.max()), int(lengths.max()))


def _flash(query, key, value, plan, *, sinks, scale, window, softcap) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    if sinks is not None:
        raise ValueError(
            "attention='flash' knows no attention sinks: patch with 'triton' or 'sdpa'"
        )
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention='flash' knows fp16 and bf16, not {query.dtype}: use 'triton'")
    rows = plan.once("flash", lambda: varlen(plan))

    def along(x: Tensor) -> Tensor:  # [1, Hk, N, D] -> [keys, Hk, D]
        # gathered in fp32, so that the gradients of a shared token are summed in fp32
        x = x[0].transpose(0, 1).to(reference.wide(x.dtype))
        return x.index_select(0, rows.keys).to(query.dtype)

    out = flash_attn_varlen_func(
        query[0].transpose(0, 1), along(key), along(value), *rows[1:],
        softmax_scale=scale, causal=True, softcap=softcap or 0.0,
        # a path holds its positions one after the other: the window is that of any sequence
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return out[None]
