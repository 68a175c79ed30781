"""A trie too large for memory, run a piece at a time, and still no token twice.

Pieces are ranges of nodes in preorder. What a piece needs besides its own nodes is the path to its
first one: every ancestor of a node in the piece is on that path or in the piece. So the keys and
values of that path are carried from piece to piece, and nothing is run again, wherever the cut is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.packed.compiling import untraced
from rmfast.trie import PackedTrie

_LEAST = 16  # nodes; when these do not fit, nothing will
_PATIENCE = 32  # passes that fit before twice as much is tried
# nodes that run together where memory allows more; the second is a guess until a GPU is timed
_MOST = {"cpu": 4096, "cuda": 65536}


def most(device: torch.device) -> int:
    """The most tokens that run together on a device, however much memory it has."""
    return _MOST.get(device.type, _MOST["cuda"])


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Some consecutive nodes of a trie, and the path to the first of them.

    Attributes:
        trie: that path, then the piece's own nodes; ``pool_index`` is int64 ``[P]``, of ``rows``.
        carried: nodes of the path: they ran before.
        keep: int64 ``[K]``, the nodes of ``trie`` on the path to the next piece.
        rows: int64 ``[P]``, the sequences of the whole trie that end in this piece.
        start: the whole trie's node that the piece begins with.
        stop: the one that the next piece begins with.
        old: all of ``keep`` was carried, so it is the first of that.
    """

    trie: PackedTrie
    carried: int
    keep: Tensor
    rows: np.ndarray
    start: int
    stop: int
    old: bool

    def to(self, device: torch.device | str) -> Piece:
        trie, keep = self.trie.sent(device, self.keep)
        return dataclasses.replace(self, trie=trie, keep=keep)


@untraced(whole=True)
def cut(trie: PackedTrie, start: int, most: int, until: int | None = None) -> Piece:
    """The piece that begins with node ``start`` and has ``most`` nodes or fewer.

    It ends where little has to be carried on: before the shallowest node of its second half.

    Args:
        trie: on the CPU, as :func:`rmfast.pack` gives it.
        until: the node that a later piece begins with; None: there is none.
    """
    end, depth, pool = (x.numpy() for x in (trie.subtree_end, trie.position_ids, trie.pool_index))
    stop = len(trie) if until is None else until
    if stop - start > most:
        first = start + most // 2 + 1
        ahead = depth[first : start + most + 1]
        stop = start + most - int(ahead[::-1].argmin())
    path = np.flatnonzero(end[:start] > start)
    nodes = np.concatenate([path, np.arange(start, stop)])
    rows = np.flatnonzero((start <= pool) & (pool < stop))
    last = end[nodes]
    part = PackedTrie(
        trie.input_ids[nodes],
        trie.position_ids[nodes],
        torch.from_numpy((np.minimum(last, stop) - start + path.size).astype(np.int32)),
        torch.from_numpy(pool[rows] - start + path.size),
    )
    keep = np.flatnonzero(last > stop)
    old = bool((keep < path.size).all())
    return Piece(part, path.size, torch.from_numpy(keep), rows, start, stop, old)


@dataclasses.dataclass
class Budget:
    """Tokens that run together: halved when memory runs out, and doubled again after a while.

    Another program may have taken the memory for a time, so after some passes that fit the size
    before is tried again, up to the one it began with. Where that fails soon, the next try comes
    twice as late.

    Attributes:
        tokens: trie nodes a piece, or token slots of a padded batch.
        fixed: it is never halved: other processes hold parts of the model and run the same passes.
        halvings: how often it was halved.
        doublings: how often it was doubled again.
    """

    tokens: int
    halvings: int = 0
    doublings: int = 0
    fixed: bool = False

    def __post_init__(self) -> None:
        self._before: list[int] = []  # the sizes that were halved, and not doubled again
        self._fitted = 0  # passes since the size changed
        self._wait = _PATIENCE  # passes until the size before is tried
        self._doubled = False  # the last change was that

    @untraced()
    def attempt(self, work: Callable[..., Any], *args: Any, size: int) -> Any:
        """Return ``work(*args)``; where memory runs out, halve the budget and return None.

        Args:
            size: tokens that it runs, or a few more.
        """
        try:
            out = work(*args)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        else:
            if 2 * size > self.tokens:  # smaller ones tell nothing
                self.fit()
            return out
        self.halve(reason.splitlines()[0])  # here, where the failed pass's frames are gone
        return None

    def fit(self) -> None:
        """Count a pass for which there was memory."""
        self._fitted += 1
        if self._doubled and self._fitted == _PATIENCE:  # that went well
            self._wait = _PATIENCE
        if self._before and self._fitted >= self._wait:
            self.tokens = self._before.pop()
            self.doublings += 1
            self._fitted, self._doubled = 0, True

    def halve(self, reason: str) -> None:
        """Raises MemoryError where it is fixed, or there is next to nothing left to halve."""
        if self.fixed:
            raise MemoryError(
                f"out of memory with {self.tokens} tokens at a time ({reason}), which cannot be "
                "halved on this process alone, as the model is sharded: set max_tokens lower, of "
                "a batch that is trained max_training_tokens"
            )
        if self.tokens <= _LEAST:
            raise MemoryError(
                f"out of memory with {self.tokens} tokens at a time ({reason}): use a smaller "
                "dtype, another device, or a smaller model"
            )
        self._before.append(self.tokens)
        self.tokens = max(_LEAST, self.tokens // 2)
        self.halvings += 1
        soon = self._doubled and self._fitted < _PATIENCE
        self._wait = 2 * self._wait if soon else _PATIENCE
        self._fitted, self._doubled = 0, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)


@untraced()
def run(
    forward: Callable[[Piece, Any], tuple[Tensor, Any]],
    trie: PackedTrie,
    budget: Budget,
    take: Callable[[Piece, Tensor], None],
    device: torch.device,
) -> None:
    """Run a trie, each node once.

    Args:
        forward: runs a piece; given what it returned of the piece before (None for the first),
            returns the hidden states ``[n, H]`` of the piece's own nodes, or ``[P, H]`` of its
            pooled ones, and what it needs for the next one.
        trie: on the CPU, as :func:`rmfast.pack` gives it.
        take: called with each piece and its hidden states; called again with a smaller piece
            should it run out of memory. Where it does not wait for a GPU, the next piece is cut
            and sent there while this one runs.
        device: where pieces run.

    Raises:
        MemoryError: not even a few tokens fit.
    """

    def one(start: int, before: Any) -> tuple[int, Any]:
        piece = cut(trie, start, budget.tokens).to(device)
        hidden, after = forward(piece, before)
        take(piece, hidden)
        return piece.stop, after

    start, before = 0, None
    while start < len(trie):
        size = min(budget.tokens, len(trie) - start)
        start, before = budget.attempt(one, start, before, size=size) or (start, before)
