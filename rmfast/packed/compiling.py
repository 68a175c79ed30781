"""What torch.compile is kept out of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_MARKED: list[tuple[Callable[..., Any], bool]] = []


def untraced(whole: bool = False) -> Callable[[F], F]:
    """A decorator: torch.compile runs the function as it is, and compiles the layers it calls.

    Packing reads tokens and counts nodes, so a compiled version would be made again for each batch.

    Args:
        whole: torch.compile does not go into what the function calls either.
    """

    def mark(function: F) -> F:
        _MARKED.append((function, whole))
        return function

    return mark


def keep_out() -> None:
    """Tell torch.compile of the functions marked above.

    Called when a model is patched, not at import: it brings torch.compile and Triton along.
    """
    while _MARKED:
        function, whole = _MARKED.pop()
        owner: Any = sys.modules[function.__module__]
        *classes, name = function.__qualname__.split(".")
        for one in classes:
            owner = getattr(owner, one)
        setattr(owner, name, torch.compiler.disable(function, recursive=whole))
