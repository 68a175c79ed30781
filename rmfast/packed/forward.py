"""The stand-ins for ``forward`` that :func:`rmfast.patch` puts on single instances.

Each reads a call as Hugging Face would, runs it on the packed trie, and gives back what Hugging
Face would have given. A call it cannot serve goes to the forward that was there before.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.ops import TriePlan
from rmfast.ops._common import transformed
from rmfast.packed import attention, models, pieces
from rmfast.packed.compiling import untraced
from rmfast.packed.pieces import Piece
from rmfast.packed.replay import Graphs
from rmfast.packed.stand_in import Override, Unservable
from rmfast.packed.state import State
from rmfast.packed.survey import Seen
from rmfast.trie import PackedTrie, moved, pack

untraced(whole=True)(PackedTrie.sent)

# Arguments the stand-ins read themselves, or may drop: they change no number.
_KNOWN = frozenset(
    "input_ids attention_mask position_ids labels inputs_embeds past_key_values use_cache "
    "output_attentions output_hidden_states output_router_logits return_dict "
    "num_items_in_batch cache_position".split()
)


class PackedForward(Override):
    """Base of the stand-ins for the model and the backbone: reads a call, packs it, runs it."""

    served: frozenset[str] = frozenset()  # outputs the packed path can give

    def __init__(self, module: nn.Module, patch: State) -> None:
        super().__init__(module, patch)
        self.graphs = Graphs()

    @untraced(whole=True)
    def check(self, call: dict[str, Any]) -> Seen:
        """The model as the call finds it; :class:`Unservable` but for ids, mask and positions."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        config = self.patch.base.config
        if ids is None or call.get("inputs_embeds") is not None:
            raise Unservable("inputs_embeds instead of input_ids")
        if ids.ndim != 2 or ids.numel() == 0:
            raise Unservable("input_ids is not a batch [B, T] of tokens")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            raise Unservable("attention_mask is not [B, T]")
        if transformed():
            raise Unservable("torch.func, which sees no numbers to pack by")
        if isinstance(call.get("past_key_values"), models.NoCache):
            raise ValueError(models.NoCache.MESSAGE)
        if call.get("use_cache") or call.get("past_key_values") is not None:
            raise Unservable("a key/value cache was asked for")
        if call.get("is_causal") is False:
            raise Unservable("the argument is_causal")
        for name in self.patch.arguments - _KNOWN:
            if call.get(name) is not None and call[name] is not False:
                raise Unservable(f"the argument {name}")
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if call.get(name, getattr(config, name, False)) and name not in self.served:
                raise Unservable(f"the argument {name}")
        theirs = attention.foreign(attention.name(config))
        if theirs is not None:
            raise Unservable(f"the attention function is by {theirs}")
        noise = getattr(self.patch.base.get_input_embeddings(), "neftune_noise_alpha", None)
        if noise and self.module.training:
            raise Unservable("NEFTune noise depends on the padded length")
        seen = self.patch.prepare()
        if seen.why_not is not None:
            raise Unservable(seen.why_not)
        return seen

    @untraced(whole=True)
    def pack(
        self,
        ids: Tensor,  # int64 [B, T], on the CPU like the rest
        mask: Tensor | None,  # [B, T]
        positions: Tensor | None,  # int64 [B, T] or [1, T]
        pooled: Tensor | None,  # int64 [B], the columns that carry the scores; None: keep all
        noisy: bool,  # each sequence draws noise of its own
    ) -> tuple[PackedTrie, bool, Tensor]:
        """The trie of the attended tokens, whether prefixes are shared, and which were kept."""
        if ids.min() < 0:
            raise Unservable("a token id below zero")
        longest = ids.shape[1]
        if positions is not None:
            longest = max(longest, int(positions.max()) + 1)
        if longest >= self.patch.position_limit:
            raise Unservable(self.too_long())
        columns = torch.arange(ids.shape[1])
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask != 0
        if pooled is not None:
            if not keep.gather(1, pooled[:, None]).all():
                raise Unservable("a row is scored at a token that its attention_mask hides")
            keep = keep & (columns <= pooled[:, None])
        elif not keep.any(1).all():
            raise Unservable("a row has no attended token")
        if positions is not None:
            if positions.ndim != 2 or positions.shape[1] != ids.shape[1]:
                raise Unservable("position_ids is not [B, T]")
            offset = (positions - columns).expand(ids.shape)
            first = offset.gather(1, keep.int().argmax(1, keepdim=True))
            if (keep & (offset != first)).any():
                raise Unservable("position_ids that do not rise by one with each token")
            if positions.min() < 0:
                raise Unservable("position_ids below zero")
        elif self.patch.absolute_positions:
            positions = columns[None]
        share = self.patch.options.share_prefixes and not noisy
        return (
            pack(ids, keep, position_ids=positions, share_prefixes=share),
            share,
            keep,
        )

    def too_long(self) -> str:
        return (
            f"{self.patch.position_limit} positions or more, where the rotary frequencies "
            "depend on the padded length"
        )

    def piece(
        self,
        piece: Piece,
        before: dict[nn.Module, tuple[Tensor, Tensor]] | None,
        prune: bool,
        shared: bool,
    ) -> tuple[Tensor, dict[nn.Module, tuple[Tensor, Tensor]]]:
        """What :func:`rmfast.packed.pieces.run` asks for."""
        prune, patch = prune and self.may_prune(), self.patch
        carried = attention.Carried(piece.carried, piece.keep, before or {}, piece.old)
        forward = functools.partial(self.nodes, carried=carried, prune=prune, shared=shared)
        alone = prune and not piece.carried and not piece.keep.numel() and len(piece.rows)
        if alone and patch.options.cuda_graphs:
            return self.graphs.run(patch.base, piece.trie, forward), {}
        return forward(piece.trie), carried.after

    def nodes(
        self, trie: PackedTrie, carried: attention.Carried, prune: bool, shared: bool
    ) -> Tensor:
        """Hidden states ``[n, H]`` of a piece's own nodes, or ``[P, H]`` of its pooled ones."""
        rows = trie.pooled if prune else None
        if prune and not len(rows):
            rows = rows.new_full((1,), len(trie) - 1)  # nobody is scored here: any one will do
        return self.backbone(self.inside(), trie, shared, rows, carried, return_dict=True)[0][0]

    def run_pieces(
        self,
        trie: PackedTrie,
        take: Callable[[Piece, Tensor], None],
        budget: pieces.Budget,
        prune: bool = True,
        shared: bool = True,
    ) -> None:
        """Run a trie piece by piece, after :meth:`check`.

        Args:
            take: as in :func:`rmfast.packed.pieces.run`.
            prune: ``take`` reads the rows of sequences' last tokens only.
            shared: a node may belong to several sequences.
        """
        step = functools.partial(self.piece, prune=prune, shared=shared)
        pieces.run(step, trie, budget, take, models.device(self.patch.base))

    def inside(self) -> Callable:
        """The forward of the backbone without its stand-in."""
        raise NotImplementedError

    def may_prune(self) -> bool:
        """Whether the last layer's stand-in is on the layer that runs last, and on no other."""
        layers, last = models.decoder_layers(self.patch.base), self.patch.last_layer
        return layers is not None and layers[-1] is last and sum(m is last for m in layers) == 1

    def no_cache(self, call: dict[str, Any]) -> models.NoCache | None:
        """What a packed call returns instead of the cache that Hugging Face returns by default."""
        asked = call.get("use_cache")
        by_default = getattr(self.patch.base.config, "use_cache", False)
        return models.NoCache() if asked is None and by_default else None

    def backbone(
        self,
        call: Callable,
        trie: PackedTrie,
        shared: bool,
        pooled: Tensor | None,
        carried: attention.Carried | None = None,
        apart: bool = False,
        **kwargs: Any,
    ) -> Any:
        first = 0 if carried is None else carried.count
        plan = TriePlan(trie.subtree_end, trie.position_ids, first=first)
        backend = self.patch.options.attention
        run = attention.TrieRun(trie, plan, shared, backend, pooled, carried, apart=apart)
        # a 4D mask is handed to the layers as it is; this one fails loudly should any use it
        no_mask = torch.empty(0, 0, 0, 0, device=trie.input_ids.device)
        return call(
            input_ids=trie.input_ids[None, first:],
            attention_mask=no_mask,
            position_ids=trie.position_ids[None, first:],
            use_cache=False,
            rmfast_run=run,
            **kwargs,
        )


@untraced(whole=True)
def sent(tensors: Iterable[Tensor | None], device: torch.device | str) -> list[Any]:
    """What :func:`rmfast.trie.moved` gives."""
    return moved(tensors, device)


def _on_cpu(call: dict[str, Any]) -> list[Tensor | None]:
    return sent([call.get(x) for x in ("input_ids", "attention_mask", "position_ids")], "cpu")


# these two of this thread alone: others may run the same model
_given: contextvars.ContextVar[tuple[PackedForward | None, Any]] = contextvars.ContextVar(
    "rmfast_given", default=(None, None)
)


@contextlib.contextmanager
def giving(stand_in: PackedForward, output: Any) -> Iterator[None]:
    """In this thread, the stand-in returns ``output`` instead of running the backbone."""
    token = _given.set((stand_in, output))
    try:
        yield
    finally:
        _given.reset(token)


_unserved: contextvars.ContextVar[tuple[State, ...]] = contextvars.ContextVar(
    "rmfast_unserved", default=()
)


@contextlib.contextmanager
def as_it_was(patch: State) -> Iterator[None]:
    """In this thread, a backbone runs its own forward: the call around it could not be served."""
    token = _unserved.set((*_unserved.get(), patch))
    try:
        yield
    finally:
        _unserved.reset(token)


def is_as_it_was(patch: State) -> bool:
    return any(patch is one for one in _unserved.get())
