"""Attention by FlexAttention and by flash-attn: the same numbers where they can run here."""

import sys
import types

import pytest
import torch
from test_ops import dense_attention, plan_of, qkv, random_trie
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmfast
import tiny
from rmfast import ops, reference
from rmfast.ops import _cpu as cpu
from rmfast.packed import backends

OPTIONS = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 5.0, "sinks": True},
}


def problem(seed, pooled, options, dtype=torch.float32):
    torch.manual_seed(seed)
    trie = random_trie(seed)
    queries = trie.pool_index.unique() if pooled else None
    leaves = qkv(trie, 4, 2, 16, dtype, len(queries) if pooled else None)
    options = {"window": None, "softcap": None, "sinks": None} | options
    if options["sinks"] is not None:
        options["sinks"] = torch.randn(4, dtype=dtype)
    return trie, queries, leaves, {**options, "scale": 0.3}


@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "pooled"])
@pytest.mark.parametrize("case", OPTIONS)
def test_flex(case, pooled):
    """Forward only: FlexAttention has no backward on a CPU."""
    for seed in range(2):
        trie, queries, leaves, options = problem(seed, pooled, OPTIONS[case])
        with torch.no_grad():
            got = backends.trie_attention("flex", *leaves, plan_of(trie, queries), **options)
        sinks = None if options["sinks"] is None else options["sinks"].double()
        want = dense_attention(
            *(x.double() for x in leaves), trie, queries, sinks, 0.3, options["window"],
            options["softcap"],
        )  # fmt: skip
        # fp32 logits of size 10: their rounding, twice, relative to values of size 4
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * 40 * 10 * 2.0**-24)


def branches(nodes):
    """A trie of so many nodes: long prefixes inside one another, and a stranger."""
    ids = torch.randint(0, 90, (nodes,), generator=torch.Generator().manual_seed(nodes)).tolist()
    third = nodes // 3
    trunk, rest = ids[: max(1, third)], ids[max(1, third) :]
    rows = [trunk + rest[:third], [*trunk[: third // 2], 91, *rest[third:-1]]]
    trie = rmfast.pack([row for row in rows if row][:nodes])
    assert abs(len(trie) - nodes) <= 2
    return trie


@pytest.mark.parametrize("nodes", [1, 127, 129, 256, 511, 1300])
@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "some"])
def test_blocks_of_flex_hold_all_that_is_seen(nodes, window, pooled):
    """A full block holds nothing else; a block that is not listed holds nothing."""
    trie = branches(nodes)
    end, positions, every = trie.subtree_end, trie.position_ids, torch.arange(len(trie))
    queries = every[len(trie) // 4 :: 3] if pooled else None
    rows = every if queries is None else queries
    mask = backends._block_mask(plan_of(trie, queries), window)
    allowed = reference.trie_mask(rows, every, end, positions, window)
    assert torch.equal(mask.mask_mod(0, 0, torch.arange(len(rows))[:, None], every), allowed)
    assert mask.shape == (1, 1, *allowed.shape)
    size = mask.BLOCK_SIZE[0]
    allowed = F.pad(allowed, (0, -allowed.shape[1] % size, 0, -allowed.shape[0] % size))
    blocks = allowed.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    holds = torch.zeros(3, *blocks.shape[:2], dtype=torch.int32)
    for kind, counts, listed in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for q, count in enumerate(counts[0, 0].tolist()):
            assert (listed[0, 0, q, :count].diff() > 0).all()
            holds[kind, q, listed[0, 0, q, :count].long()] = 1
    assert (holds.sum(0) <= 1).all()
    assert (holds.sum(0).bool() >= blocks.any(-1).any(-1)).all()
    assert (holds[2].bool() <= blocks.all(-1).all(-1)).all()
    if window is None and queries is None:  # there extrema tell all
        assert torch.equal(holds.sum(0).bool(), blocks.any(-1).any(-1))
        assert torch.equal(holds[2].bool(), blocks.all(-1).all(-1))
    if nodes == 1300 and window is None:
        assert holds[2].any()


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "some"])
def test_a_block_mask_is_made_without_the_pairs_of_nodes(window, pooled):
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.seen = max(self.seen, x.numel())
            return out

    trie = branches(5000)
    queries = torch.arange(0, len(trie), 2) if pooled else None
    with Largest() as largest:
        backends._block_mask(plan_of(trie, queries), window)
    assert len(trie) <= largest.seen < len(trie) + 128


@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "some"])
@pytest.mark.parametrize("window", [None, 7, 200])
@pytest.mark.parametrize("nodes", [1, 129, 511])
def test_flex_over_several_blocks(nodes, window, pooled):
    torch.manual_seed(0)
    trie = branches(nodes)
    queries = torch.arange(0, len(trie), 2) if pooled else None
    leaves = qkv(trie, 4, 2, 16, torch.float32, len(queries) if pooled else None)
    plan = plan_of(trie, queries)
    with torch.no_grad():
        got = backends.trie_attention("flex", *leaves, plan, scale=0.3, window=window)
    exact = [x.double() for x in leaves]
    want = cpu.trie_attention(*exact, *plan.tensors, None, 0.3, window, None)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * 40 * 10 * 2.0**-24)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """What flash-attn 2 documents: a sequence at a time, causal from the bottom right."""
    assert causal and dropout_p == 0.0 and q.dtype == k.dtype == v.dtype
    out = []
    for i in range(len(cu_seqlens_q) - 1):
        a, b = cu_seqlens_q[i : i + 2].tolist()
        c, d = cu_seqlens_k[i : i + 2].tolist()
        assert 0 < b - a <= max_seqlen_q and b - a <= d - c <= max_seqlen_k
        rows = [x.double().transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])]
        groups = rows[0].shape[0] // rows[1].shape[0]
        query, key, value = rows[0], *(x.repeat_interleave(groups, 0) for x in rows[1:])
        logits = query @ key.mT * softmax_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        at = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        left, right = window_size
        hidden = at < 0 if left < 0 else (at < 0) | (at > left)
        assert right == (0 if left >= 0 else -1)
        weights = F.softmax(logits.masked_fill(hidden, float("-inf")), -1)
        out.append((weights @ value).transpose(0, 1).to(q.dtype))
    return torch.cat(out)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn needs a GPU: a stand-in of its documented behaviour, to prove what it is given."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "pooled"])
@pytest.mark.parametrize("case", ["plain", "window", "softcap"])
def test_flash_gets_each_row_and_its_path(case, pooled, flash):
    for seed in range(3):
        trie, queries, leaves, options = problem(seed, pooled, OPTIONS[case], torch.bfloat16)
        leaves = [x.requires_grad_() for x in leaves]
        got = backends.trie_attention("flash", *leaves, plan_of(trie, queries), **options)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        want = dense_attention(
            *exact, trie, queries, None, 0.3, options["window"], options["softcap"]
        )
        # sums in fp64 there, the answer rounded to bf16
        torch.testing.assert_close(got.double(), want, rtol=2.0**-8, atol=2.0**-16)
        grad = torch.randn_like(got)
        ours = torch.autograd.grad(got, leaves, grad)
        theirs = torch.autograd.grad(want, exact, grad.double())
        copies = int((trie.subtree_end - torch.arange(len(trie))).max())
        for a, b, x in zip(ours, theirs, leaves, strict=True):
            assert a.dtype == x.dtype
            # each copy's gradient is rounded to bf16 on its own, then they are summed in fp32
            bound = 2.0**-8 * (1 + copies**0.5) * b.abs().max()
            assert (a.double() - b).abs().max() <= bound


@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("first", [1, 9, 40])
def test_nodes_from_one_on_are_those_queries(backend, first, flash):
    trie = random_trie(3, length=30)
    queries = torch.arange(first, len(trie))
    leaves = qkv(trie, 4, 2, 16, torch.bfloat16, len(queries))
    plan = ops.TriePlan(trie.subtree_end, trie.position_ids, first=first)
    with torch.no_grad():
        got, want = (
            backends.trie_attention(backend, *leaves, one, scale=0.3, window=5)
            for one in (plan, plan_of(trie, queries))
        )
    assert torch.equal(got, want)


def test_flash_refuses_what_it_cannot_do(flash):
    trie, _, leaves, options = problem(0, False, {"sinks": True}, torch.bfloat16)
    plan = plan_of(trie)
    with pytest.raises(ValueError, match="sinks"):
        backends.trie_attention("flash", *leaves, plan, **options)
    options["sinks"] = None
    with pytest.raises(ValueError, match="fp16 and bf16"):
        backends.trie_attention("flash", *(x.float() for x in leaves), plan, **options)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_patched_scores(attention):
    m = tiny.model("gemma2")
    batch = tiny.padded(tiny.rows())
    with torch.no_grad():
        want = m(**batch).logits
        got = rmfast.patch(m, attention=attention)(**batch).logits
    assert not rmfast.report(m).fallbacks
    assert tiny.score_error(got, want) <= 1e-4


def test_patched_scores_with_flash(flash):
    m = tiny.model("mistral", dtype=torch.bfloat16)
    batch = tiny.padded(tiny.rows())
    exact = tiny.model("mistral")
    exact.load_state_dict(m.state_dict())
    with torch.no_grad():
        oracle = exact(**batch).logits
        theirs = m(**batch).logits
        ours = rmfast.patch(m, attention="flash")(**batch).logits
    assert not rmfast.report(m).fallbacks
    assert (ours - oracle).norm() <= 1.1 * (theirs - oracle).norm() + 2.0**-8 * oracle.abs().max()


def test_triton_without_a_gpu_says_so():
    m = rmfast.patch(tiny.model(), attention="triton")
    with pytest.raises(ValueError, match="backend='triton' cannot run: tensors are on cpu"):
        m(**tiny.padded(tiny.rows()))


def test_an_absent_or_unknown_backend_is_refused_at_the_patch():
    with pytest.raises(ValueError, match="pip install flash-attn"):
        rmfast.patch(tiny.model(), attention="flash")
    with pytest.raises(ValueError, match="attention must be one of"):
        rmfast.patch(tiny.model(), attention="xformers")
