"""What a trainer logs of its batches, fetched from the device when it is logged."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

WAITING = 1024  # batches whose metrics stay on the device, where none are logged before


class BatchMetrics:
    """Metrics of the batches since the last log, of all processes, which add as many batches."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._sums: Counter[str] = Counter()
        self.waiting: list[tuple[Tensor, tuple[int, ...]]] = []

    def add(self, metrics: Tensor, pairs: int, scores: int, tokens: int) -> None:
        """A batch: :class:`rmfast.ops.PairwiseLoss`'s metrics ``[6]``, and what is in it."""
        self.waiting.append((metrics.detach(), (pairs, scores, tokens)))
        if len(self.waiting) == WAITING:
            self._fetch()

    def take(self) -> dict[str, float]:
        """TRL's averages, and the ``tokens`` of all sequences; empty without a batch."""
        if self.waiting:
            self._fetch()
        sums, self._sums = self._sums, Counter()
        if not sums:
            return {}
        averages = {
            "tokens": sums["tokens"],
            "min_reward": sums["min_reward"] / sums["batches"],
            "mean_reward": sums["mean_reward"] / sums["scores"],
            "max_reward": sums["max_reward"] / sums["batches"],
        }
        if sums["pairs"]:
            averages["accuracy"] = sums["accuracy"] / sums["pairs"]
            averages["margin"] = sums["margin"] / sums["pairs"]
        return averages

    def _fetch(self) -> None:
        """Add what waits on the device to the sums."""
        metrics, numbers = zip(*self.waiting, strict=True)
        self.waiting = []
        metrics = torch.stack(metrics)
        rows = torch.cat([metrics, metrics.new_tensor(numbers)], 1)  # [batches, 9]
        rows = self._accelerator.gather(rows[None]).cpu().double().numpy()  # [W, batches, 9]
        accuracy, _, margin, mean, least, greatest, pairs, scores, tokens = np.moveaxis(rows, -1, 0)
        ranked = pairs > 0
        weights = pairs[ranked]
        self._sums.update(
            {
                "batches": rows.shape[1],
                "tokens": tokens.sum(),
                "scores": scores.sum(),
                "pairs": weights.sum(),
                "min_reward": least.min(0).sum(),
                "mean_reward": (mean * scores).sum(),
                "max_reward": greatest.max(0).sum(),
                "accuracy": (accuracy[ranked] * weights).sum(),
                "margin": (margin[ranked] * weights).sum(),
            }
        )
