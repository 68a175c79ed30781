"""Liger's kernels inside one backbone: ``rmfast.patch(model, backbone_kernels="liger")``.

RMSNorm, SwiGLU and the rotary embedding of single instances, by Liger's functional interface.
Its own ``apply_liger_kernel_to_*`` and ``use_liger_kernel`` are not used: they replace names in
transformers' modules, and bind a language model's forward that fails on a sequence classifier.
**Not yet run on a GPU.**
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.packed import models
from rmfast.packed.compiling import untraced
from rmfast.packed.stand_in import Override

# By config.model_type, how the family's classes begin. Their norms multiply by the weight after
# rounding to the input's dtype and their rotary tables repeat one half: Liger's "llama" mode.
# Gemma's norms do neither.
_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_ROPE = "apply_rotary_pos_emb"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _fits(x: Tensor, like: Tensor) -> bool:
    """Whether a kernel computes in these dtypes what transformers does."""
    return _on_gpu(x) and x.dtype in _DTYPES and x.dtype == like.dtype


@functools.cache
def _functional() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


class Kernel(Override):
    """``forward`` of a module in a backbone, by a kernel of Liger's where it fits."""


class RMSNorm(Kernel):
    """``forward`` of an RMSNorm; what Liger cannot do as transformers does runs as it was."""

    @untraced()
    def run(self, hidden: Tensor) -> Tensor:  # [..., H]
        weight = self.module.weight
        if not _fits(hidden, weight):
            return self.original(hidden)
        # not in place: somebody else may read the gradient it would write over
        return _functional().liger_rms_norm(
            hidden, weight, self.module.variance_epsilon, casting_mode="llama", in_place=False
        )


class MLP(Kernel):
    """``forward`` of a gated MLP: ``down(silu(gate(x)) * up(x))``."""

    @untraced()
    def run(self, hidden: Tensor) -> Tensor:  # [..., H]
        if not _fits(hidden, hidden):
            return self.original(hidden)
        module = self.module
        product = _functional().liger_swiglu(module.gate_proj(hidden), module.up_proj(hidden))
        return module.down_proj(_once(product))


def _once(out: Tensor) -> Tensor:
    """Let only one backward through: Liger's SwiGLU writes its gradient over what it saved."""
    ran: list[bool] = []

    def before(grads: Any) -> None:
        if ran:
            raise RuntimeError(
                "a second backward through Liger's SwiGLU, which keeps nothing for it: "
                "patch without backbone_kernels where retain_graph=True is needed"
            )
        ran.append(True)

    if out.grad_fn is not None:
        out.grad_fn.register_prehook(before)
    return out


class Attention(Kernel):
    """``forward`` of an attention module: the same code, with Liger's rotary embedding."""

    @untraced()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        return _with_rope(type(self.module).forward)(self.module, *args, **kwargs)


@functools.cache
def _with_rope(forward: types.FunctionType) -> Callable:
    """A copy of a forward that finds another function under one global name."""
    before = forward.__globals__[_ROPE]

    def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # under autocast the tables stay fp32: what comes out is rounded to bf16 by attention
        wider = cos.dtype == torch.float32
        if not _fits(query, key) or not (wider or cos.dtype == query.dtype):
            return before(query, key, cos, sin)
        return _functional().liger_rope(query, key, cos, sin)

    copy = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROPE: rope},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def places(base: nn.Module) -> dict[nn.Module, type[Kernel]]:
    """The modules of a backbone that take a kernel, and the stand-in of each.

    Where somebody put a forward of their own on a module, it stays.
    """
    family = _FAMILIES[base.config.model_type]
    kinds = {f"{family}{kind.__name__}": kind for kind in (RMSNorm, MLP, Attention)}
    out = {}
    for module in base.modules():
        kind = kinds.get(type(module).__name__)
        now = models.replaced(module)
        if kind is None or not (now is None or isinstance(now, kind)):
            continue
        calls = getattr(type(module).forward, "__code__", None)
        if kind is Attention and (calls is None or _ROPE not in calls.co_names):
            continue
        out[module] = kind
    return out


def runs_on(base: nn.Module) -> bool:
    """Whether the backbone is where kernels run."""
    return _on_gpu(base.get_input_embeddings().weight)


def why_not(name: str, model: nn.Module, compile: bool) -> str | None:
    """Why a model cannot have these kernels here; None: it can."""
    if name != "liger":
        return f"backbone_kernels must be 'liger' or None, got {name!r}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "backbone_kernels='liger' needs a package: pip install 'rmfast[liger]'"
    if not _has_gpu():
        return (
            "backbone_kernels='liger' needs a GPU, and torch sees none here: Liger's kernels are "
            "Triton's; leave backbone_kernels off"
        )
    if compile:
        return "compile=True fuses what Liger's kernels do: choose it or backbone_kernels='liger'"
    _, base = models.find(model)
    config = getattr(model if base is None else base, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if base is None or kind not in _FAMILIES:
        return (
            f"backbone_kernels='liger' is proved for {', '.join(_FAMILIES)}, and this is {kind}: "
            "its norms, MLP or rotary embedding may be others; leave backbone_kernels off"
        )
    if config.hidden_act not in ("silu", "swish"):
        return (
            f"backbone_kernels='liger' has SwiGLU, and this {kind} has "
            f"hidden_act={config.hidden_act!r}: leave backbone_kernels off"
        )
    if not places(base):
        return (
            f"backbone_kernels='liger' finds no module of this {type(base).__name__} to put a "
            "kernel on: each has a forward of somebody's own"
        )
    return None
