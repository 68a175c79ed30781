"""The pairwise loss kernels against their definition in fp64."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import pair_errors, ulp, unit

from rmfast import ops, reference

LAYOUTS = ["halves", "interleaved", "index"]
OPTIONS = {
    "plain": {},
    "margin": {"margin": True},
    "smoothing": {"label_smoothing": 0.1},
    "target": {"target": True, "margin": True},
    "center": {"center": 0.01},
    "weight": {"weight": True, "center": 0.5, "label_smoothing": 0.3},
    "focal": {"gamma": 2.0},
    "focal, more": {"gamma": 0.5, "margin": True, "weight": True, "center": 0.1},
}


def options(case, count, device):
    made = dict(OPTIONS[case])
    for name, draw in (("margin", torch.randn), ("target", torch.rand), ("weight", torch.rand)):
        if made.get(name):
            made[name] = draw(count, device=device)
    return made


def layout_of(layout, count, device):
    """Number of scores, and the pairs: some scores in many of them, some in none."""
    if layout != "index":
        return 2 * count, layout
    return count + 3, torch.randint(0, count + 2, (count, 2), device=device)


def check(scores, pairs, made, reduction, upstream, block=None):
    from rmfast.kernels import pairwise_loss as kernel

    batch, dtype, u = len(scores), scores.dtype, unit(scores.dtype)
    layout, index = ("index", pairs) if torch.is_tensor(pairs) else (pairs, None)
    rest = [made.get(k) for k in ("margin", "target", "weight")]
    numbers = [made.get(k, 0.0) for k in ("label_smoothing", "center", "gamma")]
    loss, metrics, grads = kernel.pairwise_loss(
        scores, index, *rest, layout, *numbers, reduction, **({"block": block} if block else {})
    )
    got = kernel.pairwise_loss_backward(
        upstream, grads, index, layout, batch, dtype, **({"block": block} if block else {})
    )
    exact = scores.double()
    wide = [None if x is None else x.double() for x in rest]
    true, true_metrics = reference.pairwise_loss(exact, pairs, *wide, *numbers, reduction)
    error, error_slope = pair_errors(exact, 0.0, u, pairs, *rest, *numbers)
    count = len(error)
    each, _ = reference.pairwise_loss(exact, pairs, *wide, *numbers, "none")
    if reduction != "none":  # each term takes part in fewer than `count` sums
        error = error.sum() + count * u * (each.abs() + error).sum()
        error = (error / count if reduction == "mean" else error) + u * true.abs()
    assert loss.dtype == got.dtype if dtype == torch.float64 else loss.dtype == torch.float32
    assert loss.shape == true.shape and ((loss - true).abs() <= error).all()

    c, r = reference.pair_scores(exact, pairs)
    assert ((metrics[:2] - true_metrics[:2]).abs() <= 4 * u).all()  # a quotient of counts
    assert (metrics[2] - true_metrics[2]).abs() <= (count + 1) * u * (c.abs() + r.abs()).mean()
    assert (metrics[3] - true_metrics[3]).abs() <= (batch + 1) * u * exact.abs().mean()
    assert torch.equal(metrics[4:].double(), true_metrics[4:])

    true_grads = oracle.pairwise_gradients(exact, pairs, *wide, *numbers, reduction)
    error_grads = torch.stack([error_slope, error_slope])
    error_grads = (error_grads / count if reduction == "mean" else error_grads) + u * abs(
        true_grads
    )
    assert ((grads - true_grads).abs() <= error_grads).all()
    true = oracle.pairwise_loss_backward(upstream.double(), true_grads, pairs, batch)
    # rounded by the product with upstream, and in fewer than 2 * count sums
    error_grads = error_grads + (2 * count + 1) * u * (true_grads.abs() + error_grads)
    error = oracle.pairwise_loss_backward(upstream.double().abs(), error_grads, pairs, batch)
    assert ((got - true).abs() <= error + ulp(true, dtype)).all()
    unused = torch.ones_like(exact)
    places = torch.arange(batch, device=got.device)
    unused[torch.stack(reference.pair_scores(places, pairs)).flatten()] = 0
    assert (got[unused.bool()] == 0).all()


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient(reduction, layout, case, device, poison):
    torch.manual_seed(0)
    for count, dtype, block in (
        (1, torch.float32, None),
        (5, torch.float64, 2),
        (63, torch.bfloat16, None),
        (63, torch.float16, 32),
        (123, torch.float32, 32),
    ):
        batch, pairs = layout_of(layout, count, device)
        scores = 3 * torch.randn(batch, 3, device=device).to(dtype)[:, 1]  # gaps
        scores[-1] = scores[0]
        upstream = torch.randn(count if reduction == "none" else (), device=device)
        upstream = upstream.to(reference.wide(dtype))
        check(scores, pairs, options(case, count, device), reduction, upstream, block)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    case=st.sampled_from(sorted(OPTIONS)),
    values=st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 0.1, 80.0, -80.0, 1e4, -1e4, 1e-30]),
        min_size=1,
        max_size=9,
    ),
    block=st.sampled_from([1, 8, 64]),
    seed=st.integers(0, 99),
)
def test_ties_and_extremes(count, layout, case, values, block, seed, device):
    torch.manual_seed(seed)
    batch, pairs = layout_of(layout, count, device)
    scores = torch.tensor(values, device=device)[torch.randint(len(values), (batch,))]
    upstream = torch.ones((), device=device)
    check(scores, pairs, options(case, count, device), "mean", upstream, block)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_small_losses_keep_their_digits(gamma, device):
    """log(1 + exp(-z)), down to 1e-35: relative to itself, not to one."""
    from rmfast.kernels import pairwise_loss as kernel

    z = torch.linspace(0, 80 / (1 + gamma), 321, device=device)
    scores = torch.cat([z, torch.zeros_like(z)])
    loss, _, grads = kernel.pairwise_loss(
        scores, None, None, None, None, "halves", 0.0, 0.0, gamma, "none"
    )
    lost, below = -torch.nn.functional.logsigmoid(z.double()), torch.sigmoid(-z.double())
    focus = (2 * below) ** gamma
    exact = focus * lost
    # exp rounds z * log2(e); then a few units each for exp, log and the fraction; the same for the
    # power, whose argument is gamma times that
    bound = (2 * z + 12 + gamma * (3 * z + 4) + 4) * unit(torch.float32)
    assert ((loss - exact).abs() <= bound * exact).all()
    rest = torch.where(z > 0, gamma * (1 - below) * lost, 0.0)
    exact = -focus * (below + rest)
    assert ((grads[0] - exact).abs() <= bound * exact.abs()).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_infinite_scores_are_as_in_torch(gamma, device):
    scores = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0, 0.0, 0.0], device=device)
    scores.requires_grad_()
    got = ops.pairwise_loss(scores, "halves", gamma=gamma, reduction="none")
    true, metrics = reference.pairwise_loss(scores, "halves", gamma=gamma, reduction="none")
    grads = [torch.autograd.grad(x.sum(), scores)[0][:2] for x in (got.loss, true)]
    assert torch.equal(*grads) and grads[0].tolist() == [0, -1]
    assert torch.equal(got.loss[:2], true[:2]) and got.loss[2].isnan() and true[2].isnan()
    assert got.accuracy == metrics[0] and got.reward.isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", OPTIONS)
def test_gradcheck(case, layout, device):
    torch.manual_seed(0)
    batch, pairs = layout_of(layout, 3, device)
    scores = torch.randn(batch, 1, dtype=torch.float64, device=device, requires_grad=True)
    made = options(case, 3, device)
    assert torch.autograd.gradcheck(
        lambda s: ops.pairwise_loss(s, pairs, reduction="none", **made).loss, scores
    )


def test_launches(device, launches):
    from rmfast.kernels import pairwise_loss as kernel

    seen = launches(kernel)
    scores = torch.randn(8, device=device, requires_grad=True)
    out = ops.pairwise_loss(scores, margin=torch.ones(4, device=device), center=0.1)
    assert seen == ["_forward_kernel"] and not any(x.requires_grad for x in out[1:])
    out.loss.backward()
    assert seen == ["_forward_kernel", "_backward_kernel"]
    with torch.no_grad():  # nothing is left for a backward
        assert torch.equal(ops.pairwise_loss(scores, center=0.1).reward, out.reward)
