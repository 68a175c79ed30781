"""Reward head and pairwise loss at once: rows of hidden states in, loss, scores and metrics out.

    scores[b] = hidden[index[b]] . weight + bias,  then the loss of pairwise_loss.py

Of a padded batch the forward finds the rows itself, as reward_head.py does, and leaves them to the
backward. With M rows of H elements of s bytes, B of them scored, in P pairs, by G programs:

forward, 1 launch: a program has consecutive pairs. It reads their rows, scores them, knows by that
    the loss by each score, and adds the rows up into its own partial gradient of ``weight``. The
    program that is done last adds up the losses and metrics, in the programs' order. At least
    ``B*H*s + H*s + 8*B + 4*B + 8*P`` bytes, of a padded batch also the token ids (or mask) from
    the pooled one on; ``4*G*H`` for the partial gradients.
backward, 1 launch: at least ``M*H*s + 2*H*s + 8*B + 8*P`` bytes, ``4*G*H`` for the partial
    gradients again.

G is the largest number of programs up to 128 whose partial gradients, written and read, are at
most 1/25 of the bytes of rows that both launches move; one at the least. Few and short batches so
run on few processors: they have little to move. Up to 8192 columns the rows stay in registers
between score and gradient; wider ones are read again, from the cache. A row that is in several
pairs is read for each of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.pairwise_loss import accumulator, item_of, options, packed, pair_loss, wide
from rmfast.kernels.reward_head import find_rows, row_blocks, searched, write_rows

_TILE = 8192  # elements of chosen rows, and as many of rejected ones, that a program holds
_MOST = 128  # programs
_SHARE = 25  # rows moved for each byte of partial gradients
_WEIGHT_BLOCK = 128  # columns of a program that adds up partial gradients


@triton.jit
def _rows(hidden, begin, inside, col, width, stride_col, ACC: tl.constexpr):
    at = hidden + begin[:, None] + col[None, :] * stride_col
    return tl.load(at, mask=inside[:, None] & (col < width)[None, :], other=0.0).to(ACC)


@triton.jit
def _dot(
    hidden, begin, inside, weight, width, stride_col, stride_weight,
    ACC: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([TILE, BLOCK], ACC)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK).to(tl.int64)
        w = tl.load(weight + col * stride_weight, mask=col < width, other=0.0).to(ACC)
        total += _rows(hidden, begin, inside, col, width, stride_col, ACC) * w[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _forward_kernel(
    hidden, index, tokens, weight, bias, pairs, margin, target, pair_weight,
    scores, grads, partial, sums, arrived, loss, metrics,
    count, batch, span, items, length, width, skipped,
    stride_batch, stride_row, stride_col, stride_sequence, stride_token, stride_weight,
    LAYOUT: tl.constexpr, POOL: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MARGIN: tl.constexpr, HAS_TARGET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, CENTER: tl.constexpr, GAMMA: tl.constexpr, MEAN: tl.constexpr,
    GRADS: tl.constexpr, PARTIAL: tl.constexpr, ACC: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    strides = (stride_sequence, stride_token, stride_batch, stride_row)
    where = (index, tokens, length, skipped, strides)
    begin = program * span
    end = tl.minimum(begin + span, count)
    offset = tl.zeros([], ACC)
    if HAS_BIAS:
        offset += tl.load(bias).to(ACC)
    whole = tl.arange(0, BLOCK).to(tl.int64)
    w = tl.load(weight + whole * stride_weight, mask=whole < width, other=0.0).to(ACC)
    part = tl.zeros([BLOCK], ACC)
    total = tl.zeros([TILE], ACC)
    right = tl.zeros([TILE], ACC)
    ties = tl.zeros([TILE], ACC)
    margins = tl.zeros([TILE], ACC)
    rewards = tl.zeros([TILE], ACC)
    low = tl.full([TILE], float("inf"), ACC)
    high = tl.full([TILE], float("-inf"), ACC)
    for start in range(begin, end, TILE):
        pair = start + tl.arange(0, TILE)
        inside = pair < end
        chosen_item = item_of(pair, inside, pairs, count, LAYOUT)
        rejected_item = item_of(pair + count, inside, pairs, count, LAYOUT)
        chosen_row, chosen_at = find_rows(chosen_item, inside, where, POOL, TILE, TOKENS)
        rejected_row, rejected_at = find_rows(rejected_item, inside, where, POOL, TILE, TOKENS)
        if WHOLE:
            c = _rows(hidden, chosen_at, inside, whole, width, stride_col, ACC)
            r = _rows(hidden, rejected_at, inside, whole, width, stride_col, ACC)
            chosen = tl.sum(c * w[None, :], axis=1) + offset
            rejected = tl.sum(r * w[None, :], axis=1) + offset
        else:
            chosen = offset + _dot(
                hidden, chosen_at, inside, weight, width, stride_col, stride_weight,
                ACC, TILE, BLOCK,
            )  # fmt: skip
            rejected = offset + _dot(
                hidden, rejected_at, inside, weight, width, stride_col, stride_weight,
                ACC, TILE, BLOCK,
            )  # fmt: skip
        value, up, down = pair_loss(
            chosen, rejected, pair, inside, margin, target, pair_weight,
            HAS_MARGIN, HAS_TARGET, HAS_WEIGHT, SMOOTHING, CENTER, GAMMA, ACC,
        )  # fmt: skip
        if MEAN:
            up = up / count
            down = down / count
        if GRADS:
            tl.store(grads + pair, up, mask=inside)
            tl.store(grads + count + pair, down, mask=inside)
        if PARTIAL and WHOLE:
            part += tl.sum(up[:, None] * c + down[:, None] * r, axis=0)
        total += tl.where(inside, value, 0.0)
        right += tl.where(inside & (chosen > rejected), 1.0, 0.0)
        ties += tl.where(inside & (chosen == rejected), 1.0, 0.0)
        margins += tl.where(inside, chosen - rejected, 0.0)
        if LAYOUT != "index":
            tl.store(scores + chosen_item, chosen, mask=inside)
            tl.store(scores + rejected_item, rejected, mask=inside)
            if POOL != "given":
                tl.store(index + chosen_item, chosen_row, mask=inside)
                tl.store(index + rejected_item, rejected_row, mask=inside)
            rewards += tl.where(inside, chosen + rejected, 0.0)
            low = tl.minimum(low, tl.where(inside, tl.minimum(chosen, rejected), float("inf")))
            high = tl.maximum(high, tl.where(inside, tl.maximum(chosen, rejected), float("-inf")))
    if LAYOUT == "index":  # a row may be in many pairs, or in none: the scores apart from them
        last = tl.minimum(program * items + items, batch)
        for start in range(program * items, last, TILE):
            item = (start + tl.arange(0, TILE)).to(tl.int64)
            inside = item < last
            row, at = find_rows(item, inside, where, POOL, TILE, TOKENS)
            score = offset + _dot(
                hidden, at, inside, weight, width, stride_col, stride_weight, ACC, TILE, BLOCK
            )
            tl.store(scores + item, score, mask=inside)
            if POOL != "given":
                tl.store(index + item, row, mask=inside)
            rewards += tl.where(inside, score, 0.0)
            low = tl.minimum(low, tl.where(inside, score, float("inf")))
            high = tl.maximum(high, tl.where(inside, score, float("-inf")))
    if PARTIAL:
        partial += program.to(tl.int64) * width
        if WHOLE:
            tl.store(partial + whole, part, mask=whole < width)
        else:
            tl.debug_barrier()  # grads was written by other threads of this program
            for first in range(0, width, BLOCK):
                col = first + tl.arange(0, BLOCK).to(tl.int64)
                part = tl.zeros([BLOCK], ACC)
                for start in range(begin, end, TILE):
                    pair = start + tl.arange(0, TILE)
                    inside = pair < end
                    item = item_of(pair, inside, pairs, count, LAYOUT)
                    _, at = find_rows(item, inside, where, POOL, TILE, TOKENS)
                    c = _rows(hidden, at, inside, col, width, stride_col, ACC)
                    item = item_of(pair + count, inside, pairs, count, LAYOUT)
                    _, at = find_rows(item, inside, where, POOL, TILE, TOKENS)
                    r = _rows(hidden, at, inside, col, width, stride_col, ACC)
                    up = tl.load(grads + pair, mask=inside, other=0.0)
                    down = tl.load(grads + count + pair, mask=inside, other=0.0)
                    part += tl.sum(up[:, None] * c + down[:, None] * r, axis=0)
                tl.store(partial + col, part, mask=col < width)
    # sums [7, G]
    programs = tl.num_programs(0)
    sums += program
    tl.store(sums, tl.sum(total, axis=0))
    tl.store(sums + programs, tl.sum(right, axis=0))
    tl.store(sums + 2 * programs, tl.sum(ties, axis=0))
    tl.store(sums + 3 * programs, tl.sum(margins, axis=0))
    tl.store(sums + 4 * programs, tl.sum(rewards, axis=0))
    tl.store(sums + 5 * programs, tl.min(low, axis=0))
    tl.store(sums + 6 * programs, tl.max(high, axis=0))
    tl.debug_barrier()
    ticket = tl.atomic_add(arrived, 1, sem="acq_rel")
    if ticket == programs - 1:
        tl.debug_barrier()
        place = tl.arange(0, PROGRAMS)
        there = place < programs
        at = sums - program + place
        value = tl.sum(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
        if MEAN:
            value = value / count
        tl.store(loss, value)
        for i in tl.static_range(4):
            at += programs
            value = tl.sum(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
            tl.store(metrics + i, value / (count if i < 3 else batch))
        at += programs
        value = tl.load(at, mask=there, other=float("inf"), cache_modifier=".cg")
        tl.store(metrics + 4, tl.min(value, axis=0))
        at += programs
        value = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        tl.store(metrics + 5, tl.max(value, axis=0))
        tl.store(arrived, 0)  # for the next launch


@triton.jit
def sum_parts(
    parts, column, inside, count, stride,
    ACC: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``parts[:count, column]`` summed over its rows, ``stride`` apart, in their order."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS).to(tl.int64)
        mask = (part < count)[:, None] & inside[None, :]
        at = parts + part[:, None] * stride + column[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0).to(ACC), axis=0)
    return total


@triton.jit
def _backward_kernel(
    upstream, grads, partial, index, pairs, weight, grad_hidden, grad_weight, grad_bias,
    uses, rows, parts, splits, weight_programs, width, stride_weight,
    LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, USES: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    scale = tl.load(upstream).to(ACC)
    if program < weight_programs:
        col = program * WEIGHT_BLOCK + tl.arange(0, WEIGHT_BLOCK).to(tl.int64)
        total = sum_parts(partial, col, col < width, parts, width, ACC, 16, WEIGHT_BLOCK)
        tl.store(grad_weight + col, total * scale, mask=col < width)
        if HAS_BIAS:
            if program == 0:
                of_bias = tl.zeros([USES], ACC)
                for start in range(0, uses, USES):
                    use = start + tl.arange(0, USES)
                    of_bias += tl.load(grads + use, mask=use < uses, other=0.0)
                tl.store(grad_bias, tl.sum(of_bias, axis=0) * scale)
    else:
        write_rows(
            program - weight_programs, scale, grads, index, pairs, weight, grad_hidden,
            uses, rows, splits, width, 1, 1, 0, 0, stride_weight,
            LAYOUT, ACC, ROWS, USES, BLOCK,
        )  # fmt: skip


_arrived: dict[tuple, Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """An int32 that is zero between launches: one a stream, whose launches follow each other."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            return torch.zeros(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream)
    if key not in _arrived:
        _arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _arrived[key]


def programs(
    count: int,  # pairs
    batch: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    partial: bool,  # whether the gradient of weight is wanted
    tile: int = _TILE,
) -> tuple[int, int, int]:
    """Programs of the forward, pairs for each of them, and pairs that it holds at a time."""
    most = _MOST
    if partial:
        moved, buffered = (batch + rows) * dtype.itemsize, 2 * wide(dtype).itemsize
        most = max(1, min(most, moved // (_SHARE * buffered)))
    share = -(-count // most)
    block = min(triton.next_power_of_2(width), tile)
    held = max(1, min(16, tile // block, triton.next_power_of_2(share)))
    span = -(-share // held) * held
    return -(-count // span), span, held


def fused_loss(
    hidden: Tensor,  # [M, H], or [B, T, H] without index; any strides
    index: Tensor | None,  # int64 [B]
    weight: Tensor,  # [1, H], any strides
    bias: Tensor | None,  # [1]
    pairs: Tensor | None,  # int64 [P, 2] with layout "index"
    margin: Tensor | None,  # [P]
    target: Tensor | None,  # [P]
    pair_weight: Tensor | None,  # [P]
    input_ids: Tensor | None,  # int [B, T], of a padded batch; so is the rest of its rule
    attention_mask: Tensor | None,  # [B, T]
    pad_token_id: int | None,
    pooling: str,
    layout: str,
    label_smoothing: float,
    center: float,
    gamma: float,
    reduction: str,  # "mean" or "sum"
    needs_hidden: bool = True,
    needs_weight: bool = True,  # or bias
    *,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss [], scores [B], metrics [6]; rows it found, int64 [B] of hidden.flatten(0, 1); loss by
    the pairs' scores [2, P], by weight [G, H].
    """
    padded = hidden if index is None else hidden[:, None]
    rule = (input_ids, attention_mask, pad_token_id, pooling)
    pool, tokens, skipped = searched(hidden, index, *rule)
    batch, width = (hidden if index is None else index).shape[0], hidden.shape[-1]
    count = batch // 2 if pairs is None else pairs.shape[0]
    acc, device = wide(hidden.dtype), hidden.device
    if tile is None:
        tile = _TILE * 4 // acc.itemsize
    grid, span, held = programs(
        count, batch, hidden.numel() // width, width, hidden.dtype, needs_weight, tile
    )
    loss = torch.empty((), dtype=acc, device=device)
    scores = torch.empty(batch, dtype=acc, device=device)
    metrics = torch.empty(6, dtype=acc, device=device)
    sums = torch.empty(7, grid, dtype=acc, device=device)
    found = torch.empty(batch if index is None else 0, dtype=torch.int64, device=device)
    grads = partial = None
    if needs_hidden or needs_weight:
        grads = torch.empty(2, count, dtype=acc, device=device)
    if needs_weight:
        partial = torch.empty(grid, width, dtype=acc, device=device)
    whole = width <= tile
    block = triton.next_power_of_2(width) if whole else min(tile, 2048)
    _forward_kernel[(grid,)](
        padded, found if index is None else index.contiguous(), tokens, weight,
        *packed(bias, pairs, margin, target, pair_weight, instead=hidden),
        scores, grads if grads is not None else scores, partial if needs_weight else scores,
        sums, _counter(device), loss, metrics,
        count, batch, span, triton.cdiv(batch, grid), padded.shape[1], width, skipped,
        *padded.stride(), *tokens.stride(), weight.stride(1),
        **options(layout, margin, target, pair_weight, label_smoothing, center, gamma),
        POOL=pool, TOKENS=min(128, max(16, block)),
        HAS_BIAS=bias is not None, MEAN=reduction == "mean",
        GRADS=grads is not None, PARTIAL=needs_weight, ACC=accumulator(hidden.dtype),
        TILE=held, BLOCK=block, WHOLE=whole, PROGRAMS=triton.next_power_of_2(grid),
        num_warps=max(1, min(16, held * block // 512)),
    )  # fmt: skip
    return loss, scores, metrics, found, grads, partial


def fused_loss_backward(
    grad: Tensor,  # []
    grads: Tensor,  # [2, P]
    partial: Tensor | None,  # [G, H]
    index: Tensor,  # int64 [B], rows of hidden.flatten(0, -2)
    weight: Tensor,  # [1, H], any strides
    bias: Tensor | None,  # [1]
    pairs: Tensor | None,  # int64 [P, 2]
    layout: str,
    shape: torch.Size,  # of hidden
    dtype: torch.dtype,
    needs_hidden: bool = True,
    *,
    rows_tile: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None where not needed."""
    uses, width, rows = grads.numel(), weight.shape[1], math.prod(shape[:-1])
    sizes, splits, row_programs = row_blocks(rows, width, *([rows_tile] if rows_tile else []))
    grad_hidden = weight.new_empty(shape, dtype=dtype) if needs_hidden else None
    grad_weight = grad_bias = None
    weight_programs, block = 0, min(_WEIGHT_BLOCK, triton.next_power_of_2(width))
    if partial is not None:
        grad_weight = weight.new_empty(weight.shape)
        grad_bias = None if bias is None else bias.new_empty(1)
        weight_programs = triton.cdiv(width, block)
    outs = packed(grad_hidden, grad_weight, grad_bias, instead=grads)
    _backward_kernel[(weight_programs + row_programs * needs_hidden,)](
        grad, grads, grads if partial is None else partial, index.contiguous(),
        *packed(pairs, instead=index), weight, *outs,
        uses, rows, 0 if partial is None else partial.shape[0], splits, weight_programs, width,
        weight.stride(1),
        LAYOUT=layout, HAS_BIAS=grad_bias is not None, ACC=accumulator(grads.dtype),
        **sizes, WEIGHT_BLOCK=block, num_warps=8,
    )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias
