"""Pairwise loss, pooled head and both at once on the CPU: values, gradients, compile, misuse."""

import oracle
import pytest
import torch
from torch.nn import functional as F

from rmfast import ops, reference

DOUBLE = {"dtype": torch.float64}
LAYOUTS = ["halves", "interleaved", "index"]
# of 6 scores and 3 pairs; score 3 is in two pairs, scores 1 and 5 in none
INDEX = torch.tensor([[3, 0], [2, 3], [4, 2]])
OPTIONS = {
    "plain": {},
    "margin": {"margin": torch.tensor([0.5, 0.0, 2.0], **DOUBLE)},
    "smoothing": {"label_smoothing": 0.2},
    "target": {"target": torch.tensor([1.0, 0.3, 0.0], **DOUBLE)},
    "weight": {"weight": torch.tensor([2.0, 0.0, 0.5], **DOUBLE), "center": 0.3},
    "focal": {"gamma": 2.0, "weight": torch.tensor([2.0, 1.0, 0.5], **DOUBLE)},
    "focal, more": {"gamma": 0.7, "margin": torch.tensor([0.5, 0.0, 2.0], **DOUBLE), "center": 0.3},
}


def pairs_of(layout):
    return INDEX if layout == "index" else layout


def plain(
    scores, layout, margin=None, target=None, weight=None, label_smoothing=0.0, center=0.0,
    gamma=0.0,
):  # fmt: skip
    """The loss of each pair as the papers write it, through torch's cross entropy."""
    chosen, rejected = {
        "halves": lambda: scores.chunk(2),
        "interleaved": lambda: scores.view(-1, 2).unbind(1),
        "index": lambda: (scores[INDEX[:, 0]], scores[INDEX[:, 1]]),
    }[layout]()
    logit = chosen - rejected if margin is None else chosen - rejected - margin
    target = torch.full_like(logit, 1 - label_smoothing) if target is None else target
    loss = F.binary_cross_entropy_with_logits(logit, target, weight, reduction="none")
    if gamma:
        loss = loss * (1 - 2 * F.relu(logit.sigmoid() - 0.5)) ** gamma
    return loss + center * (chosen + rejected).square()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", OPTIONS)
def test_pairwise_loss(case, layout, reduction):
    torch.manual_seed(0)
    scores = torch.randn(6, **DOUBLE, requires_grad=True)
    want = plain(scores, layout, **OPTIONS[case])
    want = want if reduction == "none" else getattr(want, reduction)()
    got = ops.pairwise_loss(scores, pairs_of(layout), reduction=reduction, **OPTIONS[case])
    torch.testing.assert_close(got.loss, want, rtol=1e-14, atol=1e-15)
    grad = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(x, scores, grad)[0] for x in (got.loss, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)
    assert torch.autograd.gradcheck(
        lambda s: ops.pairwise_loss(s, pairs_of(layout), reduction=reduction, **OPTIONS[case]).loss,
        scores,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", OPTIONS)
def test_the_reference_is_differentiable_and_agrees_with_its_gradients(case, layout):
    torch.manual_seed(0)
    scores = torch.randn(6, **DOUBLE, requires_grad=True)
    loss, _ = reference.pairwise_loss(scores, pairs_of(layout), **OPTIONS[case])
    grads = oracle.pairwise_gradients(scores.detach(), pairs_of(layout), **OPTIONS[case])
    ours = oracle.pairwise_loss_backward(torch.ones(()), grads, pairs_of(layout), 6)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, scores)[0], rtol=1e-13, atol=1e-15)


def test_the_loss_of_trl():
    """RewardTrainer's lines, with its margin and centering, on logits [2 * P, 1] in bf16."""
    torch.manual_seed(0)
    logits = torch.randn(8, 1).bfloat16()
    margin = torch.rand(4)
    chosen, rejected = torch.chunk(logits.squeeze(-1).float(), chunks=2)
    loss = -F.logsigmoid(chosen - rejected - margin).mean()
    loss = loss + 0.01 * torch.mean((chosen + rejected) ** 2)
    out = ops.pairwise_loss(logits, margin=margin, center=0.01)
    torch.testing.assert_close(out.loss, loss)
    assert out.accuracy == (chosen > rejected).float().mean()
    torch.testing.assert_close(out.margin, (chosen - rejected).mean())
    torch.testing.assert_close(out.reward, logits.float().mean())
    assert (out.reward_min, out.reward_max) == (logits.min(), logits.max())


def test_ties_are_told_apart():
    out = ops.pairwise_loss(torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 3.0, 2.0, 4.0]))
    assert (out.accuracy, out.ties) == (0.25, 0.5)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 200.0])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_far_apart_scores_neither_overflow_nor_lose_their_gradient(size, gamma):
    scores = torch.tensor([size, -size, -size, size], requires_grad=True)
    out = ops.pairwise_loss(scores, gamma=gamma, reduction="sum")
    out.loss.backward()
    assert out.loss == 2 * size
    assert scores.grad.tolist() == [0.0, -1.0, 0.0, 1.0]


def test_metrics_carry_no_gradient():
    out = ops.pairwise_loss(torch.randn(4, requires_grad=True))
    assert out.loss.requires_grad and not any(x.requires_grad for x in out[1:])


def head(dtype=torch.float64, rows=7, width=5):
    torch.manual_seed(0)
    return [
        torch.randn(*shape, dtype=dtype, requires_grad=True)
        for shape in ((rows, width), (1, width), (1,))
    ]


ROWS = torch.tensor([6, 0, 3, 3, 1, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", OPTIONS)
def test_head_and_loss(case, reduction, layout):
    leaves = head()
    options = dict(OPTIONS[case])
    scores = F.linear(leaves[0][ROWS], *leaves[1:])[:, 0]
    want = getattr(plain(scores, layout, **options), reduction)()
    if "weight" in options:
        options["pair_weight"] = options.pop("weight")

    def run(*leaves):
        return ops.reward_head_pairwise_loss(
            leaves[0], ROWS, *leaves[1:], pairs=pairs_of(layout), reduction=reduction, **options
        )

    got = run(*leaves)
    torch.testing.assert_close(got.loss, want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got.scores, scores.detach(), rtol=1e-13, atol=1e-15)
    apart = ops.pairwise_loss(scores.detach(), pairs_of(layout), center=1.0)
    torch.testing.assert_close(got[2:], apart[1:], rtol=1e-13, atol=1e-15)
    assert not any(x.requires_grad for x in got[1:])
    for ours, theirs in zip(
        torch.autograd.grad(got.loss, leaves, torch.tensor(1.7, **DOUBLE)),
        torch.autograd.grad(want, leaves, torch.tensor(1.7, **DOUBLE)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda *x: run(*x).loss, leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_head_and_loss_of_what_requires_a_gradient(wanted):
    whole = head()
    ops.reward_head_pairwise_loss(whole[0], ROWS, *whole[1:]).loss.backward()
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(whole)]
    ops.reward_head_pairwise_loss(some[0], ROWS, *some[1:]).loss.backward()
    for i, (a, b) in enumerate(zip(some, whole, strict=True)):
        assert torch.equal(a.grad, b.grad) if i in wanted else a.grad is None


def test_bf16_rows_under_an_fp32_head():
    hidden, weight, bias = (x.detach() for x in head(torch.float32))
    hidden = hidden.bfloat16().requires_grad_()
    weight.requires_grad_()
    out = ops.reward_head_pairwise_loss(hidden, ROWS, weight, bias)
    out.loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    want = F.linear(hidden.detach().float()[ROWS], weight.detach(), bias)[:, 0]
    torch.testing.assert_close(out.scores, want)


@pytest.mark.parametrize(
    "rule",
    [
        {"pad_token_id": 0},
        {},
        {"pooling": "mask"},
        {"pooling": "mask", "attention_mask": torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0] * 4])},
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_pooled_reward_head(rule, bias):
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, 5, **DOUBLE).transpose(0, 1).requires_grad_()
    weight = torch.randn(2, 5, **DOUBLE, requires_grad=True)
    b = torch.randn(2, **DOUBLE, requires_grad=True) if bias else None
    ids = torch.tensor([[7, 7, 0, 0], [0, 7, 0, 7], [0, 0, 0, 0]])
    column = reference.last_token(
        ids, rule.get("attention_mask"), rule.get("pad_token_id"), rule.get("pooling", "hf")
    )
    leaves = (hidden, weight) + ((b,) if bias else ())

    def run(hidden, weight, *b):
        return ops.pooled_reward_head(hidden, ids, weight, *b, **rule)

    want = F.linear(hidden[torch.arange(3), column], weight, b)
    torch.testing.assert_close(run(*leaves), want, rtol=1e-13, atol=1e-15)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("pairs", ["halves", "interleaved", torch.tensor([[3, 0], [3, 2], [1, 1]])])
def test_head_and_loss_of_a_padded_batch(pairs):
    """The same as of its pooled rows; rows of the gradient that no score was read from are zero."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, 5, **DOUBLE).transpose(0, 1).requires_grad_()
    _, weight, bias = head()
    ids = torch.tensor([[7, 7, 0], [0, 7, 0], [0, 0, 7], [0, 0, 0]])
    mask, rows = (ids == 7).float(), torch.tensor([1, 4, 8, 9])
    count = len(pairs) if torch.is_tensor(pairs) else 2
    options = {"margin": torch.rand(count), "pair_weight": torch.rand(count), "center": 0.1}
    leaves, packed = (hidden, weight, bias), hidden.flatten(0, 1)
    want = ops.reward_head_pairwise_loss(packed, rows, weight, bias, pairs, **options)
    for rule in (
        {"pad_token_id": 0, "attention_mask": 1 - mask},
        {"pooling": "mask", "attention_mask": mask},
    ):
        rule |= {"input_ids": ids, **options}
        got = ops.reward_head_pairwise_loss(hidden, None, weight, bias, pairs, **rule)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        grads = torch.autograd.grad(got.loss, leaves)
        theirs = torch.autograd.grad(want.loss, leaves, retain_graph=True)
        torch.testing.assert_close(grads, theirs, rtol=1e-13, atol=1e-15)

    def run(hidden, weight, bias):
        return ops.reward_head_pairwise_loss(hidden, None, weight, bias, pairs, **rule).loss

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    last = ops.reward_head_pairwise_loss(hidden, None, weight, bias, input_ids=ids)
    torch.testing.assert_close(last.scores, F.linear(hidden[:, -1], weight, bias)[:, 0].detach())


def test_compile_without_graph_breaks():
    torch.compiler.reset()
    hidden, weight, bias = head(torch.float32)
    padded = torch.randn(2, 3, 5)
    ids = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def step(hidden, weight, bias):
        out = ops.reward_head_pairwise_loss(hidden, ROWS, weight, bias, center=0.1)
        again = ops.pairwise_loss(ops.reward_head(hidden, ROWS, weight, bias), INDEX)
        rule = {"input_ids": ids, "pad_token_id": 0}
        pooled = ops.pooled_reward_head(padded, weight=weight, bias=bias, **rule)
        fused = ops.reward_head_pairwise_loss(padded, None, weight, bias, **rule)
        loss = out.loss + again.loss + pooled.sum() + fused.loss
        return loss, out.accuracy, again.reward, fused.margin

    want = step(hidden, weight, bias)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, bias)
    torch.testing.assert_close(got, want)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], leaves), torch.autograd.grad(want[0], leaves)
    )


def test_second_derivatives():
    """Without a kernel, the operations are differentiable as often as torch's own are."""
    hidden, weight, bias = head()
    leaves = (hidden, weight, bias)

    def both(hidden, weight, bias):
        return ops.reward_head_pairwise_loss(hidden, ROWS, weight, bias, center=0.1).loss

    assert torch.autograd.gradgradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(lambda s: ops.pairwise_loss(s).loss, hidden[:, 0][:6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(2, 2)}, "scores must be"),
        ({"scores": torch.arange(4)}, "scores must be of a floating"),
        ({"scores": torch.randn(3)}, "scores has 3"),
        ({"scores": torch.randn(0)}, "scores is empty"),
        ({"pairs": "quarters"}, "pairs must be"),
        ({"pairs": torch.zeros(2, 2)}, "pairs must be int64"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.int64)}, "pairs is empty"),
        ({"margin": torch.zeros(3)}, "margin must be"),
        ({"margin": torch.zeros(2, requires_grad=True)}, "margin .* detach"),
        ({"target": torch.zeros(2, 1)}, "target must be"),
        ({"target": torch.zeros(2), "label_smoothing": 0.1}, "target and label_smoothing"),
        ({"label_smoothing": 1.5}, "label_smoothing must be"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"gamma": float("nan")}, "gamma must be"),
        ({"gamma": 2.0, "target": torch.zeros(2)}, "target cannot go with gamma"),
        ({"gamma": 2.0, "label_smoothing": 0.1}, "label_smoothing cannot go with gamma"),
        ({"weight": torch.zeros(4)}, "weight must be"),
        ({"weight": torch.zeros(2, requires_grad=True)}, "weight .* detach"),
        ({"margin": torch.zeros(2, device="meta")}, "margin is on meta"),
        ({"reduction": "batchmean"}, "reduction must be"),
    ],
)
def test_pairwise_loss_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        ops.pairwise_loss(**({"scores": torch.randn(4)} | change))


PADDED = {"hidden": torch.randn(4, 3, 5), "index": None, "input_ids": torch.ones(4, 3).int()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(7)}, "hidden must be"),
        ({"index": torch.zeros(6)}, "index must be"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, "index has 5"),
        ({"weight": torch.randn(2, 5), "bias": None}, "weight must be \\[1, H\\]"),
        ({"weight": torch.randn(1, 4)}, "weight must be"),
        ({"bias": torch.randn(2)}, "bias must be"),
        ({"pair_weight": torch.zeros(2)}, "pair_weight must be"),
        ({"reduction": "none"}, "reduction must be"),
        ({"index": None}, "give index"),
        ({"input_ids": torch.ones(7, 5, dtype=torch.int64)}, "give index"),
        (PADDED | {"hidden": torch.randn(7, 5)}, "hidden must be \\[B, T, H\\]"),
        (PADDED | {"input_ids": torch.ones(4, 2)}, "input_ids must be int"),
        (PADDED | {"pooling": "mask", "attention_mask": torch.ones(4, 2)}, "attention_mask must"),
        (PADDED | {"pooling": "first"}, "pooling must be"),
        (PADDED | {"hidden": torch.randn(3, 3, 5), "input_ids": torch.ones(3, 3).int()},
         "input_ids has 3"),
        (PADDED | {"input_ids": torch.ones(4, 3, device="meta").int()}, "input_ids is on meta"),
    ],
)  # fmt: skip
def test_head_and_loss_names_the_argument(change, message):
    hidden, weight, bias = (x.detach() for x in head(torch.float32))
    args = {"hidden": hidden, "index": ROWS, "weight": weight, "bias": bias}
    with pytest.raises(ValueError, match=message):
        ops.reward_head_pairwise_loss(**(args | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(2, 5)}, "hidden must be"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.int64)}, "input_ids must be"),
        ({"input_ids": torch.ones(2, 3)}, "input_ids must be"),
        ({"attention_mask": torch.ones(2, 4), "pooling": "mask"}, "attention_mask must be"),
        ({"pooling": "first"}, "pooling must be"),
        ({"weight": torch.randn(1, 4)}, "weight must be"),
        ({"bias": torch.randn(3)}, "bias must be"),
    ],
)
def test_pooled_reward_head_names_the_argument(change, message):
    args = {
        "hidden": torch.randn(2, 3, 5),
        "input_ids": torch.ones(2, 3, dtype=torch.int64),
        "weight": torch.randn(1, 5),
    }
    with pytest.raises(ValueError, match=message):
        ops.pooled_reward_head(**(args | change))


def test_gradients_of_huge_scores_are_torchs():
    """Without centering no sum of the two scores is formed: it may be infinite, or NaN times 0."""
    for values in ([float("-inf"), 2.0, 1.0, 2.0], [2e38, 0.0, 1.8e38, 0.0]):
        ours, theirs = (torch.tensor(values, requires_grad=True) for _ in range(2))
        ops.pairwise_loss(ours, reduction="sum").loss.backward()
        chosen, rejected = theirs.chunk(2)
        (-F.logsigmoid(chosen - rejected).sum()).backward()
        assert torch.equal(ours.grad, theirs.grad)


def test_a_pair_out_of_range_is_refused():
    with pytest.raises(ValueError, match="pairs must be from 0 to 3, got -1 to 2"):
        ops.pairwise_loss(torch.randn(4), torch.tensor([[-1, 2]]))


def test_a_small_gamma_is_near_none_and_a_tie_counts_in_full():
    """The focal loss joins the plain one; where it has its kink, the derivative is -1/2."""
    scores = torch.tensor([1.5, 0.0, -2.0, 0.5, 0.0, 1.0], **DOUBLE, requires_grad=True)
    losses = [ops.pairwise_loss(scores, gamma=g, reduction="none").loss for g in (0.0, 1e-9, 2.0)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    assert torch.equal(losses[0][1:], losses[2][1:]) and losses[2][0] < losses[0][0]
    (grad,) = torch.autograd.grad(losses[2][1], scores)
    assert grad.tolist() == [0, -0.5, 0, 0, 0.5, 0]


def test_gradients_of_rows_that_repeat_are_the_same_in_every_run():
    """Sums in one order: torch's index_put adds in any, where it is large and threads are many."""
    torch.manual_seed(0)
    hidden = torch.randn(8, 4096, requires_grad=True)
    index, weight = torch.arange(64) % 8, torch.randn(1, 4096, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grads = [
            torch.autograd.grad(
                ops.reward_head(hidden, index, weight).square().sum(), [hidden, weight]
            )
            for _ in range(20)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in grads for a, b in zip(again, grads[0], strict=True))


@pytest.mark.parametrize("op", ["reward_head", "reward_head_pairwise_loss"])
def test_a_backward_under_autocast_is_not_rounded(op):
    hidden, weight, bias = head(torch.float32)

    def grads():
        out = getattr(ops, op)(hidden, ROWS, weight, bias)
        loss = out.square().sum() if op == "reward_head" else out.loss
        return torch.autograd.grad(loss, [hidden, weight, bias])

    want = grads()
    with torch.autocast("cpu", torch.bfloat16):
        got = grads()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
