"""The listwise loss kernels against their definition in fp64."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import ulp, unit

from rmfast import ops, reference

KINDS = ["all_pairs", "plackett_luce"]


def errors(scores, ranks, offsets, kind, u):
    """Greatest error of a group's loss and of an item's slope, in sums with unit roundoff u."""
    losses, slopes = [], []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        s, r, size = scores[begin:end], ranks[begin:end], end - begin
        if kind == "all_pairs":
            better = r[:, None] < r[None, :]
            width = (s[:, None].abs() + s[None, :].abs()) * better
            pairs = max(1, size * (size - 1) // 2)
            # a gap of up to `width` is rounded twice, softplus has slope <= 1 and takes a dozen
            # operations on parts of at most 1 + width; a term is in at most 2 * size sums
            each = (2 * u * width + 12 * u * (1 + width)) * better
            terms = -torch.nn.functional.logsigmoid(s[:, None] - s[None, :]) * better
            loss = (each.sum() + 2 * size * u * (terms + each).sum()) / pairs
            losses.append(loss + 2 * u * terms.sum() / pairs)
            # sigmoid has slope <= 1/4 and at most 1 is rounded as often; 2 * size of them summed
            each = (width * u / 2 + (12 + 2 * size) * u) * better
            slopes.append((each.sum(0) + each.sum(1)) * (1 + u) / pairs + 2 * u)
        else:
            left = (r[None, :] >= r[:, None]).double().sum(1)  # terms of each logsumexp
            # exp of z <= 0 is at most 1 and |z| exp(z) < 1: each is off by 8 units at most, and
            # their sum, at least 1, by a unit more for each; then log, and two sums with scores
            mass = 9 * u * left
            top = s.abs().max() if size else s.sum()
            each = mass + 4 * u * (1 + left.log() + 2 * top)
            losses.append(each.sum() + size * u * (each + left.log() + 2 * top).sum())
            # shares of at most 1, of which `size` are summed, and 1 taken off
            slopes.append(torch.full_like(s, float((8 * u + 2 * u + mass).sum() + size * size * u)))
    return torch.stack(losses), torch.cat(slopes)


def check(scores, ranks, offsets, kind, max_size):
    from rmfast.kernels import listwise_loss as kernel

    u, exact = unit(scores.dtype), scores.double()
    loss, slope = kernel.listwise_loss(scores, ranks, offsets, kind, max_size)
    upstream = torch.randn(len(loss), device=loss.device).to(loss.dtype)
    got = kernel.listwise_loss_backward(upstream, slope, offsets, max_size, scores.dtype)
    true_loss = reference.listwise_loss(exact, ranks, offsets, kind)
    true_slope = oracle.listwise_slope(exact, ranks, offsets, kind)
    error, error_slope = errors(exact, ranks, offsets, kind, u)
    assert loss.dtype == slope.dtype == reference.wide(scores.dtype)
    assert got.dtype == scores.dtype and got.shape == scores.shape
    assert ((loss - true_loss).abs() <= error).all()
    assert ((slope - true_slope).abs() <= error_slope).all()
    true = oracle.listwise_loss_backward(
        upstream.double(), true_slope, offsets, torch.float64
    )  # fmt: skip
    scale = upstream.double().abs().repeat_interleave(offsets.diff())
    assert ((got - true).abs() <= scale * error_slope + u * true.abs() + ulp(true, got.dtype)).all()


def groups(sizes, dtype, device, ranks=torch.int64, ties=3):
    """Scores and ranks with gaps of NaN between them, every ``ties`` ranks the same."""
    total = sum(sizes)
    scores = torch.full((total, 2), float("nan"), dtype=dtype, device=device)
    scores[:, 0] = 3 * torch.randn(total)
    order = torch.full((total, 3), -7, device=device).to(ranks)
    order[:, 1] = (torch.randperm(total, device=device) // ties).to(ranks)
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0)
    return scores[:, 0], order[:, 1], offsets


SIZES = [3, 0, 1, 63, 2, 64, 1, 33, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_groups_with_ties(kind, dtype, device, poison):
    torch.manual_seed(0)
    check(*groups(SIZES, dtype, device), kind, 64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, size, device, poison):
    torch.manual_seed(size)
    check(*groups([size, size, max(1, size - 1)], torch.float32, device, ties=2), kind, size)


@pytest.mark.parametrize(
    "ranks", [torch.int32, torch.int8, torch.float32, torch.float64, torch.bfloat16]
)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_any_dtype(kind, ranks, device):
    torch.manual_seed(0)
    scores, order, offsets = groups([5, 9], torch.float32, device, ranks)
    check(scores, order - 2, offsets, kind, 9)


def test_large_ranks_are_told_apart(device):
    """Neighbours in int64 and in fp64, the same in fp32."""
    from rmfast.kernels import listwise_loss as kernel

    scores, offsets = torch.tensor([2.0, 0.0], device=device), torch.tensor([0, 2], device=device)
    for ranks in (torch.tensor([2**40, 2**40 + 1]), torch.tensor([1.0, 1 + 2.0**-40]).double()):
        ranks[1] = ranks[0] + (1 if ranks.dtype == torch.int64 else 2.0**-40)
        loss, _ = kernel.listwise_loss(scores, ranks.to(device), offsets, "all_pairs", 2)
        assert 0 < loss < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overflows(kind, device, poison):
    torch.manual_seed(0)
    for size in (1e4, 3e30):
        scores = torch.tensor([-size, size, 0.0, size, -size, 1.0], device=device)
        for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0]):
            ranks = torch.tensor(order, device=device)
            check(scores, ranks, torch.tensor([0, 6], device=device), kind, 6)


@pytest.mark.parametrize("gap", [5.0, 12.0, 17.0, 20.0, 80.0])
def test_small_losses_keep_their_digits(gap, device):
    from rmfast.kernels import listwise_loss as kernel

    scores, ranks = torch.tensor([gap, 0.0], device=device), torch.tensor([0, 1], device=device)
    loss, _ = kernel.listwise_loss(scores, ranks, torch.tensor([0, 2]).to(device), "all_pairs", 2)
    true = torch.tensor(-gap, dtype=torch.float64).exp().log1p()
    # exp rounds its argument, times log2(e), twice: gap units each; a dozen operations follow
    assert (loss.double().cpu() - true).abs() <= (2 * 1.5 * gap + 12) * 2.0**-24 * true


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 17), min_size=1, max_size=6),
    ties=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)
def test_any_groups(sizes, ties, kind, seed, device, poison):
    torch.manual_seed(seed)
    scores, ranks, offsets = groups(sizes, torch.float32, device, ties=ties)
    check(scores, ranks, offsets, kind, max(1, *sizes, 17 * (seed % 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, device):
    torch.manual_seed(0)
    scores, ranks, offsets = groups([4, 1, 0, 3, 7], torch.float64, device)
    leaf = scores.clone().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda s, reduction=reduction: ops.listwise_loss(
                s[:, None], ranks, offsets, kind=kind, reduction=reduction
            ),
            leaf,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_does_not_fit_is_nan(kind, device, poison):
    torch.manual_seed(0)
    scores, ranks, offsets = groups([4, 19, 3], torch.float32, device)
    leaf = scores.clone().requires_grad_()
    loss = ops.listwise_loss(leaf, ranks, offsets, kind=kind, reduction="none", max_size=6)
    assert loss.isnan().tolist() == [False, True, False]
    loss.backward(torch.ones_like(loss))
    assert leaf.grad.isnan().tolist() == [False] * 4 + [True] * 19 + [False] * 3


def test_one_launch_each_way(device, launches):
    from rmfast.kernels import listwise_loss as kernel

    seen = launches(kernel)
    scores, ranks, offsets = groups([4, 3], torch.bfloat16, device)
    leaf = scores.clone().requires_grad_()
    ops.listwise_loss(leaf, ranks, offsets).backward()
    assert seen == ["_forward_kernel", "_backward_kernel"]
