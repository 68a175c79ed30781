"""Last-token pooling and scalar head: ``scores[b, l] = hidden[index[b]] . weight[l] + bias[l]``.

Sums run in fp32, in fp64 for fp64 inputs. With M rows of H elements of s bytes, B sequences, L
labels, and each byte counted once:

forward, 1 launch: one program a sequence and 8 labels. Of a padded batch it first looks for the
    pooled token, from the right. At least ``B*H*s + L*H*s + 4*B*L + 8*B`` bytes, and the token ids
    (or mask) from the pooled one on.
backward, 1 launch: programs that write rows of the gradient of ``hidden``, each element once, zeros
    where no sequence was pooled; beside them programs that sum the gradients of ``weight`` and
    ``bias`` over the sequences, in their order. At least ``M*H*s + B*H*s + 2*L*H*s + 4*B*L + 8*B``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.pairwise_loss import accumulator, item_of, packed, wide

_TILE = 4096  # elements of weight a forward program holds, labels x columns
_ROWS_TILE = 8192  # elements of the gradient of hidden a program writes at once
_PROGRAMS = 512  # programs that write rows: more than this only where there are more row blocks
_WEIGHT_BLOCK = 128  # columns of a program that sums the gradient of weight


@triton.jit
def find_rows(
    item, inside, where, POOL: tl.constexpr, ITEMS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Rows of ``hidden.flatten(0, 1)`` that sequences are scored by, and where each begins.

    "given": those in ``index``, of hidden [M, 1, H]. "last": the last column. "search": the
    rightmost token that is not ``skipped``, column 0 where there is none.
    """
    index, tokens, length, skipped, strides = where
    stride_sequence, stride_token, stride_batch, stride_row = strides
    if POOL == "given":
        row = tl.load(index + item, mask=inside, other=0)
        begin = row * stride_batch
    elif POOL == "last":
        row = item * length + length - 1
        begin = item * stride_batch + (length - 1) * stride_row
    else:
        start = tl.zeros([], tl.int32) + (length - 1) // TOKENS * TOKENS
        found = tl.where(inside, tl.full([ITEMS], -1, tl.int32), 0)
        while (tl.min(found, axis=0) < 0) & (start >= 0):
            place = start + tl.arange(0, TOKENS)
            there = (found < 0)[:, None] & (place < length)[None, :]
            at = item[:, None] * stride_sequence + place[None, :].to(tl.int64) * stride_token
            token = tl.load(tokens + at, mask=there, other=0)
            kept = there & (token != skipped)
            found = tl.maximum(found, tl.max(tl.where(kept, place[None, :], -1), axis=1))
            start -= TOKENS
        column = tl.maximum(found, 0).to(tl.int64)
        row = item * length + column
        begin = item * stride_batch + column * stride_row
    return row, begin


@triton.jit
def _forward_kernel(
    hidden, index, tokens, weight, bias, scores,
    length, width, labels, skipped,
    stride_batch, stride_row, stride_col, stride_sequence, stride_token,
    stride_label, stride_weight,
    POOL: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
    LABELS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    label = tl.program_id(1) * LABELS + tl.arange(0, LABELS)
    item = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    strides = (stride_sequence, stride_token, stride_batch, stride_row)
    where = (index, tokens, length, skipped, strides)
    rows, _ = find_rows(item, item >= 0, where, POOL, 1, TOKENS)
    if POOL != "given":
        if tl.program_id(1) == 0:
            tl.store(index + item, rows)
    row = tl.sum(rows, axis=0)  # a number, whose address is known to be a multiple of 16 bytes
    hidden += row // length * stride_batch + row % length * stride_row
    scores += tl.program_id(0).to(tl.int64) * labels
    weight += label[:, None].to(tl.int64) * stride_label
    total = tl.zeros([LABELS, BLOCK], ACC)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK).to(tl.int64)
        h = tl.load(hidden + col * stride_col, mask=col < width, other=0.0).to(ACC)
        inside = (label < labels)[:, None] & (col < width)[None, :]
        w = tl.load(weight + col[None, :] * stride_weight, mask=inside, other=0.0).to(ACC)
        total += h[None, :] * w
    score = tl.sum(total, axis=1)
    if HAS_BIAS:
        score += tl.load(bias + label, mask=label < labels, other=0.0).to(ACC)
    tl.store(scores + label, score, mask=label < labels)


@triton.jit
def _coefficient(
    target, label, grad, index, pairs,
    uses, stride_use, stride_label,
    LAYOUT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, USES: tl.constexpr,
):  # fmt: skip
    """Sum of the gradients of the scores read from row ``target``, and the first of its uses."""
    total = tl.zeros([ROWS], ACC)
    first = tl.zeros([ROWS], tl.int32) + uses
    for start in range(0, uses, USES):
        use = start + tl.arange(0, USES)
        item = item_of(use, use < uses, pairs, uses // 2, LAYOUT)
        row = tl.load(index + item, mask=use < uses, other=-1)
        at = grad + use.to(tl.int64) * stride_use + label * stride_label
        g = tl.load(at, mask=use < uses, other=0.0).to(ACC)
        same = (row[None, :] == target[:, None]) & (use < uses)[None, :]
        total += tl.sum(tl.where(same, g[None, :], 0.0), axis=1)
        first = tl.minimum(first, tl.min(tl.where(same, use[None, :], uses), axis=1))
    return total, first


@triton.jit
def write_rows(
    program, scale, grad, index, pairs, weight, grad_hidden,
    uses, rows, splits, width, labels, stride_use, stride_grad, stride_label, stride_weight,
    LAYOUT: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, USES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``scale *`` the gradient of ROWS rows of hidden: zeros in rows that no score was read from.

    Program ``i`` has the block of rows ``i // splits``, and of it each ``splits``-th block of
    columns. Score ``u`` of ``uses`` was read from row ``index[item_of(u)]``.
    """
    slot = (program // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor, first = _coefficient(
        slot, 0, grad, index, pairs, uses, stride_use, stride_grad, LAYOUT, ACC, ROWS, USES
    )
    used = (first < uses) & (slot < rows)
    some = tl.max(used.to(tl.int32), axis=0)
    for start in range(program % splits * BLOCK, width, splits * BLOCK):
        col = start + tl.arange(0, BLOCK).to(tl.int64)
        total = tl.zeros([ROWS, BLOCK], ACC)
        if some > 0:
            w = tl.load(weight + col * stride_weight, mask=col < width, other=0.0).to(ACC)
            total += (factor * scale)[:, None] * w[None, :]
            for label in range(1, labels):
                other, _ = _coefficient(
                    slot, tl.cast(label, tl.int64), grad, index, pairs,
                    uses, stride_use, stride_grad, LAYOUT, ACC, ROWS, USES,
                )  # fmt: skip
                at = weight + tl.cast(label, tl.int64) * stride_label + col * stride_weight
                w = tl.load(at, mask=col < width, other=0.0).to(ACC)
                total += (other * scale)[:, None] * w[None, :]
        total = tl.where(used[:, None], total, 0.0)
        inside = (slot < rows)[:, None] & (col < width)[None, :]
        tl.store(grad_hidden + slot[:, None] * width + col[None, :], total, mask=inside)


@triton.jit
def _backward_kernel(
    grad, hidden, index, weight, grad_hidden, grad_weight, grad_bias,
    uses, rows, splits, weight_programs, length, width, labels,
    stride_use, stride_grad, stride_batch, stride_row, stride_col, stride_label, stride_weight,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, USES: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHT_USES: tl.constexpr, WEIGHT_BLOCK: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < weight_programs:  # a block of columns and labels
        blocks = tl.cdiv(width, WEIGHT_BLOCK)
        label = (program // blocks * LABELS + tl.arange(0, LABELS)).to(tl.int64)
        block = program % blocks
        col = block * WEIGHT_BLOCK + tl.arange(0, WEIGHT_BLOCK).to(tl.int64)
        total = tl.zeros([LABELS, WEIGHT_BLOCK], ACC)
        total_bias = tl.zeros([LABELS], ACC)
        for start in range(0, uses, WEIGHT_USES):
            use = start + tl.arange(0, WEIGHT_USES).to(tl.int64)
            row = tl.load(index + use, mask=use < uses, other=0)
            at = row // length * stride_batch + row % length * stride_row
            mask = (use < uses)[:, None] & (col < width)[None, :]
            h = tl.load(hidden + at[:, None] + col[None, :] * stride_col, mask=mask, other=0.0)
            mask = (use < uses)[:, None] & (label < labels)[None, :]
            at = use[:, None] * stride_use + label[None, :] * stride_grad
            g = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
            total += tl.sum(g[:, :, None] * h.to(ACC)[:, None, :], axis=0)
            total_bias += tl.sum(g, axis=0)
        inside = (label < labels)[:, None] & (col < width)[None, :]
        tl.store(grad_weight + label[:, None] * width + col[None, :], total, mask=inside)
        if HAS_BIAS:
            if block == 0:
                tl.store(grad_bias + label, total_bias, mask=label < labels)
    else:
        write_rows(
            program - weight_programs, 1.0, grad, index, index, weight, grad_hidden,
            uses, rows, splits, width, labels, stride_use, stride_grad, stride_label, stride_weight,
            "halves", ACC, ROWS, USES, BLOCK,
        )  # fmt: skip


def row_blocks(rows: int, width: int, rows_tile: int = _ROWS_TILE) -> tuple[dict, int, int]:
    """Block sizes, splits and number of programs of :func:`write_rows`."""
    block = min(512, triton.next_power_of_2(width))
    tall = min(32, triton.next_power_of_2(max(rows, 1)), max(1, rows_tile // block))
    tiles = triton.cdiv(rows, tall)
    splits = min(triton.cdiv(width, block), max(1, _PROGRAMS // max(tiles, 1)))
    return {"ROWS": tall, "USES": 128, "BLOCK": block}, splits, tiles * splits


def searched(
    hidden: Tensor,  # [M, H], or [B, T, H] without index
    index: Tensor | None,  # int64 [B]
    input_ids: Tensor | None,  # int [B, T], any strides; None with index
    attention_mask: Tensor | None,  # [B, T]; read with pooling "mask" alone
    pad_token_id: int | None,
    pooling: str,  # as reference.last_token has it
) -> tuple[str, Tensor, int]:
    """How :func:`find_rows` finds the rows, in which tokens, and what it passes over there."""
    if index is not None:
        return "given", hidden, 0  # which it does not read
    tokens, skipped = (attention_mask, 0) if pooling == "mask" else (input_ids, pad_token_id)
    if tokens is None or skipped is None:
        return "last", input_ids, 0
    return "search", tokens.view(torch.uint8) if tokens.dtype == torch.bool else tokens, skipped


def reward_head(
    hidden: Tensor,  # [M, H], or [B, T, H] without index; any strides
    index: Tensor | None,  # int64 [B]
    weight: Tensor,  # [L, H], any strides
    bias: Tensor | None,  # [L]
    input_ids: Tensor | None = None,  # and so on, as searched takes them
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    pooling: str = "hf",
    *,
    tile: int = _TILE,
    tokens_block: int = 256,
) -> tuple[Tensor, Tensor]:  # fp32 [B, L]; int64 [B], the rows of hidden.flatten(0, 1) it found
    padded = hidden if index is None else hidden[:, None]
    batch, labels, width = (hidden if index is None else index).shape[0], *weight.shape
    rule = (input_ids, attention_mask, pad_token_id, pooling)
    pool, tokens, skipped = searched(hidden, index, *rule)
    scores = torch.empty(batch, labels, dtype=wide(hidden.dtype), device=hidden.device)
    found = torch.empty(batch if index is None else 0, dtype=torch.int64, device=hidden.device)
    group = min(8, triton.next_power_of_2(labels))
    block = min(max(tile // group, 16), triton.next_power_of_2(width))
    _forward_kernel[(batch, triton.cdiv(labels, group))](
        padded, found if index is None else index.contiguous(), tokens, weight,
        *packed(bias, instead=weight), scores,
        padded.shape[1], width, labels, skipped,
        *padded.stride(), *tokens.stride(), *weight.stride(),
        POOL=pool, HAS_BIAS=bias is not None, ACC=accumulator(hidden.dtype),
        LABELS=group, BLOCK=block, TOKENS=tokens_block,
        num_warps=min(8, max(1, group * block * weight.dtype.itemsize // 1024)),
    )  # fmt: skip
    return scores, found


def reward_head_backward(
    grad: Tensor,  # fp32 [B, L], any strides
    hidden: Tensor,  # [M, H] or [B, T, H], any strides
    index: Tensor,  # int64 [B], rows of hidden.flatten(0, -2)
    weight: Tensor,  # [L, H], any strides
    bias: Tensor | None,  # [L]
    needs_hidden: bool = True,
    needs_weight: bool = True,  # and bias, where there is one
    *,
    rows_tile: int = _ROWS_TILE,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None where not needed."""
    index = index.contiguous()
    uses, labels, width = index.shape[0], *weight.shape
    padded = hidden if hidden.ndim == 3 else hidden[:, None]
    rows = padded.shape[0] * padded.shape[1]
    sizes, splits, row_programs = row_blocks(rows, width, rows_tile)
    grad_hidden = hidden.new_empty(hidden.shape) if needs_hidden else None
    grad_weight = grad_bias = None
    weight_programs = 0
    block = min(_WEIGHT_BLOCK, triton.next_power_of_2(width))
    group = min(8, triton.next_power_of_2(labels))
    if needs_weight:
        grad_weight = weight.new_empty(weight.shape)
        grad_bias = None if bias is None else bias.new_empty(labels)
        weight_programs = triton.cdiv(labels, group) * triton.cdiv(width, block)
    _backward_kernel[(weight_programs + row_programs * needs_hidden,)](
        grad, padded, index, weight, *packed(grad_hidden, grad_weight, grad_bias, instead=grad),
        uses, rows, splits, weight_programs, padded.shape[1], width, labels,
        *grad.stride(), *padded.stride(), *weight.stride(),
        HAS_BIAS=grad_bias is not None, ACC=accumulator(hidden.dtype),
        **sizes, WEIGHT_USES=max(1, 32 // group), WEIGHT_BLOCK=block, LABELS=group,
        num_warps=8,
    )  # fmt: skip
    return grad_hidden, grad_weight, grad_bias
