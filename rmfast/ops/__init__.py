"""The operations of a reward model's head, losses, attention and elementwise work.

On a GPU where Triton is installed, each is a kernel of :mod:`rmfast.kernels` behind a torch.library
op, which has no second derivative. Elsewhere :mod:`rmfast.reference` runs, under torch's autograd.
"""

from rmfast.ops._attention import trie_attention
from rmfast.ops._elementwise import gated, rms_norm, rotary
from rmfast.ops._fused import RewardHeadPairwiseLoss, reward_head_pairwise_loss
from rmfast.ops._head import pooled_reward_head, reward_head
from rmfast.ops._listwise import listwise_loss
from rmfast.ops._pairwise import PairwiseLoss, pairwise_loss
from rmfast.ops._plan import TriePlan

__all__ = [
    "PairwiseLoss",
    "RewardHeadPairwiseLoss",
    "TriePlan",
    "gated",
    "listwise_loss",
    "pairwise_loss",
    "pooled_reward_head",
    "reward_head",
    "reward_head_pairwise_loss",
    "rms_norm",
    "rotary",
    "trie_attention",
]
