"""Flash attention over a packed trie: query ``q`` sees key ``k`` iff ``k <= q < subtree_end[k]``.

The mask is an interval per key, so it is known tile by tile before anything is multiplied:
:func:`rmfast.kernels.trie_plan.plan` lists for a tile of queries the blocks of keys in which some
pair is allowed, those in which all are first. A block that is not listed costs nothing, a full one
runs without a mask.

Forward: one launch; a program per query tile and head, online softmax in base 2 (Dao, 2023, arXiv
2307.08691). Backward: three launches; ``dQ`` by query tile, then ``dK`` and ``dV`` by key block
over the query heads that share it. A block that far more tiles see than others, as they see a first
token common to all, is cut among several programs; the third launch adds their sums in order. All
sums are fp32, without atomics: the same bits in every run.

The queries are the last M nodes, or those that are given (``queries``, rising packed indices): then
key ``k`` is seen by the rows between those indices' insertion points of ``k`` and
``subtree_end[k]``, an interval again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels import chips, trie_plan
from rmfast.kernels.trie_plan import Rule

_LOG2E = tl.constexpr(math.log2(math.e))


# --- configurations


class Config(NamedTuple):
    rows: int  # queries in a tile
    nodes: int  # keys in a block
    warps: int
    stages: int


# by chip and padded head_dim, 16-bit inputs: forward, dQ, dK and dV
_TABLE: dict[tuple[str, int], tuple[Config, Config, Config]] = {
    ("sm_80", 64): (Config(128, 32, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 2)),
    ("sm_80", 128): (Config(128, 32, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_80", 256): (Config(32, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    ("sm_90", 64): (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 128, 8, 2)),
    ("sm_90", 128): (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(32, 128, 8, 2)),
    ("sm_90", 256): (Config(64, 32, 8, 2), Config(64, 16, 8, 2), Config(32, 32, 8, 2)),
    ("sm_100", 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("sm_100", 128): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_100", 256): (Config(128, 32, 8, 2), Config(64, 16, 8, 2), Config(32, 32, 8, 2)),
    ("sm_120", 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 2)),
    ("sm_120", 128): (Config(128, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_120", 256): (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 2)),
    ("gfx942", 64): (Config(128, 64, 4, 1), Config(128, 64, 8, 1), Config(32, 64, 4, 1)),
    ("gfx942", 128): (Config(128, 64, 8, 1), Config(64, 64, 4, 1), Config(32, 64, 8, 1)),
    ("gfx942", 256): (Config(64, 32, 8, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    ("gfx950", 64): (Config(128, 64, 4, 1), Config(128, 64, 8, 1), Config(64, 64, 4, 1)),
    ("gfx950", 128): (Config(128, 64, 8, 1), Config(64, 32, 4, 1), Config(32, 128, 4, 1)),
    ("gfx950", 256): (Config(64, 32, 8, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
}
# with a window, where its positions leave too few registers for the row above
_WINDOWED: dict[tuple[str, int], tuple[Config, Config, Config]] = {
    ("sm_80", 64): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("sm_90", 64): (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(32, 128, 8, 2)),
    ("sm_90", 128): (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_120", 64): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("gfx942", 128): (Config(128, 64, 8, 1), Config(64, 64, 4, 1), Config(16, 64, 4, 1)),
}
# any chip, by padded head_dim: without tensor cores the operands are in registers
_FP32: dict[int, tuple[Config, Config, Config]] = {
    64: (Config(16, 16, 4, 1), Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    128: (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


_tuned: dict[tuple, Config] = {}  # what tune() found


def _config(
    kernel: str, like: Tensor, width: int, pooled: bool, capped: bool, windowed: bool = False
) -> Config:
    """Tile sizes for ``forward``, ``dq`` or ``dkv`` at padded head_dim ``width``."""
    tuned = _tuned.get((kernel, like.device, like.dtype, width, pooled, capped, windowed))
    if tuned is not None:
        return tuned
    if like.dtype == torch.float32:
        row = _FP32[max(width, 64)]
    else:  # a soft cap keeps one matrix more: the smallest tiles
        key = chips.chip(like.device), 256 if capped else max(width, 64)
        row = _WINDOWED.get(key, _TABLE[key]) if windowed else _TABLE[key]
    found = row[("forward", "dq", "dkv").index(kernel)]
    return found._replace(rows=16) if pooled else found


# --- kernels


@triton.jit
def _listed(tiles, i, SIZE: tl.constexpr):
    """First row of the tile, or node of the block, that comes ``i``-th: ``tiles`` points at it."""
    return tl.load(tiles) * SIZE


@triton.jit
def _load(
    x, head, begin, rows, stride_head, stride_row, stride_col,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``x[head, begin : begin + SIZE]``, [SIZE, BLOCK]; zeros past the end."""
    row, col = tl.arange(0, SIZE), tl.arange(0, BLOCK)
    x += head.to(tl.int64) * stride_head + begin.to(tl.int64) * stride_row
    where = x + row[:, None] * stride_row + col[None, :] * stride_col
    if MASKED:
        inside = (begin + row < rows)[:, None]
        if WIDTH != BLOCK:
            inside = inside & (col < WIDTH)[None, :]
        return tl.load(where, mask=inside, other=0.0).to(DOT)
    elif WIDTH != BLOCK:
        return tl.load(where, mask=(col < WIDTH)[None, :], other=0.0).to(DOT)
    else:
        return tl.load(where).to(DOT)


@triton.jit
def _store(
    x, values, head, begin, rows, stride_head, stride_row,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col = tl.arange(0, SIZE), tl.arange(0, BLOCK)
    x += head.to(tl.int64) * stride_head + begin.to(tl.int64) * stride_row
    inside = (begin + row < rows)[:, None]
    if WIDTH != BLOCK:
        inside = inside & (col < WIDTH)[None, :]
    where = x + row[:, None] * stride_row + col[None, :]
    tl.store(where, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _seen(
    row, node, first, last, row_position, node_position, rows, nodes, window,
    POOLED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Whether ``row`` may see ``node``; one is a column, the other a row."""
    there = node < nodes
    if POOLED:
        begin, place, places = tl.load(first + node, mask=there, other=0), row, rows
    else:  # rows are the last nodes
        begin, place, places = node, row + (nodes - rows), nodes
    seen = (begin <= place) & (place < tl.load(last + node, mask=there, other=0))
    if WINDOW:
        at = tl.load(row_position + place, mask=place < places, other=0)
        seen &= at - tl.load(node_position + node, mask=there, other=0) < window
    return seen


@triton.jit
def _logits(products, scale, softcap, CAPPED: tl.constexpr):
    """``x`` and ``factor``, whose product is the base-2 logits; and the slope of the soft cap."""
    if CAPPED:
        grown = tl.exp2(products * (2 * scale / softcap * _LOG2E))
        tanh = 1 - 2 / (grown + 1)
        return tanh, softcap * _LOG2E, 1 - tanh * tanh
    else:  # the compiler wants to see that nothing follows
        return products, scale * _LOG2E, 1.0


@triton.jit
def _forward_tiles(
    total, denominator, highest, q, key, value, kv_head, begin_row,
    first, last, row_position, node_position, blocks, start, stop,
    rows, nodes, window, scale, softcap,
    k_head, k_row, k_col, v_head, v_row, v_col,
    MASKED: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks += start
    begin = _listed(blocks, start, N)
    for i in range(start, stop):
        blocks += 1
        after = _listed(blocks, i + 1, N)
        k = _load(key, kv_head, begin, nodes, k_head, k_row, k_col, N, WIDTH, D, MASKED, DOT)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x, factor, _ = _logits(products, scale, softcap, CAPPED)
        if MASKED:
            row = (begin_row + tl.arange(0, M))[:, None]
            node = (begin + tl.arange(0, N))[None, :]
            seen = _seen(
                row, node, first, last, row_position, node_position, rows, nodes, window,
                POOLED, WINDOW,
            )  # fmt: skip
            x = tl.where(seen, x, float("-inf"))
        new = tl.maximum(highest, tl.max(x, 1) * factor)
        weights = tl.exp2(x * factor - new[:, None])
        shrink = tl.exp2(highest - new)
        denominator = denominator * shrink + tl.sum(weights, 1)
        v = _load(value, kv_head, begin, nodes, v_head, v_row, v_col, N, V_WIDTH, DV, MASKED, DOT)
        total = tl.dot(weights.to(DOT), v, total * shrink[:, None], input_precision=PRECISION)
        highest = new
        begin = after
    return total, denominator, highest


@triton.jit(do_not_specialize=["rows", "nodes", "listed", "window"])
def _forward_kernel(
    query, key, value, out, lse, sinks,
    first, last, row_position, node_position, blocks, counts,
    rows, nodes, listed, window, scale, softcap,
    q_head, q_row, q_col, k_head, k_row, k_col, v_head, v_row, v_col, out_head, out_row, lse_head,
    GROUP: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, KEEP: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the later, the longer: those go first
    head = tl.program_id(1)
    kv_head = head // GROUP
    begin = tile * M
    q = _load(query, head, begin, rows, q_head, q_row, q_col, M, WIDTH, D, True, DOT)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        highest = tl.zeros([M], tl.float32) + tl.maximum(sink, -1e30)
        denominator = tl.exp2(sink - highest)
    else:
        highest = tl.zeros([M], tl.float32) - 1e30  # finite: no NaN where a tile is all hidden
        denominator = tl.zeros([M], tl.float32)
    total = tl.zeros([M, DV], tl.float32)
    full, stop = tl.load(counts + 2 * tile), tl.load(counts + 2 * tile + 1)
    blocks += tile.to(tl.int64) * listed
    total, denominator, highest = _forward_tiles(
        total, denominator, highest, q, key, value, kv_head, begin,
        first, last, row_position, node_position, blocks, 0, full,
        rows, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        False, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    total, denominator, highest = _forward_tiles(
        total, denominator, highest, q, key, value, kv_head, begin,
        first, last, row_position, node_position, blocks, full, stop,
        rows, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        True, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    row = begin + tl.arange(0, M)
    denominator = tl.where(row < rows, denominator, 1.0)  # past the end nothing was seen
    total = total / denominator[:, None]
    _store(out, total, head, begin, rows, out_head, out_row, M, V_WIDTH, DV)
    if KEEP:
        where = lse + head.to(tl.int64) * lse_head + row
        tl.store(where, highest + tl.log2(denominator), mask=row < lse_head)


@triton.jit
def _dq_tiles(
    total, q, grad, lse, delta, key, value, kv_head, begin_row,
    first, last, row_position, node_position, blocks, start, stop,
    rows, nodes, window, scale, softcap,
    k_head, k_row, k_col, v_head, v_row, v_col,
    MASKED: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks += start
    begin = _listed(blocks, start, N)
    for i in range(start, stop):
        blocks += 1
        after = _listed(blocks, i + 1, N)
        k = _load(key, kv_head, begin, nodes, k_head, k_row, k_col, N, WIDTH, D, MASKED, DOT)
        v = _load(value, kv_head, begin, nodes, v_head, v_row, v_col, N, V_WIDTH, DV, MASKED, DOT)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x, factor, slope = _logits(products, scale, softcap, CAPPED)
        weights = tl.exp2(x * factor - lse[:, None])
        if MASKED:
            row = (begin_row + tl.arange(0, M))[:, None]
            node = (begin + tl.arange(0, N))[None, :]
            seen = _seen(
                row, node, first, last, row_position, node_position, rows, nodes, window,
                POOLED, WINDOW,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_products = weights * (grad_weights - delta[:, None]) * slope
        total = tl.dot(grad_products.to(DOT), k, total, input_precision=PRECISION)
        begin = after
    return total


@triton.jit(do_not_specialize=["rows", "nodes", "listed", "window"])
def _dq_kernel(
    query, key, value, out, grad, lse, delta, grad_query, sinks, grad_sinks,
    first, last, row_position, node_position, blocks, counts,
    rows, nodes, listed, window, scale, softcap,
    q_head, q_row, q_col, k_head, k_row, k_col, v_head, v_row, v_col,
    out_head, out_row, grad_head, grad_row, grad_col, gq_head, gq_row, lse_head,
    GROUP: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP
    begin = tile * M
    row = begin + tl.arange(0, M)
    of_row = head.to(tl.int64) * lse_head + row
    q = _load(query, head, begin, rows, q_head, q_row, q_col, M, WIDTH, D, True, DOT)
    g = _load(grad, head, begin, rows, grad_head, grad_row, grad_col, M, V_WIDTH, DV, True, DOT)
    o = _load(out, head, begin, rows, out_head, out_row, 1, M, V_WIDTH, DV, True, tl.float32)
    mean = tl.sum(g.to(tl.float32) * o, 1)
    tl.store(delta + of_row, mean, mask=row < rows)
    level = tl.load(lse + of_row, mask=row < rows, other=float("inf"))
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        lost = -tl.sum(tl.exp2(sink - level) * mean, 0)
        tl.store(grad_sinks + tile * tl.num_programs(1) + head, lost)
    total = tl.zeros([M, D], tl.float32)
    full, stop = tl.load(counts + 2 * tile), tl.load(counts + 2 * tile + 1)
    blocks += tile.to(tl.int64) * listed
    total = _dq_tiles(
        total, q, g, level, mean, key, value, kv_head, begin,
        first, last, row_position, node_position, blocks, 0, full,
        rows, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        False, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    total = _dq_tiles(
        total, q, g, level, mean, key, value, kv_head, begin,
        first, last, row_position, node_position, blocks, full, stop,
        rows, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        True, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    _store(grad_query, total * scale, head, begin, rows, gq_head, gq_row, M, WIDTH, D)


@triton.jit
def _dkv_tiles(
    grad_k, grad_v, k, v, query, grad, lse, delta, head, begin_node,
    first, last, row_position, node_position, tiles, start, stop,
    rows, nodes, window, scale, softcap,
    q_head, q_row, q_col, grad_head, grad_row, grad_col, lse_head,
    MASKED: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    of_head = head.to(tl.int64) * lse_head
    tiles += start
    begin = _listed(tiles, start, M)
    for i in range(start, stop):
        tiles += 1
        after = _listed(tiles, i + 1, M)
        row = begin + tl.arange(0, M)
        q = _load(query, head, begin, rows, q_head, q_row, q_col, M, WIDTH, D, MASKED, DOT)
        g = _load(
            grad, head, begin, rows, grad_head, grad_row, grad_col, M, V_WIDTH, DV, MASKED, DOT
        )
        if MASKED:
            level = tl.load(lse + of_head + row, mask=row < rows, other=float("inf"))
            mean = tl.load(delta + of_head + row, mask=row < rows, other=0.0)
        else:
            level, mean = tl.load(lse + of_head + row), tl.load(delta + of_head + row)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        x, factor, slope = _logits(products, scale, softcap, CAPPED)
        weights = tl.exp2(x * factor - level[None, :])
        if MASKED:
            node = (begin_node + tl.arange(0, N))[:, None]
            seen = _seen(
                row[None, :], node, first, last, row_position, node_position, rows, nodes, window,
                POOLED, WINDOW,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        grad_v = tl.dot(weights.to(DOT), g, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        grad_products = weights * (grad_weights - mean[None, :]) * slope
        grad_k = tl.dot(grad_products.to(DOT), q, grad_k, input_precision=PRECISION)
        begin = after
    return grad_k, grad_v


@triton.jit
def _slot(item, block, share):
    """Where the sums of a share are: its block's first item comes after ``item - block`` cuts.

    Of a list that is cut ``n`` times, ``n + 1`` slots are used, and ``2 * n`` kept.
    """
    return 2 * (item - block) + share


@triton.jit(do_not_specialize=["rows", "nodes", "listed", "window"])
def _dkv_kernel(
    query, key, value, grad, lse, delta, grad_key, grad_value, partial,
    first, last, row_position, node_position, tiles, blocks, lists,
    rows, nodes, listed, window, scale, softcap,
    q_head, q_row, q_col, k_head, k_row, k_col, v_head, v_row, v_col,
    grad_head, grad_row, grad_col, gk_head, gk_row, gv_head, gv_row, lse_head,
    GROUP: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, kv_head = tl.load(blocks + tl.program_id(0)), tl.program_id(1)
    begin = block * N
    if begin >= nodes:
        return
    lists += 4 * block
    item, shares = tl.load(lists), tl.load(lists + 1)
    full, count = tl.load(lists + 2), tl.load(lists + 3)
    share = tl.program_id(0) - item
    start, stop = share * count // shares, (share + 1) * count // shares
    full = tl.minimum(tl.maximum(full, start), stop)
    k = _load(key, kv_head, begin, nodes, k_head, k_row, k_col, N, WIDTH, D, True, DOT)
    v = _load(value, kv_head, begin, nodes, v_head, v_row, v_col, N, V_WIDTH, DV, True, DOT)
    grad_k, grad_v = tl.zeros([N, D], tl.float32), tl.zeros([N, DV], tl.float32)
    tiles += block.to(tl.int64) * listed
    for member in range(GROUP):
        head = kv_head * GROUP + member
        grad_k, grad_v = _dkv_tiles(
            grad_k, grad_v, k, v, query, grad, lse, delta, head, begin,
            first, last, row_position, node_position, tiles, start, full,
            rows, nodes, window, scale, softcap,
            q_head, q_row, q_col, grad_head, grad_row, grad_col, lse_head,
            False, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
        )  # fmt: skip
        grad_k, grad_v = _dkv_tiles(
            grad_k, grad_v, k, v, query, grad, lse, delta, head, begin,
            first, last, row_position, node_position, tiles, full, stop,
            rows, nodes, window, scale, softcap,
            q_head, q_row, q_col, grad_head, grad_row, grad_col, lse_head,
            True, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
        )  # fmt: skip
    if shares == 1:
        _store(grad_key, grad_k * scale, kv_head, begin, nodes, gk_head, gk_row, N, WIDTH, D)
        _store(grad_value, grad_v, kv_head, begin, nodes, gv_head, gv_row, N, V_WIDTH, DV)
    else:
        at = (_slot(item, block, share) * tl.num_programs(1) + kv_head) * N
        _store(partial, grad_k, kv_head, at, at + N, 0, D + DV, N, D, D)
        _store(partial + D, grad_v, kv_head, at, at + N, 0, D + DV, N, DV, DV)


@triton.jit(do_not_specialize=["nodes"])
def _add_kernel(
    partial, lists, grad_key, grad_value, nodes, scale, gk_head, gk_row, gv_head, gv_row,
    WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """``M`` rows of the gradients of a block whose list was cut: its shares, added in order."""
    block, kv_head, begin = tl.program_id(0), tl.program_id(1), tl.program_id(2) * M
    item, shares = tl.load(lists + 4 * block), tl.load(lists + 4 * block + 1)
    if shares == 1:
        return
    grad_k, grad_v = tl.zeros([M, D], tl.float32), tl.zeros([M, DV], tl.float32)
    for share in range(shares):
        at = (_slot(item, block, share) * tl.num_programs(1) + kv_head) * N + begin
        grad_k += _load(partial, kv_head, at, 0, 0, D + DV, 1, M, D, D, False, tl.float32)
        grad_v += _load(partial + D, kv_head, at, 0, 0, D + DV, 1, M, DV, DV, False, tl.float32)
    begin += block * N
    _store(grad_key, grad_k * scale, kv_head, begin, nodes, gk_head, gk_row, M, WIDTH, D)
    _store(grad_value, grad_v, kv_head, begin, nodes, gv_head, gv_row, M, V_WIDTH, DV)


# --- launchers


def _tile(
    kernel: str, query: Tensor, value: Tensor, pooled: bool, capped: bool, windowed: bool,
    config: Config | None,
) -> tuple[Config, dict]:  # fmt: skip
    """Configuration, and the constants that the three kernels share."""
    interpreted = not isinstance(_forward_kernel, triton.JITFunction)
    width, v_width = query.shape[-1], value.shape[-1]
    d, dv = (max(16, triton.next_power_of_2(w)) for w in (width, v_width))
    chosen = config or _config(kernel, query, max(d, dv), pooled, capped, windowed)
    low = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return chosen, {
        "GROUP": query.shape[1] // value.shape[1],
        "POOLED": pooled,
        "WIDTH": width,
        "V_WIDTH": v_width,
        "D": d,
        "DV": dv,
        "M": chosen.rows,
        "N": chosen.nodes,
        # numpy multiplies bf16 as raw bits, and fp16 slowly
        "DOT": tl.float32 if interpreted else low.get(query.dtype, tl.float32),
        "PRECISION": "ieee",  # fp32 stays fp32: no TF32
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


# a share of dK and dV is at most this much of what a processor has to do on average: so the longest
# one ends soon after the others, whatever the order in which they begin
_LONGEST = 0.3
_LEAST_STEPS = 32  # tiles times query heads; for less, a sum's way through memory does not pay
_ADDED = 16  # rows of a block that a program adds up


def most_shares(processors: int, kv_heads: int) -> int:
    """How many shares of that length there are in all lists of a head together."""
    return math.ceil(processors / (_LONGEST * kv_heads))


def least_share(group: int) -> int:
    """The least tiles of a share, whatever there is to do in all."""
    return -(-_LEAST_STEPS // group)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _planned(
    subtree_end: Tensor, position_ids: Tensor, queries: Tensor | None, rows: int,
    window: int | None, config: Config, by_block: bool, made: dict,
) -> tuple[Rule, trie_plan.Plan]:  # fmt: skip
    """The rule and the plan, from ``made`` where a layer before this one has put them there."""
    seen = (subtree_end, position_ids, queries, rows, window)
    who = trie_plan.once(made, ("rule", window), lambda: trie_plan.rule(*seen))
    key, tile = (config.rows, config.nodes, by_block, window), (config.rows, config.nodes)
    return who, trie_plan.once(made, key, lambda: trie_plan.plan(who, *tile, by_block))


def _mask(who: Rule) -> tuple[Tensor, ...]:
    first = who.last if who.first is None else who.first  # not read
    return first, who.last, who.row_position, who.node_position


def trie_attention(
    query: Tensor,  # [1, Hq, M, D], any strides
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    queries: Tensor | None,  # int64 [M], rising packed indices; None: the last M nodes
    sinks: Tensor | None,  # [Hq]
    scale: float,  # above zero
    window: int | None,
    softcap: float | None,
    keep: bool,  # the log-sum-exp too, for the backward
    config: Config | None = None,
    made: dict | None = None,  # rules and plans of this batch, for other layers
) -> tuple[Tensor, Tensor]:  # [1, M, Hq, Dv]; fp32 [Hq, M rounded up] in base 2, or empty
    _, heads, rows, _ = query.shape
    pooled = queries is not None
    sinks = None if sinks is None else sinks.contiguous()
    options = (pooled, softcap is not None, window is not None)
    chosen, constants = _tile("forward", query, value, *options, config)
    seen = (subtree_end, position_ids, queries, rows, window)
    who, tiles = _planned(*seen, chosen, False, {} if made is None else made)
    out = query.new_empty(1, rows, heads, value.shape[-1])
    # each head's begins at 64 bytes
    lse = query.new_empty((heads, -(-rows // 16) * 16) if keep else (1, 0), dtype=torch.float32)
    _forward_kernel[(tiles.counts.shape[0], heads)](
        query, key, value, out, lse, lse if sinks is None else sinks,
        *_mask(who), *tiles,
        rows, key.shape[2], tiles.blocks.shape[1], window or 0, scale, softcap or 1.0,
        *query.stride()[1:], *key.stride()[1:], *value.stride()[1:],
        out.stride(2), out.stride(1), lse.stride(0),
        WINDOW=window is not None, CAPPED=softcap is not None, SINKS=sinks is not None, KEEP=keep,
        **constants,
    )  # fmt: skip
    return out, lse


def trie_attention_backward(
    grad: Tensor,  # [1, M, Hq, Dv], any strides
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
    out: Tensor,  # as the forward gave it
    lse: Tensor,
    configs: tuple[Config | None, Config | None] = (None, None),  # dQ; dK and dV
    made: dict | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # query, key, value, sinks
    _, heads, rows, _ = query.shape
    kv_heads, nodes = key.shape[1:3]
    pooled = queries is not None
    seen, made = (subtree_end, position_ids, queries, rows, window), {} if made is None else made
    sinks = None if sinks is None else sinks.contiguous()
    grad_q, grad_k, grad_v = (
        torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for x in (query, key, value)
    )
    strides = (*query.stride()[1:], *key.stride()[1:], *value.stride()[1:])
    g_strides = (grad.stride(2), grad.stride(1), grad.stride(3))
    flags = {"WINDOW": window is not None, "CAPPED": softcap is not None}

    options = (pooled, softcap is not None, window is not None)
    chosen, constants = _tile("dq", query, value, *options, configs[0])
    who, tiles = _planned(*seen, chosen, False, made)
    delta = torch.empty_like(lse)
    partial = lse.new_empty(tiles.counts.shape[0], heads) if sinks is not None else lse
    _dq_kernel[(tiles.counts.shape[0], heads)](
        query, key, value, out, grad, lse, delta, grad_q, lse if sinks is None else sinks, partial,
        *_mask(who), *tiles,
        rows, nodes, tiles.blocks.shape[1], window or 0, scale, softcap or 1.0,
        *strides, out.stride(2), out.stride(1), *g_strides,
        grad_q.stride(1), grad_q.stride(2), lse.stride(0),
        SINKS=sinks is not None, **flags, **constants,
    )  # fmt: skip

    chosen, constants = _tile("dkv", query, value, *options, configs[1])
    _, tiles = _planned(*seen, chosen, True, made)
    most = most_shares(_processors(key.device), kv_heads)
    of_item, lists = trie_plan.once(
        made, ("cut", chosen.rows, chosen.nodes, window, most),
        lambda: trie_plan.cut(tiles.counts, most, least_share(heads // kv_heads)),
    )  # fmt: skip
    of_grads = (grad_k.stride(1), grad_k.stride(2), grad_v.stride(1), grad_v.stride(2))
    sizes = {name: constants[name] for name in ("WIDTH", "V_WIDTH", "D", "DV", "N")}
    partial_kv = lse.new_empty(2 * most, kv_heads, chosen.nodes, sizes["D"] + sizes["DV"])
    _dkv_kernel[(len(of_item), kv_heads)](
        query, key, value, grad, lse, delta, grad_k, grad_v, partial_kv,
        *_mask(who), tiles.blocks, of_item, lists,
        rows, nodes, tiles.blocks.shape[1], window or 0, scale, softcap or 1.0,
        *strides, *g_strides, *of_grads, lse.stride(0),
        **flags, **constants,
    )  # fmt: skip
    _add_kernel[(len(lists), kv_heads, chosen.nodes // _ADDED)](
        partial_kv, lists, grad_k, grad_v, nodes, scale, *of_grads, **sizes, M=_ADDED, num_warps=4
    )
    grad_sinks = None if sinks is None else partial.sum(0).to(sinks.dtype)
    return grad_q, grad_k, grad_v, grad_sinks


def tune(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rule, timer: Callable | None = None
) -> dict[str, Config]:
    """Time the configurations of all chips on these inputs, and use the fastest from now on.

    ``rule`` is ``subtree_end`` to ``softcap`` as :func:`trie_attention` takes them. What is found
    holds in this process for inputs of the same head_dim, dtype and options on this device.
    """
    timer = timer or triton.testing.do_bench
    _, _, queries, _, _, window, softcap = rule
    inputs = (query, key, value, *rule)
    width = max(16, *(triton.next_power_of_2(x.shape[-1]) for x in (query, value)))
    pooled, capped, windowed = (x is not None for x in (queries, softcap, window))
    out, lse = trie_attention(*inputs, True)
    runs = {
        "forward": lambda c: trie_attention(*inputs, True, c),
        "dq": lambda c: trie_attention_backward(grad, *inputs, out, lse, (c, None)),
        "dkv": lambda c: trie_attention_backward(grad, *inputs, out, lse, (None, c)),
    }
    best = {}
    for i, (kernel, run) in enumerate(runs.items()):
        tables = (_FP32,) if query.dtype == torch.float32 else (_TABLE, _WINDOWED)
        known = [row[i] for table in tables for row in table.values()]
        times = {}
        for config in dict.fromkeys(c._replace(rows=16) if pooled else c for c in known):
            try:
                times[config] = timer(lambda c=config, run=run: run(c))
            except triton.runtime.errors.OutOfResources:
                continue  # made for a chip with more shared memory
        best[kernel] = min(times, key=times.__getitem__)
        kind = kernel, query.device, query.dtype, width, pooled, capped, windowed
        _tuned[kind] = best[kernel]
    return best
