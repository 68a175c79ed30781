"""A trie too large for memory, with gradients: it runs in pieces, and each of them twice.

The first run keeps no activations, only the hidden states of pooled nodes, and the keys and values
of nodes that later pieces see. The second runs the pieces in reverse order, each alone with
gradients: a piece is given the gradients of its pooled nodes, and what later pieces left for its
keys and values, and leaves such gradients for the keys and values of its path.

Under FSDP2 the second run comes after the backward, as FSDP2 cannot begin a backward inside of one.
Each piece is then a forward and a backward of its own, as many on each process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from rmfast import reference
from rmfast.packed import models, pieces
from rmfast.packed.attention import Carried
from rmfast.packed.compiling import untraced
from rmfast.packed.gradients import Sums, unhooked
from rmfast.packed.last_layer import pooled_rows
from rmfast.packed.pieces import Piece
from rmfast.packed.state import State
from rmfast.trie import PackedTrie

Pairs = dict[nn.Module, tuple[Tensor, Tensor]]  # keys and values of a layer, [1, Hk, n, D]
Path = list[tuple["Kept", int]]  # what earlier pieces kept, and how many of it, root first
Left = dict["Kept", Pairs]  # gradients of what was kept, by later pieces, in fp32


@dataclasses.dataclass(eq=False)
class Kept:
    """Keys and values of a piece's nodes on the path to the next one.

    Later pieces see none of its other nodes: an ancestor of theirs is one of the next piece, too.
    """

    nodes: Tensor  # int64 [K], among the piece's own
    pairs: Pairs = dataclasses.field(default_factory=dict)


class Held:
    """Keys and values in no dict: FSDP2 gives its layers copies of dicts and of dataclasses, and
    lets each tensor in them wait for the layer's gradients."""

    def __init__(self, pairs: Pairs | None = None) -> None:
        self.pairs: Pairs = {} if pairs is None else pairs

    def __getitem__(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return self.pairs[layer]


@dataclasses.dataclass(frozen=True, eq=False)
class Own(Carried):
    """Keys and values that a piece is given, and those that it makes of some of its own nodes.

    Attributes:
        nodes: int64 ``[K]``, these, counted without the path.
        own: what it made of them.
    """

    nodes: Tensor = dataclasses.field(kw_only=True)
    own: Held = dataclasses.field(default_factory=Held)

    @untraced()
    def join(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # here: a selection after all layers has the first gradients, and so of all layers at once
        self.own.pairs[layer] = _at((key, value), self.nodes)
        if self.count:  # those of the path need gradients where those of any node do
            for given, made in zip(self.before[layer], (key, value), strict=True):
                given.requires_grad_(made.requires_grad)
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
        forward: runs the trie of a piece with an :class:`Own`; gives its hidden states, of pooled
            nodes ``[P, H]`` or of all its own ones ``[n, H]``.
        trie: on any device.
        patch: of the model; its budget says how many nodes a piece has.
        device: where pieces run.
        noisy: a pass draws random numbers; the second draws the same.
        outer: the module that FSDP2 shards, which runs what it is given as ``rmfast_call``; None:
            processes do not share the model.
    """

    def __init__(
        self,
        forward: Callable[[PackedTrie, Own], Tensor],
        trie: PackedTrie,
        patch: State,
        device: torch.device,
        noisy: bool,
        outer: nn.Module | None = None,
    ) -> None:
        self.forward, self.trie, self.patch, self.device = forward, trie, patch, device
        self.budget, self.outer = patch.budget(training=True), outer
        if outer is not None:
            self.budget = dataclasses.replace(self.budget, fixed=True)
        self.count = 1 if len(trie) <= self.budget.tokens else 2  # or more
        if outer is not None:
            self.count = self._agreed()
        if self.count > 1:
            self.trie = trie.to("cpu")
        self.noisy = noisy
        self.runs: list[Run] = []
        self.autocast = {
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
        }

    def _agreed(self) -> int:
        """The most pieces that one of the processes has which share the model."""
        import torch.distributed as dist

        count, start, trie = 0, 0, self.trie if self.count == 1 else self.trie.to("cpu")
        while start < len(trie):
            fits = len(trie) - start <= self.budget.tokens
            start = len(trie) if fits else pieces.cut(trie, start, self.budget.tokens).stop
            count += 1
        most = torch.tensor(count, device=self.device)
        for group in _groups(self.outer):
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
        return int(most)

    def hidden_states(self) -> Tensor:
        """``[P, H]`` of pooled nodes; their gradients go to the parameters of the backbone."""
        layers = models.decoder_layers(self.patch.base)
        for layer in layers:
            checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
            if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True cannot run inside the pieces "
                    'of a batch: pass gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
        if self.outer is not None:
            if not any(p.requires_grad for p in self.patch.base.parameters()):
                with torch.no_grad():
                    return self.first()
            return _Later.apply(self, torch.zeros((), device=self.device, requires_grad=True))
        parameters = (p for p in self.patch.base.parameters() if p.requires_grad)
        return _Function.apply(self, *parameters)

    @untraced()
    def first(self) -> Tensor:
        """Hidden states ``[P, H]`` of pooled nodes."""
        self.runs, found = self._run(0, len(self.trie), [])
        for piece in self._idle():
            self.forward(piece.trie, self._given(piece, piece.keep[:0], {}))
        return torch.cat(found)

    def _idle(self) -> Iterator[Piece]:
        """A piece of one node for each that another process has more."""
        for _ in range(self.count - len(self.runs) if self.outer is not None else 0):
            yield pieces.cut(self.trie, 0, 1).to(self.device)

    def _run(self, start: int, stop: int, path: Path) -> tuple[list[Run], list[Tensor]]:
        """The passes of nodes from ``start`` to ``stop``, and hidden states of pooled ones."""
        runs, found = [], []

        def one(start: int, path: Path) -> tuple[int, Path]:
            piece = pieces.cut(self.trie, start, self.budget.tokens, stop)
            of_path = int((piece.keep < piece.carried).sum())  # they are its first ones
            piece = piece.to(self.device)  # from here on nothing waits for it
            nodes = piece.keep[of_path:] - piece.carried
            carried, random = self._given(piece, nodes, _joined(path)), self._random()
            hidden = self.forward(piece.trie, carried)
            if piece.rows.size:
                found.append(pooled_rows(hidden, piece.trie, piece.carried))
            kept = Kept(nodes, carried.own.pairs)
            runs.append(Run(piece, path, kept, random))
            return piece.stop, [*_shortened(path, of_path), (kept, len(nodes))]

        while start < stop:
            size = min(self.budget.tokens, stop - start)
            start, path = self.budget.attempt(one, start, path, size=size) or (start, path)
        return runs, found

    @untraced()
    def second(self, grad: Tensor, sums: Sums) -> list[Tensor | None]:
        """Gradients of parameters, given those of what :meth:`first` gave, ``[P, H]``."""
        if not self.patch.active:
            raise RuntimeError(
                "the model is no longer patched: the backward of a batch that ran in pieces runs "
                "them again, so keep it inside `with rmfast.patched(model)`"
            )
        left: Left = {}
        todo = list(self.runs)
        while todo:
            run = todo.pop()
            rows, rest = _last(grad, run.piece)
            if self._done(run, rows, left, sums, last=not todo):
                grad = rest
            else:
                todo += self._smaller(run, left)
        for piece in self._idle():
            self._again(Run(piece, [], Kept(piece.keep), []), grad[:0], None, ())
        return sums.rest()

    def _done(self, run: Run, rows: Tensor, left: Left, sums: Sums, last: bool) -> bool:
        """Run a piece once more; False: there was no memory for it, and nothing has changed."""
        size = run.piece.stop - run.piece.start
        if size > self.budget.tokens:  # memory ran out since
            return False
        given = rows, left.get(run.kept), sums.parameters
        found = self.budget.attempt(self._again, run, *given, size=size)
        if found is None:
            return False
        of_parameters, of_path = found
        sums.add(of_parameters, last)
        left.pop(run.kept, None)
        for layer, pair in of_path.items():
            if any(g is not None for g in pair):
                _leave(left, run.path, layer, pair)
        return True

    def _again(
        self, run: Run, rows: Tensor, left: Pairs | None, parameters: Sequence[Tensor]
    ) -> tuple[tuple[Tensor | None, ...], dict[nn.Module, tuple[Tensor | None, ...]]]:
        """The second pass of a piece: gradients of parameters, and of its path by layer."""
        leaves = _joined(run.path)
        carried = self._given(run.piece, run.kept.nodes, leaves)
        with self._as_before(run.random):
            hidden = self._inside(functools.partial(self.forward, run.piece.trie, carried))
            made = []
            if self.outer is not None:  # each layer takes part, whoever reads its hidden states
                made.append((hidden, torch.zeros_like(hidden)))
            if len(rows):
                made.append((pooled_rows(hidden, run.piece.trie, run.piece.carried), rows))
            for layer, pair in (left or {}).items():
                made += zip(carried.own[layer], pair, strict=True)
            outputs = [x for x, _ in made if x.requires_grad]  # others are of frozen layers
            grads = [g.to(x.dtype) for x, g in made if x.requires_grad]
            if not outputs:  # nobody reads this piece
                _reshard(self.outer)
                return (None,) * len(parameters), {}
            flat = [x for pair in leaves.values() for x in pair if x.requires_grad]
            if self.outer is not None:
                torch.autograd.backward(outputs, grads)  # FSDP2 takes what parameters get
                found = [x.grad for x in flat]
            else:
                inputs = [*parameters, *flat]
                with unhooked(parameters):
                    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
        of_path = dict(zip(flat, found[len(parameters) :], strict=True))
        return found[: len(parameters)], {
            layer: tuple(map(of_path.get, pair)) for layer, pair in leaves.items()
        }

    def _smaller(self, run: Run, left: Left) -> list[Run]:
        """The passes of a piece's parts, once there was no memory for its second pass."""
        if run.random:
            raise MemoryError(
                "out of memory in a backward with active dropout, which smaller pieces would draw "
                "anew: set max_training_tokens lower"
            )
        with self._as_before([]), torch.no_grad():
            parts, _ = self._run(run.piece.start, run.piece.stop, run.path)
        given = left.pop(run.kept, None)
        for part in parts if given else ():
            # each node that was kept is one of those that its part keeps
            place = run.kept.nodes + run.piece.start - part.piece.start
            mine = torch.isin(part.kept.nodes, place)
            theirs = torch.isin(place, part.kept.nodes)
            for layer, pair in given.items():
                for total, g in zip(_zeros(left, part.kept, layer), pair, strict=True):
                    total[:, :, mine.to(g.device)] = g[:, :, theirs.to(g.device)]
        return parts

    def _inside(self, forward: Callable[[], Tensor]) -> Tensor:
        if self.outer is None:
            return forward()
        # after a backward FSDP2 would leave all layers gathered until the next one
        hooks = [
            part.register_forward_hook(lambda part, *_: part.reshard())
            for part in _sharded(self.outer)
            if part is not self.outer
        ]
        try:
            return self.outer(rmfast_call=lambda: forward().clone())  # FSDP2 warns of views
        finally:
            for hook in hooks:
                hook.remove()

    def _given(self, piece: Piece, nodes: Tensor, before: Pairs) -> Own:
        return Own(piece.carried, piece.keep[:0], Held(before), nodes=nodes)

    def _random(self) -> list[Any]:
        if not self.noisy:
            return []
        devices = get_device_states(torch.empty(0, device=self.device))
        return [torch.get_rng_state(), *devices]

    @contextlib.contextmanager
    def _as_before(self, random: list[Any]) -> Iterator[None]:
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

    def joined(layer: nn.Module, i: int) -> Tensor:
        parts = [pairs[layer][i][:, :, :count] for pairs, count in some]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0].detach()  # no copy of one

    return {layer: (joined(layer, 0), joined(layer, 1)) for layer in (some[0][0] if some else ())}


def _shortened(path: Path, count: int) -> Path:
    """The first ``count`` nodes of a path."""
    out: Path = []
    for kept, n in path:
        if count <= 0:
            break
        out.append((kept, min(n, count)))
        count -= n
    return out


def _at(pair: tuple[Tensor, Tensor], nodes: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.index_select(2, nodes.to(x.device)) for x in pair)


def _last(grad: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
    """The rows of the pooled nodes of a piece, which come last, and the rest."""
    count = len(piece.trie.pooled)
    return grad[len(grad) - count :], grad[: len(grad) - count]


def _zeros(left: Left, kept: Kept, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The sums of a layer, which begin as zeros."""
    own = left.setdefault(kept, {})
    if layer not in own:
        wide = reference.wide(kept.pairs[layer][0].dtype)
        own[layer] = tuple(torch.zeros_like(x, dtype=wide) for x in kept.pairs[layer])
    return own[layer]


def _leave(left: Left, path: Path, layer: nn.Module, grads: tuple[Tensor | None, ...]) -> None:
    """Add gradients of a path's keys and values to what is left for the pieces that made them."""
    at = 0
    for kept, count in path:
        for total, g in zip(_zeros(left, kept, layer), grads, strict=True) if count else ():
            if g is not None:
                total[:, :, :count] += g[:, :, at : at + count]
        at += count


def shards(module: nn.Module) -> bool:
    """Whether FSDP2 was applied to a module itself, so that it gathers all that its forward needs,
    and to parts of it, so that a pass waits for other processes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule) and len(_sharded(module)) > 1


def _sharded(module: nn.Module) -> list[Any]:
    """The modules in a module that FSDP2 shards, itself too."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _reshard(module: nn.Module | None) -> None:
    """As FSDP2 does at the end of a backward."""
    for part in _sharded(module) if module is not None else ():
        part.reshard()


def _groups(module: nn.Module) -> list[Any]:
    """The groups of processes that share the parameters of a module, an axis of a mesh each.

    All processes, where every parameter is gathered now.
    """
    meshes = {p.device_mesh for p in module.parameters() if hasattr(p, "device_mesh")}
    groups = [group for mesh in sorted(meshes, key=str) for group in mesh.get_all_groups()]
    return groups or [None]


class _Later(torch.autograd.Function):
    """The second run is called when the backward it is part of is over, that of FSDP2 included."""

    @staticmethod
    def forward(ctx: Any, twice: Twice, needed: Tensor) -> Tensor:
        ctx.twice = twice
        return twice.first()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        later = functools.partial(ctx.twice.second, grad, Sums())
        torch.autograd.Variable._execution_engine.queue_callback(later)
        return None, None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, twice: Twice, *parameters: Tensor) -> Tensor:
        ctx.twice, ctx.parameters = twice, parameters
        return twice.first()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums = Sums(ctx.parameters, (node for node, _ in ctx.next_functions))
        return None, *ctx.twice.second(grad, sums)
