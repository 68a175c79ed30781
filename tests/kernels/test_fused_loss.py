"""Head and loss as one op: against their definitions, one after the other, in fp64."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import pair_errors, ulp, unit

from rmfast import ops, reference

LAYOUTS = ["halves", "interleaved", "index"]


def problem(count, layout, width, dtype, device, rows=None):
    """Rows with gaps between their elements, NaN where none is read; some are read repeatedly."""
    batch, pairs = 2 * count, layout
    if layout == "index":
        batch, pairs = count + 3, torch.randint(0, count + 2, (count, 2), device=device)
    rows = rows or batch + 4
    index = torch.randint(0, rows, (batch,))
    hidden = torch.full((rows, 2 * width), float("nan"), dtype=dtype)[:, ::2]
    hidden[index] = torch.randn(batch, width).to(dtype)
    weight = (torch.randn(width, 1) / width**0.5).to(dtype).T
    return hidden.to(device), index.to(device), weight.to(device), pairs


PACKED = (None, None, None, "hf")
PADDED = {  # the rule of a padded batch by its name: of its ids and mask
    "hf": lambda ids, mask: (ids, None, 1, "hf"),
    "no pad token": lambda ids, mask: (ids, mask, None, "hf"),
    "mask": lambda ids, mask: (ids, mask, 1, "mask"),
    "flags": lambda ids, mask: (ids, mask == 2, None, "mask"),
    "no mask": lambda ids, mask: (ids, None, None, "mask"),
}


def padded(count, layout, width, dtype, device, rule, length=7):
    """The same of a padded batch whose time runs first in memory; some rows have no token."""
    batch = 2 * count + (layout == "index")
    ids, mask = torch.randint(0, 3, (2, length, batch), device=device).mT
    ids[0], mask[0] = 1, 0
    rule = PADDED[rule](ids, mask)
    index = reference.pooled_rows(*rule)
    hidden = torch.full((length, batch, width), float("nan"), dtype=dtype, device=device).mT.mT
    hidden = hidden.transpose(0, 1)
    hidden[index // length, index % length] = torch.randn(batch, width).to(device, dtype)
    weight = (torch.randn(1, width) / width**0.5).to(device, dtype)
    pairs = torch.randint(batch, (count, 2), device=device) if layout == "index" else layout
    return hidden, index, weight, pairs, rule


def check(
    hidden, index, weight, bias, pairs, reduction="mean", tile=None, rows_tile=None, rule=PACKED,
    **made,
):  # fmt: skip
    """Without ``index``, which it is to find, where there is a ``rule``."""
    from rmfast.kernels import fused_loss as kernel

    batch, dtype, u = len(index), hidden.dtype, unit(hidden.dtype)
    layout, table = ("index", pairs) if torch.is_tensor(pairs) else (pairs, None)
    rest = [made.get(k) for k in ("margin", "target", "pair_weight")]
    numbers = [made.get(k, 0.0) for k in ("label_smoothing", "center", "gamma")]
    given = index if rule is PACKED else None
    loss, scores, metrics, found, grads, partial = kernel.fused_loss(
        hidden, given, weight, bias, table, *rest, *rule, layout, *numbers, reduction, tile=tile
    )
    assert torch.equal(found, index if given is None else index[:0])
    upstream = torch.tensor(-1.7, dtype=loss.dtype, device=loss.device)
    got = kernel.fused_loss_backward(
        upstream, grads, partial, index, weight, bias, table, layout, hidden.shape, dtype,
        rows_tile=rows_tile,
    )  # fmt: skip
    for x in (loss, scores, metrics, grads, partial):
        assert x.dtype == reference.wide(dtype)

    h, w = hidden.double(), weight.double()
    b = None if bias is None else bias.double()
    wide = [None if x is None else x.double() for x in rest]
    true_loss, true_scores, _ = reference.reward_head_pairwise_loss(
        h, index, w, b, pairs, *wide, *numbers, reduction
    )
    sizes = reference.reward_head(h.abs(), index, w.abs(), None if b is None else b.abs())[:, 0]
    error_scores = (hidden.shape[-1] + 1) * u * sizes
    assert ((scores - true_scores).abs() <= error_scores).all()

    error, error_slope = pair_errors(true_scores, error_scores, u, pairs, *rest, *numbers)
    each, _ = reference.pairwise_loss(true_scores, pairs, *wide, *numbers, "none")
    count = len(each)
    error = error.sum() + count * u * (each.abs() + error).sum()
    error = (error / count if reduction == "mean" else error) + u * true_loss.abs()
    assert (loss - true_loss).abs() <= error

    # the metrics of the scores it gave, which the lines above have bounded; where rows are in any
    # number of pairs it computes them once more for these, which may round otherwise
    _, own = reference.pairwise_loss(scores.double(), pairs)
    c, r = reference.pair_scores(scores.double(), pairs)
    assert ((metrics[:2] - own[:2]).abs() <= 4 * u).all()
    bound = (count + 2) * u * (c.abs() + r.abs()).mean()
    if layout == "index":
        bound += 2 * torch.cat(reference.pair_scores(error_scores, pairs)).sum() / count
    assert (metrics[2] - own[2]).abs() <= bound
    assert (metrics[3] - own[3]).abs() <= (batch + 2) * u * scores.abs().mean()
    assert torch.equal(metrics[4:].double(), own[4:])

    slope = oracle.pairwise_gradients(true_scores, pairs, *wide, *numbers, reduction)
    error_slope = torch.stack([error_slope] * 2)
    error_slope = error_slope / count if reduction == "mean" else error_slope
    # rounded when divided and when multiplied by weight or row and by upstream; at most
    # 2 * count sums
    error_slope = error_slope + (2 * count + 4) * u * (slope.abs() + error_slope)
    assert ((grads - slope).abs() <= error_slope).all()
    true_up = oracle.pairwise_loss_backward(upstream.double(), slope, pairs, batch)
    error_up = oracle.pairwise_loss_backward(upstream.double().abs(), error_slope, pairs, batch)
    true = oracle.reward_head_backward(true_up[:, None], h, index, w)
    error = oracle.reward_head_backward(error_up[:, None], h.abs(), index, w.abs())
    for ours, exact, bound in zip(got, true, error, strict=True):
        if ours is not None:
            assert ours.shape == exact.shape
            assert ((ours - exact).abs() <= bound + ulp(exact, ours.dtype)).all()
    unread = torch.ones(hidden.shape[:-1].numel(), dtype=torch.bool, device=hidden.device)
    unread[index] = False
    assert (got[0].flatten(0, -2)[unread] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 63, 123, 257])
def test_loss_and_gradients(width, dtype, layout, device, poison):
    torch.manual_seed(0)
    for count, tile in ((1, None), (13, 256)):  # 257 columns do not fit 256
        operands = problem(count, layout, width, dtype, device)
        bias = None if count == 1 else torch.randn(1, device=device).to(dtype)
        margin = torch.rand(count, device=device)
        check(*operands[:3], bias, operands[3], tile=tile, rows_tile=2048, margin=margin)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_options(reduction, layout, device, poison):
    torch.manual_seed(0)
    # 400 rows: several programs, whose partial sums are added up
    hidden, index, weight, pairs = problem(40, layout, 16, torch.bfloat16, device, rows=400)
    each = torch.rand(3, 40, device=device)
    for made in (
        {"label_smoothing": 0.2, "center": 0.1},
        {"target": each[0], "margin": each[1], "pair_weight": each[2], "center": 0.01},
        {"gamma": 2.0, "margin": each[1], "center": 0.01},
    ):
        check(hidden, index, weight, None, pairs, reduction, **made)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", PADDED)
def test_padded(rule, layout, device, poison):
    """The tokens are found, on either side of the padding; 33 columns do not fit 32."""
    torch.manual_seed(0)
    for count, width, length, tile in ((2, 33, 40, 32), (5, 4, 20, None)):
        *operands, pairs, by = padded(count, layout, width, torch.bfloat16, device, rule, length)
        bias = torch.randn(1, device=device).bfloat16()
        check(*operands, bias, pairs, tile=tile, rows_tile=2048, rule=by, center=0.1)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 16),
    layout=st.sampled_from(LAYOUTS),
    width=st.integers(1, 40),
    tile=st.sampled_from([4, 16, 64]),
    rows=st.integers(1, 300),
    rule=st.sampled_from([None, *PADDED]),
    seed=st.integers(0, 99),
)
def test_any_shape(count, layout, width, tile, rows, rule, seed, device):
    torch.manual_seed(seed)
    if rule is None:
        *operands, pairs = problem(count, layout, width, torch.float32, device, rows)
        check(*operands, None, pairs, tile=tile, rows_tile=1024)
    else:
        made = padded(count, layout, width, torch.float32, device, rule, rows // 30 + 1)
        *operands, pairs, rule = made
        check(*operands, None, pairs, tile=tile, rows_tile=1024, rule=rule)


def test_widest_rows(device, poison):
    torch.manual_seed(0)
    hidden, index, weight, pairs = problem(3, "halves", 16384, torch.bfloat16, device)
    check(hidden, index, weight, None, pairs)


@pytest.mark.parametrize(
    ("layout", "reduction"), [("halves", "mean"), ("interleaved", "sum"), ("index", "mean")]
)
def test_gradcheck(layout, reduction, device):
    torch.manual_seed(0)
    hidden, index, weight, pairs = problem(4, layout, 3, torch.float64, device)
    leaves = [hidden.nan_to_num(0.5), weight, torch.randn(1, dtype=torch.float64, device=device)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            ops.reward_head_pairwise_loss(
                h, index, w, b, pairs, reduction=reduction, center=0.1, label_smoothing=0.2
            ).loss
        ),
        [x.requires_grad_() for x in leaves],
        nondet_tol=0.0,
    )


def test_gradcheck_padded(device):
    torch.manual_seed(0)
    hidden, _, weight, _, rule = padded(2, "halves", 2, torch.float64, device, "hf", 2)
    names = ("input_ids", "attention_mask", "pad_token_id", "pooling")
    rule = dict(zip(names, rule, strict=True))
    leaves = [hidden.nan_to_num(0.5), weight, torch.randn(1, dtype=torch.float64, device=device)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.reward_head_pairwise_loss(h, None, w, b, **rule, gamma=2.0).loss,
        [x.requires_grad_() for x in leaves],
        nondet_tol=0.0,
    )


def test_two_launches_a_step_and_one_without_gradients(device, launches, monkeypatch):
    from rmfast.kernels import fused_loss as kernel

    seen = launches(kernel)
    hidden = torch.randn(40, 8, device=device, requires_grad=True)
    weight = torch.randn(1, 8, device=device, requires_grad=True)
    index = torch.arange(32, device=device)
    out = ops.reward_head_pairwise_loss(hidden, index, weight)
    assert not any(x.requires_grad for x in out[1:])
    out.loss.backward()
    assert seen == ["_forward_kernel", "_backward_kernel"]

    seen.clear()
    with torch.no_grad():
        alone = ops.reward_head_pairwise_loss(hidden, index, weight)
    assert seen == ["_forward_kernel"]
    torch.testing.assert_close(alone.loss, out.loss.detach())

    grad, seen[:] = weight.grad, []
    frozen = ops.reward_head_pairwise_loss(hidden, index, weight.detach())
    frozen.loss.backward()
    assert seen == ["_forward_kernel", "_backward_kernel"] and weight.grad is grad

    seen.clear()
    padded, ids = hidden.detach().view(4, 10, 8).requires_grad_(), index.new_ones(4, 10)
    ops.reward_head_pairwise_loss(padded, None, weight, input_ids=ids).loss.backward()
    assert seen == ["_forward_kernel", "_backward_kernel"]
    assert padded.grad.abs().sum(-1).count_nonzero(1).tolist() == [1] * 4


def test_the_counter_is_zero_after_each_launch(device):
    from rmfast.kernels import fused_loss as kernel

    hidden, index, weight, _ = problem(40, "halves", 4, torch.float32, device, rows=4000)
    args = (*[None] * 5, *PACKED, "halves", 0.0, 0.0, 0.0, "mean")
    first = kernel.fused_loss(hidden, index, weight, *args)
    assert first[-1].shape[0] > 1  # several programs
    assert [x.item() for x in kernel._arrived.values()] == [0] * len(kernel._arrived)
    again = kernel.fused_loss(hidden, index, weight, *args)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**5), st.integers(1, 10**6), st.integers(1, 16384), st.booleans())
def test_programs_cover_the_pairs_and_buffer_little(count, rows, width, low):
    from rmfast.kernels import fused_loss as kernel

    dtype = torch.bfloat16 if low else torch.float32
    grid, span, held = kernel.programs(count, 2 * count, rows, width, dtype, True)
    assert (grid - 1) * span < count <= grid * span and span % held == 0
    if grid > 1:
        moved = (rows + 2 * count) * width * dtype.itemsize
        assert 2 * 4 * grid * width <= 0.04 * moved


def test_opcheck(device):
    """The kernels give what their fakes promise: shapes, dtypes, strides, nothing aliased."""
    torch.manual_seed(0)
    hidden, index, weight, pairs = problem(6, "index", 5, torch.float32, device, rows=300)
    hidden = hidden.nan_to_num(0.5).requires_grad_()
    weight.requires_grad_()
    bias = torch.randn(1, device=device, requires_grad=True)
    scores = torch.randn(9, 2, device=device)[:, 1].requires_grad_()
    padded = torch.randn(3, 2, 5, device=device).transpose(0, 1).requires_grad_()
    ids = torch.tensor([[1, 0, 0], [1, 1, 0]], device=device)
    offsets = torch.tensor([0, 4, 4, 9], device=device)
    rmfast, none = torch.ops.rmfast, (None, None, None)
    both = rmfast.reward_head_pairwise_loss.default
    calls = [
        (rmfast.reward_head.default, (hidden, index, weight, bias, *PACKED)),
        (rmfast.reward_head.default, (padded, None, weight, bias, ids, None, 0, "hf")),
        (rmfast.pairwise_loss.default,
         (scores, pairs, *none, "index", 0.1, 0.0, 0.0, "none", True)),
        (both, (padded, None, weight, bias, None, *none, ids, ids, None, "mask", "interleaved", 0.0,
                0.1, 2.0, "sum", True, True)),
        (both, (hidden, index, weight, bias, pairs, *none, *PACKED, "index", 0.0, 0.1, 2.0, "sum",
                True, True)),
        (both, (hidden, index[:8], weight, None, None, *none, *PACKED, "halves", 0.1, 0.0, 0.0,
                "mean", True, True)),
        *((rmfast.listwise_loss.default,
           (scores, torch.arange(9, device=device) // 2, offsets, kind, 6))
          for kind in ("all_pairs", "plackett_luce")),
    ]  # fmt: skip
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "op", ["reward_head", "pairwise_loss", "reward_head_pairwise_loss", "listwise_loss"]
)
def test_no_second_derivative(op, device):
    hidden = torch.randn(6, 5, device=device, requires_grad=True)
    index, weight = torch.arange(6, device=device), torch.randn(1, 5, device=device)
    offsets = torch.tensor([0, 2, 6], device=device)
    loss = {
        "reward_head": lambda: ops.reward_head(hidden, index, weight).square().sum(),
        "pairwise_loss": lambda: ops.pairwise_loss(hidden[:, 0]).loss,
        "reward_head_pairwise_loss": lambda: ops.reward_head_pairwise_loss(
            hidden, index, weight
        ).loss.square(),
        "listwise_loss": lambda: ops.listwise_loss(hidden[:, 0], index, offsets),
    }[op]()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"rmfast\.ops\.{op} has no second derivative"):
        grad.sum().backward()
