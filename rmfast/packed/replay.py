"""Small tries replayed as CUDA graphs, where the host takes longer than the GPU.

A graph is a list of launches with their addresses: replayed, it costs the host one launch, and the
layers' Python does not run. So a trie is filled up to a size that comes again, and whatever that
Python would have looked at is compared before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmfast.packed import elementwise
from rmfast.packed.last_layer import pooled_rows
from rmfast.packed.survey import walk
from rmfast.trie import PackedTrie

_TIMES = 3  # a size is captured when it is met for this time
# nodes times parameters: for more, the GPU takes longer than the host that launches it. An H200
# takes 33 ms for 7e12, its host 39 ms for 28 layers; other hosts are faster
_MOST = 5e12
_PLAIN = frozenset({bool, int, float, str})
_READ = ("input_ids", "position_ids", "subtree_end", "pooled")  # of a trie, by the layers


class Graph(NamedTuple):
    """A pass that was captured.

    Attributes:
        trie: what it reads.
        alone: as many one-token sequences, which fill up what a smaller trie leaves.
        replay: launches it.
        out: ``[P, H]``, what it writes.
    """

    trie: PackedTrie
    alone: PackedTrie
    replay: Callable[[], Any]
    out: Tensor

    def run(self, trie: PackedTrie) -> Tensor:  # [P of that trie, H]
        for name in _READ:
            target, own = getattr(self.trie, name), getattr(trie, name)
            target.copy_(getattr(self.alone, name))
            target[: len(own)].copy_(own)
        self.replay()
        return self.out[: len(trie.pooled)].clone()  # the next replay writes over it


class Graphs:
    """The graphs of one backbone, as long as nobody changes it.

    Attributes:
        replayed: passes that were.
        failed: why nothing will be captured any more; None: it may be.
    """

    def __init__(self) -> None:
        self.replayed = 0
        self.failed: str | None = None
        self._free = threading.Lock()  # a graph reads and writes the same memory each time
        self._forget(None)

    def __reduce__(self) -> Any:
        return Graphs, ()  # a copy captures its own

    def __str__(self) -> str:
        text = f"CUDA graphs: {len(self._made)} captured, {self.replayed} passes replayed"
        return text if self.failed is None else f"{text}; no more, as capture failed: {self.failed}"

    def _forget(self, state: list[Any] | None) -> None:
        self._state, self._met, self._pool = state, Counter[Any](), None
        self._made: dict[Any, Graph] = {}

    def run(
        self, base: nn.Module, trie: PackedTrie, forward: Callable[[PackedTrie], Tensor]
    ) -> Tensor:  # [P, H], or [N, H] where forward gives that
        """Hidden states of pooled nodes, replayed; ``forward(trie)`` where that cannot be.

        Args:
            base: the backbone that ``forward`` runs, without gradients.
            trie: on the device of ``base``, all of it.
        """
        if not may_capture(trie.input_ids) or not self._free.acquire(blocking=False):
            return forward(trie)
        try:
            made = self._find(base, trie, forward)
            if made is None:
                return forward(trie)
            self.replayed += 1
            return made.run(trie)
        finally:
            self._free.release()

    def _find(self, base: nn.Module, trie: PackedTrie, forward: Callable) -> Graph | None:
        if self.failed is not None or torch.is_autocast_enabled(trie.input_ids.device.type):
            return None
        modules = walk(base)
        parameters = (p for m in modules for p in m._parameters.values() if p is not None)
        if len(trie) * sum(p.numel() for p in parameters) > _MOST:
            return None
        device, state = trie.input_ids.device, look(modules)
        if state is not None:
            state.append(stream(device))  # on two at once graphs would share their memory
        if state != self._state:
            self._forget(state)
        size = rounded(len(trie), len(trie.pooled))
        key = (*size, torch.is_inference_mode_enabled())
        self._met[key] += 1
        if state is not None and self._met[key] == _TIMES:
            try:
                self._made[key] = self._capture(*size, device, forward)
            except RuntimeError as error:
                self._forget(state)  # and give its memory back
                self.failed = str(error).partition("\n")[0]
        return self._made.get(key)

    def _capture(self, nodes: int, pooled: int, device: torch.device, forward: Callable) -> Graph:
        each = torch.arange(nodes, device=device)
        zeros, last = torch.zeros_like(each), each[nodes - pooled :]
        parts = (zeros, zeros, (each + 1).int(), last, last, each[:pooled])
        alone, trie = (PackedTrie(*(x.clone() for x in parts)) for _ in range(2))
        forward(trie)  # compiles what is not
        replay, out, self._pool = capture(lambda: pooled_rows(forward(trie), trie), self._pool)
        return Graph(trie, alone, replay, out)


def rounded(nodes: int, pooled: int) -> tuple[int, int]:
    """Sizes that come again: at most an eighth more nodes than needed, twice the pooled ones."""
    more = 1 << (pooled - 1).bit_length()
    nodes += more - pooled  # each of those is a node of its own
    step = 1 << max(4, nodes.bit_length() - 4)
    return -(-nodes // step) * step, more


def look(modules: list[nn.Module]) -> list[Any] | None:
    """All that decides what a pass launches; None: somebody else's code does, too."""
    found: list[Any] = []
    for module in modules:
        own = module.__dict__
        if "_hf_hook" in own or not elementwise.is_plain(module):
            return None
        found += [elementwise.runs(type(module)), "forward" in own]  # if so, it is ours
        found += [x for x in own.values() if type(x) in _PLAIN]
        for x in (*own["_parameters"].values(), *own["_buffers"].values()):
            if type(x) not in (nn.Parameter, Tensor, type(None)):
                return None
            found.append(x is not None and (x.data_ptr(), x.shape, x.stride(), x.dtype))
    return found


# --- CUDA's side


def may_capture(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def capture(run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], Any], Tensor, Any]:
    """Launch ``run()`` into a graph: what replays it, what it writes, the pool of its memory."""
    graph = torch.cuda.CUDAGraph()
    # other threads may go on: they read files, tokenise and pin memory
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = run()
    return graph.replay, out, graph.pool()
