"""The stand-in for ``forward`` of a decoder whose head is its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfast import reference
from rmfast.packed.compiling import untraced
from rmfast.packed.forward import PackedForward, _given, _on_cpu
from rmfast.packed.stand_in import Unservable


class BackboneForward(PackedForward):
    """``forward`` of a backbone under another head: packed inside, ``[B, T, H]`` outside."""

    served = frozenset({"output_hidden_states"})

    def inside(self) -> Callable:
        return self.original

    @untraced()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        stand_in, output = _given.get()
        if stand_in is self:
            return output
        call = self.named(args, kwargs)
        if call.get("rmfast_step") is not None:
            raise ValueError(
                "rmfast_step needs a model that scores by its last token: this has a "
                "head of its own"
            )
        try:
            seen = self.check(call)
            ids, mask, positions = _on_cpu(call)
            if self.patch.reads_pads and mask is not None and not mask[:, 0].all():
                raise Unservable("left-padded rows under a language model, whose loss reads a pad")
            trie, shared, keep = self.pack(ids, mask, positions, None, seen.noisy)
        except Unservable as reason:
            self.patch.fallbacks[str(reason)] += 1
            return self.original(*args, **kwargs)
        node = torch.full(keep.shape, len(trie))  # one row more, of zeros, for what is not attended
        node[keep] = torch.cat([torch.from_numpy(path) for path in trie.paths()])
        trie, node = trie.sent(call["input_ids"].device, node)
        passed = {k: call[k] for k in ("output_hidden_states",) if k in call}
        out = self.backbone(self.original, trie, shared, None, return_dict=True, **passed)
        out.last_hidden_state = _unpack(out.last_hidden_state, node)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(_unpack(h, node) for h in out.hidden_states)
        out.past_key_values = self.no_cache(call)
        as_dict = call.get("return_dict")
        as_dict = self.module.config.return_dict if as_dict is None else as_dict
        return out if as_dict else out.to_tuple()


def _unpack(hidden: Tensor, node: Tensor) -> Tensor:  # [1, N, H], int64 [B, T] -> [B, T, H]
    # in fp32, so that the gradients of a shared token are summed in fp32
    rows = nn.functional.pad(hidden[0].to(reference.wide(hidden.dtype)), (0, 0, 0, 1))
    return nn.functional.embedding(node.to(rows.device), rows).to(hidden.dtype)
