"""The stand-in for ``forward`` of the last decoder layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rmfast.ops import TriePlan
from rmfast.packed import attention, elementwise, models
from rmfast.packed.compiling import untraced
from rmfast.packed.families import RESHAPING
from rmfast.packed.stand_in import Override
from rmfast.trie import PackedTrie


class LastLayer(Override):
    """``forward`` of the last decoder layer: keys and values of all rows, the rest of pooled ones.

    The layer runs until its attention function has the keys and values and is left there by an
    exception; then it runs on the pooled rows with those keys and values. Nothing is known of the
    layer's inside, so the first run makes queries too, which nobody reads. The pooled rows alone
    come back where a norm is all that follows; elsewhere the others come back as zeros.
    """

    @untraced(whole=True)
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

        plan = TriePlan(run.trie.subtree_end, run.trie.position_ids, run.pooled)
        few = dataclasses.replace(run, plan=plan, keys_and_values=(key, value))
        kwargs["rmfast_run"] = few
        out = self.layer(pick(hidden), *tree_map(pick, args), **tree_map(pick, kwargs))
        if ends_with_norm(self.patch.base) and not models.is_watched(self.module):
            return out

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


def ends_with_norm(base: nn.Module) -> bool:
    """Whether a norm that is known runs after the last layer, and nothing else.

    Hooks, and code of somebody else, may count on a row for each node.
    """
    layers, embeddings = models.decoder_layers(base), base.get_input_embeddings()
    beside = [m for m in base.children() if m is not layers and m is not embeddings]
    return models.family(base) not in RESHAPING and all(
        elementwise.is_plain(m, "peft.")
        for m in (base, *(m for one in beside for m in one.modules()))
    )


def pooled_rows(hidden: Tensor, trie: PackedTrie, first: int = 0) -> Tensor:  # [n, H] -> [P, H]
    """The hidden states of pooled nodes, given those, or those of all nodes from ``first`` on."""
    if len(hidden) == len(trie.pooled):
        return hidden
    return hidden.index_select(0, (trie.pooled - first).to(hidden.device))
