"""RMSNorm, rotary embedding and gated activation: against fp64, and against transformers' own."""

import functools

import pytest
import torch
from rounding import ulp, unit
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from rmfast import ops, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
U = unit(FP32)
NORMS = {  # transformers' class, offset, late
    "llama": (LlamaRMSNorm, 0.0, False),
    "olmo2": (Olmo2RMSNorm, 0.0, True),
    "gemma": (GemmaRMSNorm, 1.0, True),
}
GATES = {False: F.silu, True: functools.partial(F.gelu, approximate="tanh")}


def wide(*tensors):
    return [x.detach().double().cpu().requires_grad_() for x in tensors]


def gaps(x, device):
    """The same numbers in rows that do not touch."""
    return F.pad(x, (0, 3), value=float("nan"))[..., :-3].to(device).requires_grad_()


def within(got, exact, bound):
    """Each bound counts roundings in fp32; the store is one of got's dtype."""
    for ours, true, most in zip(got, exact, bound, strict=True):
        most = most + (ulp(true, ours.dtype) if ours.dtype != FP32 else 0)
        assert ((ours.double().cpu() - true).abs() <= most).all()


# --- against fp64


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 6), (37, 130), (3, 1030)])
def test_rms_norm(rows, width, dtypes, kind, device, poison):
    torch.manual_seed(0)
    _, offset, late = NORMS[kind]
    x = gaps(torch.randn(rows, width).to(dtypes[0]), device)
    w = (torch.randn(width) - offset).to(dtypes[1]).to(device).requires_grad_()
    rule = {"offset": offset, "late": late}
    y = ops.rms_norm(x, w, 1e-6, **rule)
    assert y.dtype == (dtypes[0] if late else torch.promote_types(*dtypes))
    grad = torch.randn(y.shape, device=device).to(y.dtype)[:, :1].expand_as(y)
    got = y.detach(), *torch.autograd.grad(y, (x, w), grad)
    x, w = wide(x, w)
    y = reference.rms_norm(x, w, 1e-6, **rule)
    grad = grad.double().cpu()
    exact = y.detach(), *torch.autograd.grad(y, (x, w), grad)
    x, w = x.detach(), w.detach() + offset
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    n, g = (x * scale).abs(), (grad * w).abs()
    # a thread adds at most 32 numbers, a tree of at most 13 floors the rest; a root halves that
    norm = (24 + 4) * U
    early = 0 if late else ulp(n, dtypes[0]) * w.abs() * (dtypes[0] != FP32)
    bound = (
        (norm + 3 * U) * y.detach().abs() + early,
        scale * ((norm + 4 * U) * g + (2 * norm + 52 * U) * n * (g * n).mean(-1, keepdim=True)),
        (norm + (2 + rows) * U) * (grad.abs() * n).sum(0),
    )
    within(got, exact, bound)


def test_the_gradient_of_the_weight_is_summed_in_parts(device, poison, launches):
    """More rows than programs; the same bits again; without it the same gradient of x."""
    from rmfast.kernels import elementwise as kernels

    seen = launches(kernels)
    torch.manual_seed(0)
    x, grad = torch.randn(2, 301, 130, device=device)
    w = torch.randn(130, device=device)
    got = kernels.rms_norm_backward(grad, x, w, 1e-6, 0.0, most=3)
    again = kernels.rms_norm_backward(grad, x, w, 1e-6, 0.0, most=3)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    frozen = kernels.rms_norm_backward(grad, x, w, 1e-6, 0.0, needs_weight=False)
    assert torch.equal(frozen[0], got[0]) and frozen[1] is None
    assert seen == ["_norm_backward_kernel", "_sum_kernel"] * 2 + ["_norm_backward_kernel"]
    x, grad = x.double(), grad.double()
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    assert ((got[1] - (grad * n).sum(0)).abs() <= (28 + 303) * U * (grad * n).abs().sum(0)).all()


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "size", "tables"),
    [(1, (1, 1), 1, 2, 1), (1, (5, 1), 9, 6, 1), (2, (3, 2), 33, 96, 1), (2, (4, 4), 7, 64, 2)],
)
def test_rotary(batch, heads, tokens, size, tables, dtypes, device, poison):
    """By tables whose halves differ, which a family may have."""
    torch.manual_seed(0)
    q, k = (
        gaps(torch.randn(batch, tokens, n, size).to(dtypes[0]), device).transpose(1, 2)
        for n in heads
    )
    cos, sin = torch.randn(2, tables, tokens, size).to(dtypes[1]).to(device)
    out = ops.rotary(q, k, cos, sin)
    assert all(x.dtype == torch.promote_types(*dtypes) for x in out)
    assert all(x.transpose(1, 2).is_contiguous() for x in out)
    grads = [torch.randn(x.shape, device=device).to(x.dtype) for x in out]
    got = *out, *torch.autograd.grad(out, (q, k), grads)
    exact_q, exact_k, cos, sin = wide(q, k, cos, sin)
    out = reference.rotary(exact_q, exact_k, cos, sin)
    grads = [x.double().cpu() for x in grads]
    exact = *out, *torch.autograd.grad(out, (exact_q, exact_k), grads)
    cos, sin = cos.detach().abs()[:, None], sin.detach().abs()[:, None]

    def bound(x, s):
        a, b = x.abs().chunk(2, -1)
        return 3 * U * (x.abs() * cos + torch.cat([b, a], -1) * s)

    flipped = sin.roll(size // 2, -1)
    bounds = [bound(x.detach(), sin) for x in (exact_q, exact_k)]
    within(got, exact, bounds + [bound(x, flipped) for x in grads])


def test_rotary_of_which_one_half_is_used(device, poison):
    q, k = (torch.randn(1, 5, n, 8, device=device).transpose(1, 2) for n in (4, 2))
    cos, sin = torch.randn(2, 1, 5, 8, device=device)
    leaves = q.requires_grad_(), k.requires_grad_()
    for i in range(2):
        both = torch.autograd.grad(ops.rotary(*leaves, cos, sin)[i].sum(), leaves[i])[0]
        (want,) = torch.autograd.grad(reference.rotary(*leaves, cos, sin)[i].sum(), leaves[i])
        assert ((both - want).abs() <= 8 * U * (1 + want.abs())).all()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_gated(gelu, dtype, device, poison):
    torch.manual_seed(0)
    g = torch.cat([4 * torch.randn(2990), torch.tensor([0, 1e-4, 20, -20, 88, -88, 1e4, -1e4])])
    g, u = (gaps(x.to(dtype)[None], device) for x in (g, torch.randn(g.shape)))
    y = ops.gated(g, u, gelu=gelu)
    grad = torch.randn(y.shape, device=device).to(dtype)
    got = y.detach(), *torch.autograd.grad(y, (g, u), grad)
    g, u = wide(g, u)
    y = reference.gated(g, u, gelu)
    grad = grad.double().cpu()
    exact = y.detach(), *torch.autograd.grad(y, (g, u), grad)
    g, u = g.detach(), u.detach()
    z = (1.6 * (g + 0.045 * g**3) if gelu else g).abs().clamp_max(110)  # exp(-110) is 0
    steep = 1.6 * (1 + 0.14 * g**2) if gelu else 1.0
    s = torch.sigmoid(z * g.sign())
    # z is a sum of three roundings at most, and exp turns its error into a relative one
    few = (10 + 8 * z) * U
    # fp64's own gelu is 0 below -7.2, where tanh is -1; fp32 has no smaller numbers than that
    tiny = (1 + g.abs()) * (1 + (grad * u).abs() + grad.abs()) * (2**-52 if gelu else 2**-126)
    bound = (
        few * y.detach().abs(),
        few * (grad * u).abs() * (s + g.abs() * s * (1 - s) * steep + 2 * U * g.abs() * steep),
        few * (grad * g * s).abs(),
    )
    within(got, exact, [x + tiny for x in bound])


# --- against transformers' own, in half precision


def ratio(ours, theirs, exact):
    """RMS distance from fp64, over that of theirs raised by one unit in the last place."""
    far, own, one = (
        x.double().square().mean().sqrt()
        for x in (ours.double() - exact, theirs.double() - exact, ulp(exact, theirs.dtype))
    )
    return far / (1.1 * own + one)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_of_transformers(kind, dtype, device):
    torch.manual_seed(0)
    cls, offset, late = NORMS[kind]
    module = cls(192).to(device)
    torch.nn.init.normal_(module.weight)
    module.to(dtype)
    x = torch.randn(64, 192, device=device).to(dtype).requires_grad_()
    grad = torch.randn(x.shape, device=device).to(dtype)
    leaves = (x, module.weight)
    eps = getattr(module, "eps" if kind == "gemma" else "variance_epsilon")
    theirs = module(x)
    ours = ops.rms_norm(x, module.weight, eps, offset=offset, late=late)
    assert ours.dtype == theirs.dtype
    exact = reference.rms_norm(*(x.double() for x in leaves), eps, offset, late)
    answers = [(y.detach(), *torch.autograd.grad(y, leaves, grad)) for y in (ours, theirs)]
    true = exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())
    for a, b, c in zip(*answers, true, strict=True):
        assert ratio(a, b, c.double()) <= 1


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_rotary_of_transformers(dtype, device):
    torch.manual_seed(0)
    q, k = (
        torch.randn(1, 50, n, 64, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for n in (4, 2)
    )
    angle = (torch.rand(1, 50, 32, device=device) * 100).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    theirs, ours = (f(q, k, cos, sin) for f in (apply_rotary_pos_emb, ops.rotary))
    exact = reference.rotary(*(x.double() for x in (q, k, cos, sin)))
    grads = [torch.randn(x.shape, device=device).to(dtype) for x in ours]
    answers = [(*y, *torch.autograd.grad(y, (q, k), grads)) for y in (ours, theirs)]
    true = *exact, *torch.autograd.grad(exact, (q, k), [g.double() for g in grads])
    for a, b, c in zip(*answers, true, strict=True):
        assert ratio(a, b, c.double()) <= 1 and a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("gelu", GATES)
def test_gates_of_torch(gelu, dtype, device):
    torch.manual_seed(0)
    leaves = [x.to(dtype).requires_grad_() for x in 2 * torch.randn(2, 4000, device=device)]
    grad = torch.randn(4000, device=device).to(dtype)
    wide = [x.double() for x in leaves]
    answers = [ops.gated(*leaves, gelu=gelu), GATES[gelu](leaves[0]) * leaves[1]]
    answers = [(y.detach(), *torch.autograd.grad(y, leaves, grad)) for y in answers]
    exact = GATES[gelu](wide[0]) * wide[1]
    true = exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())
    for a, b, c in zip(*answers, true, strict=True):
        assert ratio(a, b, c.double()) <= 1


# --- as ops of torch


def test_opcheck(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    w = torch.randn(8, device=device, requires_grad=True)
    q = torch.randn(1, 3, 2, 8, device=device).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 1, 3, 8, device=device)
    op = torch.ops.rmfast
    torch.library.opcheck(op.rms_norm, (x, w, 1e-6, 0.0, False))
    torch.library.opcheck(op.rotary, (q, q[:, :1], cos, sin, False))
    torch.library.opcheck(op.gated, (x, x.detach().clone().requires_grad_(), True))


@pytest.mark.parametrize("dtype", [FP32, torch.float64])
@pytest.mark.parametrize("name", ["rms_norm", "gated"])
def test_second_derivatives_are_plain_torchs(name, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(3, 8, device=device, dtype=torch.float64).to(dtype).requires_grad_()

    def twice(function, x):
        y = function(x, x[0], 1e-6) if name == "rms_norm" else function(x, x.sin())
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    want = twice(getattr(reference, name), x.detach().double().requires_grad_())
    # a few dozen roundings of numbers no larger than the largest
    assert (twice(getattr(ops, name), x) - want).abs().max() <= 64 * unit(dtype) * want.abs().max()


def test_gradients_of_many_at_a_time(device):
    x, w = (torch.randn(*s, device=device, requires_grad=True) for s in ((3, 8), (8,)))
    cos, sin = torch.randn(2, 1, 3, 8, device=device)
    turned, _ = ops.rotary(x[None, None], x[None, None], cos, sin)
    y = ops.gated(ops.rms_norm(x, w, 1e-6), x) + turned[0, 0]
    many = torch.randn(5, 3, 8, device=device)
    got = torch.autograd.grad(y, (x, w), many, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, (x, w), one, retain_graph=True) for one in many]
    for ours, want in zip(got, map(torch.stack, zip(*each, strict=True)), strict=True):
        assert (ours - want).abs().max() <= 16 * U * want.abs().max()


def test_where_a_kernel_does_not_run(device, launches):
    """fp64, rows wider than a program holds, torch.func and forward mode: plain torch."""
    from rmfast.kernels import elementwise as kernels

    seen = launches(kernels)
    x, w = torch.randn(2, 6, device=device), torch.randn(6, device=device)
    assert ops.rms_norm(x.double(), w.double(), 1e-6).dtype == torch.float64
    broad = torch.randn(1, 8193, device=device)
    ops.rms_norm(broad, broad[0], 1e-6)
    torch.func.vmap(lambda x: ops.gated(x, x))(x)
    torch.func.jvp(lambda x: ops.rms_norm(x, w, 1e-6), (x,), (x,))
    assert not seen
    ops.gated(x, x)
    assert seen == ["_gated_kernel"]
