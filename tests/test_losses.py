"""Public losses against their formulas in fp64, written out here: values, gradients, misuse."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import rmfast
import tiny
from rmfast import losses, ops

DOUBLE = {"dtype": torch.float64}
NAN, INF = float("nan"), float("inf")


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE).to(dtype)


def reduced(loss, reduction):
    return loss if reduction == "none" else getattr(loss, reduction)()


def agree(ours, formula, leaves):
    """Values and gradients to a few roundings of fp64, and finite differences."""
    got, want = ours(*leaves), formula(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    up = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, up), torch.autograd.grad(want, leaves, up), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(ours, leaves)


def near(ours, formula, inputs, dtype):
    """Half precision in: the loss of just these numbers, in fp32, and a gradient in their dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got, want = ours(*leaves), formula(*exact)
    assert got.dtype == torch.float32
    # nothing on the way is rounded 32 times, nor is larger than this
    bound = 32 * 2**-24 * (1 + sum(x.abs().sum() for x in exact).item()) ** 2
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    got.sum().backward()
    want.sum().backward()
    step = torch.finfo(dtype).eps
    for x, y in zip(leaves, exact, strict=True):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=step, atol=bound)


# --- pairs

P = 5
EACH = {name: torch.rand(P, generator=torch.Generator().manual_seed(i), **DOUBLE)
        for i, name in enumerate(("margin", "target", "weight"))}  # fmt: skip
BT = {
    "plain": {},
    "margin": {"margin": EACH["margin"]},
    "soft labels": {"target": EACH["target"], "margin": EACH["margin"]},
    "smoothing": {"label_smoothing": 0.1, "weight": EACH["weight"]},
    "centred": {"center": 0.01, "weight": EACH["weight"]},
}


def bt(chosen, rejected, margin=0.0, target=None, label_smoothing=0.0, weight=1.0, center=0.0):
    p = torch.sigmoid(chosen - rejected - margin)
    t = 1 - label_smoothing if target is None else target
    likelihood = t * torch.log(p) + (1 - t) * torch.log(1 - p)
    return -weight * likelihood + center * (chosen + rejected) ** 2


def focal(chosen, rejected, gamma=2.0, margin=0.0, weight=1.0, center=0.0):
    p = torch.sigmoid(chosen - rejected - margin)
    fade = (1 - 2 * torch.clamp(p - 0.5, min=0)) ** gamma
    return -weight * fade * torch.log(p) + center * (chosen + rejected) ** 2


FOCAL = {
    "plain": {},
    "gamma": {"gamma": 0.5},
    "off": {"gamma": 0.0},
    "all": {"gamma": 3.0, "margin": EACH["margin"], "weight": EACH["weight"], "center": 0.1},
}
PAIRS = [(losses.bradley_terry, bt, options) for options in BT.values()]
PAIRS += [(losses.focal, focal, options) for options in FOCAL.values()]
IDS = [*(f"bradley_terry {name}" for name in BT), *(f"focal {name}" for name in FOCAL)]
EVERY_PAIR = pytest.mark.parametrize(("ours", "formula", "options"), PAIRS, ids=IDS)


@EVERY_PAIR
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pairs(ours, formula, options, reduction):
    leaves = [draw(P, seed=i).requires_grad_() for i in (0, 1)]
    agree(
        lambda c, r: ours(c, r, reduction=reduction, **options),
        lambda c, r: reduced(formula(c, r, **options), reduction),
        leaves,
    )


@EVERY_PAIR
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pairs_in_half_precision(ours, formula, options, dtype):
    near(
        lambda c, r: ours(c, r, reduction="none", **options),
        lambda c, r: formula(c, r, **{k: torch.as_tensor(v, **DOUBLE) for k, v in options.items()}),
        [draw(P, seed=i) for i in (0, 1)],
        dtype,
    )


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(*[st.floats(-30, 30)] * 3), min_size=1, max_size=9),
    gamma=st.floats(0, 5),
    columns=st.booleans(),
)
def test_any_pairs(pairs, gamma, columns):
    chosen, rejected, margin = torch.tensor(pairs, **DOUBLE).unbind(1)
    # p and 1 - p have lost what is below 1e-16 of one: the formulas with log p = -softplus(-z)
    z = chosen - rejected - margin
    plain = F.softplus(-z, threshold=1e3)
    fade = torch.where(z > 0, 2 * torch.sigmoid(-z), 1.0) ** gamma
    if columns:
        chosen, rejected = chosen[:, None], rejected[:, None]
    got = losses.bradley_terry(chosen, rejected, margin=margin, reduction="none")
    torch.testing.assert_close(got, plain, rtol=1e-13, atol=0)
    got = losses.focal(chosen, rejected, gamma=gamma, margin=margin, reduction="none")
    # the exponent, up to 5 * 90, is rounded a few times
    torch.testing.assert_close(got, fade * plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_extreme_scores_have_finite_losses_and_gradients(size):
    chosen = torch.tensor([size, -size], requires_grad=True)
    for loss in (losses.bradley_terry, losses.focal):
        out = loss(chosen, torch.zeros(2), reduction="none")
        assert out.tolist() == [0, torch.tensor(size).item()]
        assert torch.autograd.grad(out.sum(), chosen)[0].tolist() == [0, -1]


def test_as_trl_trains_a_reward_model():
    """RewardTrainer's two lines, for a pair of columns out of a model in bf16."""
    chosen, rejected = (draw(4, 1, dtype=torch.bfloat16, seed=i) for i in (0, 1))
    margin = torch.rand(4)
    rewards_chosen, rewards_rejected = chosen.float().squeeze(1), rejected.float().squeeze(1)
    loss = -F.logsigmoid(rewards_chosen - rewards_rejected - margin).mean()
    loss += 0.01 * torch.mean((rewards_chosen + rewards_rejected) ** 2)
    ours = losses.bradley_terry(chosen, rejected, margin=margin, center=0.01)
    torch.testing.assert_close(ours, loss)


# --- groups

OFFSETS = torch.tensor([0, 3, 4, 8])
RANKS = torch.tensor([1, 0, 2, 0, 1, 1, 0, 2])


def ranked(kind, scores, ranks):
    """One group, its answers one by one."""
    items = list(zip(scores, ranks.tolist(), strict=True))
    if kind == "all_pairs":
        terms = [
            -torch.log(torch.sigmoid(better - worse))
            for (better, i), (worse, j) in itertools.permutations(items, 2)
            if i < j
        ]
        return sum(terms, scores.sum() * 0) / max(1, len(items) * (len(items) - 1) // 2)
    chances = [score.exp() / sum(s.exp() for s, r in items if r >= rank) for score, rank in items]
    return -sum(torch.log(p) for p in chances)


@pytest.mark.parametrize("kind", ["all_pairs", "plackett_luce"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_groups(kind, reduction):
    def formula(scores):
        groups = zip(scores.split([3, 1, 4]), RANKS.split([3, 1, 4]), strict=True)
        return reduced(torch.stack([ranked(kind, *group) for group in groups]), reduction)

    def ours(scores):
        return getattr(losses, kind)(scores, RANKS, OFFSETS, reduction=reduction)

    agree(ours, formula, [draw(8).requires_grad_()])
    near(ours, formula, [draw(8)], torch.bfloat16)


@pytest.mark.parametrize("kind", ["all_pairs", "plackett_luce"])
def test_rows_are_groups(kind):
    loss, ranks = getattr(losses, kind), torch.tensor([[2, 0, 1], [0, 0, 1]])
    scores = draw(2, 3).requires_grad_()
    want = loss(scores.flatten()[:, None], ranks.flatten(), torch.tensor([0, 3, 6]))
    assert torch.equal(loss(scores, ranks), want)
    assert torch.autograd.gradcheck(lambda s: loss(s, ranks, reduction="none"), scores)


def test_a_group_of_two_is_a_pair():
    chosen, rejected = draw(4, seed=0), draw(4, seed=1)
    scores, ranks = torch.stack([rejected, chosen], 1), torch.tensor([[1, 0]]).expand(4, 2)
    want = losses.bradley_terry(chosen, rejected)
    for loss in (losses.all_pairs, losses.plackett_luce):
        torch.testing.assert_close(loss(scores, ranks), want, rtol=1e-14, atol=0)


# --- ratings


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_regression(shape, masked, reduction):
    targets = draw(*shape, seed=1)
    weight = draw(6, *[1] * (len(shape) - 1), seed=2).abs()
    mask = draw(*shape, seed=3) > 0 if masked else None
    chosen = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    given_ = targets if mask is None else targets.masked_fill(~mask, NAN)  # never read

    def formula(scores):
        each = weight * (scores - targets) ** 2 * chosen
        return each.sum() / chosen.sum() if reduction == "mean" else reduced(each, reduction)

    def ours(scores):
        return losses.regression(scores, given_, mask=mask, weight=weight, reduction=reduction)

    agree(ours, formula, [draw(*shape).requires_grad_()])
    near(ours, formula, [draw(*shape)], torch.bfloat16)


def test_attributes_are_weighed():
    """Torch's own MSE of the same, with a weight an attribute; a column is as good as a row."""
    scores, targets = draw(6, 3), torch.randint(0, 5, (6, 3))
    weight = torch.tensor([[0.5, 0.0, 2.0]])
    want = (F.mse_loss(scores, targets.double(), reduction="none") * weight).mean()
    torch.testing.assert_close(losses.regression(scores, targets, weight=weight), want)
    assert torch.equal(
        losses.regression(scores[:, :1], targets[:, 0]),
        losses.regression(scores[:, 0], targets[:, 0]),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_rated_is_no_loss_and_no_gradient(reduction):
    scores = draw(3, 2).requires_grad_()
    unrated = torch.full((3, 2), NAN)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    loss = losses.regression(scores, unrated, mask=mask, reduction=reduction)
    loss.backward()
    assert loss == 0 and torch.equal(scores.grad, torch.zeros(3, 2, **DOUBLE))


# --- policies


def logps(dtype=torch.float64):
    """Sums of some hundred log-probabilities: of the policy's pairs, then of the reference's."""
    return [(-300 + 20 * draw(7, seed=i)).to(dtype) for i in range(4)]


def dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, smoothing):
    """TRL's DPOTrainer, loss_type "sigmoid", with the smoothing of the authors' own code."""
    chosen_logratios = policy_chosen - reference_chosen
    rejected_logratios = policy_rejected - reference_rejected
    delta_score = chosen_logratios - rejected_logratios
    return (
        -F.logsigmoid(beta * delta_score) * (1 - smoothing)
        - F.logsigmoid(-beta * delta_score) * smoothing
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing, reduction):
    *policy, chosen, rejected = logps()
    agree(
        lambda c, r: losses.dpo(
            c, r, chosen, rejected, beta=0.3, label_smoothing=smoothing, reduction=reduction
        ),
        lambda c, r: reduced(dpo(c, r, chosen, rejected, 0.3, smoothing), reduction),
        [x.requires_grad_() for x in policy],
    )


def test_dpo_in_fp32():
    """Ratios are taken before anything is rounded to the size of a reward."""
    given_ = logps(torch.float32)
    want = dpo(*(x.double() for x in given_), 0.1, 0.0)
    got = losses.dpo(*given_, reduction="none")
    ratios = (given_[0] - given_[2]).abs() + (given_[1] - given_[3]).abs()
    # each ratio, its product with beta and their difference are rounded; then a dozen in the loss
    bound = 2**-24 * (4 * 0.1 * ratios.double() + 12 * (1 + 0.1 * ratios.double()))
    assert got.dtype == torch.float32 and ((got - want).abs() <= bound).all()


def test_dpo_is_the_loss_of_implicit_rewards():
    policy_chosen, policy_rejected, chosen, rejected = logps()
    rewards = [
        losses.implicit_reward(policy_chosen, chosen, 0.2),
        losses.implicit_reward(policy_rejected, rejected, 0.2),
    ]
    assert torch.equal(rewards[0], 0.2 * (policy_chosen - chosen))
    assert torch.equal(
        losses.dpo(*logps(), beta=0.2, label_smoothing=0.1),
        losses.bradley_terry(*rewards, label_smoothing=0.1),
    )
    assert losses.implicit_reward(*logps(torch.bfloat16)[:2]).dtype == torch.float32


def sequence_logps(model, starts, **batch):
    """log pi(y | x) of each row, from its model's logits."""
    logits = model(**batch).logits[:, :-1]
    after = batch["input_ids"][:, 1:]
    gain = logits.log_softmax(-1).gather(-1, after[..., None])[..., 0]
    place = torch.arange(1, after.shape[1] + 1)
    answer = (place >= torch.tensor(starts)[:, None]) & (batch["attention_mask"][:, 1:] == 1)
    return gain.where(answer, 0.0).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dpo_of_a_patched_policy(dtype):
    """Each prefix of the batch runs once, and loss and gradients are Hugging Face's."""
    prompt = list(range(3, 14))
    answers = [[20, 21, 22, 23], [40], [20, 31], [50, 51]]  # of two prompts, chosen then rejected
    starts = [11, 6, 11, 6]
    batch = tiny.padded([prompt[:n] + answer for n, answer in zip(starts, answers, strict=True)])
    policy = tiny.model("llama", dtype, cls=AutoModelForCausalLM)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)

    def step():
        policy.zero_grad()
        with torch.no_grad():
            theirs = sequence_logps(reference, starts, **batch).chunk(2)
        ours = sequence_logps(policy, starts, **batch).chunk(2)
        loss = losses.dpo(*ours, *theirs, label_smoothing=0.1)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in policy.named_parameters()}

    want, want_grads = step()
    tokens_run = []
    for model in (policy, reference):
        rmfast.patch(model).get_input_embeddings().register_forward_pre_hook(
            lambda _, args: tokens_run.append(args[0].numel())
        )
        assert rmfast.report(model).level == "backbone"
    loss, grads = step()
    assert tokens_run == [11 + 4 + 1 + 1 + 2] * 2 and not rmfast.report(policy).fallbacks
    # in fp64, what is left is the rounding of the model's own fp32 parts: see test_parity.py
    bound = 96 * 2**-24 if dtype == torch.float64 else 1e-4
    assert (loss - want).abs() <= bound * want.abs()
    assert tiny.grad_error(grads, want_grads) <= bound


# --- together


def test_losses_add_up():
    """GRM: a language head beside the reward head, its loss a term; gradients are the sum's."""
    torch.manual_seed(0)
    backbone, score, lm = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 5)
    inputs, labels, alpha = torch.randn(2, 3, 6), torch.randint(5, (2, 3)), 0.01
    parameters = [*backbone.parameters(), *score.parameters(), *lm.parameters()]

    def terms():
        hidden = torch.tanh(backbone(inputs))
        chosen, rejected = score(hidden[:, -1])
        reward = losses.bradley_terry(chosen, rejected, center=0.1)
        return reward, F.cross_entropy(lm(hidden).flatten(0, 1), labels.flatten())

    def gradient(loss):
        return torch.autograd.grad(loss, parameters, materialize_grads=True, retain_graph=True)

    reward, language = terms()
    both = gradient((1 - alpha) * reward + alpha * language)
    apart = zip(gradient(reward), gradient(language), strict=True)
    for got, (a, b) in zip(both, apart, strict=True):
        torch.testing.assert_close(got, (1 - alpha) * a + alpha * b)


def test_compile_without_graph_breaks():
    torch.compiler.reset()
    scores, ranks = draw(4, 2, dtype=torch.float32), torch.tensor([[0, 1]] * 4)
    sums = logps(torch.float32)
    margin, mask = torch.rand(4), torch.tensor([[True, False]] * 4)

    def every(scores, first, second):
        chosen, rejected = scores.unbind(1)
        return (
            losses.bradley_terry(chosen, rejected, margin=margin)
            + losses.focal(chosen, rejected)
            + losses.all_pairs(scores, ranks)
            + losses.plackett_luce(scores, ranks)
            + losses.regression(scores, ranks, mask=mask)
            + losses.dpo(first, second, *sums[2:])
        )

    leaves = [x.requires_grad_() for x in (scores, *sums[:2])]
    got = torch.compile(every, fullgraph=True, backend="aot_eager")(*leaves)
    want = every(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_autocast_rounds_nothing():
    chosen, rejected = draw(4, dtype=torch.float32), draw(4, dtype=torch.float32, seed=1)
    want = [loss(chosen, rejected) for loss in (losses.focal, losses.regression)]
    with torch.autocast("cpu", torch.bfloat16):
        got = [loss(chosen, rejected) for loss in (losses.focal, losses.regression)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_import_brings_neither_transformers_nor_kernels():
    code = "import sys; from rmfast import losses; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "rmfast.losses" in loaded
    assert not [m for m in loaded if m.split(".")[0] == "transformers" or "rmfast.kernels" in m]


# --- misuse


def one(value, size=3, place=1):
    x = torch.zeros(size)
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": torch.randn(3, 2)}, r"chosen must be \[P\] or \[P, 1\], got shape \(3, 2\)"),
        ({"rejected": torch.randn(())}, "rejected must be"),
        ({"rejected": torch.randn(2)}, "chosen has 3 scores, rejected 2"),
        ({"rejected": torch.arange(3)}, "rejected must be of a floating dtype"),
        ({"rejected": torch.zeros(3, device="meta")}, "rejected is on meta"),
        ({"chosen": torch.zeros(0), "rejected": torch.zeros(0)}, "chosen and rejected are empty"),
        ({"margin": one(NAN)}, "margin of pair 1 is nan: it must be finite"),
        ({"margin": one(INF, place=2)}, "margin of pair 2 is inf"),
        ({"margin": torch.zeros(3, 1)}, r"margin must be \[3\]"),
        ({"target": one(1.5)}, "target of pair 1 is 1.5: it must be between 0 and 1"),
        ({"target": one(NAN)}, "target of pair 1 is nan"),
        ({"target": torch.zeros(3), "label_smoothing": 0.1}, "target and label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing must be"),
        ({"weight": one(NAN)}, "weight of pair 1 is nan"),
        ({"weight": torch.ones(3, requires_grad=True)}, "weight gets no gradient"),
        ({"reduction": "average"}, "reduction must be"),
    ],
)
def test_bradley_terry_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        losses.bradley_terry(**({"chosen": torch.randn(3), "rejected": torch.randn(3)} | change))


@pytest.mark.parametrize("gamma", [-1.0, NAN, INF])
def test_focal_names_gamma(gamma):
    with pytest.raises(ValueError, match="gamma must be 0 or more, and finite"):
        losses.focal(torch.randn(3), torch.randn(3), gamma=gamma)


def test_the_fused_op_names_the_pair():
    hidden, index = torch.randn(4, 2), torch.arange(4)
    with pytest.raises(ValueError, match="pair_weight of pair 0 is nan"):
        ops.reward_head_pairwise_loss(
            hidden, index, torch.randn(1, 2), pair_weight=torch.tensor([NAN, 1.0])
        )


@pytest.mark.parametrize("loss", [losses.all_pairs, losses.plackett_luce])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(6, 1)}, r"scores must be \[G, K\], .*offsets, got shape \(6, 1\)"),
        ({"scores": torch.randn(6)}, "come with offsets"),
        ({"scores": torch.randn(2, 65)}, "K from 2 to 64"),
        ({"scores": torch.randn(0, 3)}, "scores must be"),
        ({"ranks": torch.zeros(3, 2)}, r"ranks must be \(2, 3\) like scores"),
        ({"ranks": torch.tensor([[0, 1, 2.0], [0, NAN, 1]])}, r"ranks\[4\] is NaN"),
        ({"ranks": torch.zeros(2, 3, dtype=torch.bool)}, "ranks must be int or float"),
        ({"offsets": torch.tensor([0, 2])}, "scores must be"),
        ({"reduction": "average"}, "reduction must be"),
    ],
)
def test_groups_name_the_argument(loss, change, message):
    args = {"scores": torch.randn(2, 3), "ranks": torch.zeros(2, 3)} | change
    with pytest.raises(ValueError, match=message):
        loss(**args)


def test_offsets_that_do_not_fit():
    with pytest.raises(ValueError, match="offsets must rise from 0 to 6"):
        losses.all_pairs(torch.randn(6), torch.zeros(6), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(2, 3, 1)}, "scores must be"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, "scores must be of a floating dtype"),
        ({"scores": torch.randn(0, 3), "targets": torch.randn(0, 3)}, "scores is empty"),
        ({"targets": torch.randn(2)}, r"targets must be \(2, 3\) like scores, got \(2,\)"),
        ({"targets": torch.tensor([[0, 1, 2], [0, NAN, 1]])}, r"targets\[1, 1\] is nan: .*mask"),
        ({"targets": torch.randn(2, 3, requires_grad=True)}, "targets gets no gradient"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must be bool \(2, 3\)"),
        ({"weight": torch.ones(3)}, r"weight must be \[B, A\], \[B, 1\] or \[1, A\]"),
        ({"weight": torch.ones(3, 1)}, "weight must be"),
        ({"weight": torch.ones(2, 1, device="meta")}, "weight is on meta"),
        ({"reduction": "average"}, "reduction must be"),
    ],
)
def test_regression_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        losses.regression(**({"scores": torch.randn(2, 3), "targets": torch.randn(2, 3)} | change))


def test_an_unmasked_target_that_is_missing():
    targets = torch.tensor([[0, NAN], [NAN, 1]])
    mask = torch.tensor([[True, False], [True, True]])
    with pytest.raises(ValueError, match=r"targets\[1, 0\] is nan"):
        losses.regression(torch.randn(2, 2), targets, mask=mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_chosen": torch.randn(2)}, r"reference_chosen must be \(2,\) like policy_chosen"),
        ({"reference_rejected": torch.randn(3, 1)}, "reference_rejected must be"),
        ({"policy_rejected": torch.arange(3)}, "policy_rejected must be of a floating dtype"),
        ({"reference_chosen": torch.randn(3, requires_grad=True)}, "reference_chosen .*no_grad"),
        ({"reference_chosen": torch.zeros(3, device="meta")}, "reference_chosen is on meta"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"beta": NAN}, "beta must be above 0"),
        ({"label_smoothing": 1.1}, "label_smoothing must be"),
        ({"reduction": "average"}, "reduction must be"),
    ],
)
def test_dpo_names_the_argument(change, message):
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    with pytest.raises(ValueError, match=message):
        losses.dpo(**({name: torch.randn(3) for name in names} | change))


def test_dpo_of_unequal_sides():
    two, three = torch.randn(2), torch.randn(3)
    with pytest.raises(ValueError, match="policy_chosen has 2 scores, policy_rejected 3"):
        losses.dpo(two, three, two, three)
    with pytest.raises(ValueError, match="reference must be"):
        losses.implicit_reward(two, three)
