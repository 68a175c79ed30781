"""Kernels for the norms, gated MLPs and rotary embeddings of one backbone, where they run.

A module is known by the bytecode of what it runs, held against the copies below of what is written
in transformers 5.0 to 5.23, whatever its family. What is written in any other way runs as it was.
**Not yet run on a GPU.**
"""

from __future__ import annotations

import functools
import os
import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.ops import _elementwise as ops
from rmfast.ops._common import HAS_TRITON
from rmfast.packed import models
from rmfast.packed.stand_in import Override
from rmfast.packed.state import State

# --- what transformers runs


def _llama(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _olmo2(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _gemma(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _gemma_norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _mlp(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def rotate_half(x):
    """Theirs has a docstring: without one, the constants would be numbered in another way."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """As above."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


# forward of a norm: where it keeps eps, offset of its weight, whether it rounds late
_NORMS = {
    _llama: ("variance_epsilon", 0.0, False),
    _olmo2: ("variance_epsilon", 0.0, True),
    _gemma: ("eps", 1.0, True),
}
# class of an activation, of torch or transformers: whether it is GELU approximated by tanh
_ACTIVATIONS = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "PytorchGELUTanh": True}
_KERNEL = "_rmfast_kernel"
_ROPE = apply_rotary_pos_emb.__name__


def _is(function: Any, ours: Callable) -> bool:
    """Whether a function does what ours does: names of variables and docstrings may differ."""

    def does(f: Any) -> tuple:
        code = f.__code__
        constants = [x for x in code.co_consts if not (x is None or isinstance(x, str))]
        return code.co_code, code.co_names, code.co_argcount, f.__defaults__, constants

    return isinstance(function, types.FunctionType) and does(function) == does(ours)


# --- what runs in its place


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stands for the forward of all these modules, as a method of each.

    Were it an object of each, torch.compile would take every layer for another one. The name is
    for pickle, which asks a module for its method by it.
    """
    return module.__dict__[_KERNEL](*args, **kwargs)


class Kernel(Override):
    """``forward`` of a module in a backbone, by a kernel where it takes the call's tensors."""

    name: str  # in the report

    def put(self) -> None:
        if not self.placed:
            self.module.__dict__[_KERNEL] = self
            self.place()
            self.placed = True

    def place(self) -> None:
        """Also after pickling, which left the method of the class in its place."""
        setattr(self.module, models.slot(self.module), types.MethodType(forward, self.module))

    def leave(self) -> None:
        super().leave()
        if not self.placed:
            self.module.__dict__.pop(_KERNEL, None)

    def is_in(self, now: Any) -> bool:
        return getattr(now, "__func__", None) is forward


class RMSNorm(Kernel):
    """``forward`` of an RMSNorm; ``rule`` as in ``_NORMS``."""

    name = "RMSNorm"

    def __init__(self, module: nn.Module, patch: State, rule: tuple[str, float, bool]) -> None:
        super().__init__(module, patch)
        self.rule = rule

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        (hidden,) = (*args, *kwargs.values())  # [..., H]
        weight = self.module.weight
        if not ops.norms(hidden, weight):
            return self.original(hidden)
        eps, *rule = self.rule
        return ops.rms_norm_op(hidden, weight, getattr(self.module, eps), *rule)


class MLP(Kernel):
    """``forward`` of a gated MLP, by its own projections: ``down(act(gate(x)) * up(x))``."""

    name = "gated MLP"

    def __init__(self, module: nn.Module, patch: State) -> None:
        super().__init__(module, patch)
        self.activation = type(module.act_fn)

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        (hidden,) = (*args, *kwargs.values())  # [..., H]
        module, act = self.module, self.module.act_fn
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
        if ops.gates(gate, up) and type(act) is self.activation and not act._forward_hooks:
            return module.down_proj(ops.gated_op(gate, up, _ACTIVATIONS[type(act).__name__]))
        return module.down_proj(act(gate) * up)


class Attention(Kernel):
    """``forward`` of an attention module: the same code, with another rotary embedding."""

    name = "rotary"

    def __init__(self, module: nn.Module, patch: State) -> None:
        super().__init__(module, patch)
        self.turning = _turning(type(module).forward)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "turning"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.turning = _turning(type(self.module).forward)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.turning(self.module, *args, **kwargs)


@functools.cache
def _turning(forward: types.FunctionType) -> types.FunctionType:
    """A copy of a forward that finds the kernel under the name of the rotary embedding."""
    before = forward.__globals__[_ROPE]

    def rope(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or not ops.turns(q, k, cos, sin):
            return before(q, k, cos, sin, unsqueeze_dim)
        return ops.rotary_op(q, k, cos, sin, False)

    names = {**forward.__globals__, _ROPE: rope}
    del names["__name__"]  # torch.compile would look names up in the module of that name
    copy = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def overrides(base: nn.Module, patch: State) -> list[Kernel]:
    """A stand-in for each module of a backbone that a kernel can be put on; none without a GPU.

    Where somebody put a forward of their own on a module, it stays.
    """
    gpu = HAS_TRITON and torch.cuda.is_available()
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return []
    return [kernel for module in base.modules() for kernel in _of(module, patch)]


def _of(module: nn.Module, patch: State) -> Iterable[Kernel]:
    cls, forward = type(module), type(module).forward
    if models.replaced(module) is not None or not isinstance(forward, types.FunctionType):
        return
    for ours, rule in _NORMS.items():
        if _is(forward, ours) and (ours is not _gemma or _is(cls._norm, _gemma_norm)):
            yield RMSNorm(module, patch, rule)
    if _is(forward, _mlp) and _knows(module.act_fn):
        yield MLP(module, patch)
    if _ROPE in forward.__code__.co_names:
        rope = forward.__globals__.get(_ROPE)
        if _is(rope, apply_rotary_pos_emb) and _is(rope.__globals__["rotate_half"], rotate_half):
            yield Attention(module, patch)


def _knows(act: Any) -> bool:
    theirs = type(act).__module__.startswith(("torch.", "transformers."))
    return theirs and type(act).__name__ in _ACTIVATIONS and models.replaced(act) is None


def report(overrides: Iterable[Override]) -> str | None:
    """One line for :func:`rmfast.report`; None where there is no kernel."""
    counts = Counter(one.name for one in overrides if isinstance(one, Kernel))
    if not counts:
        return None
    found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"on a GPU, kernels: {found}"
