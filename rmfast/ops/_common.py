"""What every op shares: dispatch, autocast, checks."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def without_autocast(function: Callable) -> Callable:
    """A decorator: autocast, which would round fp32 sums to bf16, is off inside.

    The current CUDA device is that of the first argument: Triton launches on the current one.
    """

    @functools.wraps(function)
    def run(first: Tensor, *args):
        with torch.autocast(first.device.type, enabled=False), _on(first.device):
            return function(first, *args)

    return run


def op(name: str, schema: str, **options: Any) -> Callable[[Callable], torch.library.CustomOpDef]:
    """A decorator: an op of torch, in which autocast is off."""
    make = torch.library.custom_op(f"rmfast::{name}", mutates_args=(), schema=schema, **options)
    return lambda function: make(without_autocast(function))


def present(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, with an empty one like ``like`` for None, which an op cannot give back."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


HAS_TRITON = importlib.util.find_spec("triton") is not None


def transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    They see through torch's own operations alone: of one of ours torch.func knows no gradient, and
    forward mode takes its derivative for zero without a word.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and unpack_dual(x).tangent is not None for x in tensors)


def use_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a Triton kernel runs on ``x``: on a GPU, and on a CPU under Triton's interpreter.

    ``others`` are the other inputs that have a derivative.
    """
    if transformed(x, *others):
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return x.is_cuda and HAS_TRITON


def no_second_derivative(op: torch.library.CustomOpDef, name: str) -> None:
    """Make ``op``, the backward of ``rmfast.ops.name``, raise when it is differentiated."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"rmfast.ops.{name} has no second derivative: for one, write the operation in plain "
            "torch, as rmfast.reference does"
        )

    op.register_autograd(refuse)


def checks_values(x: Tensor) -> bool:
    """Whether values are checked: not where the host would wait for a GPU, nor in torch.compile.

    Nor under torch.func, whose tensors may stand for many.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def check_places(name: str, places: Tensor | None, count: int) -> None:
    """Raise ValueError unless all are indices of ``count`` items."""
    if places is None or not checks_values(places):
        return
    if places.numel() and not 0 <= places.min() <= places.max() < count:
        raise ValueError(
            f"{name} must be from 0 to {count - 1}, got {places.min()} to {places.max()}"
        )


def check_pair_values(**tensors: Tensor | None) -> None:
    """Raise ValueError unless margin, target and weight ``[P]``, where given, are finite."""
    for name, x in tensors.items():
        if x is None or not checks_values(x):
            continue
        good = (x >= 0) & (x <= 1) if name == "target" else x.isfinite()
        if not good.all():
            pair = int((~good).nonzero()[0])
            want = "between 0 and 1" if name == "target" else "finite"
            raise ValueError(f"{name} of pair {pair} is {x[pair].item()}: it must be {want}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def check_devices(**tensors: Tensor | None) -> None:
    first, *others = ((name, x.device) for name, x in tensors.items() if x is not None)
    for name, device in others:
        if device != first[1]:
            raise ValueError(f"{name} is on {device}, {first[0]} on {first[1]}: move one of them")


def check_floating(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}: convert it")
