"""The ops against their definitions: values, gradients, fake kernels, misuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional as F

import rmfast
from rmfast import losses, ops, reference
from rmfast.ops import _cpu as cpu


def random_trie(seed, batch=6, length=12, values=3):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=g).tolist()
    return rmfast.pack([torch.randint(0, values, (n,), generator=g) for n in lengths])


def qkv(trie, heads, kv_heads, width, dtype, rows=None, value_width=None):
    n = len(trie)
    shapes = [
        (heads, rows or n, width),
        (kv_heads, n, width),
        (kv_heads, n, value_width or width),
    ]
    # as transformers lays them out: tokens first in memory
    return [torch.randn(1, m, h, d, dtype=dtype).transpose(1, 2) for h, m, d in shapes]


def plan_of(trie, queries=None):
    return ops.TriePlan(trie.subtree_end, trie.position_ids, queries)


def dense_attention(query, key, value, trie, queries, sinks, scale, window, softcap):
    seen = (trie.subtree_end, trie.position_ids, queries)
    return reference.trie_attention(query, key, value, seen, sinks, scale, window, softcap)


CASES = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 5.0, "sinks": True},
    "wide-values": {"value_width": 5},
}


@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "pooled"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(case, heads, pooled):
    options = dict(CASES[case])
    value_width = options.pop("value_width", None)
    for seed in range(3):
        torch.manual_seed(seed)
        trie = random_trie(seed)
        queries = trie.pool_index.unique() if pooled else None
        rows = len(queries) if pooled else None
        leaves = qkv(trie, *heads, 8, torch.float64, rows, value_width)
        if options.get("sinks") is not None:
            options["sinks"] = torch.randn(heads[0], dtype=torch.float64)
            leaves.append(options["sinks"])
        leaves = [x.requires_grad_() for x in leaves]
        sinks = options.get("sinks")
        window, softcap = options.get("window"), options.get("softcap")
        got = ops.trie_attention(
            *leaves[:3], plan_of(trie, queries), sinks=sinks,
            scale=0.3, window=window, softcap=softcap,
        )  # fmt: skip
        want = dense_attention(*leaves[:3], trie, queries, sinks, 0.3, window, softcap)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(want)
        for ours, theirs in zip(
            torch.autograd.grad(got, leaves, grad),
            torch.autograd.grad(want, leaves, grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([None, 5]))
def test_nodes_from_one_on_are_those_queries(seed, first, window):
    torch.manual_seed(seed)
    trie = random_trie(seed, 6, 40, values=2)
    first %= len(trie)
    queries = torch.arange(first, len(trie))
    leaves = [x.requires_grad_() for x in qkv(trie, 2, 1, 4, torch.float64, len(queries))]
    plan = ops.TriePlan(trie.subtree_end, trie.position_ids, first=first)
    got = ops.trie_attention(*leaves, plan, window=window)
    for rows in (queries, None):  # the definition, of queries and of a range
        want = dense_attention(*leaves, trie, rows, None, 0.5, window, None)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 300))
def test_attention_of_many_shapes(seed, batch, length):
    """Long rows are cut and short ones joined: neither changes a number."""
    torch.manual_seed(seed)
    trie = random_trie(seed, batch, length, values=2)
    leaves = qkv(trie, 2, 1, 4, torch.float64)
    got = ops.trie_attention(*leaves, plan_of(trie))
    want = dense_attention(*leaves, trie, None, None, 0.5, None, None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_attention_after_many_keys():
    """Tiles are larger there; a short one stands beside them."""
    prompt = [1] * (cpu._MANY + 5)
    trie = rmfast.pack([[*prompt, row, *[row] * (20 * row)] for row in range(5)])
    leaves = qkv(trie, 2, 1, 8, torch.float64)
    got = ops.trie_attention(*leaves, plan_of(trie))
    want = dense_attention(*leaves, trie, None, None, 8**-0.5, None, None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    made = cpu.bundles(trie.subtree_end, trie.position_ids, None, len(trie), None)
    assert {b.queries.shape[1] for b in made} == {cpu._TILE, 2 * cpu._TILE}


def test_no_tensor_has_n_by_n_elements():
    """Rows of 64 tokens: what is computed grows with their number, not with its square."""
    trie = rmfast.pack([[row] + [1] * 63 for row in range(200)])
    bundles = cpu.bundles(trie.subtree_end, trie.position_ids, None, len(trie), None)
    assert sum(b.hidden.numel() for b in bundles) <= 2 * 64 * len(trie) < len(trie) ** 2 / 50
    assert max(b.hidden.numel() for b in bundles) <= 2**17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_low_precision(dtype):
    """As near to fp64 as one dense call of torch's own attention, in which the largest weight is 1.

    There only the answer is rounded where one weight counts, here that weight is, too: each by as
    much, so the square root of 2 is the most that lies between them. With gradients, it is not.
    """
    torch.manual_seed(0)
    trie = random_trie(3, batch=16, length=120)
    leaves = qkv(trie, 6, 2, 32, dtype)
    exact = dense_attention(*(x.double() for x in leaves), trie, None, None, 32**-0.5, None, None)
    every = torch.arange(len(trie))
    allowed = reference.trie_mask(every, every, trie.subtree_end, trie.position_ids, None)
    theirs = F.scaled_dot_product_attention(*leaves, attn_mask=allowed, enable_gqa=True)
    far = (theirs.transpose(1, 2) - exact).norm()
    for learns, bound in ((False, 2**0.5), (True, 1.1)):
        ours = ops.trie_attention(leaves[0].requires_grad_(learns), *leaves[1:], plan_of(trie))
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= bound * far


def test_autocast_stays_out_of_the_fp32_sums():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 300), torch.randn(1, 300)
    index = torch.tensor([2, 0])
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.reward_head(hidden, index, weight)
    assert torch.equal(got, ops.reward_head(hidden, index, weight))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("labels", [1, 5])
def test_reward_head_gradients(labels, bias):
    torch.manual_seed(0)
    hidden = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(labels, 9, dtype=torch.float64, requires_grad=True)
    b = torch.randn(labels, dtype=torch.float64, requires_grad=True) if bias else None
    index = torch.tensor([0, 6, 6, 2])
    want = F.linear(hidden[index], weight, b)
    torch.testing.assert_close(ops.reward_head(hidden, index, weight, b), want)
    leaves = (hidden, weight) + ((b,) if bias else ())
    assert torch.autograd.gradcheck(
        lambda h, w, *b: ops.reward_head(h, index, w, *b), leaves, fast_mode=False
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reward_head_sums_in_fp32(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4096).to(dtype), torch.randn(1, 4096).to(dtype)
    index = torch.tensor([4, 1, 1])
    got = ops.reward_head(hidden, index, weight)
    assert got.dtype == torch.float32
    exact = hidden[index].double() @ weight.double().T
    # n products of unit variance, each sum rounded to fp32: at most n units, sqrt(n) expected
    assert (got - exact).abs().max() <= 4096 * 2.0**-24 * 4


def test_reward_head_backward_keeps_dtypes_and_makes_one_row_a_token():
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1, 8, requires_grad=True)
    ops.reward_head(hidden, torch.tensor([5, 5, 1]), weight).sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert hidden.grad.shape == (6, 8)
    assert hidden.grad[[0, 2, 3, 4]].abs().max() == 0
    torch.testing.assert_close(hidden.grad[5].float(), 2 * weight[0], rtol=2**-8, atol=0)


def test_opcheck():
    trie = random_trie(0)
    leaves = [x.requires_grad_() for x in qkv(trie, 4, 2, 8, torch.float32)]
    sinks = torch.randn(4, requires_grad=True)
    pooled = trie.pool_index.unique()
    first = leaves[0][:, :, : len(pooled)]
    attention = torch.ops.rmfast.trie_attention.default
    rest = (trie.subtree_end, trie.position_ids)
    carrier = torch.empty(0)
    calls = [
        (attention, (*leaves, *rest, None, carrier, None, 0.3, None, None, False, True)),
        (attention, (*leaves, *rest, None, carrier, sinks, 0.3, 3, 2.0, False, True)),
        (attention,
         (first, *leaves[1:], *rest, pooled, carrier, None, 0.3, None, None, False, True)),
    ]  # fmt: skip
    for op, args in calls:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(3)}, "hidden"),
        ({"index": torch.zeros(2)}, "index"),
        ({"weight": torch.randn(1, 5)}, "weight"),
        ({"bias": torch.randn(2)}, "bias"),
    ],
)
def test_reward_head_names_the_argument(change, message):
    args = {
        "hidden": torch.randn(3, 4),
        "index": torch.tensor([0]),
        "weight": torch.randn(1, 4),
        "bias": None,
    }
    with pytest.raises(ValueError, match=message):
        ops.reward_head(**(args | change))


@pytest.mark.parametrize("index", [[-1], [3], [0, 7]])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(ValueError, match="index must be from 0 to 2"):
        ops.reward_head(torch.randn(3, 4), torch.tensor(index), torch.randn(1, 4))


def test_attention_names_the_argument():
    trie = random_trie(0)
    q, k, v = qkv(trie, 4, 2, 8, torch.float32)
    rest = (trie.subtree_end, trie.position_ids)
    plan = ops.TriePlan(*rest)
    with pytest.raises(ValueError, match="query"):
        ops.trie_attention(q[:, :, 1:], k, v, plan)
    with pytest.raises(ValueError, match="key"):
        ops.trie_attention(q, k[:, :, 1:], v, plan)
    with pytest.raises(ValueError, match="heads"):
        ops.trie_attention(q[:, :3], k, v, plan)
    with pytest.raises(ValueError, match=r"value is torch\.float64 and query"):
        ops.trie_attention(q, k, v.double(), plan)
    with pytest.raises(ValueError, match="key has head_dim 7"):
        ops.trie_attention(q, k[..., 1:], v, plan)
    with pytest.raises(ValueError, match="sinks"):
        ops.trie_attention(q, k, v, plan, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="subtree_end must be int32"):
        ops.TriePlan(rest[0].long(), rest[1])
    with pytest.raises(ValueError, match="position_ids must be"):
        ops.TriePlan(rest[0], rest[1][1:])
    with pytest.raises(ValueError, match="queries must be int64"):
        ops.TriePlan(*rest, rest[1][:0])
    for bad in ({"first": -1}, {"first": len(trie)}, {"first": 1, "queries": rest[1][:1]}):
        with pytest.raises(ValueError, match="first must be a node"):
            ops.TriePlan(*rest, **bad)
    with pytest.raises(ValueError, match=rf"query must be \[1, Hq, {len(trie) - 2}, D\]"):
        ops.trie_attention(q, k, v, ops.TriePlan(*rest, first=2))
    with pytest.raises(ValueError, match="queries must rise"):
        ops.trie_attention(q[:, :, :2], k, v, ops.TriePlan(*rest, torch.tensor([1, 1])))
    for name, bad in (("window", 0), ("softcap", 0.0), ("softcap", -1.0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            ops.trie_attention(q, k, v, plan, **{name: bad})
    with pytest.raises(ValueError, match="query must be of a floating dtype"):
        ops.trie_attention(*(x.long() for x in (q, k, v)), plan)
    with pytest.raises(ValueError, match="backend='triton' cannot run"):
        ops.trie_attention(q, k, v, plan, backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        ops.trie_attention(q, k, v, plan, backend="cudnn")


def test_attention_compiles_in_one_graph():
    trie = random_trie(0)
    leaves = [x.requires_grad_() for x in qkv(trie, 4, 2, 8, torch.float32)]

    plan = plan_of(trie)

    def call(q, k, v):
        return ops.trie_attention(q, k, v, plan, window=5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, got = call(*leaves), compiled(*leaves)
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        assert torch.equal(a, b)


def test_attention_refuses_a_second_derivative():
    trie = random_trie(0)
    leaves = [x.requires_grad_() for x in qkv(trie, 4, 2, 8, torch.float32)]
    out = ops.trie_attention(*leaves, plan_of(trie))
    (first,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="trie_attention has no second derivative"):
        first.sum().backward()


TRIE = random_trie(0, batch=3, length=4)
GROUPS = torch.tensor([3, 1, 2, 1, 1]), torch.tensor([0, 3, 5])  # ranks, offsets
BOTH = {"bias": torch.ones(1).double(), "pairs": torch.tensor([[0, 2], [1, 2]])}
OF_ONE = {  # by name a function of [2, N, 4], which is read in all that has a derivative
    "attention": lambda x: ops.trie_attention(
        x, x[:, :1].exp(), x[:, 1:].sin(), plan_of(TRIE), sinks=x[0, :, 0, 0], window=3, softcap=2.0
    ),
    "head": lambda x: ops.reward_head(
        x[0, 0], torch.tensor([1, 0, 1]), x[0, 1, :2], x[0, 0, 0, :2]
    ),
    "pooled head": lambda x: ops.pooled_reward_head(
        x[0], torch.tensor([[3] * len(TRIE), [3] + [0] * (len(TRIE) - 1)]), x[0, 0, :2],
        pad_token_id=0,
    ),
    "pairs": lambda x: ops.pairwise_loss(x[0, 0, :4, 0], center=0.1, gamma=2.0).loss,
    "head and pairs": lambda x: ops.reward_head_pairwise_loss(
        x[0, 0], torch.tensor([1, 0, 1]), x[0, 1, :1], **BOTH
    ).loss,
    "head and pairs, padded": lambda x: ops.reward_head_pairwise_loss(
        x[0], None, x[0, 1, :1], input_ids=torch.ones(2, len(TRIE)).int(), pad_token_id=0
    ).loss,
    "ratings": lambda x: losses.regression(x[0, 0, :4, 0], x[0, 1, :4, 0].detach()),
    "all pairs": lambda x: ops.listwise_loss(x[0, 0, :5, 0], *GROUPS),
    "plackett-luce": lambda x: ops.listwise_loss(
        x[0, 0, :5, 0], *GROUPS, kind="plackett_luce", max_size=3
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", [False, True], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("name", OF_ONE)
def test_transforms_of_torch_and_forward_mode(name, kernels, monkeypatch):
    torch.manual_seed(0)
    x, direction = (torch.randn(1, 2, len(TRIE), 4, dtype=torch.float64) for _ in range(2))

    def value(x):
        return OF_ONE[name](x).sin().sum()

    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(value(x), x)[0]

    want, rows = slope(x), torch.stack([x, 2 * x])
    each = torch.stack([slope(row) for row in rows])
    if kernels:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    near = torch.testing.assert_close
    near(torch.func.grad(value)(x), want)
    near(torch.func.vmap(torch.func.grad(value))(rows), each)
    near(torch.func.jvp(value, (x,), (direction,))[1], (want * direction).sum())
    with forward_ad.dual_level():
        dual = value(forward_ad.make_dual(x, direction))
        near(forward_ad.unpack_dual(dual).tangent, (want * direction).sum())
    curvature = torch.func.hessian(value)(x)
    near(curvature, torch.func.jacrev(torch.func.grad(value))(x))
    assert curvature.abs().max() > 0


def test_places_that_stand_for_many_are_not_looked_at():
    hidden, weight = torch.randn(2, 3, 4), torch.randn(1, 4)
    index = torch.tensor([[0, 2], [1, 1]])
    got = torch.func.vmap(ops.reward_head, in_dims=(0, 0, None))(hidden, index, weight)
    assert torch.equal(
        got, torch.stack([ops.reward_head(hidden[i], index[i], weight) for i in (0, 1)])
    )


def test_a_plan_is_made_once_and_of_one_batch(monkeypatch):
    calls = []
    make = cpu._bundles
    monkeypatch.setattr(cpu, "_bundles", lambda *args: calls.append(args) or make(*args))
    trie = random_trie(0)
    leaves = [x.requires_grad_() for x in qkv(trie, 4, 2, 8, torch.float64)]
    plan = plan_of(trie)
    outs = [ops.trie_attention(*leaves, plan, window=window) for window in (None, 5, None)]
    for out in outs:
        torch.autograd.grad(out.sum(), leaves)
    assert len(calls) == 2  # one for each window, the backward included
    assert torch.equal(outs[0], outs[2])
    ops.trie_attention(*leaves, plan_of(trie))
    assert len(calls) == 3


def test_a_plan_of_tensors_that_were_refilled():
    """Somebody's buffers hold one batch after the other: each has a plan of its own."""
    torch.manual_seed(0)
    first, second = rmfast.pack([[1, 2, 3], [1, 2, 4]]), rmfast.pack([[1, 2], [3, 4]])
    assert len(first) == len(second)
    end, position = first.subtree_end.clone(), first.position_ids.clone()
    leaves = qkv(first, 2, 1, 4, torch.float64)
    for trie in (first, second):
        end.copy_(trie.subtree_end)
        position.copy_(trie.position_ids)
        got = ops.trie_attention(*leaves, ops.TriePlan(end, position))
        want = dense_attention(*leaves, trie, None, None, 0.5, None, None)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.sampled_from([None, 0, 2]))
def test_one_rule_says_which_token_is_scored(row, pad):
    """For one sequence and for a batch; tests/kernels holds the kernel against the batch's."""
    kept = reference.until_scored(np.array(row), pad)
    last = reference.last_token(torch.tensor([row]), None, pad, "hf")
    assert len(kept) - 1 == last.item() and kept.tolist() == row[: len(kept)]
