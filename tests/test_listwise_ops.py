"""The listwise losses on the CPU against loops in plain Python: values, gradients, misuse."""

import itertools
import math

import oracle
import pytest
import torch

from rmfast import ops, reference

KINDS = ["all_pairs", "plackett_luce"]
OFFSETS = torch.tensor([0, 4, 4, 5, 8, 15])


def batch(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.randn(15, dtype=dtype), torch.randint(0, 4, (15,))


def all_pairs(scores, ranks):
    """-log(sigmoid(better - worse)), summed, over the number of all pairs."""
    total = sum(
        math.log1p(math.exp(worse - better))
        for (better, i), (worse, j) in itertools.permutations(zip(scores, ranks, strict=True), 2)
        if i < j
    )
    return total / max(1, math.comb(len(scores), 2))


def plackett_luce(scores, ranks):
    """-log of the product of the chances by which each is chosen from what is left."""
    product = 1.0
    for score, rank in zip(scores, ranks, strict=True):
        left = sum(math.exp(s) for s, r in zip(scores, ranks, strict=True) if r >= rank)
        product *= math.exp(score) / left
    return -math.log(product)


PLAIN = {"all_pairs": all_pairs, "plackett_luce": plackett_luce}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_values(kind, seed):
    scores, ranks = batch(seed)
    want = torch.tensor(
        [
            PLAIN[kind](scores[a:b].tolist(), ranks[a:b].tolist())
            for a, b in itertools.pairwise(OFFSETS.tolist())
        ],
        dtype=torch.float64,
    )
    for reduction, reduced in (("none", want), ("mean", want.mean()), ("sum", want.sum())):
        got = ops.listwise_loss(scores, ranks, OFFSETS, kind=kind, reduction=reduction)
        torch.testing.assert_close(got, reduced, rtol=1e-13, atol=1e-14)
    assert want[1] == want[2] == 0  # no item, and one


def test_two_items_are_one_pair():
    """Both kinds become the pairwise loss."""
    scores = torch.tensor([0.3, -1.1, 4.0, 2.0])
    ranks, offsets = torch.tensor([1, 0, 0, 1]), torch.tensor([0, 2, 4])
    want = -torch.nn.functional.logsigmoid(torch.tensor([-1.4, 2.0])).mean()
    for kind in KINDS:
        torch.testing.assert_close(ops.listwise_loss(scores, ranks, offsets, kind=kind), want)


def test_the_chances_of_all_orders_sum_to_one():
    scores, offsets = torch.randn(4, dtype=torch.float64), torch.tensor([0, 4])
    losses = [
        ops.listwise_loss(scores, torch.tensor(order), offsets, kind="plackett_luce")
        for order in itertools.permutations(range(4))
    ]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(kind, reduction):
    scores, ranks = batch()
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: ops.listwise_loss(s, ranks, OFFSETS, kind=kind, reduction=reduction), scores
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_written_out_by_hand(kind):
    scores, ranks = batch()
    slope = oracle.listwise_slope(scores, ranks, OFFSETS, kind)
    loss = reference.listwise_loss(scores.requires_grad_(), ranks, OFFSETS, kind)
    (want,) = torch.autograd.grad(loss.sum(), scores)
    torch.testing.assert_close(slope, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_shapes(kind, dtype):
    scores, ranks = batch(dtype=dtype)
    column = scores[:, None].requires_grad_()
    loss = ops.listwise_loss(column, ranks.to(dtype), OFFSETS, kind=kind)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.backward()
    assert column.grad.dtype == dtype and column.grad.shape == (15, 1)
    exact = ops.listwise_loss(scores.double(), ranks, OFFSETS, kind=kind)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind):
    scores, ranks = batch(dtype=torch.float32)
    scores.requires_grad_()

    def loss(s):
        return ops.listwise_loss(2 * s, ranks, OFFSETS, kind=kind, max_size=7)

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(scores)
    torch.testing.assert_close(got, loss(scores))
    ours, want = (torch.autograd.grad(x, scores)[0] for x in (got, loss(scores)))
    torch.testing.assert_close(ours, want)


def test_no_group():
    offsets = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="offsets must be int64"):  # the mean of nothing is NaN
        ops.listwise_loss(torch.randn(0), torch.zeros(0), offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(4, 2)}, "scores must be"),
        ({"scores": torch.arange(4)}, "scores must be of a floating"),
        ({"ranks": torch.arange(3)}, "ranks must be"),
        ({"ranks": torch.zeros(4, dtype=torch.bool)}, "ranks must be"),
        ({"ranks": torch.zeros(4, requires_grad=True)}, "ranks .* detach"),
        ({"ranks": torch.zeros(4, device="meta")}, "ranks is on meta"),
        ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, "offsets must be int64"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "offsets must be int64"),
        ({"offsets": torch.tensor([0, 3])}, "offsets must rise from 0 to 4"),
        ({"offsets": torch.tensor([1, 4])}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 3]), "max_size": 4}, "offsets must rise"),
        ({"offsets": torch.tensor([0, 1, 4]), "max_size": 2}, "group of 3, more than max_size"),
        ({"max_size": 0}, "max_size must be"),
        ({"max_size": 65}, "max_size must be"),
        ({"kind": "listnet"}, "kind must be"),
        ({"reduction": "max"}, "reduction must be"),
    ],
)
def test_names_the_argument(change, message):
    args = {
        "scores": torch.randn(4),
        "ranks": torch.arange(4),
        "offsets": torch.tensor([0, 4]),
    }
    with pytest.raises(ValueError, match=message):
        ops.listwise_loss(**(args | change))


def test_a_group_of_65_is_refused():
    with pytest.raises(ValueError, match="offsets hold a group of 65"):
        ops.listwise_loss(torch.randn(66), torch.arange(66), torch.tensor([0, 1, 66]))
