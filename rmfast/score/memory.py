"""How many tokens a micro-batch may hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from rmfast.packed import pieces

_SHARE = 0.6  # of the free memory, for a micro-batch


# --- memory


def _most_tokens(device: torch.device, probe: Callable[[int], None]) -> int:
    """Tokens that run together: what some of the free memory holds, up to a limit.

    Two passes tell what a token takes; where the system does not say what is free, or was used,
    the limit stands.
    """
    most = pieces.most(device)
    few = most // 8
    used = []
    for tokens in (few // 2, few):
        before = _memory(device)
        if before is None:
            return most
        probe(tokens)
        used.append(_memory(device)[1] - before[0])
    a_token = max((used[1] - used[0]) / (few - few // 2), used[1] / few, 1.0)
    return int(min(most, max(few, _SHARE * _free(device) / a_token)))


def _memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes held now, and at most since the last call; None where nobody counts them."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), peak
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        held = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        return int(held["VmRSS"]) << 10, int(held["VmHWM"]) << 10
    except (OSError, KeyError):
        return None


def _free(device: torch.device) -> int:
    """Bytes that could still be taken."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(free, 0)
