"""Tile sizes of attention over a trie, by chip, head_dim and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmfast.kernels import chips


class Config(NamedTuple):
    rows: int  # queries in a tile
    nodes: int  # keys in a block
    warps: int
    stages: int


# by chip and padded head_dim, 16-bit inputs: forward, dQ, dK and dV
TABLE: dict[tuple[str, int], tuple[Config, Config, Config]] = {
    ("sm_80", 64): (Config(128, 32, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 2)),
    ("sm_80", 128): (Config(128, 32, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_80", 256): (Config(32, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    ("sm_90", 64): (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 128, 8, 2)),
    # timed on an H200, with four shapes of tries; that of dK and dV spills 32 bytes and is fastest
    ("sm_90", 128): (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(32, 64, 4, 3)),
    ("sm_90", 256): (Config(64, 32, 8, 2), Config(64, 16, 8, 2), Config(32, 32, 8, 2)),
    ("sm_100", 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    ("sm_100", 128): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_100", 256): (Config(128, 32, 8, 2), Config(64, 16, 8, 2), Config(32, 32, 8, 2)),
    ("sm_120", 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(32, 128, 8, 2)),
    ("sm_120", 128): (Config(128, 32, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
    ("sm_120", 256): (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 8, 2)),
    ("gfx942", 64): (Config(128, 64, 4, 1), Config(128, 64, 8, 1), Config(32, 64, 4, 1)),
    ("gfx942", 128): (Config(128, 64, 8, 1), Config(64, 64, 4, 1), Config(16, 64, 4, 1)),
    ("gfx942", 256): (Config(64, 32, 8, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    ("gfx950", 64): (Config(128, 64, 4, 1), Config(128, 64, 8, 1), Config(64, 64, 4, 1)),
    ("gfx950", 128): (Config(128, 64, 8, 1), Config(64, 32, 4, 1), Config(32, 128, 4, 1)),
    ("gfx950", 256): (Config(64, 32, 8, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
}
# with a window, where its positions leave too few registers for the row above
WINDOWED: dict[tuple[str, int], tuple[Config, Config, Config]] = {
    ("sm_80", 64): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("sm_90", 64): (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(32, 128, 8, 2)),
    ("sm_90", 128): (Config(64, 64, 4, 2), Config(64, 32, 4, 3), Config(32, 64, 4, 3)),
    ("sm_120", 64): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    ("gfx942", 256): (Config(64, 16, 8, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    ("gfx950", 64): (Config(128, 64, 4, 1), Config(128, 64, 8, 1), Config(32, 64, 4, 1)),
    ("gfx950", 128): (Config(128, 32, 8, 1), Config(64, 32, 4, 1), Config(32, 128, 4, 1)),
}
# any chip, by padded head_dim: without tensor cores the operands are in registers
FP32: dict[int, tuple[Config, Config, Config]] = {
    64: (Config(16, 16, 4, 1), Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    128: (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


TUNED: dict[tuple, Config] = {}  # what tune() found


def config(
    kernel: str, like: Tensor, width: int, pooled: bool, capped: bool, windowed: bool = False
) -> Config:
    """Tile sizes for ``forward``, ``dq`` or ``dkv`` at padded head_dim ``width``."""
    tuned = TUNED.get((kernel, like.device, like.dtype, width, pooled, capped, windowed))
    if tuned is not None:
        return tuned
    if like.dtype == torch.float32:
        row = FP32[max(width, 64)]
    else:  # a soft cap keeps one matrix more: the smallest tiles
        key = chips.chip(like.device), 256 if capped else max(width, 64)
        row = WINDOWED.get(key, TABLE[key]) if windowed else TABLE[key]
    found = row[("forward", "dq", "dkv").index(kernel)]
    return found._replace(rows=16) if pooled else found
