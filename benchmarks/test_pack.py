"""pytest-benchmark timings of packing and of the reward head, forward and backward.

    pytest benchmarks --benchmark-only

Packing is timed as the patch does it, on a padded batch on the host. The head runs on the GPU
where there is one. Nothing here fails for being slow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import rmfast
from rmfast import ops

ROWS, LENGTH, VOCABULARY = 64, 2048, 50_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def _head(dtype: torch.dtype, requires_grad: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(8192, 2048, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
    weight = torch.randn(1, 2048, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
    return hidden, torch.randint(8192, (ROWS,), device=DEVICE), weight


def _finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reward_head_forward(benchmark: Callable, dtype: torch.dtype) -> None:
    hidden, index, weight = _head(dtype, requires_grad=False)

    def forward() -> torch.Tensor:
        scores = ops.reward_head(hidden, index, weight)
        _finish()
        return scores

    assert benchmark(forward).shape == (ROWS, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reward_head_forward_backward(benchmark: Callable, dtype: torch.dtype) -> None:
    hidden, index, weight = _head(dtype, requires_grad=True)

    def step() -> None:
        hidden.grad = weight.grad = None
        ops.reward_head(hidden, index, weight).sum().backward()
        _finish()

    benchmark(step)
    assert hidden.grad.shape == hidden.shape
