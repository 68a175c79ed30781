"""The specification of every kernel, in plain torch: fp32 sums of any dtype, fp64 of fp64."""

from rmfast.reference.attention import trie_attention, trie_mask
from rmfast.reference.elementwise import gated, rms_norm, rotary
from rmfast.reference.head import (
    last_token,
    pooled_rows,
    reward_head,
    until_scored,
    wide,
)
from rmfast.reference.losses import (
    listwise_loss,
    pair_scores,
    pairwise_loss,
    reward_head_pairwise_loss,
)

__all__ = [
    "gated",
    "last_token",
    "listwise_loss",
    "pair_scores",
    "pairwise_loss",
    "pooled_rows",
    "reward_head",
    "reward_head_pairwise_loss",
    "rms_norm",
    "rotary",
    "trie_attention",
    "trie_mask",
    "until_scored",
    "wide",
]
