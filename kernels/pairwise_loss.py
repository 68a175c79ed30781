"""Pairwise log-sigmoid loss."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def item_of(use, inside, pairs, count, LAYOUT: tl.constexpr):
    """Sequence whose score is chosen ``use``, or rejected ``use - count``, of ``count`` pairs."""
    if LAYOUT == "halves":
        item = use.to(tl.int64)
    elif LAYOUT == "interleaved":
        item = (use % count * 2 + use // count).to(tl.int64)
    else:  # pairs [count, 2]
        item = tl.load(pairs + use % count * 2 + use // count, mask=inside, other=0)
    return item
