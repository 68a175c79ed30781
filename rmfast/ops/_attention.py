"""Attention under the packed trie."""

from __future__ import annotations

import torch
from torch import Tensor

from rmfast import reference
from rmfast.ops import _cpu as cpu
from rmfast.ops._common import (
    check_choice,
    check_devices,
    check_floating,
    no_second_derivative,
    op,
    present,
    transformed,
    use_kernels,
    without_autocast,
)
from rmfast.ops._plan import TriePlan, made_for

# the rule: who sees whom, the plan that is shared by layers, and what becomes of a logit
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor subtree_end, Tensor position_ids, "
    "Tensor? queries, Tensor plan, Tensor? sinks, float scale, int? window, float? softcap"
)


@op("trie_attention", f"({_INPUTS}, bool triton, bool keep) -> (Tensor, Tensor)")
def _trie_attention(query, key, value, *rest):
    """The second output is what the Triton backward needs besides: empty elsewhere."""
    end, position, queries, plan, *rule, triton, keep = rest
    inputs = (query, key, value, end, position, queries, *rule)
    if triton:
        from rmfast.kernels import trie_attention as kernels

        return kernels.trie_attention(*inputs, keep, made=made_for(plan))
    lse = query.new_empty(1, 0, dtype=torch.float32)
    # errors of one layer add up in the gradients of the others
    return cpu.trie_attention(*inputs, made=made_for(plan), once=not keep), lse


@op(
    "trie_attention_backward",
    f"(Tensor grad, {_INPUTS}, Tensor? out, Tensor? lse) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _trie_attention_backward(grad, query, *rest):
    key, value, end, position, queries, plan, *rule, out, lse = rest
    inputs = (grad, query, key, value, end, position, queries, *rule)
    made = made_for(plan)
    if lse is not None:
        from rmfast.kernels import trie_attention as kernels

        *grads, sinks = kernels.trie_attention_backward(*inputs, out, lse, made=made)
    else:
        *grads, sinks = cpu.trie_attention_backward(*inputs, made=made)
    return *grads, *present(query, sinks)


@_trie_attention.register_fake
def _(query, key, value, *rest):
    *_, triton, keep = rest
    _, heads, rows, _ = query.shape
    shape = (heads, (rows + 15) // 16 * 16) if triton and keep else (1, 0)
    lse = query.new_empty(shape, dtype=torch.float32)
    return query.new_empty(1, rows, heads, value.shape[-1]), lse


@_trie_attention_backward.register_fake
def _(grad, query, key, value, end, position, queries, plan, sinks, *_):
    grads = (cpu.tokens_first(x, x.dtype) for x in (query, key, value))
    return *grads, *present(query, None if sinks is None else torch.empty_like(sinks))


def _trie_attention_setup(ctx, inputs, output):
    *tensors, scale, window, softcap, triton, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(output if triton else (None, None)))
    ctx.options = (scale, window, softcap)


def _trie_attention_autograd(ctx, grad, _):
    *saved, out, lse = ctx.saved_tensors  # once: checkpointing lets go of them after
    *grads, grad_sinks = _trie_attention_backward(grad, *saved, *ctx.options, out, lse)
    has_sinks = saved[-1] is not None
    return *grads, None, None, None, None, grad_sinks if has_sinks else None, *(None,) * 5


_trie_attention.register_autograd(_trie_attention_autograd, setup_context=_trie_attention_setup)
no_second_derivative(_trie_attention_backward, "trie_attention")


def _why_not_triton(query: Tensor, value: Tensor, scale: float) -> str | None:
    """Why the Triton attention kernel cannot take these; None: it can."""
    if not use_kernels(query):
        return f"tensors are on {query.device}, and Triton is for GPUs"
    widest = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}.get(query.dtype)
    if widest is None:
        return f"it knows fp32, fp16 and bf16, not {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > widest:
        return f"it holds head_dim up to {widest} in {query.dtype}"
    if query.is_cuda and torch.version.hip is None:
        if torch.cuda.get_device_capability(query.device)[0] < 8:
            return "it needs compute capability 8.0 or newer"
    return None if scale > 0 else f"scale is {scale}, not above zero"


def trie_attention(
    query: Tensor,  # [1, Hq, M, D]
    key: Tensor,  # [1, Hk, N, D]
    value: Tensor,  # [1, Hk, N, Dv]
    plan: TriePlan,
    *,
    sinks: Tensor | None = None,  # [Hq]
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over a packed trie: query ``q`` sees key ``k`` iff ``k <= q < subtree_end[k]``.

    Args:
        query: ``[1, Hq, M, D]``; ``Hq`` a multiple of ``Hk`` (grouped heads).
        key: ``[1, Hk, N, D]``, one key per trie node.
        value: ``[1, Hk, N, Dv]``.
        plan: of the ``N`` nodes and the ``M`` queries; made once a batch.
        sinks: ``[Hq]``, attention-sink logits.
        scale: factor on the logits, ``D ** -0.5`` when not given.
        window: sliding window, in positions: a key is seen when nearer than this.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        backend: ``"triton"``, the kernel (GPU; fp16 and bf16 with D and Dv up to 256,
            fp32 up to 128); ``"sdpa"``, torch's own operations tile by tile, anywhere; ``"auto"``,
            the first that can. Under torch.func and in forward-mode differentiation
            :func:`rmfast.reference.trie_attention`, with ``[M, N]`` logits in memory.

    Returns:
        ``[1, M, Hq, Dv]``, the layout attention functions of transformers return.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or inputs ``backend`` cannot take;
            the message names the argument.
    """
    _check(query, key, value, plan, sinks)
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more, or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above zero, or None, got {softcap}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_choice("backend", backend, ("auto", "triton", "sdpa"))
    if transformed(query, key, value, sinks):
        run = without_autocast(reference.trie_attention)
        return run(query, key, value, plan.tensors, sinks, scale, window, softcap)
    why_not = None if backend == "sdpa" else _why_not_triton(query, value, scale)
    if backend == "triton" and why_not is not None:
        raise ValueError(f"backend='triton' cannot run: {why_not}; 'auto' takes what can")
    triton = backend != "sdpa" and why_not is None
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, sinks)
    )
    out, _ = _trie_attention(
        query, key, value, *plan.tensors, plan.carrier, sinks, scale, window, softcap, triton, keep
    )
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, plan: TriePlan, sinks: Tensor | None) -> None:
    nodes = len(plan.subtree_end)
    if query.ndim != 4 or query.shape[0] != 1 or query.shape[2] != plan.rows:
        raise ValueError(f"query must be [1, Hq, {plan.rows}, D], got shape {tuple(query.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[0] != 1 or x.shape[2] != nodes:
            raise ValueError(f"{name} must be [1, Hk, {nodes}, D], got shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype} and query {query.dtype}: cast one of them")
    check_floating(query=query, sinks=sinks)
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key has head_dim {key.shape[3]}, query {query.shape[3]}")
    if not key.shape[1] or query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}, value {value.shape[1]}: need "
            "as many key as value heads, and a multiple of them as query heads"
        )
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"sinks must be [{query.shape[1]}], got shape {tuple(sinks.shape)}")
    check_devices(query=query, key=key, value=value, plan=plan.subtree_end, sinks=sinks)
