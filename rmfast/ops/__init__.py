"""The operations as torch.library ops: one name, one implementation a device, autograd once.

Every op runs :mod:`rmfast.reference` on a CPU, and a kernel of :mod:`rmfast.kernels` on a GPU
where Triton is installed. Second derivatives are not implemented.
"""

from rmfast.ops._attention import trie_attention
from rmfast.ops._fused import RewardHeadPairwiseLoss, reward_head_pairwise_loss
from rmfast.ops._head import pooled_reward_head, reward_head
from rmfast.ops._listwise import listwise_loss
from rmfast.ops._pairwise import PairwiseLoss, pairwise_loss
from rmfast.ops._plan import TriePlan

__all__ = [
    "PairwiseLoss",
    "RewardHeadPairwiseLoss",
    "TriePlan",
    "listwise_loss",
    "pairwise_loss",
    "pooled_reward_head",
    "reward_head",
    "reward_head_pairwise_loss",
    "trie_attention",
]
