"""What every stand-in for ``forward`` does: take its place, leave it, call what was before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from rmfast.packed import models
from rmfast.packed.compiling import keep_out
from rmfast.packed.state import Member, State, Weak


class Unservable(Exception):
    """A call the packed path cannot serve; the message is the reason."""


class Override(Member):
    """Stands in for ``forward`` on one instance. Pickles and copies along with its module."""

    __name__ = "forward"
    module = Weak()
    patch = Weak()  # None in the copy of a layer alone: it then runs as it was
    placed = False  # on its module, itself or inside somebody's wrapper

    def __new__(cls, *_: Any) -> Override:
        keep_out()  # here, because an unpickled model comes by no other way
        return super().__new__(cls)

    def __init__(self, module: nn.Module, patch: State) -> None:
        self.module = module
        self.patch = patch
        self.before = models.replaced(module)  # an instance forward of somebody else's

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["patch"]  # the copy of the patch puts itself there
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_patch", None)

    def put(self) -> None:
        """Replace the instance's forward, unless somebody's wrapper holds this stand-in already."""
        if not self.placed:
            setattr(self.module, models.slot(self.module), self)
            self.placed = True

    def leave(self) -> None:
        """Put the forward before it back, unless somebody has wrapped this stand-in since."""
        slot = self.slot()
        if slot is None:
            return
        self.placed = False
        if self.before is None and slot == "forward":
            del self.module.forward
        else:
            setattr(self.module, slot, self.before or self.of_class())

    def slot(self) -> str | None:
        """The attribute of the module that holds this stand-in; None inside somebody's wrapper."""
        for slot in ("forward", "_old_forward"):
            now = None if self.module is None else self.module.__dict__.get(slot)
            if self.is_in(now):
                return slot
        return None

    def is_in(self, now: Any) -> bool:
        """Whether a forward is this stand-in."""
        return now is self or getattr(now, "__func__", None) is self

    def fits(self) -> bool:
        """Whether the stand-in can be put again: nobody has replaced the forward since."""
        if self.module is None:
            return False
        return self.placed or models.replaced(self.module) == self.before

    def of_class(self) -> Callable:
        return type(self.module).forward.__get__(self.module)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        # a method made by __get__ is, to torch.compile, the forward of the instance
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # trainers drop the columns it does not name
        return inspect.signature(self.before or self.of_class())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # accelerate makes a method of what it unwraps
            args = args[1:]
        if self.module is None:
            raise ReferenceError("the model of this forward is gone: keep the model")
        if self.patch is None or not self.patch.active:
            return self.original(*args, **kwargs)
        return self.run(*args, **kwargs)

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        if not args:
            return dict(kwargs)
        signature = self.__signature__
        named = dict(signature.bind(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(parameter.name, {}))
        return named

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError
