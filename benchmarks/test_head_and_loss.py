"""pytest-benchmark timings of the reward head and the pairwise loss, beside plain torch.

    pytest benchmarks --benchmark-only

They run on the GPU where there is one. Nothing here fails for being slow.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rmfast import ops

ROWS, WIDTH, SEQUENCES = 8192, 2048, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _head(dtype: torch.dtype, requires_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
    weight = torch.randn(1, WIDTH, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
    return hidden, torch.randint(ROWS, (SEQUENCES,), device=DEVICE), weight


def _finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@DTYPES
def test_reward_head_forward(benchmark: Callable, dtype: torch.dtype) -> None:
    hidden, index, weight = _head(dtype, requires_grad=False)

    def forward() -> Tensor:
        scores = ops.reward_head(hidden, index, weight)
        _finish()
        return scores

    assert benchmark(forward).shape == (SEQUENCES, 1)


@DTYPES
def test_pooled_reward_head_forward(benchmark: Callable, dtype: torch.dtype) -> None:
    hidden, _, weight = _head(dtype, requires_grad=False)
    hidden = hidden.view(SEQUENCES, -1, WIDTH)
    ids = torch.randint(9, hidden.shape[:2], device=DEVICE)

    def forward() -> Tensor:
        scores = ops.pooled_reward_head(hidden, ids, weight, pad_token_id=0)
        _finish()
        return scores

    assert benchmark(forward).shape == (SEQUENCES, 1)


@DTYPES
def test_reward_head_forward_backward(benchmark: Callable, dtype: torch.dtype) -> None:
    hidden, index, weight = _head(dtype, requires_grad=True)

    def step() -> None:
        hidden.grad = weight.grad = None
        ops.reward_head(hidden, index, weight).sum().backward()
        _finish()

    benchmark(step)
    assert hidden.grad.shape == hidden.shape


def _plain_loss(scores: Tensor) -> Tensor:
    """TRL's lines, and the metrics they log, left on the device."""
    chosen, rejected = scores.squeeze(-1).float().chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    with torch.no_grad():
        (chosen > rejected).float().mean(), (chosen - rejected).mean()
        scores.mean(), scores.min(), scores.max()
    return loss


def _plain(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return _plain_loss(F.linear(hidden[index], weight))


def _two_ops(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return ops.pairwise_loss(ops.reward_head(hidden, index, weight), center=0.01).loss


def _one_op(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return ops.reward_head_pairwise_loss(hidden, index, weight, center=0.01).loss


@DTYPES
@pytest.mark.parametrize("run", [_plain, _two_ops, _one_op], ids=["torch", "two-ops", "one-op"])
def test_head_and_loss_step(benchmark: Callable, run: Callable, dtype: torch.dtype) -> None:
    hidden, index, weight = _head(dtype, requires_grad=True)

    def step() -> None:
        hidden.grad = weight.grad = None
        run(hidden, index, weight).backward()
        _finish()

    benchmark(step)
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("run", [_plain_loss, lambda x: ops.pairwise_loss(x, center=0.01).loss],
                         ids=["torch", "rmfast"])  # fmt: skip
def test_pairwise_loss_step(benchmark: Callable, run: Callable) -> None:
    torch.manual_seed(0)
    scores = torch.randn(SEQUENCES, 1, device=DEVICE, requires_grad=True)

    def step() -> None:
        scores.grad = None
        run(scores).backward()
        _finish()

    benchmark(step)
    assert scores.grad.shape == scores.shape
