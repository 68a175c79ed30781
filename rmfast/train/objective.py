"""The loss of a batch of preferences, and what is logged of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmfast import ops
from rmfast.packed.step import Batch, Rows

LARGEST_GROUP = 64  # responses: what the kernel of the ranked losses holds
KINDS = {  # by what they are for
    "pairs": ("bradley_terry", "focal"),
    "ranked responses": ("all_pairs", "plackett_luce"),
}


@dataclass(frozen=True)
class Objective:
    """The loss of a batch of preferences, and what is logged of it.

    Attributes:
        kind: one of :data:`KINDS`, functions of :mod:`rmfast.losses`.
        label_smoothing: of ``"bradley_terry"``.
        center: weight of the squared sum of a pair's scores, of pairs.
        gamma: of ``"focal"``.

    Raises:
        ValueError: an unknown kind, or options that do not go with it.
    """

    kind: str = "bradley_terry"
    label_smoothing: float = 0.0
    center: float = 0.0
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in {kind for kinds in KINDS.values() for kind in kinds}:
            raise ValueError(f"no loss {self.kind!r}")
        if self.kind != "bradley_terry" and self.label_smoothing:
            raise ValueError(f"label_smoothing has no meaning with {self.kind}")
        if not self.of_pairs and self.center:
            raise ValueError(f"centering is of pairs, not of {self.kind}")

    @property
    def of_pairs(self) -> bool:
        return self.kind in KINDS["pairs"]

    def _options(self, batch: Batch) -> dict[str, Any]:
        return {
            "margin": batch.get("margin"),
            "label_smoothing": self.label_smoothing,
            "center": self.center,
            "gamma": self.gamma if self.kind == "focal" else 0.0,
            "reduction": "sum",
        }

    def __call__(self, rows: Rows, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses, the scores, and :class:`rmfast.ops.PairwiseLoss`'s metrics ``[6]``.

        Head and loss are one op where the loss allows it.
        """
        if not self.of_pairs or rows.head is None:
            return self.of_scores(rows.scores(), batch)
        loss, scores, *metrics = ops.reward_head_pairwise_loss(
            rows.hidden,
            weight=rows.head.weight,
            bias=rows.head.bias,
            **rows.where,
            **self._options(batch),
        )
        return loss, scores, torch.stack(metrics)

    def of_scores(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The same of scores ``[B]`` alone."""
        if self.of_pairs:
            loss, *metrics = ops.pairwise_loss(scores, **self._options(batch))
        else:
            loss = ops.listwise_loss(
                scores, batch["ranks"], batch["offsets"],
                kind=self.kind, reduction="sum", max_size=batch["largest"],
            )  # fmt: skip
            if not len(batch["pairs"]):  # all tied
                return loss, scores.detach(), scores.new_full((6,), float("nan"))
            _, *metrics = ops.pairwise_loss(scores.detach(), batch["pairs"])
        return loss, scores.detach(), torch.stack(metrics)
