"""What attention works out once for a batch, and all layers use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmfast.ops._common import check_devices


class TriePlan:
    """Which queries see which keys, and what attention makes of it: tiles and lists of blocks.

    One plan is made for a batch and handed to every call, as FlexAttention's ``BlockMask`` is. The
    first call fills it, later ones with the same window reuse it: on the same stream, and all in
    one CUDA graph or in none. A plan knows nothing of what is written to its tensors afterwards:
    make a new one then.

    Args:
        subtree_end: int32 ``[N]``, see :class:`rmfast.PackedTrie`.
        position_ids: int64 ``[N]``; read only with a sliding window.
        queries: int64 ``[M]``, packed indices of the queries, each above the one before it (not
            checked on a GPU). None: every node from ``first`` on, ``M = N - first``.
        first: the first query, where those before it have run already.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, a ``first`` that is no node or
            stands beside ``queries``; the message names the argument.
    """

    def __init__(
        self,
        subtree_end: Tensor,
        position_ids: Tensor,
        queries: Tensor | None = None,
        *,
        first: int = 0,
    ) -> None:
        for name, x, dtype in (
            ("subtree_end", subtree_end, torch.int32),
            ("position_ids", position_ids, torch.int64),
            ("queries", queries, torch.int64),
        ):
            if x is not None and (x.ndim != 1 or x.dtype != dtype or x.shape[0] == 0):
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name} must be {kind} with one dimension, not empty; "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
        if position_ids.shape != subtree_end.shape:
            raise ValueError(
                f"position_ids must be [{len(subtree_end)}], got shape {tuple(position_ids.shape)}"
            )
        check_devices(subtree_end=subtree_end, position_ids=position_ids, queries=queries)
        if not 0 <= first < (len(subtree_end) if queries is None else 1):
            raise ValueError(
                f"first must be a node, 0 to {len(subtree_end) - 1}, and 0 beside queries; "
                f"got {first}"
            )
        self.subtree_end, self.position_ids, self.queries = subtree_end, position_ids, queries
        self.first = first
        self.rows = len(subtree_end) - first if queries is None else len(queries)
        self.device = subtree_end.device
        # an op takes tensors only, so an empty one carries the dict to where it is filled
        self.carrier = torch.empty(0, device=self.device)
        self.carrier.made = {}
        self._copies: dict[torch.device, TriePlan] = {}

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.subtree_end, self.position_ids, self.queries

    def on(self, device: torch.device) -> TriePlan:
        """The plan for layers on a device: itself, or a copy that is made once."""
        if device == self.device:
            return self
        if device not in self._copies:
            moved = (None if x is None else x.to(device) for x in self.tensors)
            self._copies[device] = TriePlan(*moved, first=self.first)
        return self._copies[device]


def made_for(carrier: Tensor) -> dict[Any, Any]:
    """What a plan has already; an empty dict where only a copy of its tensors came here."""
    return getattr(carrier, "made", {})
