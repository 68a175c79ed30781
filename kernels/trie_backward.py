"""The backward kernels of attention over a trie: dQ by query tile, dK and dV by key block."""

from __future__ import annotations

import triton
import triton.language as tl

from rmfast.kernels.trie_forward import LOG2E, allowed, listed, load, logits, offset, store


@triton.jit
def _dq_tiles(
    total, q, grad, lse, delta, key, value, kv_head, begin_place,
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
        v = load(value, kv_head, begin, nodes, v_head, v_row, v_col, N, V_WIDTH, DV, MASKED, DOT)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x, factor, slope = logits(products, scale, softcap, CAPPED)
        weights = tl.exp2(x * factor - lse[:, None])
        if MASKED:
            place = (begin_place + tl.arange(0, M))[:, None]
            node = (begin + tl.arange(0, N))[None, :]
            seen = allowed(
                place, node, first, last, row_position, node_position, places, nodes, window,
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
    q = load(query, head, begin, rows, q_head, q_row, q_col, M, WIDTH, D, True, DOT)
    g = load(grad, head, begin, rows, grad_head, grad_row, grad_col, M, V_WIDTH, DV, True, DOT)
    o = load(out, head, begin, rows, out_head, out_row, 1, M, V_WIDTH, DV, True, tl.float32)
    mean = tl.sum(g.to(tl.float32) * o, 1)
    tl.store(delta + of_row, mean, mask=row < rows)
    level = tl.load(lse + of_row, mask=row < rows, other=float("inf"))
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        lost = -tl.sum(tl.exp2(sink - level) * mean, 0)
        tl.store(grad_sinks + tile * tl.num_programs(1) + head, lost)
    total = tl.zeros([M, D], tl.float32)
    full, stop = tl.load(counts + 2 * tile), tl.load(counts + 2 * tile + 1)
    blocks += tile.to(tl.int64) * listed
    shift = offset(rows, nodes, POOLED)
    total = _dq_tiles(
        total, q, g, level, mean, key, value, kv_head, begin + shift,
        first, last, row_position, node_position, blocks, 0, full,
        rows + shift, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        False, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    total = _dq_tiles(
        total, q, g, level, mean, key, value, kv_head, begin + shift,
        first, last, row_position, node_position, blocks, full, stop,
        rows + shift, nodes, window, scale, softcap,
        k_head, k_row, k_col, v_head, v_row, v_col,
        True, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
    )  # fmt: skip
    store(grad_query, total * scale, head, begin, rows, gq_head, gq_row, M, WIDTH, D)


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
    begin = listed(tiles, start, M)
    for i in range(start, stop):
        tiles += 1
        after = listed(tiles, i + 1, M)
        row = begin + tl.arange(0, M)
        q = load(query, head, begin, rows, q_head, q_row, q_col, M, WIDTH, D, MASKED, DOT)
        g = load(
            grad, head, begin, rows, grad_head, grad_row, grad_col, M, V_WIDTH, DV, MASKED, DOT
        )
        if MASKED:
            level = tl.load(lse + of_head + row, mask=row < rows, other=float("inf"))
            mean = tl.load(delta + of_head + row, mask=row < rows, other=0.0)
        else:
            level, mean = tl.load(lse + of_head + row), tl.load(delta + of_head + row)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        x, factor, slope = logits(products, scale, softcap, CAPPED)
        weights = tl.exp2(x * factor - level[None, :])
        if MASKED:
            node = (begin_node + tl.arange(0, N))[:, None]
            shift = offset(rows, nodes, POOLED)
            place = (begin + shift + tl.arange(0, M))[None, :]
            seen = allowed(
                place, node, first, last, row_position, node_position, rows + shift, nodes, window,
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
    item, shares = tl.load(lists + 4 * block), tl.load(lists + 4 * block + 1)
    full, count = tl.load(lists + 4 * block + 2), tl.load(lists + 4 * block + 3)
    k = load(key, kv_head, begin, nodes, k_head, k_row, k_col, N, WIDTH, D, True, DOT)
    v = load(value, kv_head, begin, nodes, v_head, v_row, v_col, N, V_WIDTH, DV, True, DOT)
    grad_k, grad_v = tl.zeros([N, D], tl.float32), tl.zeros([N, DV], tl.float32)
    tiles += block.to(tl.int64) * listed
    for member in range(GROUP):  # bounds anew for each head: registers are scarce in the loops
        head = kv_head * GROUP + member
        share = tl.program_id(0) - item
        start, stop = share * count // shares, (share + 1) * count // shares
        middle = tl.minimum(tl.maximum(full, start), stop)
        grad_k, grad_v = _dkv_tiles(
            grad_k, grad_v, k, v, query, grad, lse, delta, head, begin,
            first, last, row_position, node_position, tiles, start, middle,
            rows, nodes, window, scale, softcap,
            q_head, q_row, q_col, grad_head, grad_row, grad_col, lse_head,
            False, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
        )  # fmt: skip
        grad_k, grad_v = _dkv_tiles(
            grad_k, grad_v, k, v, query, grad, lse, delta, head, begin,
            first, last, row_position, node_position, tiles, middle, stop,
            rows, nodes, window, scale, softcap,
            q_head, q_row, q_col, grad_head, grad_row, grad_col, lse_head,
            True, POOLED, WINDOW, CAPPED, WIDTH, V_WIDTH, D, DV, M, N, DOT, PRECISION,
        )  # fmt: skip
    grad_k *= scale
    # read again, not kept through the loops
    block = tl.load(blocks + tl.program_id(0), volatile=True)
    begin = block * N
    item, shares = tl.load(lists + 4 * block), tl.load(lists + 4 * block + 1)
    if shares == 1:
        store(grad_key, grad_k, kv_head, begin, nodes, gk_head, gk_row, N, WIDTH, D)
        store(grad_value, grad_v, kv_head, begin, nodes, gv_head, gv_row, N, V_WIDTH, DV)
    else:
        slot = _slot(item, block, tl.program_id(0) - item)
        at = (slot * tl.num_programs(1) + kv_head) * N
        store(partial, grad_k, kv_head, at, at + N, 0, D + DV, N, D, D)
        store(partial + D, grad_v, kv_head, at, at + N, 0, D + DV, N, DV, DV)


@triton.jit(do_not_specialize=["nodes"])
def _add_kernel(
    partial, lists, grad_key, grad_value, nodes, gk_head, gk_row, gv_head, gv_row,
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
        grad_k += load(partial, kv_head, at, 0, 0, D + DV, 1, M, D, D, False, tl.float32)
        grad_v += load(partial + D, kv_head, at, 0, 0, D + DV, 1, M, DV, DV, False, tl.float32)
    begin += block * N
    store(grad_key, grad_k, kv_head, begin, nodes, gk_head, gk_row, M, WIDTH, D)
    store(grad_value, grad_v, kv_head, begin, nodes, gv_head, gv_row, M, V_WIDTH, DV)
