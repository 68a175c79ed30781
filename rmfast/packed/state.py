"""What was asked of a patch, and what became of it."""

from __future__ import annotations

import dataclasses
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Options:
    share_prefixes: bool = True
    prune_last_layer: bool = True
    pooling: str = "hf"
    attention: str = "auto"
    compile: bool = False
    max_tokens: int | None = None
    backbone_kernels: str | None = None


@dataclasses.dataclass
class Report:
    """What ``patch`` made of a model. Print it to read it.

    Attributes:
        level: ``"trie"`` (packed backbone, pooled last layer, fp32 head), ``"backbone"`` (packed
            backbone, the model's own head) or ``"head"`` (Hugging Face's backbone).
        reasons: why this level, and what runs.
        warnings: what a user should know before trusting or timing the scores.
        fallbacks: calls that went to the original forward, counted by reason.
    """

    level: str
    reasons: list[str]
    warnings: list[str]
    fallbacks: Counter[str]

    def __str__(self) -> str:
        lines = [f"rmfast: level {self.level}"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines += [f"  ! {warning}" for warning in self.warnings]
        lines += [
            f"  > {count} call{'s' if count > 1 else ''} ran unpacked: {reason}"
            for reason, count in self.fallbacks.items()
        ]
        return "\n".join(lines)
