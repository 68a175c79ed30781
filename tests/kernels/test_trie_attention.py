"""The attention kernels against their definition in fp64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmfast
from rmfast import reference
from rmfast.demo import embedded
from rmfast.ops import _cpu as cpu
from rmfast.packed.pieces import cut

SMALL = (16, 32, 4, 1)  # so that a few dozen tokens are many tiles
U = 2.0**-24  # half a unit of fp32's last place


def random_trie(seed, batch=5, length=30, values=3):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=g).tolist()
    return rmfast.pack([torch.randint(0, values, (n,), generator=g) for n in lengths])


def chain(count):
    return rmfast.pack([list(range(count))])


def tensor(heads, rows, width, dtype, device):
    """[1, heads, rows, width] as transformers lays it out, in the midst of NaN."""
    around = torch.full((1, rows + 3, heads, width + 5), float("nan"), dtype=dtype)
    around[:, :rows, :, :width] = torch.randn(1, rows, heads, width)
    return around.to(device)[:, :rows, :, :width].transpose(1, 2)


class Problem:
    """Inputs, the exact answer, and how far from it fp32 sums may end."""

    def __init__(
        self, trie, device, heads=(4, 2), width=16, value_width=None, dtype=torch.float32,
        pooled=False, first=0, window=None, softcap=None, sinks=False, scale=0.3,
    ):  # fmt: skip
        nodes = len(trie)
        self.queries = trie.pool_index.unique() if pooled else None
        rows = len(self.queries) if pooled else nodes - first
        value_width = value_width or width
        self.q = tensor(heads[0], rows, width, dtype, device)
        self.k = tensor(heads[1], nodes, width, dtype, device)
        self.v = tensor(heads[1], nodes, value_width, dtype, device)
        self.grad = tensor(heads[0], rows, value_width, dtype, device).transpose(1, 2)
        self.sinks = torch.randn(heads[0]).to(dtype).to(device) if sinks else None
        trie = trie.to(device)
        self.queries = self.queries.to(device) if pooled else None
        self.mask = (trie.subtree_end, trie.position_ids, self.queries)
        self.options = (scale, window, softcap)
        self.dtype, self.nodes, self.rows = dtype, nodes, rows
        self.group = heads[0] // heads[1]

    def run(self, config=SMALL, keep=True):
        from rmfast.kernels import trie_attention as kernels

        config = kernels.Config(*config) if config else None
        inputs = (self.q, self.k, self.v, *self.mask, self.sinks, *self.options)
        out, lse = kernels.trie_attention(*inputs, keep, config)
        if not keep:
            assert lse.numel() == 0
            return (out,)
        grads = kernels.trie_attention_backward(self.grad, *inputs, out, lse, (config, config))
        return (out, *(g for g in grads if g is not None))

    def exact(self):
        inputs = [x.double() for x in (self.q, self.k, self.v)]
        sinks = None if self.sinks is None else self.sinks.double()
        rest = (*self.mask, sinks, *self.options)
        out = cpu.trie_attention(*inputs, *rest)
        grads = cpu.trie_attention_backward(self.grad.double(), *inputs, *rest)
        return (out, *(g for g in grads if g is not None))

    def bounds(self):
        """Worst-case error of each answer: first-order rounding analysis, n terms cost n U."""
        scale, _, softcap = self.options
        q, k, v, g = (x.double().abs().sum(-1).max() for x in (self.q, self.k, self.v, self.grad))
        qm, km, vm, gm = (x.double().abs().max() for x in (self.q, self.k, self.v, self.grad))
        products = min(q * km, k * qm)  # no sum of |q_i k_i| is larger
        logit = scale * products
        # products summed; scaled, capped (tanh to a few U) and shifted: all in a logit's size
        error = (self.q.shape[-1] + 12) * U * (logit + (softcap or 0.0) * 4 + 1)
        weight = 2 * error + (self.nodes + 8) * U  # relative error of a softmax weight
        out = weight * vm
        dots = min(g * vm, v * gm)  # of |g_i v_i|
        dot = (self.v.shape[-1] + 8) * U * dots + out * g  # error of g.v, and of delta
        spread = 2 * dots  # |g.v - delta|
        ds = weight * spread + 2 * dot + 8 * U * spread * (1 + (softcap is not None))
        ds += spread * error if softcap is not None else 0.0
        terms = self.rows * self.group
        grad_q = scale * km * (ds + (self.nodes + 4) * U * spread)
        grad_k = scale * qm * terms * (ds + (terms + 4) * U * spread)
        grad_v = gm * terms * (weight + (terms + 4) * U)
        return out, grad_q, grad_k, grad_v, terms * (ds + (terms + 4) * U * spread)

    def rounded(self, dot):
        """First-order error of each answer from storing it, and of tensor cores in ``dot``.

        Weights P and their gradients dS are rounded to ``dot`` before they meet V, dO, K and Q:
        dP = r P, dO = dP |V| + s |O|, d(delta) = |dO| dO, ddS = P d(delta) + r |dS|, and those by
        the absolute values of what they are multiplied with. s: a store's rounding, r: ``dot``'s,
        which is absolute where a number is below the normal ones.
        """
        scale, window, softcap = self.options
        # half a unit; one where the interpreter cuts off. fp32 is in bounds() already
        store = {torch.float32: 0.0}.get(self.dtype, torch.finfo(self.dtype).eps)
        info = torch.finfo(dot)
        r = info.eps / 2 if dot != torch.float32 else 0.0
        tiny = info.smallest_normal * r
        end, position, queries = self.mask
        nodes = torch.arange(self.nodes, device=end.device)
        rows = nodes[-self.rows :] if queries is None else queries
        seen = reference.trie_mask(rows, nodes, end, position, window)
        q, g = self.q[0].double(), self.grad[0].double().transpose(0, 1)  # [Hq, M, D]
        k, v = (x[0].double().repeat_interleave(self.group, 0) for x in (self.k, self.v))
        logits, slope = scale * q @ k.mT, 1.0
        if softcap is not None:
            tanh = torch.tanh(logits / softcap)
            logits, slope = softcap * tanh, 1 - tanh * tanh
        logits = logits.masked_fill(~seen, float("-inf"))
        sinks = logits.new_full((len(q), 1, 1), float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.double().view(-1, 1, 1)
        p = torch.cat([logits, sinks.expand(-1, len(rows), 1)], -1).softmax(-1)
        p, lost = p[..., :-1], p[..., -1]
        out = p @ v
        p_error = seen * (r * p + tiny)
        out_error = p_error @ v.abs() + store * out.abs()
        delta_error = (g.abs() * out_error).sum(-1)  # of the stored output, as in FlashAttention
        ds = p * (g @ v.mT - (g * out).sum(-1, keepdim=True)) * slope
        ds_error = p * slope * delta_error[..., None] + seen * (r * ds.abs() + tiny)

        def by_key(x):  # the query heads that share it
            return x.unflatten(0, (-1, self.group)).sum(1)[None]

        return (
            out_error.transpose(0, 1)[None],
            (scale * ds_error @ k.abs())[None],
            by_key(scale * ds_error.mT @ q.abs()),
            by_key(p_error.mT @ g.abs()),
            (lost * delta_error).sum(-1),
        ), store

    def check(self, config=SMALL, dot=None):
        compiled = self.q.is_cuda  # interpreted, products are fp32
        extra, store = self.rounded(dot or (self.dtype if compiled else torch.float32))
        names = ("out", "query", "key", "value", "sinks")
        answers = zip(names, self.run(config), self.exact(), self.bounds(), extra, strict=False)
        for name, ours, theirs, bound, more in answers:
            assert ours.dtype == self.dtype
            error = (ours.double() - theirs).abs()
            worst = (error - store * theirs.abs() - more - bound).max().item()
            assert worst <= 0, f"{name}: off by {error.max():.3g}, {worst:.3g} above the bound"


CASES = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 3, "softcap": 5.0, "sinks": True},
    "wide-values": {"value_width": 40},
    "wide-keys": {"width": 40, "value_width": 20},
    "mha": {"heads": (3, 3)},
    "mqa": {"heads": (3, 1)},
}


@pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "pooled"])
@pytest.mark.parametrize("case", CASES)
def test_every_option(case, pooled, device, poison):
    torch.manual_seed(0)
    Problem(random_trie(0), device, pooled=pooled, **CASES[case]).check()


@pytest.mark.parametrize("case", ["plain", "all", "mqa"])
def test_rows_after_a_carried_path(case, device, poison):
    torch.manual_seed(0)
    start = list(range(23))
    whole = rmfast.pack([[*start, *range(i, i + 20)] for i in range(50, 57)])
    _, (trie, first), *_ = pieces_of(whole, 70)
    assert first == 23 and len(trie) > 60
    Problem(trie, device, first=first, **CASES[case]).check()


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"window": 9}, 4),
        ({"pooled": True}, 9),
        ({"first": 21, "softcap": 5.0, "heads": (3, 1)}, 60),
    ],
)
def test_lists_of_dk_and_dv_are_cut(options, most, device, poison, monkeypatch):
    """That of a common first token alone, and most of them."""
    from rmfast.kernels import trie_attention as kernels

    monkeypatch.setattr(kernels, "_LEAST_STEPS", 1)
    monkeypatch.setattr(kernels, "most_shares", lambda *_: most)
    made, cut_ = [], kernels.trie_plan.cut
    monkeypatch.setattr(kernels.trie_plan, "cut", lambda *a: made.append(cut_(*a)) or made[-1])
    torch.manual_seed(0)
    trie = rmfast.pack([[0, *range(i, i + 5 + i % 3)] for i in range(1, 20)])
    problem = Problem(trie, device, **{"heads": (2, 1), "width": 8, "value_width": 5} | options)
    problem.check()
    assert made[0].lists[:, 1].max() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, device, poison):
    torch.manual_seed(0)
    Problem(random_trie(1), device, dtype=dtype, window=6, sinks=True).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds by itself")
@pytest.mark.parametrize("case", ["plain", "window", "softcap", "sinks"])
def test_weights_rounded_as_a_gpu_does(case, device, poison, monkeypatch):
    """The bound needs its part of that, and holds with it: products in fp16, stores in fp32."""
    import triton.language as tl

    from rmfast.kernels import trie_attention as kernels

    tile = kernels._tile

    def half(*args):
        config, constants = tile(*args)
        return config, constants | {"DOT": tl.float16}

    monkeypatch.setattr(kernels, "_tile", half)
    torch.manual_seed(0)
    problem = Problem(random_trie(0), device, heads=(2, 1), width=8, scale=0.1, **CASES[case])
    for x in (problem.q, problem.k, problem.v, problem.grad):
        x.copy_(x.half())
    problem.check(dot=torch.float16)
    with pytest.raises(AssertionError, match="out: off by"):
        problem.check(dot=torch.float32)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 63, 123, 199])
def test_plain_causal_attention_at_odd_lengths(count, device, poison):
    torch.manual_seed(count)
    Problem(chain(count), device, heads=(1, 1), width=8).check()


@pytest.mark.parametrize("width", [32, 63, 80, 128, 256])
def test_head_dims_with_the_configurations_of_the_table(width, device, poison):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if width != 63 else torch.float32
    Problem(random_trie(2, 8, 60), device, width=width, dtype=dtype, heads=(2, 1)).check(None)


def test_text(device, poison):
    """Both answers to each question, and questions that begin alike."""
    pairs = embedded.pairs("held-out")[:3]
    texts = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    rows = [[*" ".join(turn["content"] for turn in text).encode()][:90] for text in texts]
    trie = rmfast.pack(rows)
    assert len(trie) < sum(map(len, rows))
    torch.manual_seed(0)
    Problem(trie, device, heads=(2, 1)).check()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 50), st.integers(1, 3))
def test_random_tries(seed, batch, length, values):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    trie = random_trie(seed, batch, length, values)
    window = [None, 1, 5][seed % 3]
    which = [{}, {"pooled": True}, {"first": seed % len(trie)}][seed // 3 % 3]
    Problem(trie, device, heads=(1, 1), width=8, window=window, **which).check()


def test_rotated_positions_do_not_matter_without_a_window_and_shift_it_with_one(device):
    """Positions are the caller's: the window is measured in them, not in packed indices."""
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7, 8, 9, 3], [5, 6, 7, 1, 2, 4]])
    trie = rmfast.pack(ids, position_ids=torch.tensor([[0, 1, 2, 10, 11, 12]]))
    Problem(trie, device, window=4).check()


@pytest.mark.parametrize("value", [float("-inf"), -1e4, 1e4])
def test_extreme_sinks(value, device):
    torch.manual_seed(0)
    problem = Problem(random_trie(0), device, sinks=True)
    problem.sinks[1] = value
    assert not any(x.isnan().any() for x in problem.run())
    problem.check()


def test_small_tensors_of_any_strides(device):
    torch.manual_seed(0)
    problem = Problem(random_trie(0), device, sinks=True, window=4)
    want = problem.run()

    def strided(x):
        return torch.stack([x, torch.full_like(x, 7)], 1)[:, 0]

    end, positions, queries = problem.mask
    problem.mask = (strided(end), strided(positions), queries)
    problem.sinks = strided(problem.sinks)
    for ours, theirs in zip(problem.run(), want, strict=True):
        assert torch.equal(ours, theirs)


def test_inference_keeps_no_state_and_gives_the_same_bits(device):
    torch.manual_seed(0)
    problem = Problem(random_trie(3), device)
    assert torch.equal(problem.run(keep=False)[0], problem.run()[0])


def test_same_bits_in_every_run(device):
    torch.manual_seed(0)
    problem = Problem(random_trie(4), device, heads=(4, 1), sinks=True)
    for first, second in zip(problem.run(), problem.run(), strict=True):
        assert torch.equal(first, second)


def test_three_launches_backward(device, launches):
    from rmfast.kernels import trie_attention as kernels

    seen = launches(kernels)
    Problem(random_trie(5), device).run()
    assert seen == ["_forward_kernel", "_dq_kernel", "_dkv_kernel", "_add_kernel"]


@pytest.mark.parametrize("options", [{}, {"pooled": True, "window": 5, "sinks": True}])
def test_opcheck_of_the_op_that_launches_them(options, device):
    torch.manual_seed(0)
    problem = Problem(random_trie(7, 4, 20), device, heads=(2, 1), **options)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    sinks = problem.sinks if problem.sinks is None else problem.sinks.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.rmfast.trie_attention.default,
        (
            *leaves,
            *problem.mask,
            torch.empty(0, device=device),
            sinks,
            *problem.options,
            True,
            True,
        ),
    )


@pytest.mark.parametrize("window", [None, 9])
def test_tuning_keeps_what_was_fastest(device, window):
    from rmfast.kernels import trie_attention as kernels
    from rmfast.kernels import trie_configs

    torch.manual_seed(0)
    problem = Problem(random_trie(6), device, heads=(1, 1), dtype=torch.bfloat16, window=window)
    kinds = ("forward", "dq", "dkv")
    other = lambda: [trie_configs.config(k, problem.q, 16, False, False, not window) for k in kinds]  # noqa: E731
    before = other()
    used, tile = [], kernels._tile
    args = (problem.grad, problem.q, problem.k, problem.v, *problem.mask, None, *problem.options)
    order = iter(range(1000, 0, -1))  # the last one is the fastest
    tables = (trie_configs.TABLE, trie_configs.WINDOWED)
    try:
        best = kernels.tune(*args, timer=lambda run: next(order))
        assert best == {
            kernel: list(dict.fromkeys(row[i] for t in tables for row in t.values()))[-1]
            for i, kernel in enumerate(kinds)
        }
        assert other() == before  # with a window, or without: not what was tuned
        kernels._tile = lambda *a: used.append(tile(*a)) or used[-1]
        problem.check(None)
        assert [config for config, _ in used] == list(best.values())
    finally:
        kernels._tile = tile
        trie_configs.TUNED.clear()


# --- the plan


def listed(plan, full_only=False):
    return {
        (t, b)
        for t, row in enumerate(plan.blocks.tolist())
        for b in row[: plan.counts[t, 0 if full_only else 1]]
    }


def pieces_of(trie, most):
    """The tries that run one after the other, and how many of their nodes are carried."""
    start = 0
    while start < len(trie):
        piece = cut(trie, start, most)
        yield piece.trie, piece.carried
        start = piece.stop


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 60), st.sampled_from([None, 1, 7]),
    st.sampled_from(["all", "pooled", "carried"]), st.sampled_from([1, 1 << 24]),
)  # fmt: skip
def test_plan_lists_what_holds_an_allowed_pair_and_nothing_else(
    seed, batch, length, window, which, chunk
):
    from rmfast.kernels import trie_plan

    tries = [(random_trie(seed, batch, length, values=2), 0)]
    if which == "carried":
        tries = list(pieces_of(tries[0][0], 40 + seed % 50))
    sizes = [(m, n) for m in (16, 32, 64, 128) for n in (16, 32, 64, 128)]
    before, trie_plan._CHUNK = trie_plan._CHUNK, chunk
    try:
        for i, (trie, first) in enumerate(tries):
            queries = trie.pool_index.unique() if which == "pooled" else None
            check_plan(trie, queries, first, window, *sizes[(seed + i) % len(sizes)])
    finally:
        trie_plan._CHUNK = before


def check_plan(trie, queries, first, window, m, n):
    from rmfast.kernels import trie_plan

    nodes = torch.arange(len(trie))
    rows = nodes[first:] if queries is None else queries
    mask = reference.trie_mask(rows, nodes, trie.subtree_end, trie.position_ids, window).numpy()
    some, full = set(), set()
    for t in range(0, mask.shape[0], m):
        for b in range(0, mask.shape[1], n):
            tile = mask[t : t + m, b : b + n]
            if tile.any():
                some.add((t // m, b // n))
            if tile.all() and tile.shape[1] == n:
                full.add((t // m, b // n))
    who = trie_plan.rule(trie.subtree_end, trie.position_ids, queries, len(rows), window)
    plan = trie_plan.plan(who, m, n)
    assert listed(plan) == some
    assert listed(plan, full_only=True) == full
    by_block = trie_plan.plan(who, m, n, by_block=True)
    assert {(t, b) for b, t in listed(by_block)} == some
    whole = {(t, b) for t, b in full if m * (t + 1) <= mask.shape[0]}
    assert {(t, b) for b, t in listed(by_block, full_only=True)} == whole


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=30), st.integers(1, 60), st.integers(1, 9))
def test_lists_are_cut_into_even_shares(lengths, most, least):
    """As many as there is room for, none too long; together they are the lists."""
    from rmfast.kernels import trie_plan

    counts = torch.tensor([[n // 2, n] for n in lengths], dtype=torch.int32)
    blocks, lists = trie_plan.cut(counts, most, least)
    assert lists[:, 2:].equal(counts) and len(blocks) == len(lengths) + most
    first, shares = lists[:, 0], lists[:, 1]
    assert blocks[: shares.sum()].equal(torch.arange(len(lengths)).repeat_interleave(shares).int())
    assert (blocks[shares.sum() :] == len(lengths)).all()
    assert first.equal((shares.cumsum(0) - shares).int())
    longest = -(-counts[:, 1] // shares)
    assert longest.max() <= max(least, sum(lengths) // most + 1)
    slots = [2 * (f - b) + i for b, (f, n) in enumerate(lists[:, :2].tolist()) if n > 1
             for i in range(n)]  # fmt: skip
    assert len(set(slots)) == len(slots) and max(slots, default=0) < 2 * most


def test_a_plan_is_made_once_a_batch(monkeypatch):
    from rmfast.kernels import trie_attention as kernels

    calls = []
    plan = kernels.trie_plan.plan
    monkeypatch.setattr(kernels.trie_plan, "plan", lambda *args: calls.append(args) or plan(*args))
    trie = random_trie(8)
    config = kernels.Config(*SMALL)

    def planned(window, made):
        seen = (trie.subtree_end, trie.position_ids, None, len(trie), window)
        return kernels._planned(*seen, config, False, made)

    made = {}
    first = planned(3, made)
    assert planned(3, made)[1] is first[1] and len(calls) == 1
    planned(5, made)
    assert len(calls) == 2
    planned(3, {})  # another batch
    assert len(calls) == 3


def test_a_tensor_written_to_between_calls(device):
    first, second = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([3, 2, 3], [3] * 3)
    )
    torch.manual_seed(0)
    problem = Problem(chain(3), device)
    with torch.inference_mode():
        end = first.clone()
        problem.mask = (end, *problem.mask[1:])
        problem.check()
        end.copy_(second)
        problem.check()


def test_bounds_would_notice_a_wrong_mask(device):
    """A row that sees one key too many is far outside the bound."""
    torch.manual_seed(0)
    problem = Problem(random_trie(0), device)
    exact, bound = problem.exact()[0], problem.bounds()[0]
    end, *rest = problem.mask
    problem.mask = ((end + 1).clamp(max=len(end)), *rest)
    assert (problem.exact()[0] - exact).abs().max() > 100 * bound
