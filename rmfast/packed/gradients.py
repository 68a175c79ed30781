"""Gradients of parameters, summed over pieces in the middle of a backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmfast import reference


class Sums:
    """Gradients of parameters that a function of autograd returns at the end of its backward.

    Where there is a ``.grad`` in fp32 and nobody else is given what a backward adds to it, the
    gradients of all pieces but the last are added there at once: no second copy lies beside the
    activations of a piece. Other sums are kept apart, in fp32; where there is no ``.grad``, they
    become it.

    Args:
        parameters: of the function.
        nodes: their places in the graph, ``ctx.next_functions``; empty: nothing is summed.
    """

    def __init__(self, parameters: Sequence[Tensor] = (), nodes: Iterable[Any] = ()) -> None:
        self.parameters = parameters
        self.direct = [*map(_is_direct, parameters, nodes)]
        self.apart: list[Tensor | None] = [None] * len(parameters)
        self.added: set[int] = set()

    def add(self, grads: Iterable[Tensor | None], last: bool) -> None:
        """Add a piece's gradients, which may be one tensor for two parameters."""
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if self.direct[i] and not last and grad.layout is torch.strided:
                self.parameters[i].grad += grad
                self.added.add(i)
                continue
            grad = grad.to(reference.wide(grad.dtype))
            before = self.apart[i]
            self.apart[i] = grad if before is None else before + grad

    def rest(self) -> list[Tensor | None]:
        """What is not in ``.grad`` yet."""
        for i in self.added:  # autograd adds it, and calls who waits for that
            if self.apart[i] is None:
                self.apart[i] = torch.zeros_like(self.parameters[i])
        pairs = zip(self.apart, self.parameters, strict=True)
        return [x if x is None else x.to(p.dtype) for x, p in pairs]


def _is_direct(parameter: Tensor, node: Any) -> bool:
    kept, dtype = parameter.grad, parameter.dtype
    if type(parameter) is not nn.Parameter or parameter._backward_hooks:
        return False
    if kept is None or kept.layout != torch.strided:
        return False
    if kept.dtype != dtype or dtype not in (torch.float32, torch.float64):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad: it wants what would be added
        return False


@contextlib.contextmanager
def unhooked(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Without the hooks that are called with a parameter's gradient: they are given its sum."""
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, own in hooks:
            parameter._backward_hooks = own
