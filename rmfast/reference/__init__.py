"""The specification of every kernel, in plain torch: fp32 sums of any dtype, fp64 of fp64."""

from rmfast.reference.attention import trie_mask
from rmfast.reference.head import (
    last_token,
    pooled_reward_head,
    reward_head,
    reward_head_backward,
    rows_gradient,
    wide,
)
from rmfast.reference.losses import (
    listwise_loss,
    listwise_loss_backward,
    pair_scores,
    pairwise_gradients,
    pairwise_loss,
    pairwise_loss_backward,
    reward_head_pairwise_loss,
)

__all__ = [
    "last_token",
    "listwise_loss",
    "listwise_loss_backward",
    "pair_scores",
    "pairwise_gradients",
    "pairwise_loss",
    "pairwise_loss_backward",
    "pooled_reward_head",
    "reward_head",
    "reward_head_backward",
    "reward_head_pairwise_loss",
    "rows_gradient",
    "trie_mask",
    "wide",
]
