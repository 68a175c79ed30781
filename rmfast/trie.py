"""The packed token trie: a batch of sequences in which every shared prefix appears once.

The nodes are listed in preorder, so the subtree of node ``k`` is the contiguous range
``k <= q < subtree_end[k]``, and that range is the whole attention mask: query ``q`` sees key ``k``
if and only if ``k <= q < subtree_end[k]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_ID = 2**31  # token ids and positions share one int64 key, 32 bits each

# encoders read two texts as two segments: ids of the second have this added, token type 1
SEGMENT = 1 << 30


@dataclass(frozen=True, eq=False)
class PackedTrie:
    """A batch of ``B`` sequences as the ``N`` nodes of its token trie, in preorder.

    Attributes:
        input_ids: int64 ``[N]``, one token per node.
        position_ids: int64 ``[N]``, the node's position in every sequence that passes through it.
        subtree_end: int32 ``[N]``, first packed index after the node's subtree.
        pool_index: int64 ``[B]``, for each input sequence, in input order, the node of its last
            token (it may be an inner node, and it may repeat).
        pooled: int64 ``[P]``, rising, each node of ``pool_index`` once. Left out, it is made of it;
            give None with another ``pool_index``.
        place: int64 ``[B]``, where in ``pooled`` each sequence's node is. Likewise.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    pool_index: Tensor
    pooled: Tensor = None  # type: ignore[assignment]
    place: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.place is None:
            pooled, place = self.pool_index.unique(return_inverse=True)
            self.__dict__.update(pooled=pooled, place=place)

    def __len__(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedTrie:
        """The trie on a device, in one copy: pinned and non-blocking from the host to a GPU."""
        return self.sent(device)[0]

    def sent(self, device: torch.device | str, *more: Tensor) -> tuple[Any, ...]:
        """The trie on a device, and more tensors in the same copy."""
        own = [getattr(self, field.name) for field in fields(self)]
        there = moved([*own, *more], device)
        return PackedTrie(*there[: len(own)]), *there[len(own) :]

    def paths(self) -> list[np.ndarray]:
        """For each input sequence, in input order, the packed indices of its tokens, root first."""
        end, pool = moved((self.subtree_end, self.pool_index), "cpu")
        end = end.numpy()
        return [np.flatnonzero(end[: node + 1] > node) for node in pool.tolist()]


def moved(tensors: Iterable[Any], device: torch.device | str) -> list[Any]:
    """The same tensors on a device, in one copy from each other device; what is None stays None."""
    out, device = list(tensors), torch.device(device)
    for source in {x.device for x in out if x is not None} - {device}:
        which = [i for i, x in enumerate(out) if x is not None and x.device == source]
        # as_strided: a contiguous tensor of one element or none may have any stride
        flat = [out[i].contiguous().as_strided((out[i].numel(),), (1,)) for i in which]
        raw, gap = [x.view(torch.uint8) for x in flat], flat[0].new_empty(16, dtype=torch.uint8)
        # each begins at a multiple of 16 bytes, as kernels want it
        parts = [part for x in raw for part in (x, gap[: -len(x) % 16])]
        buffer, pinned = torch.cat(parts), source.type == "cpu" and device.type == "cuda"
        if pinned:  # torch keeps this memory until the copy has passed
            buffer = buffer.pin_memory()
        there = buffer.to(device, non_blocking=pinned).split([len(part) for part in parts])
        for i, x in zip(which, there[::2], strict=True):
            out[i] = x.view(out[i].dtype).view(out[i].shape)
    return out


def pack(
    input_ids: Tensor | Sequence[Sequence[int] | Tensor | np.ndarray],
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    share_prefixes: bool = True,
) -> PackedTrie:
    """Pack a batch so that no token runs twice.

    Two tokens become one node when they and everything before them are equal: token ids and
    position ids both.

    Args:
        input_ids: a padded batch, int ``[B, T]`` (either padding side), or a list of ``B`` token
            lists of any lengths.
        attention_mask: ``[B, T]``, non-zero where the token counts; padded batches only. Left out,
            every token counts.
        position_ids: int ``[B, T]`` or ``[1, T]``; padded batches only. Left out, a sequence's
            first counted token is at 0 and the others at their distance from it.
        share_prefixes: ``False`` gives every sequence a root of its own, which is ordinary varlen
            packing.

    Returns:
        The trie, on the device of ``input_ids`` (on the CPU for lists).

    Raises:
        ValueError: no sequence, a sequence without a token, shapes that do not match, ids that are
            not integers, or one outside ``0 <= id < 2**31``; the message names the row.
    """
    if isinstance(input_ids, Tensor):
        device = input_ids.device
        input_ids, attention_mask, position_ids = moved(
            (input_ids, attention_mask, position_ids), "cpu"
        )
        tokens, positions, lengths = _flatten_padded(input_ids, attention_mask, position_ids)
    else:
        if attention_mask is not None or position_ids is not None:
            raise ValueError(
                "attention_mask and position_ids belong to a padded batch [B, T]; "
                "a list of token lists takes neither"
            )
        device = torch.device("cpu")
        rows = [integers(f"row {i}", row, "[t]") for i, row in enumerate(input_ids)]
        lengths = np.array([row.size for row in rows], dtype=np.int64)
        tokens = np.concatenate(rows) if rows else np.empty(0, np.int64)
        positions = None
    _check(lengths, tokens, positions)

    offsets = np.cumsum(lengths) - lengths
    if share_prefixes:
        order, shared = _sort(tokens, positions, offsets, lengths)
    else:
        order, shared = np.arange(lengths.size), np.zeros_like(lengths)
    new = lengths[order] - shared
    ends = np.cumsum(new)
    starts = ends - new

    nodes = np.arange(ends[-1])
    source = nodes + np.repeat(offsets[order] + shared - starts, new)
    pool = np.empty(order.size, np.int64)
    pool[order] = ends - 1  # a row that adds no node equals the row before it: same last node
    return PackedTrie(
        torch.from_numpy(tokens[source]),
        torch.from_numpy(
            nodes + np.repeat(shared - starts, new) if positions is None else positions[source]
        ),
        torch.from_numpy(_subtree_end(shared, starts, ends)),
        torch.from_numpy(pool),
    ).to(device)


def integers(name: str, ids: Tensor | np.ndarray | Sequence[int], shape: str) -> np.ndarray:
    """``ids`` as an int64 array, unless a conversion would change them."""
    try:
        out = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        got = f"{out.dtype} {list(out.shape)}"
        good = out.ndim == shape.count(",") + 1 and (out.dtype.kind in "iu" or not out.size)
    except (TypeError, ValueError):  # lists of unequal lengths, a dtype of torch alone
        good, got = False, getattr(ids, "dtype", "lists of unequal lengths")
    if not good:
        raise ValueError(f"{name} must be integers {shape}, got {got}")
    return out.astype(np.int64, copy=False)


def _flatten_padded(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Tokens that count, their positions (None: 0, 1, 2, … in every row), tokens in each row."""
    ids = integers("input_ids", input_ids, "[B, T]")
    keep = None
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not match "
                f"input_ids {tuple(input_ids.shape)}"
            )
        keep = attention_mask.numpy() != 0
    if position_ids is not None:
        positions = integers("position_ids", position_ids, "[B, T]")
        if positions.shape not in (ids.shape, (1, ids.shape[1])):
            raise ValueError(f"position_ids {positions.shape} does not match input_ids {ids.shape}")
        positions = np.broadcast_to(positions, ids.shape)
        positions = positions.reshape(-1) if keep is None else positions[keep]
    if keep is None or keep.all():
        lengths = np.full(ids.shape[0], ids.shape[1], np.int64)
        return ids.reshape(-1), positions if position_ids is not None else None, lengths
    lengths = keep.sum(axis=1)
    if position_ids is None:
        first = keep.argmax(axis=1)
        holes = keep.shape[1] - keep[:, ::-1].argmax(axis=1) - first != lengths
        positions = None
        if (holes & (lengths > 0)).any():
            positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)[keep]
            positions = positions - np.repeat(first, lengths)
    return ids[keep], positions, lengths


def _check(lengths: np.ndarray, tokens: np.ndarray, positions: np.ndarray | None) -> None:
    if lengths.size == 0:
        raise ValueError("no sequence to pack: the batch is empty")
    if not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0])
        raise ValueError(f"row {row} has no token to pack: drop it, or give it at least one token")
    for name, ids in (("token", tokens), ("position", positions)):
        if ids is not None and (ids.min() < 0 or ids.max() >= _MAX_ID):
            bad = int(np.flatnonzero((ids < 0) | (ids >= _MAX_ID))[0])
            row = int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            raise ValueError(f"row {row} has {name} id {ids[bad]}; need 0 <= id < 2**31")


def shared_length(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with."""
    least = min(row.size for row in rows)
    differ = [row[:least] != rows[0][:least] for row in rows]
    return int(np.append(np.any(differ, 0), True).argmax())


def _sort(
    tokens: np.ndarray, positions: np.ndarray | None, offsets: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lexicographic order of the rows, and how many tokens each shares with the row before it."""
    # Any order that puts equal prefixes together will do, so rows are compared as raw bytes.
    key = tokens.astype(np.int32) if positions is None else (positions << 32) | tokens
    raw = key.tobytes()
    size = key.itemsize
    bounds = list(zip(offsets.tolist(), (offsets + lengths).tolist(), strict=True))
    rows = [raw[size * start : size * end] for start, end in bounds]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared = np.zeros(len(order), np.int64)
    for i, (left, right) in enumerate(itertools.pairwise(order), start=1):
        (left, left_end), (right, right_end) = bounds[left], bounds[right]
        overlap = min(left_end - left, right_end - right)
        differ = key[left : left + overlap] != key[right : right + overlap]
        first = int(differ.argmax())
        shared[i] = first if differ[first] else overlap
    return np.array(order), shared


def _subtree_end(shared: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A node at depth ``d`` ends where the first later row begins that shares at most ``d``."""
    out = np.empty(ends[-1], np.int32)
    depth = int((shared + ends - starts).max())
    next_start = np.full(depth, ends[-1], np.int32)  # by depth, over the rows after this one
    for first, start, end in zip(
        shared.tolist()[::-1], starts.tolist()[::-1], ends.tolist()[::-1], strict=True
    ):
        out[start:end] = next_start[first : first + end - start]
        next_start[first:] = start
    return out
