"""Head and losses on a GPU at the sizes of real batches, and what only a GPU can show."""

import oracle
import pytest
import torch
from rounding import pair_errors, ulp, unit

from rmfast import ops, reference

CENTER = 0.01
# sequences, hidden size: one program and many, rows held whole and not
SIZES = [(2, 1), (2, 16384), (64, 4096), (510, 1000), (8192, 896)]


def batch_of(batch, width, dtype, layout="halves"):
    """Rows, ids that pick the pooled ones, their index, head, pairs, margins."""
    torch.manual_seed(0)
    hidden = torch.randn(batch, 4, width, device="cuda").to(dtype)
    weight = (torch.randn(1, width, device="cuda") / width**0.5).to(dtype)
    bias = torch.randn(1, device="cuda").to(dtype)
    column = torch.randint(4, (batch,), device="cuda")
    ids = (torch.arange(4, device="cuda") <= column[:, None]).long()
    index = torch.arange(batch, device="cuda") * 4 + column
    pairs = layout
    if layout == "index":
        pairs = torch.randint(batch, (batch // 2, 2), device="cuda")
    margin = torch.rand(batch // 2, device="cuda")
    return (hidden, weight, bias), ids, index, pairs, margin


def one_op(hidden, weight, bias, ids, index, pairs, margin):
    out = ops.reward_head_pairwise_loss(
        hidden.flatten(0, 1), index, weight, bias, pairs, margin=margin, center=CENTER
    )
    return out.loss, out.scores


def one_op_padded(hidden, weight, bias, ids, index, pairs, margin):
    out = ops.reward_head_pairwise_loss(
        hidden, None, weight, bias, pairs, input_ids=ids, pad_token_id=0, margin=margin,
        center=CENTER,
    )  # fmt: skip
    return out.loss, out.scores


def two_ops(hidden, weight, bias, ids, index, pairs, margin):
    scores = ops.reward_head(hidden.flatten(0, 1), index, weight, bias)
    return ops.pairwise_loss(scores, pairs, margin=margin, center=CENTER).loss, scores[:, 0]


def pooled(hidden, weight, bias, ids, index, pairs, margin):
    scores = ops.pooled_reward_head(hidden, ids, weight, bias, pad_token_id=0)
    return ops.pairwise_loss(scores, pairs, margin=margin, center=CENTER).loss, scores[:, 0]


def step(run, leaves, *rest):
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss, scores = run(*leaves, *rest)
    return [loss.detach(), scores.detach(), *torch.autograd.grad(loss, leaves)]


HEADS = pytest.mark.parametrize("run", [one_op, one_op_padded, two_ops, pooled])


@pytest.mark.parametrize("layout", ["halves", "interleaved", "index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@HEADS
def test_head_and_pairwise_loss(run, size, dtype, layout):
    leaves, ids, index, pairs, margin = batch_of(*size, dtype, layout)
    loss, scores, *grads = step(run, leaves, ids, index, pairs, margin)
    batch, width = size
    u, count, made = unit(dtype), batch // 2, {"margin": margin.double(), "center": CENTER}
    h, w, b = (x.double() for x in leaves)
    true_scores = reference.reward_head(h, index, w, b)[:, 0]
    error = (width + 1) * u * reference.reward_head(h.abs(), index, w.abs(), b.abs())[:, 0]
    assert ((scores - true_scores).abs() <= error).all()
    error, slope_error = pair_errors(true_scores, error, u, pairs, margin, center=CENTER)
    each, _ = reference.pairwise_loss(true_scores, pairs, **made, reduction="none")
    # each term is in fewer than `count` sums
    assert (loss - each.mean()).abs() <= (error + (count + 1) * u * (each + error)).mean()
    slope = oracle.pairwise_gradients(true_scores, pairs, **made)
    # divided, multiplied twice; in fewer than 2 * count sums by score, and as many by weight
    slope_error = torch.stack([slope_error] * 2) / count
    slope_error = slope_error + (4 * count + 4) * u * (slope.abs() + slope_error)
    one = torch.ones((), dtype=torch.float64, device="cuda")
    up = oracle.pairwise_loss_backward(one, slope, pairs, batch)[:, None]
    up_error = oracle.pairwise_loss_backward(one, slope_error, pairs, batch)[:, None]
    true = oracle.reward_head_backward(up, h, index, w)
    bounds = oracle.reward_head_backward(up_error, h.abs(), index, w.abs())
    for ours, exact, bound in zip(grads, true, bounds, strict=True):
        assert ((ours - exact).abs() <= bound + ulp(exact, dtype)).all()


@pytest.mark.parametrize("kind", ["all_pairs", "plackett_luce"])
def test_listwise_loss(kind):
    torch.manual_seed(0)
    sizes = torch.randint(1, 65, (1000,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).cuda()
    scores = 3 * torch.randn(int(sizes.sum()), device="cuda")
    ranks = torch.randint(40, scores.shape, device="cuda")
    leaf = scores.clone().requires_grad_()
    loss = ops.listwise_loss(leaf, ranks, offsets, kind=kind, reduction="none")
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    exact, theirs = ((reference.listwise_loss(x, ranks, offsets, kind),
                      oracle.listwise_slope(x, ranks, offsets, kind))
                     for x in (scores.double(), scores))  # fmt: skip
    for ours, other, true in zip((loss.detach(), slope), theirs, exact, strict=True):
        # no further off than plain torch, but for a dozen roundings done in another order
        bound = 1.1 * (other - true).norm() + 12 * unit(torch.float32) * true.norm()
        assert (ours - true).norm() <= bound


def many_programs(dtype=torch.float32):
    """Of the fused op: the last of them to arrive adds up what the others have written."""
    from rmfast.kernels import fused_loss

    made = batch_of(4096, 512, dtype)
    grid, _, _ = fused_loss.programs(2048, 4096, 4 * 4096, 512, dtype, True)
    assert grid > 100
    return made


def test_the_last_program_sees_what_the_others_wrote():
    leaves, *rest = many_programs()
    first = step(one_op, leaves, *rest)
    for _ in range(200):
        again = step(one_op, leaves, *rest)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_streams_do_not_disturb_each_other():
    leaves, *rest = many_programs()
    want = step(one_op, leaves, *rest)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = []
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            got.append(step(one_op, leaves, *rest)[:2])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for one in got for a, b in zip(want, one, strict=False))


@HEADS
def test_no_sync(run, no_sync):
    leaves, *rest = batch_of(64, 256, torch.bfloat16)
    step(run, leaves, *rest)  # compiled
    with no_sync():
        step(run, leaves, *rest)


def test_no_sync_in_listwise_loss(no_sync):
    scores = torch.randn(64, device="cuda", requires_grad=True)
    ranks, offsets = torch.arange(64, device="cuda"), torch.arange(0, 65, 8, device="cuda")

    def run():
        loss = ops.listwise_loss(scores, ranks, offsets, max_size=8)
        torch.autograd.grad(loss, scores)

    run()
    with no_sync():
        run()


@HEADS
def test_compiled(run):
    leaves, *rest = batch_of(64, 256, torch.bfloat16)
    compiled = torch.compile(run, fullgraph=True)
    for ours, true in zip(step(compiled, leaves, *rest), step(run, leaves, *rest), strict=True):
        assert torch.equal(ours, true)


@HEADS
def test_cuda_graph(run):
    """The counter of the programs that are done is zero again at each replay."""
    leaves, *rest = batch_of(2048, 256, torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*leaves, *rest)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, scores = run(*leaves, *rest)
    for _ in range(3):
        leaves[0].normal_()
        graph.replay()
        want = run(*leaves, *rest)
        assert torch.equal(loss, want[0]) and torch.equal(scores, want[1])
