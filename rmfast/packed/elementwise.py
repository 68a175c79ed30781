"""Kernels for the norms, gated MLPs and rotary embeddings of one backbone, where they run.

A module is known by the bytecode of what it runs, held against that of a few classes of
transformers which were tried on numbers, whatever its family. Other code runs as it was.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from rmfast import reference
from rmfast.ops import _elementwise as ops
from rmfast.ops._common import HAS_TRITON
from rmfast.packed import models
from rmfast.packed.stand_in import Override
from rmfast.packed.state import State

# --- what transformers runs

# class of a norm: where it keeps eps, offset of its weight, whether it rounds late
_NORMS = {
    "llama.LlamaRMSNorm": ("variance_epsilon", 0.0, False),
    "olmo2.Olmo2RMSNorm": ("variance_epsilon", 0.0, True),
    "gemma.GemmaRMSNorm": ("eps", 1.0, True),
}
# class of an activation, of torch or transformers: whether it is GELU approximated by tanh
_ACTIVATIONS = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "PytorchGELUTanh": True}
_KERNEL = "_rmfast_kernel"
_ROPE = "apply_rotary_pos_emb"


def _theirs(name: str) -> Any:
    """transformers' own ``family.name``; None where this version has none."""
    family, name = name.split(".")
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None
    return getattr(module, name, None)


def _code(*functions: Any) -> tuple | None:
    """What functions do: names of their variables and docstrings may differ; None: not known."""
    out: list[Any] = []
    for function in functions:
        if not isinstance(function, types.FunctionType):
            return None
        code = function.__code__
        constants = [x for x in code.co_consts if not (x is None or isinstance(x, str))]
        out += [code.co_code, code.co_names, code.co_argcount, function.__defaults__, *constants]
    return tuple(out)


def _of_norm(cls: type) -> tuple | None:
    return _code(*(getattr(cls, name) for name in ("forward", "_norm") if hasattr(cls, name)))


def _of_rope(rope: Any) -> tuple | None:
    return _code(rope, getattr(rope, "__globals__", {}).get("rotate_half"))


@functools.cache
def _known() -> dict[tuple, Any]:
    """What a kernel can do instead, by its code: transformers' own, tried on numbers.

    Should a version change a formula, it is not in here, and runs as it was.
    """
    found: dict[tuple | None, Any] = {}
    draw = torch.Generator().manual_seed(0)
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        x = torch.randn(2, 3, 4, 16, generator=draw, dtype=torch.float32)
        tables = torch.randn(2, 2, 4, 16, generator=draw, dtype=torch.float32)
        for name, rule in _NORMS.items():
            cls, weight = _theirs(name), x[0, 0, 0]
            if cls is None:
                continue
            same = True
            for dtype in (torch.float32, torch.bfloat16):  # the second tells when it rounds
                norm = cls.__new__(cls)  # not made: somebody may see to where parameters go
                norm.__dict__.update({"weight": weight.to(dtype), rule[0]: 0.125})
                ours = reference.rms_norm(x.to(dtype), weight.to(dtype), 0.125, *rule[1:])
                same &= torch.equal(cls.forward(norm, x.to(dtype)), ours)
            if same:
                found[_of_norm(cls)] = rule
        mlp, rope = _theirs("llama.LlamaMLP"), _theirs(f"llama.{_ROPE}")
        parts = types.SimpleNamespace(
            gate_proj=torch.sin, up_proj=torch.cos, act_fn=F.silu, down_proj=torch.neg
        )
        if torch.equal(mlp.forward(parts, x), -reference.gated(x.sin(), x.cos())):
            found[_code(mlp.forward)] = "mlp"
        theirs = rope(x, x[:, :1], *tables)
        if all(map(torch.equal, theirs, reference.rotary(x, x[:, :1], *tables))):
            found[_of_rope(rope)] = "rope"
    return {code: what for code, what in found.items() if code is not None}


# --- what runs in its place


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stands for the forward of all these modules, as a method of each.

    Were it an object of each, torch.compile would take every layer for another one. The name is
    for pickle, which asks a module for its method by it.
    """
    return module.__dict__[_KERNEL](*args, **kwargs)


def runs(cls: type) -> tuple:
    """What a class runs that a kernel stands in for; any of it may be replaced later."""
    forward = cls.forward
    return forward, getattr(cls, "_norm", None), getattr(forward, "__globals__", {}).get(_ROPE)


class Kernel(Override):
    """``forward`` of a module in a backbone, by a kernel where it takes the call's tensors.

    ``rule`` is one of ``_known()``.
    """

    name: str  # in the report

    def __init__(self, module: nn.Module, patch: State, rule: Any) -> None:
        super().__init__(module, patch)
        self.rule = rule
        self.look()

    def look(self) -> None:
        """Keep what the class runs, if that is known."""
        cls = type(self.module)
        self.runs = runs(cls) if _rule(cls) == self.rule else None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("runs", "turning")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.look()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and runs(type(self.module)) != self.runs:
            return self.original(*args, **kwargs)
        return self.faster(*args, **kwargs)

    def faster(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

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
    """``forward`` of an RMSNorm."""

    name = "RMSNorm"

    def faster(self, *args: Any, **kwargs: Any) -> Tensor:
        (hidden,) = (*args, *kwargs.values())  # [..., H]
        weight = self.module.weight
        if not ops.norms(hidden, weight):
            return self.original(hidden)
        eps, *rule = self.rule
        return ops.rms_norm_op(hidden, weight, getattr(self.module, eps), *rule)


class MLP(Kernel):
    """``forward`` of a gated MLP, by its own projections: ``down(act(gate(x)) * up(x))``."""

    name = "gated MLP"

    def faster(self, *args: Any, **kwargs: Any) -> Tensor:
        (hidden,) = (*args, *kwargs.values())  # [..., H]
        module, act = self.module, self.module.act_fn
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
        if ops.gates(gate, up) and _knows(act):
            return module.down_proj(ops.gated_op(gate, up, _ACTIVATIONS[type(act).__name__]))
        return module.down_proj(act(gate) * up)


class Attention(Kernel):
    """``forward`` of an attention module: the same code, with another rotary embedding."""

    name = "rotary"

    def look(self) -> None:
        super().look()
        self.turning = self.runs and _turning(*self.runs[::2])

    def faster(self, *args: Any, **kwargs: Any) -> Any:
        return self.turning(self.module, *args, **kwargs)


@functools.cache
def _turning(forward: types.FunctionType, before: Callable) -> types.FunctionType:
    """A copy of a forward that finds the kernel under the name of the rotary embedding."""

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
    if patch.options.attention == "sdpa" or not (gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        return []
    found = []
    for module in base.modules():
        rule = None if models.replaced(module) is not None else _rule(type(module))
        kind = {"mlp": MLP, "rope": Attention}.get(rule, RMSNorm)
        if rule is not None and (kind is not MLP or _knows(module.act_fn)):
            found.append(kind(module, patch, rule))
    return found


def _rule(cls: type) -> Any:
    """What a class runs, as ``_known()`` has it; None: nothing that is known."""
    forward, _, rope = runs(cls)
    if not isinstance(forward, types.FunctionType):
        return None
    rope = rope if _ROPE in forward.__code__.co_names else None
    return next(filter(None, map(_known().get, (_of_norm(cls), _of_rope(rope)))), None)


def _knows(act: Any) -> bool:
    """Whether an activation is known, and nobody has a say in it."""
    theirs = type(act).__module__.startswith(("torch.", "transformers."))
    known = theirs and type(act).__name__ in _ACTIVATIONS
    return known and models.replaced(act) is None and not models.is_watched(act)


def is_on(module: nn.Module) -> bool:
    """Whether the forward of a module is a kernel's stand-in."""
    return getattr(models.replaced(module), "__func__", None) is forward


def is_plain(module: nn.Module, *others: str) -> bool:
    """Whether torch's, transformers' or our code runs in a module, and nobody looks on.

    Args:
        others: packages whose code may, too.
    """
    own = isinstance(models.replaced(module), (Override, type(None))) or is_on(module)
    theirs = (
        "torch.nn.",
        "transformers.models.",
        "transformers.activations",
        "transformers.pytorch_utils",
        *others,
    )
    return own and type(module).__module__.startswith(theirs) and not models.is_watched(module)


def report(overrides: Iterable[Override]) -> str | None:
    """One line for :func:`rmfast.report`; None where there is no kernel."""
    counts = Counter(one.name for one in overrides if isinstance(one, Kernel))
    if not counts:
        return None
    found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"on a GPU, kernels: {found}"
