"""Batches by trie nodes instead of by examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch


class TokenBudgetSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of examples whose tries have ``max_tokens`` nodes or fewer, as many on every rank.

    An example with more has a batch to itself.

    An epoch's batches are those of a random order cut where the budget is full. So that every epoch
    and every rank has the same number of them, the largest are cut in two where some are missing.

    Args:
        nodes: trie nodes of each example, ``[E]``.
        max_tokens: most nodes a batch. What examples share is counted in each of them, apart from
            ``common``.
        cuts: such an example is run in pieces.
        common: nodes that all examples begin with; a batch runs them once.
        ranks: processes that train together, and which of them this is.
        epochs: how many there will be.
        seed: of the order.

    Raises:
        ValueError: an example with more nodes than ``max_tokens``, where none is run in pieces.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        max_tokens: int,
        *,
        cuts: bool = False,
        common: int = 0,
        ranks: tuple[int, int] = (1, 0),
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self._own = np.asarray(nodes, np.int64) - common
        self._room = max_tokens - common
        if not cuts and self._own.size and self._own.max() > self._room:
            worst = int(self._own.argmax())
            raise ValueError(
                f"example {worst} has {nodes[worst]} trie nodes, more than max_tokens = "
                f"{max_tokens}: raise it, or lower the length from which examples are dropped"
            )
        self._world, self._rank = ranks
        self._seed, self._epoch = seed, 0
        most = max(len(self._cut(epoch)) for epoch in range(max(1, epochs)))
        self._count = -(-most // self._world)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._cut(self._epoch)
        for missing in range(self._count * self._world - len(batches)):
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch, half = batches[largest], len(batches[largest]) // 2
            if half:
                batches[largest : largest + 1] = [batch[:half], batch[half:]]
            else:  # nothing left to cut: some examples run twice
                batches.append(batches[missing])
        yield from batches[self._rank :: self._world]

    def _cut(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self._seed, epoch]).permutation(self._own.size)
        batches: list[list[int]] = []
        left = -1
        for i, own in zip(order.tolist(), self._own[order].tolist(), strict=True):
            left -= own
            if left < 0:
                batches.append([])
                left = self._room - own
            batches[-1].append(i)
        return batches
