"""RMSNorm, rotary embedding and gated activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rmfast import reference
from rmfast.ops._common import (
    check_devices,
    check_floating,
    op,
    present,
    use_kernels,
    without_autocast,
)

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 8192  # columns of a row that a program holds whole


def _takes(*tensors: Tensor) -> bool:
    """Whether the kernels run on these: on a GPU, in fp32 or less, not distributed or quantised."""
    return use_kernels(*tensors) and all(
        x.dtype in _DTYPES and not is_traceable_wrapper_subclass(x) for x in tensors
    )


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm_op`` takes these."""
    return x.shape[-1] <= _WIDEST and _takes(x, weight)


def gates(gate: Tensor, up: Tensor) -> bool:
    """Whether ``gated_op`` takes these."""
    return gate.dtype == up.dtype and gate.shape == up.shape and _takes(gate, up)


def turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether ``rotary_op`` takes these; its tables have no gradient."""
    fixed = not (cos.requires_grad or sin.requires_grad)
    return fixed and _can_turn(q, k, cos, sin) and _takes(q, k, cos, sin)


def _can_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        q.ndim == k.ndim == 4
        and q.shape[-1] % 2 == 0
        and (k.shape[0], *k.shape[2:]) == (q.shape[0], *q.shape[2:])
        and cos.shape == sin.shape
        and cos.shape in ((q.shape[0], *q.shape[2:]), (1, *q.shape[2:]))
        and cos.dtype == sin.dtype
    )


@op("rms_norm", "(Tensor x, Tensor weight, float eps, float offset, bool late) -> Tensor")
def _rms_norm(*inputs):
    from rmfast.kernels import elementwise as kernel

    return kernel.rms_norm(*inputs)


@op(
    "rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, float eps, float offset, bool needs_weight) "
    "-> (Tensor, Tensor)",
)
def _rms_norm_backward(grad, x, *rest):
    from rmfast.kernels import elementwise as kernel

    return present(x, *kernel.rms_norm_backward(grad, x, *rest))


@op("rotary", "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool backward) -> (Tensor, Tensor)")
def _rotary(*inputs):
    from rmfast.kernels import elementwise as kernel

    return kernel.rotary(*inputs)


@op("gated", "(Tensor gate, Tensor up, bool gelu) -> Tensor")
def _gated(*inputs):
    from rmfast.kernels import elementwise as kernel

    return kernel.gated(*inputs)


@op("gated_backward", "(Tensor grad, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)")
def _gated_backward(*inputs):
    from rmfast.kernels import elementwise as kernel

    return kernel.gated_backward(*inputs)


@_rms_norm.register_fake
def _(x, weight, eps, offset, late):
    return x.new_empty(x.shape, dtype=None if late else torch.promote_types(x.dtype, weight.dtype))


@_rms_norm_backward.register_fake
def _(grad, x, weight, eps, offset, needs_weight):
    return x.new_empty(x.shape), *present(
        x, weight.new_empty(len(weight)) if needs_weight else None
    )


@_rotary.register_fake
def _(q, k, cos, sin, backward):
    dtypes = (torch.promote_types(x.dtype, cos.dtype) for x in (q, k))
    made = zip((q.transpose(1, 2), k.transpose(1, 2)), dtypes, strict=True)
    return tuple(x.new_empty(x.shape, dtype=dtype).transpose(1, 2) for x, dtype in made)


@_gated.register_fake
def _(gate, up, gelu):
    return gate.new_empty(gate.shape)


@_gated_backward.register_fake
def _(grad, gate, up, gelu):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx, inputs, output):
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.rest = inputs[len(tensors) :]


def _twice(ctx, function, grad):
    """The backward in plain torch, where it is differentiated itself."""
    inputs = [x.view_as(x) for x in ctx.saved_tensors]  # one may be made of another
    needed = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    out = without_autocast(function)(*inputs, *ctx.rest)
    found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
    return (*(next(found) if need else None for need in ctx.needs_input_grad),)


def _norm_autograd(ctx, grad):
    if torch.is_grad_enabled():
        return _twice(ctx, reference.rms_norm, grad)
    eps, offset, _ = ctx.rest
    needs = ctx.needs_input_grad
    grads = _rms_norm_backward(grad, *ctx.saved_tensors, eps, offset, needs[1])
    return *(g if need else None for g, need in zip(grads, needs, strict=False)), None, None, None


def _rotary_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:4])
    ctx.backward = inputs[4]
    ctx.set_materialize_grads(False)


def _rotary_autograd(ctx, *grads):
    """A query or key that nobody used has no head to turn."""
    like = next(g for g in grads if g is not None)
    turned = _rotary(
        *(like[:, :0] if g is None else g for g in grads), *ctx.saved_tensors, not ctx.backward
    )
    grads = (None if g is None else x for g, x in zip(grads, turned, strict=True))
    return *grads, None, None, None


def _gated_autograd(ctx, grad):
    if torch.is_grad_enabled():
        return _twice(ctx, reference.gated, grad)
    return *_gated_backward(grad, *ctx.saved_tensors, *ctx.rest), None


def _past_dispatcher(
    op: torch.library.CustomOpDef, setup: Callable, backward: Callable
) -> Callable:
    """``op``, with less work for the host, where nobody traces or watches the call.

    A layer calls six to eight of these ops, and a small model waits for its host.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:  # with setup_context, torch binds a signature
        out = op._init_fn(*inputs)
        setup(ctx, inputs, out)
        return out

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op._name, (torch.autograd.Function,), parts)
    op.register_autograd(backward, setup_context=setup)

    def call(*inputs: Any) -> Any:
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        if watched or any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in inputs):
            return op(*inputs)
        return function.apply(*inputs) if torch.is_grad_enabled() else op._init_fn(*inputs)

    return call


rms_norm_op = _past_dispatcher(_rms_norm, _setup, _norm_autograd)
rotary_op = _past_dispatcher(_rotary, _rotary_setup, _rotary_autograd)
gated_op = _past_dispatcher(_gated, _setup, _gated_autograd)


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    offset: float = 0.0,
    late: bool = False,
) -> Tensor:
    """``(offset + weight) * x / sqrt(mean(x**2) + eps)``, over the last dimension.

    Args:
        x: ``[..., H]``, any floating dtype, any strides.
        weight: ``[H]``, any floating dtype.
        eps: what the mean square is raised by.
        offset: 1.0 in Gemma's norms, 0.0 in others.
        late: round once, to x's dtype, after the product (Gemma's and OLMo 2's). Else x / rms is
            rounded to x's dtype, and the product is of the dtype that torch promotes to (Llama's).

    Returns:
        ``[..., H]``. Computed in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not match, dtypes that are not floating, several devices.
    """
    if weight.ndim != 1 or x.ndim == 0 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight must be [H] for x [..., H], got {_shapes(x, weight)}")
    _check(x=x, weight=weight)
    if norms(x, weight):
        return rms_norm_op(x, weight, eps, offset, late)
    return without_autocast(reference.rms_norm)(x, weight, eps, offset, late)


def rotary(
    q: Tensor,  # [B, Hq, N, D]
    k: Tensor,  # [B, Hk, N, D]
    cos: Tensor,  # [B or 1, N, D]
    sin: Tensor,  # [B or 1, N, D]
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys by halves: ``x * cos + cat(-x2, x1) * sin``.

    arXiv 2104.09864, in the layout of GPT-NeoX and Llama. The tables have no gradient.

    Args:
        q: ``[B, Hq, N, D]``, any floating dtype, any strides, D even.
        k: ``[B, Hk, N, D]``.
        cos: ``[B, N, D]`` or ``[1, N, D]``.
        sin: like ``cos``.

    Returns:
        q and k turned, ``[B, heads, N, D]``, in the dtype torch promotes to; computed in fp32
        (fp64 for fp64 inputs). On a GPU they lie in memory as ``[B, N, heads, D]``.

    Raises:
        ValueError: shapes that do not match, dtypes that are not floating, several devices.
    """
    if not _can_turn(q, k, cos, sin):
        raise ValueError(
            "q and k must be [B, heads, N, D] with an even D, cos and sin [B or 1, N, D], got "
            + _shapes(q, k, cos, sin)
        )
    _check(q=q, k=k, cos=cos, sin=sin)
    if _takes(q, k, cos, sin):
        return rotary_op(q, k, cos, sin, False)
    return without_autocast(reference.rotary)(q, k, cos, sin)


def gated(gate: Tensor, up: Tensor, *, gelu: bool = False) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, arXiv 2002.05202), or ``gelu(gate) * up``.

    Args:
        gate: any shape, any floating dtype.
        up: like ``gate``.
        gelu: GELU approximated by tanh instead of SiLU, as in Gemma.

    Returns:
        A tensor like ``gate``; computed in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not match, dtypes not floating, several devices.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike, got {gate.dtype} and {up.dtype}, {_shapes(gate, up)}"
        )
    _check(gate=gate, up=up)
    if _takes(gate, up):
        return gated_op(gate, up, gelu)
    return without_autocast(reference.gated)(gate, up, gelu)


def _check(**tensors: Tensor) -> None:
    check_floating(**tensors)
    check_devices(**tensors)


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(x.shape)) for x in tensors)
