"""The stand-in for ``forward`` of a sequence classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rmfast import ops, reference
from rmfast.packed import models
from rmfast.packed import step as packed_step
from rmfast.packed.compiling import untraced
from rmfast.packed.forward import PackedForward, _on_cpu, as_it_was, sent
from rmfast.packed.last_layer import pooled_rows
from rmfast.packed.stand_in import Unservable
from rmfast.packed.step import Rows
from rmfast.packed.survey import Seen
from rmfast.packed.twice import Twice, shards
from rmfast.trie import PackedTrie

if TYPE_CHECKING:
    from rmfast.packed.pieces import Budget, Piece


class ScoringForward(PackedForward):
    """``forward`` of a sequence classifier that scores by its last token."""

    served = frozenset({"output_router_logits"})  # which a sequence classifier does not hand on

    @untraced()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        inside = call.pop("rmfast_call", None)
        if inside is not None:
            return inside()
        step = call.pop("rmfast_step", None)
        if step is not None:
            return self.prepacked(step, call)
        patch = self.patch
        if patch.level == "trie":
            try:
                out = self.packed(call, self.check(call))
                patch.packed[type(self.module).__name__] += 1
                return out
            except Unservable as reason:
                self.fall_back(reason)
        with as_it_was(patch):
            if patch.options.pooling == "mask" or self.pools_first(call):
                return self.padded(call)
            return self.unpacked(call)

    def pools_first(self, call: dict[str, Any]) -> bool:
        """Whether a padded batch is pooled here: the model's own head would round its scores."""
        if self.patch.level == "head" or not self.has_loss(call):
            return self.has_loss(call)
        ids, linear = call.get("input_ids"), models.linear(self.module.score)
        if linear is None or not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            return False
        dtype = linear.weight.dtype
        half = reference.wide(dtype) != dtype
        return half or torch.is_autocast_enabled(linear.weight.device.type)

    @untraced(whole=True)
    def check(self, call: dict[str, Any]) -> Seen:
        if self.patch.base is None or models.inner(self.module) is not self.patch.base:
            raise Unservable("the backbone was replaced after the patch")
        seen = super().check(call)
        if not models.is_pointwise(self.module.score):
            raise Unservable("the score head mixes tokens")
        if not self.has_loss(call):
            raise Unservable("labels: this family writes its loss out in its own forward")
        return seen

    def has_loss(self, call: dict[str, Any]) -> bool:
        return call.get("labels") is None or models.is_generic(self.module)

    def packed(self, call: dict[str, Any], seen: Seen) -> Any:
        ids, mask, positions = _on_cpu(call)
        trie, shared, _ = self.pack(ids, mask, positions, self.pooled(ids, mask), seen.noisy)
        patch, device = self.patch, call["input_ids"].device
        cuts = patch.options.max_tokens != 0 and not seen.whole
        if cuts and device == models.device(patch.base):
            return self.scored(call, self.by_piece(trie, shared, patch.budget()))
        hidden, place = self.pooled_states(trie, device, shared, seen)
        return self.scored(call, self.scores(hidden, place))

    def pooled_states(
        self, trie: PackedTrie, device: torch.device, shared: bool, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[P, H]`` of pooled nodes, and where each sequence's is, int64 ``[B]``."""
        prune, patch = self.may_prune(), self.patch
        outer = self.module if self.cuts_together() else None
        cuts = seen.whole and not seen.sharded and patch.options.max_training_tokens is not None
        cuts = cuts and len(trie) > patch.budget(training=True).tokens
        if (cuts or outer) and device == models.device(patch.base):
            step = functools.partial(self.nodes, prune=prune, shared=shared)
            passes = Twice(step, trie, patch, device, seen.noisy, outer)
            if passes.count > 1:
                return passes.hidden_states(), trie.place.to(device)
        trie = trie.to(device)
        out = self.backbone(patch.base, trie, shared, trie.pooled if prune else None)
        return pooled_rows(out[0][0], trie), trie.place

    def cuts_together(self) -> bool:
        """Whether this call, on each process that shares the model, may run in pieces."""
        patch = self.patch
        asked = patch.options.max_training_tokens is not None and patch.level == "trie"
        return asked and torch.is_grad_enabled() and shards(self.module)

    def fall_back(self, reason: Unservable) -> None:
        """Count a call that runs as it was.

        Raises:
            RuntimeError: other processes ask this one how many pieces it has.
        """
        if self.cuts_together():
            raise RuntimeError(
                f"a batch cannot run packed ({reason}), and under FSDP2 with max_training_tokens "
                "all processes run packed batches: leave max_training_tokens out, or the batch"
            )
        self.patch.fallbacks[str(reason)] += 1

    @untraced()
    def by_piece(
        self,
        trie: PackedTrie,
        shared: bool,
        budget: Budget,
        launched: Callable[[Piece], None] = lambda piece: None,
    ) -> Tensor:  # [B, num_labels]
        """Scores of a trie on the CPU; nothing waits for the device that they are on."""
        found = {}  # by where a piece begins

        def take(piece: Piece, hidden: Tensor) -> None:
            found.pop(piece.start, None)  # a larger one began there, and did not end
            if piece.rows.size:  # a node once: a matmul may round equal rows differently
                rows = pooled_rows(hidden, piece.trie, piece.carried)
                every = torch.arange(len(rows), device=piece.trie.place.device)
                found[piece.start] = self.scores(rows, every)
            launched(piece)

        self.run_pieces(trie, take, budget, shared=shared)
        scores = torch.cat([*found.values()])  # of the pooled nodes, in preorder
        return scores[sent([trie.place], scores.device)[0]]

    def prepacked(self, step: packed_step.Step, call: dict[str, Any]) -> Any:
        """The loss of a batch that was packed before; nothing waits for a GPU."""
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        batch = step.batch
        for name in ("inputs_embeds", "past_key_values"):
            if call.get(name) is not None:
                raise ValueError(f"a packed batch cannot be run with {name}: give padded batches")
        patch = self.patch
        try:
            seen = self.check_packed(batch)
        except Unservable as reason:
            if patch.level == "trie":
                self.fall_back(reason)
            rows = self.of_padded(batch)
        else:
            patch.packed[type(self.module).__name__] += 1
            trie = packed_step.trie_of(batch)
            device = trie.input_ids.device
            hidden, index = self.pooled_states(trie, device, batch["shared"], seen)
            head, where = self.head_beside(hidden, index), {"index": index}
            rows = Rows(lambda: self.scores(hidden, index)[:, 0], hidden, head, where)
        loss, step.scores, step.metrics = step.objective(rows, batch)
        loss = loss / step.count
        step.loss = loss.detach()
        return SequenceClassifierOutputWithPast(loss=loss, logits=step.scores[:, None])

    def of_padded(self, batch: packed_step.Batch) -> Rows:
        """Of a packed batch that runs padded; row by row, where no token fills it up."""
        pad, how = models.pad_token(self.module), {"use_cache": False, "return_dict": True}
        inputs = packed_step.padded(batch, pad or 0)
        pools = self.patch.level == "head"
        if not pools and models.linear(self.module.score) is not None:
            # with noise, it runs packed all the same, without sharing
            pools = not (batch["shared"] and self.patch.prepare().noisy)
        if pad is not None and pools:
            with as_it_was(self.patch):
                hidden = models.inner(self.module)(**inputs, **how)[0]
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            head = self.head_beside(hidden, ids) if ids.shape == hidden.shape[:2] else None
            where = {"index": None, "input_ids": ids, "attention_mask": mask, "pad_token_id": pad}
            where["pooling"] = self.patch.options.pooling
            return Rows(lambda: self.pooled_scores(hidden, ids, mask)[:, 0], hidden, head, where)
        if pad is not None:
            scores = self.run(**inputs, **how).logits[:, 0]
        else:
            each = [ids[mask != 0][None] for ids, mask in zip(*inputs.values(), strict=True)]
            scores = torch.cat([self.run(input_ids=row, **how).logits[:, 0] for row in each])
        return Rows(lambda: scores)

    def head_beside(self, *tensors: Tensor) -> nn.Linear | None:
        """The head, where it is a bare linear one on the device of all of these."""
        linear = models.linear(self.module.score)
        if linear is None or {linear.weight.device} != {x.device for x in tensors}:
            return None
        return linear

    def check_packed(self, batch: packed_step.Batch) -> Seen:
        if self.patch.level != "trie":
            raise Unservable(f"a packed batch at level {self.patch.level}")
        seen = self.check({"input_ids": batch["input_ids"][None]})
        if batch["longest"] >= self.patch.position_limit:
            raise Unservable(self.too_long())
        if batch["shared"] and seen.noisy:
            raise Unservable("a packed batch with shared prefixes while dropout is active")
        return seen

    def inside(self) -> Callable:
        return self.patch.base

    def padded(self, call: dict[str, Any]) -> Any:
        """Run Hugging Face's backbone on the padded batch, then the head on pooled rows only."""
        ids = call.get("input_ids")
        if ids is None:
            if self.patch.options.pooling == "mask":
                raise ValueError("pooling='mask' needs input_ids: inputs_embeds alone has no rule")
            return self.unpacked(call)
        inputs = {k: v for k, v in call.items() if k not in ("labels", "return_dict")}
        out = models.inner(self.module)(**inputs, return_dict=True)
        return self.scored(call, self.pooled_scores(out[0], ids, call.get("attention_mask")), out)

    def pooled_scores(self, hidden: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, num_labels]`` of hidden states ``[B, T, H]``."""
        linear = self.head_beside(hidden)
        if linear is not None and ids.shape == hidden.shape[:2]:
            pad, pooling = self.rule(ids)
            mask = mask.to(hidden.device) if mask is not None and pooling == "mask" else None
            return ops.pooled_reward_head(
                hidden, ids.to(hidden.device), linear.weight, linear.bias,
                attention_mask=mask, pad_token_id=pad, pooling=pooling,
            )  # fmt: skip
        batch, length, width = hidden.shape
        start = torch.arange(batch, device=hidden.device) * length
        index = start + self.pooled(ids, mask).to(hidden.device)
        return self.scores(hidden.reshape(batch * length, width), index)

    def unpacked(self, call: dict[str, Any]) -> Any:
        as_dict = self.return_dict(call)
        out = self.original(**{**call, "return_dict": True})
        dtype = out.logits.dtype
        out.logits = out.logits.to(reference.wide(dtype))
        if out.logits.dtype != dtype:
            self.patch.rounded[str(dtype).removeprefix("torch.")] += 1
        return out if as_dict else out.to_tuple()

    def rule(self, ids: Tensor) -> tuple[int | None, str]:
        pad = getattr(self.module.config.get_text_config(), "pad_token_id", None)
        pooling = self.patch.options.pooling
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
