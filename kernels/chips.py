"""The chips the configuration tables name, and which of them a launch is for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    backend: str  # as Triton's GPUTarget has it
    arch: int | str
    warp_size: int
    shared: int  # bytes of shared memory a program can have


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 << 10),
    "sm_90": Chip("cuda", 90, 32, 227 << 10),
    "sm_100": Chip("cuda", 100, 32, 227 << 10),
    "sm_120": Chip("cuda", 120, 32, 99 << 10),
    "gfx942": Chip("hip", "gfx942", 64, 64 << 10),
    "gfx950": Chip("hip", "gfx950", 64, 160 << 10),
}

_launching_for: str | None = None


@contextlib.contextmanager
def launching_for(name: str) -> Iterator[None]:
    """Configurations of this chip, whatever the device: to compile for it without having it."""
    global _launching_for
    before, _launching_for = _launching_for, name
    try:
        yield
    finally:
        _launching_for = before


def chip(device: torch.device) -> str:
    """The row of the tables for ``device``; off the GPU, as under the interpreter, ``sm_80``."""
    if _launching_for is not None:
        return _launching_for
    return "sm_80" if device.type != "cuda" else _of_gpu(device.index or 0)


@functools.cache
def _of_gpu(index: int) -> str:
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return "gfx950" if name == "gfx950" else "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (8, 0):
        return "sm_80"
    # 8.6, 8.9 and older have little shared memory, as 12.x has
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
