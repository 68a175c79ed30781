"""The specification of attention on a trie."""

from __future__ import annotations

from torch import Tensor

# --- attention under the trie


def trie_mask(
    queries: Tensor,  # int [M], packed indices
    keys: Tensor,  # int [L], packed indices
    subtree_end: Tensor,  # int32 [N]
    position_ids: Tensor,  # int64 [N]
    window: int | None,
) -> Tensor:  # bool [M, L]
    """True where the query may see the key: ``k <= q < subtree_end[k]``, nearer than ``window``."""
    q = queries[:, None]
    allowed = (keys <= q) & (q < subtree_end[keys])
    if window is not None:
        allowed &= position_ids[q] - position_ids[keys] < window
    return allowed
