"""Training on a trie that is larger than memory: time and memory of pieces that run twice.

    rmfast bench trees --responses 8 16 32 64

One step on N responses of 100 tokens to one prompt of 1,000: a sum of their scores, forward and
backward. Each way in a process of its own, which then gives the least time of some rounds:

    whole    the trie in one pass
    pieces   ``rmfast.patch(model, max_training_tokens=2048)``
    rows     Hugging Face, a row a micro-batch, gradients accumulated: what fits without rmfast

Memory is what tensors held at most beyond weights and their gradients, in a step of its own: what
the GPU's allocator says, or, on a CPU, counted at each operation (what an operation takes meanwhile
is not seen).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmfast
from rmfast.benchmarks import contestants
from rmfast.benchmarks.peers import models

PROMPT, ANSWER = 1000, 100
WAYS = ("whole", "pieces", "rows")


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still held.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.held.pop(key)


def most_held(work: Callable[[], None], model: nn.Module, device: str) -> int:
    """Bytes that a step holds at most beyond a model's weights and their gradients."""
    known = [x for p in model.parameters() for x in (p.data, p.grad) if x is not None]
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Live(known) as live:
        work()
    return live.most


def group(count: int, vocabulary: int) -> torch.Tensor:  # int64 [count, PROMPT + ANSWER]
    draw = np.random.default_rng(0)
    prompt = draw.integers(3, vocabulary, PROMPT)
    rows = [np.r_[prompt, draw.integers(3, vocabulary, ANSWER)] for _ in range(count)]
    return torch.from_numpy(np.stack(rows))


def step(model: nn.Module, way: str, rows: torch.Tensor, args: argparse.Namespace) -> None:
    """Gradients of all parameters; scores weigh -1 to 1."""
    weight = torch.linspace(-1, 1, len(rows), device=rows.device)
    kind, dtype = args.device.partition(":")[0], getattr(torch, args.dtype)
    size = 1 if way == "rows" else len(rows)
    for some, share in zip(rows.split(size), weight.split(size), strict=True):
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = (model(input_ids=some, use_cache=False).logits[:, 0].float() * share).sum()
        loss.backward()


def measure(way: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForSequenceClassification

    source = models.original(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, dtype=torch.float32, num_labels=1
    )
    model.to(args.device).train()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    rows = group(count, models.vocabulary(source)).to(args.device)
    if way != "rows":
        rmfast.patch(model, max_training_tokens=args.tokens if way == "pieces" else None)
    seen: list[int] = []
    layer = model.base_model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:-1].numel()))
    step(model, way, rows[:2, -20:].contiguous(), args)  # gradients, and what is made once
    seen.clear()
    times = []
    for _ in range(args.rounds):
        contestants._synchronise(args.device)
        start = time.perf_counter()
        step(model, way, rows, args)
        contestants._synchronise(args.device)
        times.append(time.perf_counter() - start)
    handle.remove()
    held = most_held(lambda: step(model, way, rows, args), model, args.device)
    return {"seconds": min(times), "gb": held / 1e9, "tokens": sum(seen) // args.rounds}


def alone(function: Callable, *args: Any) -> Any:
    """What a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main(argv: Sequence[str] | None = None) -> None:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="rmfast bench trees", description=about)
    add = parser.add_argument
    add("--responses", type=int, nargs="+", default=[8, 16, 32, 64], help="N")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="what runs")
    add("--tokens", type=int, default=2048, help="trie nodes a piece")
    add("--model", help="reward model, folder or hub name; default: the embedded one")
    add("--dtype", choices=contestants.DTYPES, default="bfloat16", help="of autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--rounds", type=int, default=2, help="the first of them warms up")
    args = parser.parse_args(argv)
    print("| responses | nodes | way | seconds | GB beyond weights and gradients | tokens run |")
    print("|---|---|---|---|---|---|")
    for count in args.responses:
        for way in args.ways:
            found = alone(measure, way, count, args)
            cells = (count, PROMPT + ANSWER * count, way, f"{found['seconds']:.2f}")
            cells += (f"{found['gb']:.2f}", found["tokens"])
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
