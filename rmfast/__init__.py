"""rmfast: Hugging Face reward models train and score without running a token twice."""

from rmfast.patching import Report, patch, patched, report, unpatch
from rmfast.trie import PackedTrie, pack

__all__ = ["PackedTrie", "Report", "pack", "patch", "patched", "report", "unpatch"]
