"""Options of a command: the fields of a dataclass, each with its type, default, range and help.

Python callers make the dataclass; :mod:`rmfast.commands` makes a command line of it. Both are
checked in the same place.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from rmfast.errors import UserError


def option(
    help: str, default: Any = dataclasses.MISSING, group: str | None = None, **settings: Any
) -> Any:
    """A field of :class:`Options`.

    Args:
        help: what it is for; begins with a verb.
        default: left out where the option is required.
        group: the heading it stands under in the help.
        settings: ``metavar``; ``names``, more spellings of its flag; ``both``, a switch that is off
            has a flag to turn it off, against a file that turns it on; ``several``, its flag may
            come again, for values that commas join; and its range: ``least``, ``above``, ``below``.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **settings})


class Options:
    """Base of the dataclasses: checks every value when one is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kind_of(type(self), field.name)
            if typing.get_origin(kind) is Literal and isinstance(value, str):
                value = value.replace("-", "_")
                setattr(self, field.name, value)
            if value is not None:
                wrong = why_not(value, field.metadata, kind)
                if wrong is not None:
                    raise UserError(f"{flag(field.name)} {wrong}, got {value!r}")
        if getattr(self, "resume", False) and getattr(self, "overwrite", False):
            raise UserError("--resume and --overwrite exclude each other: give one of them")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(options: type, name: str) -> Any:
    """The type of a field without ``| None``: a class, or a ``Literal``."""
    kind = typing.get_type_hints(options)[name]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def why_not(value: Any, limits: typing.Mapping[str, Any], kind: Any) -> str | None:
    """What is wrong with the value of an option; None: nothing."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return None if value in choices else f"must be one of {', '.join(map(str, choices))}"
    least, above, below = (limits.get(name) for name in ("least", "above", "below"))
    if kind not in (int, float):
        return None
    if kind is int and least == 1 and value < 1:
        return "must be a positive integer"
    fits = math.isfinite(value)
    fits = fits and (least is None or value >= least) and (above is None or value > above)
    if fits and (below is None or value < below):
        return None
    bounds = (("at least", least), ("above", above), ("below", below))
    words = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
    return f"must be a {'whole number' if kind is int else 'number'} {words or 'that is finite'}"
