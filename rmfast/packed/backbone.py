"""The stand-ins for ``forward`` of a decoder that is called for its hidden states.

Another head than rmfast's reads them, or a language model around it does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfast import reference
from rmfast.ops._common import transformed
from rmfast.packed import attention, models, padding_free
from rmfast.packed.compiling import untraced
from rmfast.packed.forward import PackedForward, _given, _on_cpu, as_it_was, is_as_it_was, sent
from rmfast.packed.stand_in import Override, Unservable
from rmfast.trie import PackedTrie, pack

_PASSED = ("output_hidden_states", "output_router_logits")


class BackboneForward(PackedForward):
    """``forward`` of a backbone under another head: packed inside, ``[B, T, H]`` outside."""

    served = frozenset(_PASSED)

    def inside(self) -> Callable:
        return self.original

    @untraced()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        stand_in, output = _given.get()
        if stand_in is self:
            return output
        call, patch = self.named(args, kwargs), self.patch
        if call.get("rmfast_step") is not None:
            raise ValueError(
                "rmfast_step goes to a model that scores by its last token, not to the backbone "
                "of another one"
            )
        if call.get("rmfast_run") is not None or is_as_it_was(patch):
            return self.original(*args, **kwargs)
        passed = {k: call[k] for k in _PASSED if k in call}
        try:
            if patch.is_orphan():
                raise Unservable("the classifier that was patched is gone")
            trie, shared, node, apart = self.read(call)
            trie, node = trie.sent(call["input_ids"].device, node)
            run = functools.partial(self.backbone, self.original, trie, shared, None, apart=apart)
            out = run(return_dict=True, **passed)
        except (Unservable, attention.SequencesMeet) as reason:
            patch.fallbacks[str(reason)] += 1
            return self.original(*args, **kwargs)
        patch.packed[type(self.module).__name__] += 1
        out.last_hidden_state = _unpack(out.last_hidden_state, node)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(_unpack(h, node) for h in out.hidden_states)
        if out.get("router_logits") is not None:  # [N, E] -> [B * T, E]
            each = (_unpack(logits[None], node) for logits in out.router_logits)
            out.router_logits = tuple(logits.flatten(0, 1) for logits in each)
        out.past_key_values = self.no_cache(call)
        as_dict = call.get("return_dict")
        as_dict = self.module.config.return_dict if as_dict is None else as_dict
        return out if as_dict else out.to_tuple()

    @untraced(whole=True)
    def read(self, call: dict[str, Any]) -> tuple[PackedTrie, bool, Tensor, bool]:
        """The trie of a call, whether prefixes are shared, each token's node, int64 ``[B, T]``.

        What is not attended has the node after the last one. Then, whether the model's own
        attention function has to keep sequences apart.
        """
        theirs = attention.name(self.patch.base.config)
        call, where = padding_free.plain(call, theirs)
        seen = self.check(call)
        ids, mask, positions = _on_cpu(call)
        begins = padding_free.begins(ids, mask, positions, sent(where, "cpu"))
        flash = "flash" in theirs  # it goes by positions itself; others go by the mask
        if self.patch.classifier is not None and mask is not None:
            pad = models.pad_token(self.patch.classifier)
            if ((mask == 0) & (ids != pad)).any():  # which a classifier may score
                raise Unservable("a token that attention_mask hides, and is no pad token")
        if begins is None:
            trie, shared, keep = self.pack(ids, mask, positions, None, seen.noisy)
        elif not flash and not padding_free.masks(inspect.unwrap(type(self.module).forward)):
            raise attention.SequencesMeet
        elif not flash and self.no_cache(call) is not None:
            raise attention.SequencesMeet(" because a cache is made: pass use_cache=False")
        else:
            trie, shared = self.pack_row(ids, positions, begins, seen.noisy)
            keep = torch.ones_like(ids, dtype=torch.bool)
        node = torch.full(keep.shape, len(trie))
        node[keep] = torch.cat([torch.from_numpy(path) for path in trie.paths()])
        return trie, shared, node, flash and begins is not None

    def pack_row(
        self, ids: Tensor, positions: Tensor, begins: list[int], noisy: bool
    ) -> tuple[PackedTrie, bool]:
        """The trie of the sequences in one row, and whether prefixes are shared."""
        if ids.min() < 0:
            raise Unservable("a token id below zero")
        if int(positions.max()) + 1 >= self.patch.position_limit:
            raise Unservable(self.too_long())
        share = self.patch.options.share_prefixes and not noisy
        return pack([*ids[0].tensor_split(begins[1:])], share_prefixes=share), share


def _unpack(hidden: Tensor, node: Tensor) -> Tensor:  # [1, N, H], int64 [B, T] -> [B, T, H]
    # one row more, of zeros, for what is not attended; in fp32, so that the gradients of a shared
    # token are summed in fp32
    rows = nn.functional.pad(hidden[0].to(reference.wide(hidden.dtype)), (0, 0, 0, 1))
    return nn.functional.embedding(node.to(rows.device), rows).to(hidden.dtype)


class LossForward(Override):
    """``forward`` of a model whose loss may read a token that the mask hides.

    Hugging Face computes hidden states of such tokens, and a packed backbone does not.
    """

    @untraced()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        reason = _reads_hidden(self.module, self.named(args, kwargs)) if self.patch.packs else None
        if reason is None:
            return self.original(*args, **kwargs)
        self.patch.fallbacks[reason] += 1
        with as_it_was(self.patch):
            return self.original(*args, **kwargs)


@untraced(whole=True)
def _reads_hidden(model: nn.Module, call: dict[str, Any]) -> str | None:
    """Why the loss of a call may read a token that the mask hides; None: it does not."""
    mask, labels = call.get("attention_mask"), call.get("labels")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or transformed():
        return None  # all are attended, or the backbone has its own reason
    if call.get("start_positions") is not None:
        return None if bool(mask.all()) else "a loss over all tokens of rows with hidden ones"
    speaks = model.can_generate()
    kept = call.get("logits_to_keep", 0)
    if speaks and not models.runs_transformers(model) and isinstance(kept, int) and not kept:
        if not bool(mask[:, 0].all()):
            return "left-padded rows under a language model that may make labels of its own"
    if labels is None or labels.ndim < 2:  # a label a row is no loss of tokens
        return None
    shifted = call.get("shift_labels") if speaks else labels
    if shifted is None:  # a token predicts the next one
        shifted, mask = labels[..., 1:], mask[:, :-1]
    if shifted.shape != mask.shape:
        return "labels of another shape than attention_mask"
    counts = shifted != call.get("ignore_index", -100)
    if bool((counts & (mask == 0).to(shifted.device)).any()):
        return "labels that are read from a token which attention_mask hides"
    return None
