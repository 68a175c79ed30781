"""A trie too large for memory, with gradients: it runs in pieces, and each of them twice.

The first run keeps no activations, only the hidden states of pooled nodes, and the keys and values
of nodes that later pieces see. The second runs the pieces in reverse order, each alone with
gradients: a piece is given the gradients of its pooled nodes, and what later pieces left for its
keys and values, and leaves such gradients for the keys and values of its path.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from rmfast import reference
from rmfast.packed import pieces
from rmfast.packed.attention import Carried
from rmfast.packed.compiling import untraced
from rmfast.packed.last_layer import pooled_rows
from rmfast.packed.pieces import Piece
from rmfast.trie import PackedTrie

Pairs = dict[nn.Module, tuple[Tensor, Tensor]]  # keys and values of a layer, [1, Hk, n, D]
Path = list[tuple["Kept", int]]  # what earlier pieces kept, and how many of it, root first


@dataclasses.dataclass(eq=False)
class Kept:
    """Keys and values of a piece's nodes on the path to the next one.

    Later pieces see none of its other nodes: an ancestor of theirs is one of the next piece, too.
    """

    nodes: Tensor  # int64 [K], among the piece's own
    pairs: Pairs = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Own(Carried):
    """Keys and values that a piece is given, and those that it makes of its own nodes."""

    own: Pairs = dataclasses.field(default_factory=dict)

    @untraced()
    def join(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.own[layer] = key, value
        return super().join(layer, key, value)


@dataclasses.dataclass(eq=False)
class Run:
    """A piece that ran: with what before it, what it kept, and the random numbers it began with."""

    piece: Piece
    path: Path
    kept: Kept
    random: list[Any]


class Twice:
    """The passes of one trie.

    Args:
        forward: runs a piece with an :class:`Own`; gives its hidden states, of pooled nodes ``[P,
            H]`` or of all its own ones ``[n, H]``.
        trie: on the CPU.
        most: nodes a piece.
        device: where pieces run.
        noisy: a pass draws random numbers; the second draws the same.
    """

    def __init__(
        self,
        forward: Callable[[Piece, Own], Tensor],
        trie: PackedTrie,
        most: int,
        device: torch.device,
        noisy: bool,
    ) -> None:
        self.forward, self.trie, self.most, self.device = forward, trie, most, device
        self.noisy = noisy
        self.runs: list[Run] = []
        self.autocast = {
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
        }

    @untraced()
    def first(self) -> Tensor:
        """Hidden states ``[P, H]`` of pooled nodes."""
        start, path, found = 0, [], []
        while start < len(self.trie):
            piece = pieces.cut(self.trie, start, self.most).to(self.device)
            carried = self.given(piece, _joined(path))
            random = self.random()
            hidden = self.forward(piece, carried)
            if piece.rows.size:
                found.append(pooled_rows(hidden, piece.trie, piece.carried))
            count = int((piece.keep < piece.carried).sum())  # of the path: its first ones
            kept = Kept(piece.keep[count:] - piece.carried)
            for layer, pair in carried.own.items() if kept.nodes.numel() else ():
                nodes = kept.nodes.to(pair[0].device)
                kept.pairs[layer] = tuple(x.index_select(2, nodes) for x in pair)
            self.runs.append(Run(piece, path, kept, random))
            path = [*_shortened(path, count), (kept, kept.nodes.numel())]
            start = piece.stop
        return torch.cat(found)

    @untraced()
    def second(self, grad: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of parameters, given those of what :meth:`first` gave, ``[P, H]``."""
        sums: list[Tensor | None] = [None] * len(parameters)
        left: dict[Kept, Pairs] = {}  # gradients of what was kept, in fp32
        end = len(grad)
        for run in reversed(self.runs):
            leaves = {
                layer: tuple(x.detach().requires_grad_() for x in pair)
                for layer, pair in _joined(run.path).items()
            }
            carried = self.given(run.piece, leaves)
            with self.again(run.random):
                hidden = self.forward(run.piece, carried)
                outputs, grads = [], []
                if run.piece.rows.size:
                    rows = pooled_rows(hidden, run.piece.trie, run.piece.carried)
                    outputs.append(rows)
                    grads.append(grad[end - len(rows) : end])
                    end -= len(rows)
                for layer, pair in left.pop(run.kept, {}).items():
                    nodes = run.kept.nodes.to(pair[0].device)
                    outputs += [x.index_select(2, nodes) for x in carried.own[layer]]
                    grads += [g.to(x.dtype) for g, x in zip(pair, carried.own[layer], strict=True)]
                flat = [x for pair in leaves.values() for x in pair]
                inputs = [*parameters, *flat]
                found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
            for i, g in enumerate(found[: len(parameters)]):
                if g is not None:
                    g = g.to(reference.wide(g.dtype))
                    sums[i] = g if sums[i] is None else sums[i] + g  # g may be another's, too
            of_path = iter(found[len(parameters) :])
            for layer in leaves:
                _leave(left, run.path, layer, (next(of_path), next(of_path)))
        return [g if g is None else g.to(p.dtype) for g, p in zip(sums, parameters, strict=True)]

    def given(self, piece: Piece, before: Pairs) -> Own:
        return Own(piece.carried, piece.keep[:0], before)

    def random(self) -> list[Any]:
        if not self.noisy:
            return []
        devices = get_device_states(torch.empty(0, device=self.device))
        return [torch.get_rng_state(), *devices]

    @contextlib.contextmanager
    def again(self, random: list[Any]) -> Iterator[None]:
        """As in the first run: autocast and random numbers; and with gradients."""
        kind = self.device.type
        with contextlib.ExitStack() as stack:
            if random:
                state, devices, states = random
                stack.enter_context(
                    torch.random.fork_rng(devices, device_type=kind if devices else "cuda")
                )
                torch.set_rng_state(state)
                set_device_states(devices, states)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(kind, **self.autocast))
            yield


def _joined(path: Path) -> Pairs:
    """Keys and values of a path, by layer."""
    some = [(kept.pairs, count) for kept, count in path if count]
    return {
        layer: tuple(torch.cat([p[layer][i][:, :, :n] for p, n in some], 2) for i in (0, 1))
        for layer in (some[0][0] if some else ())
    }


def _shortened(path: Path, count: int) -> Path:
    """The first ``count`` nodes of a path."""
    out: Path = []
    for kept, n in path:
        if count <= 0:
            break
        out.append((kept, min(n, count)))
        count -= n
    return out


def _leave(left: dict[Kept, Pairs], path: Path, layer: nn.Module, grads: tuple) -> None:
    """Add gradients of a path's keys and values to what is left for the pieces that made them."""
    at = 0
    for kept, count in path:
        if not count:
            continue
        own = left.setdefault(kept, {})
        if layer not in own:
            wide = reference.wide(kept.pairs[layer][0].dtype)
            own[layer] = tuple(torch.zeros_like(x, dtype=wide) for x in kept.pairs[layer])
        for total, g in zip(own[layer], grads, strict=True):
            if g is not None:
                total[:, :, :count] += g[:, :, at : at + count]
        at += count


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, twice: Twice, *parameters: Tensor) -> Tensor:
        ctx.twice, ctx.parameters = twice, parameters
        return twice.first()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.twice.second(grad, ctx.parameters)


def hidden_states(twice: Twice, base: nn.Module) -> Tensor:
    """``[P, H]`` of pooled nodes; gradients go to the parameters of ``base``."""
    return _Function.apply(twice, *(p for p in base.parameters() if p.requires_grad))
