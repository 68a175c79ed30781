"""The reward head kernels against their definition in fp64."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounding import ulp, unit

from rmfast import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = unit(torch.float32)


def operands(rows, width, labels, dtype, device, index):
    """Hidden rows with gaps between their elements; NaN in those that no score is read from."""
    hidden = torch.full((rows, 2 * width), float("nan"), dtype=dtype)[:, ::2]
    used = torch.tensor(index, dtype=torch.int64).unique()
    hidden[used] = torch.randn(len(used), width).to(dtype)
    weight = torch.randn(width, labels).to(dtype).T
    return (
        hidden.to(device),
        torch.tensor(index, dtype=torch.int64, device=device),
        weight.to(device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 123, 199, 1024, 1025])
@pytest.mark.parametrize("labels", [1, 9])
def test_forward(width, labels, dtype, device, poison):
    from rmfast.kernels import reward_head as kernel

    torch.manual_seed(0)
    hidden, index, weight = operands(17, width, labels, dtype, device, [16, 3, 3, 0])
    for bias in (None, torch.randn(labels, device=device)):
        got, _ = kernel.reward_head(hidden, index, weight, bias, tile=2048)
        assert got.dtype == torch.float32
        exact = reference.reward_head(
            hidden.double(), index, weight.double(), bias.double() if bias is not None else None
        )
        sizes = reference.reward_head(hidden.abs().double(), index, weight.abs().double(), None)
        sizes += 0 if bias is None else bias.abs()
        # a product rounds once, then takes part in fewer than `width` sums, and one with the bias
        assert ((got - exact).abs() <= (width + 1) * UNIT * sizes).all()


@pytest.mark.parametrize("width", [16384, 4097])
def test_forward_of_wide_rows(width, device, poison):
    from rmfast.kernels import reward_head as kernel

    torch.manual_seed(0)
    hidden, index, weight = operands(3, width, 1, torch.bfloat16, device, [2, 0])
    got, _ = kernel.reward_head(hidden, index, weight, None)
    exact = reference.reward_head(hidden.double(), index, weight.double(), None)
    sizes = reference.reward_head(hidden.abs().double(), index, weight.abs().double(), None)
    assert ((got - exact).abs() <= width * UNIT * sizes).all()


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "time-first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_pooled_token(data, device):
    """Column and score of any ids and mask, whatever their strides."""
    from rmfast.kernels import reward_head as kernel

    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 11))
    cells = st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length)
    ids = torch.tensor(data.draw(cells), device=device).view(batch, length)
    mask = torch.tensor(data.draw(cells), device=device).view(batch, length)
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    ids = layout(ids.to(data.draw(st.sampled_from([torch.int64, torch.int32]))))
    mask = layout(mask.to(data.draw(st.sampled_from([torch.int64, torch.bool, torch.float32]))))
    pad = data.draw(st.sampled_from([None, 0, 1, -1]))
    rule = (
        data.draw(st.sampled_from([None, mask])),
        pad,
        data.draw(st.sampled_from(["hf", "mask"])),
    )
    hidden = layout(torch.randn(batch, length, 3, device=device))
    weight = torch.randn(1, 3, device=device)
    column = reference.last_token(ids, *rule)
    start = torch.arange(batch, device=device)
    spoiled = torch.full_like(hidden, float("nan"))
    spoiled[start, column] = hidden[start, column]
    block = data.draw(st.sampled_from([1, 4, 16]))
    scores, index = kernel.reward_head(spoiled, None, weight, None, ids, *rule, tokens_block=block)
    assert torch.equal(index, start * length + column)
    exact = reference.reward_head(hidden.double(), index, weight.double(), None)
    sizes = reference.reward_head(hidden.abs().double(), index, weight.abs().double(), None)
    assert ((scores - exact).abs() <= 3 * UNIT * sizes).all()


BACKWARD = {
    # rows, index
    "one": (1, [0]),
    "few": (9, [8, 3, 3, 0, 3]),
    "all": (6, [5, 4, 3, 2, 1, 0]),
    "none": (4, []),
    "many": (33, [(7 * i) % 31 for i in range(41)]),
}


SHAPES = [(1, 1), (63, 5), (123, 1), (129, 9), (513, 1)]  # width, labels


@pytest.mark.parametrize(
    ("case", "width", "labels", "dtype"),
    [("few", *shape, dtype) for shape in SHAPES for dtype in DTYPES]
    + [(case, 63, 1, torch.float16) for case in BACKWARD]
    + [("many", 513, 3, torch.bfloat16), ("one", 16384, 1, torch.bfloat16)],
)
def test_backward(case, width, labels, dtype, device, poison):
    from rmfast.kernels import reward_head as kernel

    torch.manual_seed(0)
    rows, index = BACKWARD[case]
    uses = len(index)
    hidden, index, weight = operands(rows, width, labels, dtype, device, index)
    bias = torch.randn(labels, device=device)
    grad = torch.randn(labels, uses, device=device).T
    got = kernel.reward_head_backward(grad, hidden, index, weight, bias, rows_tile=1024)
    _check_backward(got, grad, hidden, index, weight)


def _check_backward(got, grad, hidden, index, weight):
    wide = (grad.double(), hidden.double(), index, weight.double())
    exact = oracle.reward_head_backward(*wide)
    sizes = oracle.reward_head_backward(*(abs(x) for x in wide))
    repeats, uses = index.bincount().max() if len(index) else 0, len(index)
    # hidden: sums over a row's uses, then over the labels. weight, bias: sums over all uses
    terms = (repeats + weight.shape[0] + 1, uses + 1, uses)
    for ours, true, size, n in zip(got, exact, sizes, terms, strict=True):
        assert ours.shape == true.shape
        assert ((ours - true).abs() <= n * UNIT * size + ulp(true, ours.dtype)).all()
    assert (got[0] == 0)[exact[0] == 0].all()  # rows of no score, exactly


def test_backward_of_a_padded_batch(device, poison):
    from rmfast.kernels import reward_head as kernel

    torch.manual_seed(0)
    hidden = torch.randn(7, 3, 65, device=device).transpose(0, 1)  # [3, 7, 65], time first
    ids = torch.tensor([[1, 0, 0, 0, 0, 0, 0], [1] * 7, [0, 0, 0, 1, 1, 0, 1]], device=device)
    weight, bias = torch.randn(2, 65, device=device), torch.randn(2, device=device)
    scores, index = kernel.reward_head(hidden, None, weight, bias, ids, None, 0, "hf")
    assert index.tolist() == [0, 13, 20]
    grad = torch.randn_like(scores)
    got = kernel.reward_head_backward(grad, hidden, index, weight, bias)
    assert got[0].is_contiguous()
    _check_backward(got, grad, hidden, index, weight)


def test_a_weight_of_nan_stays_out_of_the_rows_of_no_score(device, poison):
    from rmfast.kernels import reward_head as kernel

    hidden, index, weight = operands(5, 8, 1, torch.float32, device, [2])
    weight[0, 3] = float("nan")
    rows, _, _ = kernel.reward_head_backward(
        torch.ones(1, 1, device=device), hidden, index, weight, None
    )
    assert rows.isnan().sum() == 1 and rows[2, 3].isnan()


def test_launches(device, launches):
    from rmfast.kernels import reward_head as kernel

    seen = launches(kernel)
    hidden = torch.randn(4, 2, device=device, requires_grad=True)
    weight = torch.randn(1, 2, device=device, requires_grad=True)
    bias = torch.randn(1, device=device, requires_grad=True)
    index = torch.tensor([1, 1, 3], device=device)
    scores = ops.reward_head(hidden, index, weight, bias)
    scores.sum().backward()
    assert seen == ["_forward_kernel", "_backward_kernel"]
    assert torch.equal(hidden.grad, index.bincount(minlength=4)[:, None] * weight.detach())
    assert bias.grad.item() == 3


def test_only_what_is_asked_for(device, poison):
    from rmfast.kernels import reward_head as kernel

    hidden, index, weight = operands(5, 8, 1, torch.float32, device, [2, 4])
    grad, bias = torch.ones(2, 1, device=device), torch.ones(1, device=device)
    whole = kernel.reward_head_backward(grad, hidden, index, weight, bias)
    rows = kernel.reward_head_backward(grad, hidden, index, weight, bias, True, False)
    rest = kernel.reward_head_backward(grad, hidden, index, weight, bias, False, True)
    assert torch.equal(rows[0], whole[0]) and rows[1:] == (None, None)
    assert rest[0] is None and torch.equal(rest[1], whole[1]) and torch.equal(rest[2], whole[2])


@pytest.mark.parametrize("labels", [1, 3])
def test_gradcheck(labels, device):
    torch.manual_seed(0)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((5, 3), (labels, 3), (labels,))
    ]
    index = torch.tensor([4, 0, 4], device=device)
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.reward_head(h, index, w, b), leaves, nondet_tol=0.0
    )
    padded = torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(labels, 4, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[1, 1, 0], [0, 0, 0]], device=device)
    assert torch.autograd.gradcheck(
        lambda h, w: ops.pooled_reward_head(h, ids, w, pad_token_id=0),
        (padded, weight),
        nondet_tol=0.0,
    )
