"""What a trainer needs: preferences packed where the data is loaded, and what is minimised.

:class:`Collator` turns examples into one packed trie, on the host; ``model(rmfast_step=Step(batch,
objective))`` on a patched model runs it without a look at a token again.
:class:`TokenBudgetSampler` fills batches by trie nodes instead of by examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast import ops
from rmfast.trie import PackedTrie, pack

LARGEST_GROUP = 64  # responses: what the kernel of the ranked losses holds
KINDS = {  # by what they are for
    "pairs": ("bradley_terry", "focal"),
    "ranked responses": ("all_pairs", "plackett_luce"),
}

Batch = dict[str, Any]


# --- batches


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
    - ``pooled``: int64 ``[P]``, rising, the nodes that carry a score.
    - ``pairs``: int64 ``[Q, 2]``, better and worse sequence; only with groups.
    - ``margin``: fp32 ``[B / 2]``, where the examples have one.
    - ``ranks``: fp32 ``[B]``, ``offsets``: int64 ``[G + 1]``, ``largest``: the most responses in a
      group; only with groups.
    - ``count``: pairs or groups; ``tokens``: tokens of all sequences; ``longest``: of the longest
      one; ``shared``: whether nodes may belong to several sequences. Plain numbers.

    Raises:
        ValueError: an example without the fields, or with an empty sequence, a margin that is not a
            finite number, or ranks that do not match the responses; the message says which one.
    """

    pad_token_id: int | None = None
    share_prefixes: bool = True

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        if "responses_ids" in examples[0]:
            return self._groups(examples)
        for name in ("chosen_ids", "rejected_ids"):
            for i, example in enumerate(examples):
                if example.get(name) is None:
                    raise ValueError(f"example {i} of the batch has no {name}")
        rows = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
        out = self._packed(rows)
        out["count"] = len(examples)
        if examples[0].get("margin") is not None:
            for i, example in enumerate(examples):
                if example.get("margin") is None or not math.isfinite(example["margin"]):
                    raise ValueError(
                        f"example {i} of the batch: margin is {example.get('margin')}, and must "
                        "be a finite number in every example, or in none"
                    )
            out["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float32)
        return out

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
        out = {"sizes": torch.tensor(sizes), **self._packed(rows)}
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ranks = np.concatenate([np.asarray(e["ranks"], np.float64) for e in examples])
        pairs = []
        for first, size in zip(offsets, sizes, strict=False):
            r = ranks[first : first + size]
            pairs.append(np.argwhere(r[:, None] < r) + first)
        out["pairs"] = torch.from_numpy(np.concatenate(pairs))
        # only their order counts, and fp32 may not tell large numbers apart
        out["ranks"] = torch.from_numpy(np.unique(ranks, return_inverse=True)[1]).float()
        out["offsets"] = torch.from_numpy(offsets)
        out["count"], out["largest"] = len(examples), max(sizes)
        return out

    def _packed(self, rows: Sequence[Sequence[int]]) -> Batch:
        arrays = [np.asarray(row, np.int64) for row in rows]
        trie = pack([self.scored(row) for row in arrays], share_prefixes=self.share_prefixes)
        # its length comes first: to trainers of transformers that is the size of the batch
        return {
            "pool_index": trie.pool_index,
            "input_ids": trie.input_ids,
            "position_ids": trie.position_ids,
            "subtree_end": trie.subtree_end,
            "pooled": trie.pool_index.unique(),
            "tokens": sum(row.size for row in arrays),
            "longest": max(row.size for row in arrays),
            "shared": self.share_prefixes,
        }

    def scored(self, row: np.ndarray) -> np.ndarray:
        """A sequence up to the token that carries its score; what follows changes nothing."""
        if self.pad_token_id is None:
            return row
        counts = np.flatnonzero(row != self.pad_token_id)
        return row[: counts[-1] + 1 if counts.size else 1]

    def rows(self, example: dict[str, Any]) -> list[np.ndarray]:
        """The sequences of one example, up to the tokens that carry their scores."""
        rows = example.get("responses_ids") or [example["chosen_ids"], example["rejected_ids"]]
        return [self.scored(np.asarray(row, np.int64)) for row in rows]

    def nodes(self, example: dict[str, Any]) -> int:
        """Trie nodes of one example."""
        return len(pack(self.rows(example), share_prefixes=self.share_prefixes))


def trie_of(batch: Batch) -> PackedTrie:
    names = ("input_ids", "position_ids", "subtree_end", "pool_index")
    return PackedTrie(*(batch[name] for name in names))


def padded(batch: Batch, pad_token_id: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, T]`` of a packed batch, padded on the right."""
    trie = trie_of(batch)
    rows = [
        trie.input_ids[torch.from_numpy(path).to(trie.input_ids.device)] for path in trie.paths()
    ]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, True, pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True),
    }


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


def common(left: np.ndarray, right: np.ndarray) -> int:
    """How many tokens two sequences both begin with."""
    size = min(left.size, right.size)
    differ = left[:size] != right[:size]
    return int(differ.argmax()) if differ.any() else size


class TokenBudgetSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of examples whose tries have ``max_tokens`` nodes or fewer, as many on every rank.

    An epoch's batches are those of a random order cut where the budget is full. So that every epoch
    and every rank has the same number of them, the largest are cut in two where some are missing.

    Args:
        nodes: trie nodes of each example, ``[E]``.
        max_tokens: most nodes a batch. What examples share is counted in each of them, apart from
            ``common``.
        common: nodes that all examples begin with; a batch runs them once.
        ranks: processes that train together, and which of them this is.
        epochs: how many there will be.
        seed: of the order.

    Raises:
        ValueError: an example with more nodes than ``max_tokens``.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        max_tokens: int,
        *,
        common: int = 0,
        ranks: tuple[int, int] = (1, 0),
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self._own = np.asarray(nodes, np.int64) - common
        self._room = max_tokens - common
        if self._own.size and self._own.max() > self._room:
            worst = int(self._own.argmax())
            raise ValueError(
                f"example {worst} has {nodes[worst]} trie nodes, more than max_tokens = "
                f"{max_tokens}: raise it, or lower the length from which examples are dropped"
            )
        self._world, self._rank = ranks
        self._seed, self._epoch = seed, 0
        most = max(len(self._cut(epoch)) for epoch in range(max(1, epochs)))
        self._count = -(-most // self._world)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._cut(self._epoch)
        for missing in range(self._count * self._world - len(batches)):
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch, half = batches[largest], len(batches[largest]) // 2
            if half:
                batches[largest : largest + 1] = [batch[:half], batch[half:]]
            else:  # nothing left to cut: some examples run twice
                batches.append(batches[missing])
        yield from batches[self._rank :: self._world]

    def _cut(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self._seed, epoch]).permutation(self._own.size)
        out: list[list[int]] = []
        left = -1
        for i, own in zip(order.tolist(), self._own[order].tolist(), strict=True):
            left -= own
            if left < 0:
                out.append([])
                left = self._room - own
            out[-1].append(i)
        return out


# --- what is minimised


@dataclass(frozen=True)
class Objective:
    """The loss of a batch of preferences, and what is logged of it.

    Attributes:
        kind: one of :data:`KINDS`, functions of :mod:`rmfast.losses`.
        label_smoothing: of ``"bradley_terry"``.
        center: weight of the squared sum of a pair's scores, of pairs.
        gamma: of ``"focal"``.

    Raises:
        ValueError: an unknown kind, or options that do not go with it.
    """

    kind: str = "bradley_terry"
    label_smoothing: float = 0.0
    center: float = 0.0
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in {kind for kinds in KINDS.values() for kind in kinds}:
            raise ValueError(f"no loss {self.kind!r}")
        if self.kind != "bradley_terry" and self.label_smoothing:
            raise ValueError(f"label_smoothing has no meaning with {self.kind}")
        if not self.of_pairs and self.center:
            raise ValueError(f"centering is of pairs, not of {self.kind}")

    @property
    def of_pairs(self) -> bool:
        return self.kind in KINDS["pairs"]

    def _options(self, batch: Batch) -> dict[str, Any]:
        return {
            "margin": batch.get("margin"),
            "label_smoothing": self.label_smoothing,
            "center": self.center,
            "gamma": self.gamma if self.kind == "focal" else 0.0,
            "reduction": "sum",
        }

    def of_hidden(
        self,
        hidden: Tensor,  # [N, H]
        batch: Batch,
        head: nn.Linear | None,
        score: Callable[[Tensor, Tensor], Tensor],  # hidden, index -> [B, num_labels]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [], fp32 [B], fp32 [6]
        """Sum of the losses, the scores, and :class:`rmfast.ops.PairwiseLoss`'s metrics.

        Head and loss are one op where the loss allows it.
        """
        if not self.of_pairs or head is None:
            return self.of_scores(score(hidden, batch["pool_index"])[:, 0], batch)
        loss, scores, *metrics = ops.reward_head_pairwise_loss(
            hidden,
            batch["pool_index"],
            head.weight,
            head.bias,
            **self._options(batch),
        )
        return loss, scores, torch.stack(metrics)

    def of_scores(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The same of scores ``[B]``."""
        if self.of_pairs:
            loss, *metrics = ops.pairwise_loss(scores, **self._options(batch))
        else:
            loss = ops.listwise_loss(
                scores, batch["ranks"], batch["offsets"],
                kind=self.kind, reduction="sum", max_size=batch["largest"],
            )  # fmt: skip
            if not len(batch["pairs"]):  # all tied
                return loss, scores.detach(), scores.new_full((6,), float("nan"))
            _, *metrics = ops.pairwise_loss(scores.detach(), batch["pairs"])
        return loss, scores.detach(), torch.stack(metrics)


class Step:
    """A packed batch and what is minimised, for ``model(rmfast_step=step)`` on a patched model.

    The call returns ``loss``, divided by ``count``, and ``logits``. No dict and no tuple: what
    wraps a model may round every tensor that it finds in arguments and outputs, as FSDP2's mixed
    precision does. The batch is on the model's device already.

    Args:
        batch: what :class:`Collator` returned.
        objective: the loss.
        count: what the sum over the batch is divided by: a number or a tensor ``[]``.

    Attributes:
        loss: after the call, the value of the loss, fp32 (of fp64 models fp64).
        scores: ``[B]``, likewise.
        metrics: ``[6]``, see :class:`rmfast.ops.PairwiseLoss`.
    """

    def __init__(self, batch: Batch, objective: Objective, count: Any = 1) -> None:
        self.batch, self.objective, self.count = batch, objective, count
        self.loss: Tensor | None = None
        self.scores: Tensor | None = None
        self.metrics: Tensor | None = None
