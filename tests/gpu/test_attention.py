"""Attention on a GPU: no further from its definition in fp64 than torch's own in the same dtype."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rmfast
from rmfast import ops, reference
from rmfast.ops import _cpu as cpu

NAMES = ("out", "query", "key", "value", "sinks")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS = {
    "plain": {},
    "window": {"window": 100},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 100, "softcap": 5.0, "sinks": True},
}
POOLED = pytest.mark.parametrize("pooled", [False, True], ids=["all-rows", "pooled"])


def trie_of(nodes):
    """Two answers to each of four prompts that begin alike; a little over ``nodes`` nodes."""
    g = torch.Generator().manual_seed(nodes)
    start = torch.randint(1000, (37,), generator=g)
    part, rows = nodes // 16, []
    for _ in range(4):
        prompt, *answers = (
            torch.randint(1000, (n,), generator=g) for n in (2 * part - 7, part + 3, part - 5)
        )
        rows += [torch.cat([start, prompt, answer]) for answer in answers]
    return rmfast.pack(rows)


class Problem:
    """Inputs, their answers by any backend, by torch in the same dtype, and in fp64."""

    def __init__(
        self, nodes, width, dtype, pooled=False, window=None, softcap=None, sinks=False, first=0
    ):  # fmt: skip
        torch.manual_seed(0)
        trie = trie_of(nodes)
        queries = trie.pool_index.unique() if pooled else None
        count = len(trie)
        self.rows = count - first if queries is None else len(queries)
        shapes = [(self.rows, 8), (count, 2), (count, 2)]
        # as transformers lays them out: tokens first in memory
        self.leaves = [
            torch.randn(1, m, h, width, device="cuda").to(dtype).transpose(1, 2) for m, h in shapes
        ]
        self.leaves += [torch.randn(8, device="cuda").to(dtype)] if sinks else []
        self.grad = torch.randn(1, self.rows, 8, width, device="cuda").to(dtype)
        self.trie, self.dtype, self.width, self.sinks = trie.to("cuda"), dtype, width, sinks
        self.queries = None if queries is None else queries.to("cuda")
        self.window, self.softcap = window, softcap
        of_trie = (self.trie.subtree_end, self.trie.position_ids, self.queries)
        self.plan = ops.TriePlan(*of_trie, first=first)

    def forward(self, backend, query, key, value, sinks=None):
        return ops.trie_attention(
            query, key, value, self.plan, sinks=sinks, window=self.window, softcap=self.softcap,
            backend=backend,
        )  # fmt: skip

    def dense(self, query, key, value, sinks=None):
        """Under an [M, N] mask: torch's fused kernel, or what transformers writes out."""
        key, value = (x.repeat_interleave(4, dim=1) for x in (key, value))
        nodes = torch.arange(len(self.trie), device="cuda")
        rows = nodes[-self.rows :] if self.queries is None else self.queries
        of_trie = (self.trie.subtree_end, self.trie.position_ids)
        mask = reference.trie_mask(rows, nodes, *of_trie, self.window)[None, None]
        if self.softcap is None and sinks is None:
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        logits = query @ key.mT * self.width**-0.5
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sink = sinks[None, :, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1, dtype=torch.float32).to(self.dtype)[..., : len(nodes)]
        return (weights @ value).transpose(1, 2)

    def run(self, forward, *args):
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        out = forward(*args, *leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad)]

    def exact(self):
        wide = [x.cpu().double() for x in self.leaves]
        end, position = self.trie.subtree_end.cpu(), self.trie.position_ids.cpu()
        rest = (
            *wide[:3], end, position, None if self.queries is None else self.queries.cpu(),
            wide[3] if self.sinks else None, self.width**-0.5, self.window, self.softcap,
        )  # fmt: skip
        out = cpu.trie_attention(*rest)
        grads = cpu.trie_attention_backward(self.grad.cpu().double(), *rest)
        return [out, *grads[: len(self.leaves)]]

    def check(self, answers, exact, theirs):
        """Norms of the errors. One rounding of the answer, and in fp32 of exp2's argument, apart"""
        q, k = (x.float().norm(dim=-1).max().item() for x in self.leaves[:2])
        largest = math.log2(math.e) * q * k * self.width**-0.5
        unit = torch.finfo(self.dtype).eps + largest * torch.finfo(FP32).eps
        for name, ours, other, true in zip(NAMES, answers, theirs, exact, strict=False):
            error, its = ((x.cpu().double() - true).norm().item() for x in (ours, other))
            size = true.norm().item()
            if name == "sinks":  # each row's part comes from its rounded answer
                size += (exact[0] * self.grad.cpu().double()).abs().sum((0, 1, 3)).norm().item()
            bound = 1.1 * its + unit * size
            assert error <= bound, (
                f"{name}: off by {error:.3g}, torch by {its:.3g}, not {bound:.3g}"
            )


def check(problem):
    theirs = problem.run(problem.dense)
    problem.check(problem.run(problem.forward, "triton"), problem.exact(), theirs)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(d, t) for t in (BF16, FP16) for d in (32, 64, 80, 96, 128, 192, 256)]
    + [(d, FP32) for d in (32, 64, 80, 96, 128)],
)
def test_head_dims(width, dtype):
    check(Problem(1200, width, dtype))


@POOLED
@pytest.mark.parametrize(("width", "dtype"), [(128, BF16), (64, FP16), (64, FP32)])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, width, dtype, pooled):
    check(Problem(900, width, dtype, pooled, **OPTIONS[case]))


@pytest.mark.parametrize("case", OPTIONS)
def test_rows_after_a_carried_path(case):
    check(Problem(900, 128, BF16, first=133, **OPTIONS[case]))


@POOLED
def test_long(pooled):
    check(Problem(4096, 128, BF16, pooled))


@POOLED
def test_same_bits_in_every_run(pooled):
    problem = Problem(1200, 64, BF16, pooled, sinks=True)
    first = problem.run(problem.forward, "triton")
    for _ in range(20):
        again = problem.run(problem.forward, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@POOLED
def test_another_stream(pooled):
    problem, other = Problem(1200, 64, BF16, pooled), Problem(1200, 64, BF16, pooled)
    want = problem.run(problem.forward, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = other.run(other.forward, "triton")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_no_sync(no_sync):
    """Neither with a plan already made, nor where a new batch wants one."""
    for case in ({}, {"window": 100}, {"pooled": True}):
        problem, later = Problem(900, 64, BF16, **case), Problem(900, 64, BF16, **case)
        problem.run(problem.forward, "triton")  # compiled
        with no_sync():
            problem.run(problem.forward, "triton")
            later.run(later.forward, "triton")


def test_cuda_graph():
    problem = Problem(1200, 64, BF16)
    static = [x.detach() for x in problem.leaves]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.forward("triton", *static)  # compiled, and planned
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = problem.forward("triton", *static)
    for _ in range(3):
        for x in static:
            x.normal_()
        graph.replay()
        assert torch.equal(out, problem.forward("triton", *static))


@POOLED
def test_compiled(pooled):
    problem = Problem(900, 64, BF16, pooled, sinks=True, window=100)

    @torch.compile(fullgraph=True)
    def forward(query, key, value, sinks):
        return 2 * ops.trie_attention(
            2 * query, key, value, problem.plan, sinks=sinks, window=100, backend="triton"
        )  # fmt: skip

    def eager(query, key, value, sinks):  # powers of two round nothing
        return 2 * problem.forward("triton", 2 * query, key, value, sinks)

    for ours, true in zip(problem.run(forward), problem.run(eager), strict=True):
        assert torch.equal(ours, true)


def test_memory():
    """A mask alone would have a byte for each of N x N pairs; so much less that nobody made it."""
    problem = Problem(30_000, 64, BF16)
    problem.run(problem.forward, "triton")
    fresh = Problem(30_000, 64, BF16)  # whose plan is still to be made
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fresh.run(fresh.forward, "triton")
    assert torch.cuda.max_memory_allocated() - held < len(fresh.trie) ** 2 / 2
