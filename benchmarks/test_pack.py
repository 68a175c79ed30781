"""pytest-benchmark timings of packing, as the patch does it: a padded batch on the host.

    pytest benchmarks --benchmark-only

Nothing here fails for being slow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import rmfast

ROWS, LENGTH, VOCABULARY = 64, 2048, 50_000


def _distinct(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ from their first tokens on."""
    return rng.integers(VOCABULARY, size=(ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int64)


def _ragged(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 1 to 2048 tokens, right-padded."""
    ids, _ = _distinct(rng)
    lengths = rng.integers(1, LENGTH + 1, size=(ROWS, 1))
    return ids, (np.arange(LENGTH) < lengths).astype(np.int64)


def _deep(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each row leaves the one before it in its last 64 tokens: long comparisons, few nodes."""
    ids, mask = _distinct(rng)
    for row in range(1, ROWS):
        shared = int(rng.integers(LENGTH - 64, LENGTH))
        ids[row, :shared] = ids[row - 1, :shared]
    return ids[rng.permutation(ROWS)], mask


@pytest.mark.parametrize(
    ("batch", "share_prefixes"),
    [(_distinct, True), (_ragged, True), (_deep, True), (_deep, False)],
    ids=["distinct", "ragged", "deep", "deep-unshared"],
)
def test_pack(benchmark: Callable, batch: Callable, share_prefixes: bool) -> None:
    ids, mask = (torch.from_numpy(x) for x in batch(np.random.default_rng(0)))
    trie = benchmark(rmfast.pack, ids, mask, share_prefixes=share_prefixes)
    assert trie.pool_index.shape == (ROWS,)
