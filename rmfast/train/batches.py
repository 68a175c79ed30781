"""Batches of preferences as packed tries.

:class:`Collator` packs examples on the host, in the workers of a data loader;
``model(rmfast_step=Step(batch, objective))`` on a patched model runs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmfast.packed.step import Batch
from rmfast.reference import until_scored
from rmfast.train.objective import LARGEST_GROUP
from rmfast.trie import SEGMENT, integers, pack


@dataclass
class Collator:
    """Packs preference pairs, or ranked groups of responses, into one token trie.

    Examples are dicts: ``chosen_ids`` and ``rejected_ids`` with or without a ``margin``, or
    ``responses_ids`` (a list of token lists) with ``ranks`` (lower is better, equal is a tie). Each
    of these holds prompt and response.

    Args:
        pad_token_id: a sequence is scored at its last token that is not this one, as Hugging Face
            does; None: at its last token.
        share_prefixes: False while dropout draws noise for each token.

    Returns, when called, a dict of what :class:`rmfast.PackedTrie` has, of ``B`` sequences in ``N``
    nodes (pairs: all chosen, then all rejected; groups: one after another), and of

    - ``sizes``: int64 ``[G]``, responses of each group; only with groups.
    - ``pairs``: int64 ``[Q, 2]``, better and worse sequence; only with groups.
    - ``margin``: fp32 ``[B / 2]``, where the examples have one.
    - ``ranks``: fp32 ``[B]``, ``offsets``: int64 ``[G + 1]``, ``largest``: the most responses in a
      group; only with groups.
    - ``count``: pairs or groups; ``tokens``: tokens of all sequences; ``longest``: of the longest
      one; ``shared``: whether nodes may belong to several sequences; ``segments``: whether ids hold
      token types, as :class:`rmfast.data.encoding.Encoder` makes them. Plain numbers.

    Raises:
        ValueError: no examples, or one without the fields that the others have, with an empty
            sequence, a margin that is not a finite number, or ranks that do not match the
            responses; the message says which one.
    """

    pad_token_id: int | None = None
    share_prefixes: bool = True

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        if not len(examples):
            raise ValueError("a batch needs at least one example")
        ranked = "responses_ids" in examples[0]
        for name in ("responses_ids",) if ranked else ("chosen_ids", "rejected_ids"):
            for i, example in enumerate(examples):
                if example.get(name) is None:
                    raise ValueError(f"example {i} of the batch has no {name}")
        if ranked:
            return self._groups(examples)
        rows = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
        batch = self._packed(rows)
        batch["count"] = len(examples)
        if any(example.get("margin") is not None for example in examples):
            for i, example in enumerate(examples):
                if example.get("margin") is None or not math.isfinite(example["margin"]):
                    raise ValueError(
                        f"example {i} of the batch: margin is {example.get('margin')}, and must "
                        "be a finite number in every example, or in none"
                    )
            batch["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float32)
        return batch

    def _groups(self, examples: Sequence[dict[str, Any]]) -> Batch:
        rows = [row for e in examples for row in e["responses_ids"]]
        sizes = [len(e["responses_ids"]) for e in examples]
        for i, (example, size) in enumerate(zip(examples, sizes, strict=True)):
            ranks = example.get("ranks")
            if ranks is None or len(ranks) != size or not np.isfinite(ranks).all():
                raise ValueError(
                    f"example {i} of the batch has {size} responses, its ranks must be as many "
                    f"finite numbers, not {ranks}"
                )
            if size > LARGEST_GROUP:
                raise ValueError(
                    f"example {i} of the batch has {size} responses, more than {LARGEST_GROUP}"
                )
        # first, so that trainers of transformers count groups: they look at the first tensor
        batch = {"sizes": torch.tensor(sizes), **self._packed(rows)}
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ranks = np.concatenate([np.asarray(e["ranks"], np.float64) for e in examples])
        pairs = []
        for first, size in zip(offsets, sizes, strict=False):
            r = ranks[first : first + size]
            pairs.append(np.argwhere(r[:, None] < r) + first)
        batch["pairs"] = torch.from_numpy(np.concatenate(pairs))
        # only their order counts, and fp32 may not tell large numbers apart
        batch["ranks"] = torch.from_numpy(np.unique(ranks, return_inverse=True)[1]).float()
        batch["offsets"] = torch.from_numpy(offsets)
        batch["count"], batch["largest"] = len(examples), max(sizes)
        return batch

    def _packed(self, rows: Sequence[Sequence[int]]) -> Batch:
        arrays = [integers(f"sequence {i}", row, "[t]") for i, row in enumerate(rows)]
        trie = pack(
            [until_scored(row, self.pad_token_id) for row in arrays],
            share_prefixes=self.share_prefixes,
        )
        # its length comes first: to trainers of transformers that is the size of the batch
        return {
            "pool_index": trie.pool_index,
            "input_ids": trie.input_ids,
            "position_ids": trie.position_ids,
            "subtree_end": trie.subtree_end,
            "pooled": trie.pooled,
            "place": trie.place,
            "tokens": sum(row.size for row in arrays),
            "longest": max(row.size for row in arrays),
            "shared": self.share_prefixes,
            "segments": any(row.max() >= SEGMENT for row in arrays),
        }

    def rows(self, example: dict[str, Any]) -> list[np.ndarray]:
        """The sequences of one example, up to the tokens that carry their scores."""
        rows = example.get("responses_ids") or [example["chosen_ids"], example["rejected_ids"]]
        return [until_scored(np.asarray(row, np.int64), self.pad_token_id) for row in rows]

    def nodes(self, example: dict[str, Any]) -> int:
        """Trie nodes of one example."""
        return len(pack(self.rows(example), share_prefixes=self.share_prefixes))


def first_of(batch: Batch, scores: Tensor, count: int) -> tuple[Batch, Tensor]:
    """What a loss of scores looks at, of the first ``count`` pairs or groups, and their scores."""
    if "offsets" not in batch:
        kept = {"margin": batch["margin"][:count]} if "margin" in batch else {}
        return {**kept, "count": count}, scores.view(2, -1)[:, :count].flatten()
    offsets = batch["offsets"][: count + 1]
    end = int(batch["sizes"][:count].sum())
    pairs = batch["pairs"][batch["pairs"][:, 0] < end]
    kept = {"ranks": batch["ranks"][:end], "offsets": offsets, "pairs": pairs}
    return {**kept, "largest": batch["largest"], "count": count}, scores[:end]
