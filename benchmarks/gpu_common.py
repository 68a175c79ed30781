"""What ``gpu_check`` and ``gpu_report`` share: batches, models, facts, a process for each task."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime
import gc
import json
import multiprocessing
import operator
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from rmfast.benchmarks import contestants
from rmfast.benchmarks import kernels as bench
from rmfast.kernels import trie_attention  # noqa: F401  Triton is there before any fork

DRY = "--dry" in sys.argv  # tiny, on a CPU: to see that all of it runs
DEV = "cpu" if DRY else "cuda"
PATIENCE = 10 if DRY else 1  # where nothing is timed, a busy machine fails nothing
BF16 = torch.bfloat16
KINDS = ("groups", "apart") if DRY else ("pairs", "groups", "long", "apart")
ROUNDS = 1 if DRY else 3
Row = dict[str, Any]

SETTINGS = "TRITON_(?!CACHE)|PYTORCH_|TORCH_|CUDA_(?!HOME)"  # of the environment
PACKAGES = """torch triton transformers numpy accelerate peft pytest pytest-xdist pytest-timeout
    trl datasets pyarrow""".split()
REGULAR = {  # prompts, tokens of each, answers to each, tokens of an answer
    "groups": (7, 600, 8, 200), "long": (2, 4096, 8, 512), "apart": (32, 0, 1, 512),
    "wide": (16, 0, 1, 4096), "huge": (1056, 0, 1, 512),
}  # fmt: skip
QWEN3 = transformers.Qwen3ForSequenceClassification
LLAMA = transformers.LlamaForSequenceClassification
SIZES = """hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim""".split()
# as Qwen3-0.6B, Llama-3.2-1B, Llama-3.1-8B and 12 of its 32 layers; a smaller vocabulary
SHAPES = {
    "0.6B": (QWEN3, 1024, 3072, 28, 16, 8, 128),
    "1B": (LLAMA, 2048, 8192, 16, 32, 8, 64),
    "8B": (LLAMA, 4096, 14336, 32, 32, 8, 128),
    "8B, 12 layers": (LLAMA, 4096, 14336, 12, 32, 8, 128),
}


def rows_of(kind: str, start: int = 4) -> list[np.ndarray]:
    """Token rows, answers to one prompt side by side; all begin with the same ``start`` tokens.

    "pairs": as skewed as HH-RLHF's, some 16,000 trie nodes. The others: :data:`REGULAR`.
    """
    rng = np.random.default_rng(0)

    def skewed(mean: float, spread: float, low: int, high: int, size: int) -> np.ndarray:
        return np.clip(rng.lognormal(mean, spread, size), low, high).astype(int)

    if kind == "pairs":
        prompts = skewed(4.5, 0.8, 8, 900, 77).tolist()
        made = [(length, skewed(3.4, 0.9, 2, 400, 2).tolist()) for length in prompts]
    else:
        count, prompt, answers, answer = REGULAR[kind]
        made = [(prompt, [answer] * answers)] * count
    if DRY:
        made = [(p // 200, [1 + n // 200 for n in answers[:2]]) for p, answers in made[:4]]
    tokens = lambda n: rng.integers(3, 30_000, n)  # noqa: E731
    begin, out = tokens(start), []
    for prompt, answers in made:
        head = np.concatenate([begin, tokens(max(0, prompt - start))])
        out += [np.concatenate([head, tokens(n)]) for n in answers]
    return out


def padded(rows: Sequence[np.ndarray], batch: Sequence[int] | None = None) -> dict[str, Tensor]:
    batch = range(len(rows)) if batch is None else batch
    return {name: x.to(DEV) for name, x in contestants.padded(rows, batch, 0).items()}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, and NaN right behind its last row."""
    around = torch.full((shape[0] + 64, *shape[1:]), float("nan"), dtype=dtype, device=DEV)
    return around[: shape[0]].normal_()


def heads_of(trie: Any, d: int, h: Sequence[int], dtype: torch.dtype = BF16) -> list[Tensor]:
    """Query, key and value of every node, [1, heads, N, D], tokens first in memory."""
    made = (noise(len(trie), heads, d, dtype=dtype) for heads in (h[0], h[1], h[1]))
    return [x[None].transpose(1, 2) for x in made]


def build(name: str, dtype: torch.dtype = BF16) -> nn.Module:
    """A reward model with random weights."""
    made, *sizes = SHAPES[name]
    sizes = dict(zip(SIZES, (32, 48, 2, 2, 1, 16) if DRY else sizes, strict=True))
    sizes |= {"vocab_size": 30_000, "max_position_embeddings": 8192}
    config = made.config_class(num_labels=1, pad_token_id=0, use_cache=False, **sizes)
    torch.manual_seed(0)
    with torch.device(DEV):
        return made._from_config(config, dtype=dtype)


def roof() -> dict[str, float]:
    """What a copy of 1 GiB and a product of 8192 cubed reach here."""
    calls, work = {}, {}
    for unit in ("bytes", "flops"):
        calls[unit], work[unit] = bench.roof(unit, DEV, DRY)
    took = bench.measure(calls, 1 if DRY else 10, bench.Clock(DEV))
    rate = {unit: work[unit] / median(took[unit]) / 1e12 for unit in took}
    return {"copy TB/s": rate["bytes"], "bf16 TFLOP/s": rate["flops"]}


# --- what sections are made of


def ready() -> None:
    if not DRY:
        torch.cuda.synchronize()


def goal(what: str, measured: float | None, needed: float, most: bool = False, **more: Any) -> Row:
    """``needed`` is the least, or the ``most``; compared as they are printed, to two digits."""
    well = operator.le if most else operator.ge
    reached = measured is not None and well(round(measured, 2), round(needed, 2))
    sign = "≤" if most else "≥"
    return {
        "goal": what, "needed": f"{sign} {needed:.2f}", "measured": measured, "reached": reached,
        **more,
    }  # fmt: skip


def on_gpu(run: Callable[[], object]) -> tuple[list, list, float]:
    """The GPU's work during ``run``, all events, and the seconds by the wall clock."""
    from torch.profiler import ProfilerActivity, profile

    ready()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not DRY)) as prof:
        start = time.perf_counter()
        run()
        ready()
        wall = time.perf_counter() - start
    events = list(prof.events())
    there = [e for e in events if str(e.device_type).endswith("CUDA")]
    return sorted(there, key=lambda e: e.time_range.start), events, wall


# --- the machine, and where results go


def said(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def ask(fields: str) -> str:
    return said("nvidia-smi", "--format=csv,noheader", f"--query-gpu={fields}").partition("\n")[0]


def device_name() -> str:
    """Asked elsewhere: a process that touched the GPU cannot be forked."""
    if DRY:
        return "dry run"
    get = "import torch; print(torch.cuda.get_device_name())"
    return ask("name") or said(sys.executable, "-c", get)


def facts() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(), "cuda": torch.version.cuda, "python": sys.version.split()[0],
        "gpu": ask("driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"),
        "gcc": said("gcc", "--version").partition("\n")[0], "cpus": os.cpu_count(),
        "environment": {k: v for k, v in os.environ.items() if re.match(SETTINGS, k)},
        "packages": versions,
    }  # fmt: skip


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a folder for results; refuses where no GPU is."""
    parser.add_argument(
        "--dry", action="store_true", help="tiny, on a CPU, with TRITON_INTERPRET=1"
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of results")
    args = parser.parse_args()
    if not device_name():
        parser.error("torch sees no GPU: to try it out, TRITON_INTERPRET=1 and --dry")
    args.out.mkdir(parents=True, exist_ok=True)
    args.seconds *= PATIENCE
    for one in (signal.SIGTERM, signal.SIGHUP):  # what ends this ends the tasks too
        signal.signal(one, lambda *_: sys.exit(1))
    return args


def keep(folder: Path, part: str, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Into ``folder/<device>.json``, which both programs write a part of."""
    path = folder / Path(bench.file_of(about["device"])).with_suffix(".json")
    whole = json.loads(path.read_text()) if path.exists() else {}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(whole | {part: {"facts": about, "found": found}}, indent=1) + "\n")
    new.replace(path)


# --- processes


class Group:
    """A process that leads a group of its own, and all that it starts."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        atexit.register(self.end)

    def end(self) -> None:
        atexit.unregister(self.end)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Task:
    """``work(*args)`` in a forked process that lasts ``seconds``; rows it yielded are kept.

    Whatever happens to it happens to no other. The parent must not have touched the GPU.
    """

    def __init__(
        self, path: Path, seconds: float, work: Callable[..., Iterable[Any]], *args: Any
    ) -> None:
        self.path, self.until, self.late = path, time.monotonic() + PATIENCE * seconds, False
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=_live, args=(path, work, args))
        self.process.start()
        self.group = Group(self.process.pid)

    def ended(self, now: bool = False) -> bool:
        """Whether it is over. Out of its time, or ``now``, it is ended."""
        if self.process.is_alive():
            if not now and time.monotonic() < self.until:
                return False
            self.late = True
        self.group.end()
        self.process.kill()  # should it not lead a group yet
        self.process.join()
        return True

    def result(self) -> dict[str, Any]:
        """``ok``, ``rows``, ``error``; where it got so far ``trace``, ``seconds``, ``peak GB``."""
        out: dict[str, Any] = {"ok": False, "rows": [], "error": None}
        with contextlib.suppress(OSError, ValueError):
            out |= json.loads(self.path.read_text())
        if self.late:
            out |= {"ok": False, "error": "cut off: no time left"}
        elif not (out["ok"] or out["error"]):
            out["error"] = f"died, exit code {self.process.exitcode}"
        return out


def _live(path: Path, work: Callable[..., Iterable[Any]], args: tuple) -> None:
    os.setsid()
    begun, out = time.perf_counter(), {"ok": False, "rows": [], "error": None}
    torch.set_num_threads(1 if DRY else 2)
    gc.freeze()  # what was there before the fork is no garbage

    def save() -> None:
        out["seconds"] = round(time.perf_counter() - begun, 1)
        if torch.cuda.is_initialized():
            out["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(out))
        new.replace(path)

    try:
        for row in work(*args):
            out["rows"].append(row)
            save()
        out["ok"] = True
    except BaseException as error:
        out["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        out["trace"] = traceback.format_exc()[-4000:]
    with contextlib.suppress(Exception):  # a broken context may not answer
        save()
    os._exit(0)  # nor be taken down in order
