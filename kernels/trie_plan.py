"""Which tiles of attention over a trie hold a pair that the mask allows, and who works on them.

Made once a batch in plain torch, without waiting for the device: the shapes of all tables are known
from those of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Rule(NamedTuple):
    """Who sees whom: key ``k`` is seen by the rows at places ``first[k] <= place < last[k]``.

    Rows are at the last places, one after the other. Of queries that were given those are 0 to M,
    of a range of nodes they are the nodes themselves.
    """

    first: Tensor | None  # int32 [N]; None: places are nodes, and first[k] == k
    last: Tensor  # int32 [N]
    row_position: Tensor  # int64 [places]
    node_position: Tensor  # int64 [N]
    rows: int
    window: int | None


def rule(
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    queries: Tensor | None,  # int64 [M], rising packed indices; None: the last ``rows`` nodes
    rows: int,
    window: int | None,
) -> Rule:
    subtree_end, position_ids = subtree_end.contiguous(), position_ids.contiguous()
    if queries is None:
        return Rule(None, subtree_end, position_ids, position_ids, rows, window)
    nodes = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    first = torch.searchsorted(queries, nodes, out_int32=True)
    last = torch.searchsorted(queries, subtree_end.long(), out_int32=True)
    return Rule(first, last, position_ids[queries], position_ids, rows, window)


# --- tiles


class Plan(NamedTuple):
    """For each tile, the blocks to visit: ``blocks[t, : counts[t, 0]]`` are full."""

    blocks: Tensor  # int32 [tiles, blocks + 1]; full ones, then partial ones, each rising; rest
    counts: Tensor  # int32 [tiles, 2]: full ones; all to visit


_CHUNK = 1 << 24  # pairs looked at together: 128 MB a tensor


def plan(who: Rule, rows: int, nodes: int, by_block: bool = False) -> Plan:
    """Tiles of ``rows`` queries by blocks of ``nodes`` keys; ``by_block`` lists tiles by block.

    Exact, windows included: a block is listed iff the tile has an allowed pair in it.
    """
    places, count = who.row_position.shape[0], who.last.shape[0]
    device, padding = who.last.device, (0, -count % nodes)  # nodes that nobody sees
    start = torch.arange(places - who.rows, places, rows, dtype=torch.int32, device=device)[:, None]
    stop = (start + rows).clamp(max=places)
    last = pad(who.last, padding)
    if who.first is not None:
        some, full = _by_pair(who, last, _tiles(start, rows, places), nodes)
    else:
        # Extrema are exact: a key k with start < subtree_end[k] is seen by row start if k <= start;
        # else the greater of start and the block's first node is in block and tile, and sees itself
        first = torch.arange(0, count, nodes, dtype=torch.int32, device=device)
        least, most = last.view(-1, nodes).aminmax(dim=1)
        some = first < stop
        full = (first + (nodes - 1) <= start) & (least >= stop)
        if who.window is None:
            some &= most > start
        else:
            near, whole = _in_window(who, last, _tiles(start, rows, places), nodes)
            some, full = some & near, full & whole
    if by_block:  # a program that goes from tile to tile wants whole ones
        full, some = (full & (start + rows <= places)).T, some.T
    both = torch.stack([full, some], 1)
    order = both.sum(1, dtype=torch.int8).argsort(dim=1, descending=True, stable=True)
    # a loop looks one ahead
    return Plan(pad(order.int(), (0, 1)), both.sum(2, dtype=torch.int32))


def _tiles(start: Tensor, rows: int, places: int) -> Tensor:  # int32 [tiles, rows]
    """The places of each tile's rows; a short tile repeats its last."""
    row = torch.arange(rows, dtype=torch.int32, device=start.device)
    return (start + row).clamp(max=places - 1)


def _in_window(who: Rule, last: Tensor, place: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Which blocks that begin before a tile's end have a key it sees; which are all in reach."""
    reach = pad(who.node_position, (0, len(last) - len(who.node_position))) + who.window
    at = who.row_position.int()[place]
    # The rows that see a key before the tile are the tile's first, up to the end of its subtree.
    # A key of the tile is among those rows and sees itself; one after it shares its block with one.
    lowest, offset = at.cummin(1).values.flatten(), len(who.row_position) - who.rows
    ends, near = (last.long() - offset - 1).clamp(min=0), []
    for some in place.split(max(1, _CHUNK // len(last))):
        nearest = lowest[ends.minimum(some[:, -1:] - offset)]
        seen = (nearest < reach) & (last > some[:, :1])
        near.append(seen.unflatten(1, (-1, nodes)).any(2))
    return torch.cat(near), at.amax(1, keepdim=True) < reach.view(-1, nodes).amin(1)


def _by_pair(who: Rule, last: Tensor, place: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Which blocks hold an allowed pair, and which nothing else, by the mask: queries are few."""
    padding = (0, len(last) - len(who.last))
    first, some, full = pad(who.first, padding), [], []
    for row in place[..., None].split(max(1, _CHUNK // (place.shape[1] * len(last)))):
        seen = (first <= row) & (row < last)
        if who.window is not None:
            seen &= who.row_position[row] - pad(who.node_position, padding) < who.window
        seen = seen.unflatten(2, (-1, nodes))
        some.append(seen.any(3).any(1))
        full.append(seen.all(3).all(1))
    return torch.cat(some), torch.cat(full)


# --- lists that are cut


class Cut(NamedTuple):
    """The lists of a plan by block, cut into shares of about the same length."""

    block: Tensor  # int32 [items], whose list the item is from; past the end: none
    lists: Tensor  # int32 [blocks, 4]: first item, how many; full tiles, all to visit


def cut(counts: Tensor, most: int, least: int) -> Cut:
    """Shares no longer than a ``most``-th of all lists and one tile, or than ``least`` tiles.

    A list of ``n`` tiles is cut ``n // share`` times, all lists ``most`` times or less.
    """
    length = counts[:, 1]
    share = (length.sum() // most + 1).clamp(min=least)
    shares = length // share + 1
    last = shares.cumsum(0)
    item = torch.arange(len(counts) + most, device=counts.device)
    block = torch.searchsorted(last, item, right=True, out_int32=True)
    return Cut(block, torch.cat([torch.stack([last - shares, shares], 1).int(), counts], 1))


def once(made: dict, key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, or what it gave where a layer before this one has put that into ``made``."""
    if key not in made:
        made[key] = make()
    return made[key]
