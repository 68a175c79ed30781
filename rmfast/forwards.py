"""The stand-ins for ``forward`` that :func:`rmfast.patch` puts on single instances.

Each reads a call as Hugging Face would, runs it on the packed trie, and gives back what Hugging
Face would have given. A call it cannot serve goes to the forward that was there before.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rmfast import attention, models, ops, pieces, reference, training
from rmfast.trie import PackedTrie, pack

if TYPE_CHECKING:
    from rmfast.patching import Patch
    from rmfast.pieces import Piece

# Arguments the stand-ins read themselves, or may drop: they change no number.
_KNOWN = frozenset(
    "input_ids attention_mask position_ids labels inputs_embeds past_key_values use_cache "
    "output_attentions output_hidden_states output_router_logits return_dict "
    "num_items_in_batch cache_position".split()
)


class Unservable(Exception):
    """A call the packed path cannot serve; the message is the reason."""


class Weak:
    """An attribute that keeps nothing alive: None where what it was has gone."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        held = getattr(instance, self.name)
        return None if held is None else held()

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self.name, None if value is None else weakref.ref(value))


class Member:
    """Part of a patched model, which it does not keep alive. A copy belongs to the model's copy."""

    def __getstate__(self) -> dict[str, Any]:
        names = [name.removeprefix("_") for name in self.__dict__]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Override(Member):
    """Stands in for ``forward`` on one instance. Pickles and copies along with its module."""

    __name__ = "forward"
    module = Weak()
    patch = Weak()  # None in the copy of a layer alone: it then runs as it was
    placed = False  # on its module, itself or inside somebody's wrapper

    def __new__(cls, *_: Any) -> Override:
        go_around(cls)  # an unpickled model comes by no other way
        return super().__new__(cls)

    def __init__(self, module: nn.Module, patch: Patch) -> None:
        self.module = module
        self.patch = patch
        self.before = models.replaced(module)  # an instance forward of somebody else's

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["patch"]  # the copy of the patch puts itself there
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_patch", None)

    def put(self) -> None:
        """Take the place of what the instance has; inside somebody's wrapper it stays there."""
        if not self.placed:
            setattr(self.module, models.slot(self.module), self)
            self.placed = True

    def leave(self) -> None:
        """Put back what was there, unless somebody has wrapped this since."""
        slot = self.slot()
        if slot is None:
            return
        self.placed = False
        if self.before is None and slot == "forward":
            del self.module.forward
        else:
            setattr(self.module, slot, self.before or self.of_class())

    def slot(self) -> str | None:
        """The attribute of its module that it is; None inside somebody's wrapper."""
        for slot in ("forward", "_old_forward"):
            now = None if self.module is None else self.module.__dict__.get(slot)
            if now is self or (now is not None and getattr(now, "__func__", None) is self):
                return slot
        return None

    def fits(self) -> bool:
        """Whether it can be put again: nobody has put a forward of their own there since."""
        if self.module is None:
            return False
        return self.placed or models.replaced(self.module) == self.before

    def of_class(self) -> Callable:
        return type(self.module).forward.__get__(self.module)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return self.of_class()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # trainers drop the columns it does not name
        return inspect.signature(self.before or self.of_class())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # accelerate makes a method of what it unwraps
            args = args[1:]
        if self.module is None:
            raise ReferenceError("the model of this forward is gone: keep the model")
        if self.patch is None or not self.patch.active:
            return self.original(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@functools.cache
def go_around(kind: type[Override]) -> None:
    """torch.compile goes around stand-ins of this kind, and around packing, into the layers.

    Not at import, which would bring all of torch.compile along.
    """
    untraced(kind, "run", whole=kind is LastLayer)
    for owner, name in ((PackedForward, "pack"), (pieces, "cut")):
        untraced(owner, name, whole=True)
    for owner, name in (
        (pieces, "run"),
        (pieces.Budget, "attempt"),
        (ScoringForward, "by_piece"),
        (attention.Carried, "join"),
    ):
        untraced(owner, name)


@functools.cache
def untraced(owner: Any, name: str, whole: bool = False) -> None:
    """Packing looks at the tokens, so torch.compile goes around it, into the layers.

    It goes around pieces and what they carry: nothing is compiled anew for each count of nodes.
    With ``whole`` it does not go into what is called from there either.
    """
    setattr(owner, name, torch.compiler.disable(getattr(owner, name), recursive=whole))


class PackedForward(Override):
    """What the model's and the backbone's stand-ins share: read a call, pack it, run it."""

    served: frozenset[str] = frozenset()  # outputs the packed path can give

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return dict(kwargs)
        signature = self.__signature__
        named = dict(signature.bind(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(parameter.name, {}))
        return named

    def check(self, call: dict[str, Any]) -> None:
        """Raise :class:`Unservable` unless the call is ids, mask and positions alone."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        config = self.patch.base.config
        if ids is None or call.get("inputs_embeds") is not None:
            raise Unservable("inputs_embeds instead of input_ids")
        if ids.ndim != 2 or ids.numel() == 0:
            raise Unservable("input_ids is not a batch [B, T] of tokens")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            raise Unservable("attention_mask is not [B, T]")
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
        noise = getattr(self.patch.base.get_input_embeddings(), "neftune_noise_alpha", None)
        if noise and self.module.training:
            raise Unservable("NEFTune noise depends on the padded length")
        changed = models.why_not_now(self.patch.base)
        if changed is not None:
            raise Unservable(changed)

    def pack(
        self,
        ids: Tensor,  # int64 [B, T], on the CPU like the rest
        mask: Tensor | None,  # [B, T]
        positions: Tensor | None,  # int64 [B, T] or [1, T]
        pooled: Tensor | None,  # int64 [B], the columns that carry the scores; None: keep all
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
        share = self.patch.options.share_prefixes and not models.draws_noise(
            self.module, active=True
        )
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
        before: dict[nn.Module, tuple[Tensor, Tensor]],
        prune: bool,
        shared: bool = True,
    ) -> tuple[Tensor, dict[nn.Module, tuple[Tensor, Tensor]]]:
        """Run a piece of a trie, on the model's device.

        Args:
            before: what the piece before it left; empty for the first.
            prune: only the rows of its ``pool_index`` are wanted.
            shared: a node may belong to several sequences.

        Returns:
            Hidden states ``[n, H]`` of the piece's own nodes, and what it leaves to the next one.
        """
        self.patch.prepare()
        trie = piece.trie
        rows = trie.pool_index.unique() if prune and self.may_prune() else None
        if rows is not None and not rows.numel():
            rows = trie.after(len(trie) - 1)  # nobody is scored here: any one will do
        carried = attention.Carried(piece.carried, piece.keep, before)
        out = self.backbone(self.inside(), trie, shared, rows, carried, return_dict=True)
        return out[0][0], carried.after

    def inside(self) -> Callable:
        """The backbone, past the stand-in."""
        raise NotImplementedError

    def may_prune(self) -> bool:
        """Whether the stand-in sits on what runs last, and nowhere else."""
        layers, last = models.decoder_layers(self.patch.base), self.patch.last_layer
        return layers is not None and layers[-1] is last and sum(m is last for m in layers) == 1

    def no_cache(self, call: dict[str, Any]) -> models.NoCache | None:
        """In place of the cache that Hugging Face returns by default."""
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
        **kwargs: Any,
    ) -> Any:
        first = 0 if carried is None else carried.count
        run = attention.TrieRun(
            trie, shared, self.patch.options.attention, pooled,
            carried=carried, rows=trie.after(first),
        )  # fmt: skip
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


def _on_cpu(call: dict[str, Any]) -> list[Tensor | None]:
    names = ("input_ids", "attention_mask", "position_ids")
    return [None if call.get(name) is None else call[name].cpu() for name in names]


class ScoringForward(PackedForward):
    """``forward`` of a sequence classifier that scores by its last token."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        step = call.pop("rmfast_step", None)
        if step is not None:
            return self.prepacked(step, call)
        patch = self.patch
        if patch.level == "trie":
            try:
                self.check(call)
                return self.packed(call)
            except Unservable as reason:
                patch.fallbacks[str(reason)] += 1
        if patch.options.pooling == "mask" or self.pools_first(call):
            return self.padded(call)
        return self.unpacked(call)

    def pools_first(self, call: dict[str, Any]) -> bool:
        """Whether a padded batch is pooled here: as packed rows are, where the head would round."""
        if self.patch.level == "head" or not self.has_loss(call):
            return self.has_loss(call)
        ids, linear = call.get("input_ids"), models.linear(self.module.score)
        if linear is None or not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            return False
        dtype = linear.weight.dtype
        half = reference.wide(dtype) != dtype
        return half or torch.is_autocast_enabled(linear.weight.device.type)

    def check(self, call: dict[str, Any]) -> None:
        if self.patch.base is None or models.inner(self.module) is not self.patch.base:
            raise Unservable("the backbone was replaced after the patch")
        super().check(call)
        if not models.is_pointwise(self.module.score):
            raise Unservable("the score head mixes tokens")
        if not self.has_loss(call):
            raise Unservable("labels: this family writes its loss out in its own forward")

    def has_loss(self, call: dict[str, Any]) -> bool:
        return call.get("labels") is None or models.is_generic(self.module)

    def packed(self, call: dict[str, Any]) -> Any:
        patch = self.patch
        ids, mask, positions = _on_cpu(call)
        trie, shared, _ = self.pack(ids, mask, positions, self.pooled(ids, mask))
        if self.in_pieces(call["input_ids"].device):
            return self.scored(call, self.by_piece(trie, shared))
        rows = trie.pool_index.unique() if self.may_prune() else None
        device = call["input_ids"].device
        trie, rows = trie.to(device), rows.to(device) if rows is not None else None
        patch.prepare()
        out = self.backbone(patch.base, trie, shared, rows)
        return self.scored(call, self.scores(out[0][0], trie.pool_index))

    def in_pieces(self, device: torch.device) -> bool:
        """Whether nothing of a call need be kept, so that its tokens may run bit by bit."""
        if self.patch.options.max_tokens == 0 or device != models.device(self.patch.base):
            return False
        needed = torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        return not needed and not models.is_sharded(self.patch.base)

    def by_piece(self, trie: PackedTrie, shared: bool) -> Tensor:  # [B, num_labels]
        rows, scores = [], []

        def take(piece: Piece, hidden: Tensor) -> None:
            if piece.rows.size:
                scores.append(self.scores(hidden, piece.trie.pool_index - piece.carried))
                rows.append(torch.from_numpy(piece.rows))

        pieces.run(self, trie, self.patch.budget(), take, shared=shared)
        scores = torch.cat(scores)
        return scores[torch.cat(rows).argsort().to(scores.device)]

    def prepacked(self, step: training.Step, call: dict[str, Any]) -> Any:
        """The loss of what :class:`rmfast.training.Collator` packed; nothing waits for a GPU."""
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        batch, objective = step.batch, step.objective
        for name in ("inputs_embeds", "past_key_values"):
            if call.get(name) is not None:
                raise ValueError(f"a packed batch cannot be run with {name}: give padded batches")
        patch = self.patch
        try:
            self.check_packed(batch)
        except Unservable as reason:
            patch.fallbacks[str(reason)] += 1
            inputs = training.padded(batch, self.module.config.get_text_config().pad_token_id)
            scores = self.run(**inputs, use_cache=False, return_dict=True).logits[:, 0]
            loss, step.scores, step.metrics = objective.of_scores(scores, batch)
        else:
            patch.prepare()
            rows = batch["pooled"] if self.may_prune() else None
            hidden = self.backbone(patch.base, training.trie_of(batch), batch["shared"], rows)[0]
            head = models.linear(self.module.score)
            if head is not None and {head.weight.device, hidden.device} != {batch["pooled"].device}:
                head = None  # the loss is where the batch is
            found = objective.of_hidden(hidden[0], batch, head, self.scores)
            loss, step.scores, step.metrics = found
        loss = loss / step.count
        step.loss = loss.detach()
        return SequenceClassifierOutputWithPast(loss=loss, logits=step.scores[:, None])

    def check_packed(self, batch: training.Batch) -> None:
        if self.patch.level != "trie":
            raise Unservable(f"a packed batch at level {self.patch.level}")
        self.check({"input_ids": batch["input_ids"][None]})
        if batch["longest"] >= self.patch.position_limit:
            raise Unservable(self.too_long())
        if batch["shared"] and models.draws_noise(self.module, active=True):
            raise Unservable("a packed batch with shared prefixes while dropout is active")

    def inside(self) -> Callable:
        return self.patch.base

    def padded(self, call: dict[str, Any]) -> Any:
        """Hugging Face's backbone on the padded batch; pooled first, so the head sees B rows."""
        ids = call.get("input_ids")
        if ids is None:
            if self.patch.options.pooling == "mask":
                raise ValueError("pooling='mask' needs input_ids: inputs_embeds alone has no rule")
            return self.unpacked(call)
        inputs = {k: v for k, v in call.items() if k not in ("labels", "return_dict")}
        out = models.inner(self.module)(**inputs, return_dict=True)
        hidden, mask = out[0], call.get("attention_mask")
        linear = models.linear(self.module.score)
        fused = linear is not None and linear.weight.device == hidden.device
        if fused and ids.shape == hidden.shape[:2]:
            pad, pooling = self.rule(ids)
            mask = mask.to(hidden.device) if mask is not None and pooling == "mask" else None
            scores = ops.pooled_reward_head(
                hidden, ids.to(hidden.device), linear.weight, linear.bias,
                attention_mask=mask, pad_token_id=pad, pooling=pooling,
            )  # fmt: skip
            return self.scored(call, scores, out)
        batch, length, width = hidden.shape
        start = torch.arange(batch, device=hidden.device) * length
        index = start + self.pooled(ids, mask).to(hidden.device)
        scores = self.scores(hidden.reshape(batch * length, width), index)
        return self.scored(call, scores, out)

    def unpacked(self, call: dict[str, Any]) -> Any:
        as_dict = self.return_dict(call)
        out = self.original(**{**call, "return_dict": True})
        dtype = out.logits.dtype
        out.logits = out.logits.to(reference.wide(dtype))
        if out.logits.dtype != dtype:
            self.patch.rounded[str(dtype).removeprefix("torch.")] += 1
        return out if as_dict else out.to_tuple()

    def rule(self, ids: Tensor) -> tuple[int | None, str]:
        pad, pooling = (
            self.module.config.get_text_config().pad_token_id,
            self.patch.options.pooling,
        )
        if pad is None and pooling == "hf" and ids.shape[0] != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        return pad, pooling

    def pooled(self, ids: Tensor, mask: Tensor | None) -> Tensor:  # int64 [B]
        return reference.last_token(ids, mask, *self.rule(ids))

    def scores(self, hidden: Tensor, index: Tensor) -> Tensor:  # [M, H], [B] -> [B, num_labels]
        linear, device = models.linear(self.module.score), index.device
        index = index.to(hidden.device)
        if linear is None:
            scores = self.module.score(hidden[index][:, None])[:, 0]
            return scores.to(device, reference.wide(scores.dtype))
        if linear.weight.device != hidden.device:
            hidden = hidden[index].to(linear.weight.device)
            index = torch.arange(len(index), device=hidden.device)
        return ops.reward_head(hidden, index, linear.weight, linear.bias).to(device)

    def return_dict(self, call: dict[str, Any]) -> bool:
        asked = call.get("return_dict")
        return self.module.config.return_dict if asked is None else asked

    def scored(self, call: dict[str, Any], scores: Tensor, backbone: Any = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        loss = None
        if call.get("labels") is not None:
            model = self.module
            loss = model.loss_function(
                logits=scores,
                labels=call["labels"],
                pooled_logits=scores,
                config=model.config,
            )
        names = ("past_key_values", "hidden_states", "attentions")
        rest = {name: getattr(backbone, name, None) for name in names}
        if backbone is None:
            rest["past_key_values"] = self.no_cache(call)
        out = SequenceClassifierOutputWithPast(loss=loss, logits=scores, **rest)
        return out if self.return_dict(call) else out.to_tuple()


# of this thread alone: others may run the same model
_given: contextvars.ContextVar[tuple[BackboneForward | None, Any]] = contextvars.ContextVar(
    "rmfast_given", default=(None, None)
)


@contextlib.contextmanager
def giving(stand_in: BackboneForward, output: Any) -> Iterator[None]:
    """In this thread the backbone is not run, and gives ``output``."""
    token = _given.set((stand_in, output))
    try:
        yield
    finally:
        _given.reset(token)


class BackboneForward(PackedForward):
    """``forward`` of a backbone under another head: packed inside, ``[B, T, H]`` outside."""

    served = frozenset({"output_hidden_states"})

    def inside(self) -> Callable:
        return self.original

    def run(self, *args: Any, **kwargs: Any) -> Any:
        stand_in, output = _given.get()
        if stand_in is self:
            return output
        call = self.named(args, kwargs)
        try:
            self.check(call)
            ids, mask, positions = _on_cpu(call)
            if self.patch.reads_pads and mask is not None and not mask[:, 0].all():
                raise Unservable("left-padded rows under a language model, whose loss reads a pad")
            trie, shared, keep = self.pack(ids, mask, positions, None)
        except Unservable as reason:
            self.patch.fallbacks[str(reason)] += 1
            return self.original(*args, **kwargs)
        self.patch.prepare()
        device, as_dict = call["input_ids"].device, call.get("return_dict")
        trie = trie.to(device)
        passed = {k: call[k] for k in ("output_hidden_states",) if k in call}
        out = self.backbone(self.original, trie, shared, None, return_dict=True, **passed)
        node = torch.full(keep.shape, len(trie))  # one row more, of zeros, for what is not attended
        node[keep] = torch.cat([torch.from_numpy(path) for path in trie.paths()])
        out.last_hidden_state = _unpack(out.last_hidden_state, node)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(_unpack(h, node) for h in out.hidden_states)
        out.past_key_values = self.no_cache(call)
        as_dict = self.module.config.return_dict if as_dict is None else as_dict
        return out if as_dict else out.to_tuple()


def _unpack(hidden: Tensor, node: Tensor) -> Tensor:  # [1, N, H], int64 [B, T] -> [B, T, H]
    # in fp32, so that the gradients of a shared token are summed in fp32
    rows = nn.functional.pad(hidden[0].to(reference.wide(hidden.dtype)), (0, 0, 0, 1))
    return nn.functional.embedding(node.to(rows.device), rows).to(hidden.dtype)


class LastLayer(Override):
    """``forward`` of the last decoder layer: keys and values of all rows, the rest of pooled ones.

    The layer runs until its attention function has the keys and values and is left there by an
    exception; then it runs on the pooled rows with those keys and values. Nothing is known of the
    layer's inside. Rows that were not asked for come back as zeros.
    """

    def run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = kwargs.get("rmfast_run")
        if run is None or run.pooled is None:
            return self.original(hidden, *args, **kwargs)
        first = 0 if run.carried is None else run.carried.count
        nodes, rows = len(run.trie) - first, run.pooled - first
        until = dataclasses.replace(run, leave_at_attention=True)
        try:
            self.layer(hidden, *args, **{**kwargs, "rmfast_run": until})
        except attention.KeysAndValues as left:
            key, value = left.key, left.value
        else:
            raise RuntimeError(
                f"{type(self.module).__name__} never called its attention function; "
                "patch with prune_last_layer=False, and report this model's class"
            )

        def pick(x: Any) -> Any:
            along = isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == (1, nodes)
            return x.index_select(1, rows.to(x.device)) if along else x

        kwargs["rmfast_run"] = dataclasses.replace(run, keys_and_values=(key, value))
        out = self.layer(pick(hidden), *tree_map(pick, args), **tree_map(pick, kwargs))

        def put(x: Any) -> Any:
            along = isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == (1, len(rows))
            if not along:
                return x
            return x.new_zeros(1, nodes, *x.shape[2:]).index_copy(1, rows.to(x.device), x)

        return tree_map(put, out)

    def layer(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        forward = type(self.module).forward
        while forward.__code__.co_name == "forward_with_checkpointing":
            forward = forward.__wrapped__  # an exception must not leave through checkpointing
        return forward(self.module, *args, **kwargs)
