"""Records what a launcher launches, and compiles it for chips that are not there.

    with offline.record() as recorded:
        reward_head.reward_head(hidden, index, weight, None)  # ordinary CPU tensors
    compiled = offline.compile(recorded[0], "sm_90")

Compiling goes through ``JITFunction.run`` itself, told that the chip is there, so arguments are
specialised exactly as a launch would. Triton must have been imported without TRITON_INTERPRET:
:func:`processes` starts some where it was.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rmfast.kernels import chips


class Launch(NamedTuple):
    fn: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, the constexprs and defaults among them
    options: dict[str, Any]  # num_warps, num_stages, ...: what the kernel has no parameter for


class Compiled(NamedTuple):
    kernel: str
    chip: str
    num_warps: int
    num_stages: int
    registers: int  # of a thread; on AMD vector registers, accumulators included
    spills: int  # NVIDIA: instructions to or from local memory; AMD: vector registers spilled
    scalar_spills: int  # AMD: scalar registers kept in lanes of vector ones, not in memory
    local_bytes: int  # of a thread: stack, spilled registers, arrays indexed at run time
    shared: int  # bytes of a program
    programs: int  # that a multiprocessor (compute unit) can hold at once
    occupancy: float  # their warps over the most it can hold
    text: str  # SASS, or AMD's assembly; empty where it was not asked for

    def opcodes(self) -> collections.Counter[str]:
        """How often each instruction stands in the text, by its full name."""
        pattern = _SASS if chips.CHIPS[self.chip].backend == "cuda" else _AMDGCN
        return collections.Counter(pattern.findall(self.text))


_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\t([a-z]\w*)", re.MULTILINE)


@contextlib.contextmanager
def record(also: Callable[[Launch], object] = lambda launch: None) -> Iterator[list[Launch]]:
    """Inside the block kernels are not run: their launches are listed, in order, ``also`` told."""
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET=1: kernels are interpreted and cannot be compiled; unset it before "
            "triton is imported"
        )
    recorded: list[Launch] = []

    def run(fn, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in list(kwargs) if k not in fn.arg_names}
        bound = fn.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        recorded.append(Launch(fn, grid(arguments) if callable(grid) else grid, arguments, options))
        also(recorded[-1])

    before, JITFunction.run = JITFunction.run, run
    try:
        yield recorded
    finally:
        JITFunction.run = before


# --- compiling


def name(launch: Launch) -> str:
    """``file.function`` of its kernel."""
    return f"{launch.fn.fn.__module__.split('.')[-1]}.{launch.fn.fn.__name__}"


def compile(launch: Launch, chip: str, text: bool = True) -> Compiled:
    """What the launch would run on ``chip``, one of ``chips.CHIPS``.

    Which configuration that is was settled when the launch was recorded: do that inside
    ``chips.launching_for(chip)``. Without ``text`` it is a third faster on NVIDIA's.
    """
    kernel = _kernel(launch, chip)
    if chips.CHIPS[chip].backend == "cuda":
        figures = _nvidia(kernel.asm["cubin"], text)
    else:
        figures = _amd(kernel.asm["amdgcn"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    programs = resident(chip, warps, figures["registers"], shared)
    return Compiled(
        kernel=name(launch),
        chip=chip,
        num_warps=warps,
        num_stages=kernel.metadata.num_stages,
        shared=shared,
        programs=programs,
        occupancy=programs * warps / LIMITS[chip].warps,
        **figures,
    )


def specialised(launch: Launch, chip: str) -> Any:
    """The ``ASTSource`` that is compiled: signature, constants and attributes."""
    return _kernel(launch, chip).src


def _kernel(launch: Launch, chip: str) -> Any:
    with _driver(chip):
        return launch.fn.run(**launch.arguments, grid=launch.grid, warmup=True, **launch.options)


class _Absent:
    """All of a driver that is asked for before the launch itself."""

    def __init__(self, chip: str):
        from triton.backends.compiler import GPUTarget

        self.name = chip
        self.target = GPUTarget(*chips.CHIPS[chip][:3])

    def get_current_target(self):
        return self.target

    def get_current_device(self):  # what compiled kernels are kept under
        return self.name

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def _driver(chip: str) -> Iterator[None]:
    from triton.runtime import driver

    before = dict(vars(driver))  # `active` itself raises where there is no GPU
    driver.set_active(_Absent(chip))
    try:
        yield
    finally:
        vars(driver).update(before)


@functools.cache
def _nvidia(cubin: bytes, text: bool) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        local = used["STACK"] + used["LOCAL"]
        # without local memory there is nothing to spill to
        sass = _tool("nvdisasm", "-c", "-ndf", file.name) if text or local else ""
    return {
        "registers": used["REG"],
        "spills": sum(op.startswith(("STL", "LDL")) for op in _SASS.findall(sass)),
        "scalar_spills": 0,
        "local_bytes": local,
        "text": sass if text else "",
    }


def _tool(name: str, *arguments: str) -> str:
    from triton.backends import nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _amd(text: str) -> dict[str, Any]:
    fields = {k: int(v) for k, v in re.findall(r"^ +\.(\w+): +(\d+)$", text, re.MULTILINE)}
    return {
        "registers": fields["vgpr_count"],
        "spills": fields["vgpr_spill_count"],
        "scalar_spills": fields["sgpr_spill_count"],
        "local_bytes": fields["private_segment_fixed_size"],
        "text": text,
    }


# --- occupancy


class Limits(NamedTuple):
    """Of a multiprocessor or compute unit."""

    warps: int
    programs: int
    shared: int  # bytes
    granule: int  # bytes in which shared memory is given out
    reserved: int  # bytes of it that each program loses


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; 1 KiB a
# program is the system's. AMD: CDNA3 and CDNA4 instruction set guides and white papers: 4 SIMDs of
# 8 waves, 64 or 160 KiB of LDS, 16 workgroups that have a barrier.
LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10, 128, 1 << 10),
    "sm_90": Limits(64, 32, 228 << 10, 128, 1 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 128, 1 << 10),
    "sm_120": Limits(48, 24, 100 << 10, 128, 1 << 10),
    "gfx942": Limits(32, 16, 64 << 10, 512, 0),
    "gfx950": Limits(32, 16, 160 << 10, 1280, 0),
}


def resident(chip: str, num_warps: int, registers: int, shared: int) -> int:
    """Programs that fit on one multiprocessor (compute unit) together."""
    limits = LIMITS[chip]
    if chips.CHIPS[chip].backend == "cuda":
        # 64 Ki registers in four quarters; a warp takes multiples of 256
        warps = 4 * ((16 << 10) // _up(32 * max(registers, 1), 256))
        programs = limits.programs
    else:
        # 512 registers a lane in each of four SIMDs; a wave takes multiples of 8
        warps = 4 * (512 // _up(max(registers, 1), 8))
        programs = limits.programs if num_warps > 1 else limits.warps
    taken = _up(shared + limits.reserved, limits.granule)
    by_shared = limits.shared // taken if taken else programs
    return min(programs, min(warps, limits.warps) // num_warps, by_shared)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


# --- processes that import triton afresh


@contextlib.contextmanager
def processes(
    jobs: int | None = None, interpret: bool = False
) -> Iterator[concurrent.futures.Executor]:
    """Workers in which triton compiles (or interprets), whatever this process does.

    Their compiled kernels go with them. ``jobs``: how many, as many as there are CPUs if None.
    """
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ProcessPoolExecutor(
            jobs or os.cpu_count(),
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(cache, interpret),
        ) as pool,
    ):
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _start(cache: str, interpret: bool) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: 3.9 warns
    import torch

    torch.set_num_threads(1)
