"""Time and peak memory of a model without and with the patch, each in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn

from rmfast import loading
from rmfast.errors import UserError
from rmfast.packed.patching import patch
from rmfast.packed.step import pad
from rmfast.train import begin

Batch = list[list[int]]  # token ids of all chosen sides, then of all rejected ones
WORKS = ("scoring", "training")
_ROUNDS = 2  # in turn; the fastest counts


@dataclasses.dataclass(frozen=True)
class Job:
    """A model, and how to run it."""

    model: str
    trust_remote_code: bool
    dtype: str  # of DemoOptions
    device: str
    seed: int

    def load(self) -> begin.Started:
        return begin.load_to_train(
            self.model,
            dtype="bfloat16" if self.dtype == "bfloat16" else "float32",
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            seed=self.seed,
        )


def compare(job: Job, batches: list[Batch]) -> dict[str, list[tuple[float, float]]]:
    """For each of :data:`WORKS` seconds and peak GB, of the unpatched and of the patched model.

    Both work on all batches but the first, which warms up.

    Raises:
        UserError: a process ended early.
    """
    figures = {}
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in (False, True)]
        for work in WORKS:
            rounds = [
                [
                    _wait(pool.submit(_measure, job, patched, work, batches))
                    for pool, patched in zip(pools, (False, True), strict=True)
                ]
                for _ in range(_ROUNDS)
            ]
            figures[work] = []
            for of_process in zip(*rounds, strict=True):
                seconds, memory = zip(*of_process, strict=True)
                figures[work].append((min(seconds), max(memory)))
    return figures


def _wait(future: Future) -> tuple[float, float]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError("a measuring process was killed: out of memory?") from None


@functools.cache
def _model(job: Job, patched: bool) -> nn.Module:
    loading.silence_transformers()
    model = job.load().model
    return patch(model) if patched else model


def _measure(job: Job, patched: bool, work: str, batches: list[Batch]) -> tuple[float, float]:
    """Seconds and peak GB of a process that was made for this."""
    model = _model(job, patched).train(work == "training")
    run(job, model, work, batches[:1])
    model.zero_grad()
    _forget_peak(job.device)
    start = time.perf_counter()
    run(job, model, work, batches[1:])
    return time.perf_counter() - start, _peak_gb(job.device)


def run(job: Job, model: nn.Module, work: str, batches: list[Batch]) -> list[float]:
    """Scores of padded batches; in training with a backward of Bradley-Terry's loss."""
    device, scores = torch.device(job.device), []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "mixed")
    for batch in batches:
        ids, mask = pad([torch.tensor(row) for row in batch], model.config.pad_token_id)
        with autocast, torch.set_grad_enabled(work == "training"):
            output = model(ids.to(device), mask.to(device), use_cache=False)
            found = output.logits[:, 0].float()
            if work == "training":
                chosen, rejected = found.chunk(2)
                (-nn.functional.logsigmoid(chosen - rejected).mean()).backward()
        scores += found.tolist()  # waits for the device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return scores


def _forget_peak(device: str) -> None:
    """Start the peak again from what is held now: loading may take more than running."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts a parent's memory in the ru_maxrss of a process it starts; VmHWM has its own only
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
