"""The forward kernel of attention over a trie, and what it shares with the backward ones."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def listed(tiles, i, SIZE: tl.constexpr):
    """First row of the tile, or node of the block, that comes ``i``-th: ``tiles`` points at it."""
    return tl.load(tiles) * SIZE


@triton.jit
def load(
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
def store(
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
def offset(rows, nodes, POOLED: tl.constexpr):
    """The first row's place: without queries, rows are the last nodes."""
    if POOLED:
        return 0
    else:
        return nodes - rows


@triton.jit
def allowed(
    place, node, first, last, row_position, node_position, places, nodes, window,
    POOLED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Whether the row at ``place`` may see ``node``; one is a column, the other a row."""
    there = node < nodes
    begin = node
    if POOLED:
        begin = tl.load(first + node, mask=there, other=0)
    seen = (begin <= place) & (place < tl.load(last + node, mask=there, other=0))
    if WINDOW:
        at = tl.load(row_position + place, mask=place < places, other=0)
        seen &= at - tl.load(node_position + node, mask=there, other=0) < window
    return seen


@triton.jit
def logits(products, scale, softcap, CAPPED: tl.constexpr):
    """``x`` and ``factor``, whose product is the base-2 logits; and the slope of the soft cap."""
    if CAPPED:
        grown = tl.exp2(products * (2 * scale / softcap * LOG2E))
        tanh = 1 - 2 / (grown + 1)
        return tanh, softcap * LOG2E, 1 - tanh * tanh
    else:  # the compiler wants to see that nothing follows
        return products, scale * LOG2E, 1.0


@triton.jit
def _forward_tiles(
    total, denominator, highest, q, key, value, kv_head, begin_place,
    first, last, row_position, node_position, blocks, start, stop,
    places, nodes, window, scale, softcap,
    k_head, k_row, k_col, v_head, v_row, v_col,
    MASKED: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks += start
    begin = listed(blocks, start, N)
    for i in range(start, stop):
        blocks += 1
        after = listed(blocks, i + 1, N)
        k = load(key, kv_head, begin, nodes, k_head, k_row, k_col, N, WIDTH, D, MASKED, DOT)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x, factor, _ = logits(products, scale, softcap, CAPPED)
        if MASKED:
            place = (begin_place + tl.arange(0, M))[:, None]
            node = (begin + tl.arange(0, N))[None, :]
            seen = allowed(
                place, node, first, last, row_position, node_position, places, nodes, window,
                POOLED, WINDOW,
            )  # fmt: skip
            x = tl.where(seen, x, float("-inf"))
        new = tl.maximum(highest, tl.max(x, 1) * factor)
        weights = tl.exp2(x * factor - new[:, None])
        shrink = tl.exp2(highest - new)
        denominator = denominator * shrink + tl.sum(weights, 1)
        v = load(value, kv_head, begin, nodes, v_head, v_row, v_col, N, V_WIDTH, DV, MASKED, DOT)
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
    q = load(query, head, begin, rows, q_head, q_row, q_col, M, WIDTH, D, True, DOT)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.zeros([M], tl.float32) + tl.maximum(sink, -1e30)
        denominator = tl.exp2(sink - highest)
    else:
        highest = tl.zeros([M], tl.float32) - 1e30  # finite: no NaN where a tile is all hidden
        denominator = tl.zeros([M], tl.float32)
    total = tl.zeros([M, DV], tl.float32)
    full, stop = tl.load(counts + 2 * tile), tl.load(counts + 2 * tile + 1)
    blocks += tile.to(tl.int64) * listed
    shift = offset(rows, nodes, POOLED)
    total, denominator, highest = _forward_tiles(
        total, denominator, highest, q, key, value, kv_head, begin + shift,
        first, last, row_position, node_position, blocks, 0, full,
        rows + shift, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        False, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    total, denominator, highest = _forward_tiles(
        total, denominator, highest, q, key, value, kv_head, begin + shift,
        first, last, row_position, node_position, blocks, full, stop,
        rows + shift, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        True, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    row = begin + tl.arange(0, M)
    denominator = tl.where(row < rows, denominator, 1.0)  # past the end nothing was seen
    total = total / denominator[:, None]
    store(out, total, head, begin, rows, out_head, out_row, M, V_WIDTH, DV)
    if KEEP:
        where = lse + head.to(tl.int64) * lse_head + row
        tl.store(where, highest + tl.log2(denominator), mask=row < lse_head)
