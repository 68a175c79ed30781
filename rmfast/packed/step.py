"""A packed batch and the callable that makes a loss of its scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.trie import SEGMENT, PackedTrie, moved

Batch = dict[str, Any]


def trie_of(batch: Batch) -> PackedTrie:
    return PackedTrie(**{field.name: batch[field.name] for field in fields(PackedTrie)})


def padded(batch: Batch, pad_token_id: int) -> dict[str, Tensor]:
    """What a model's own forward takes of a packed batch, each ``[B, T]``, padded on the right."""
    trie = trie_of(batch).to("cpu")
    rows = [trie.input_ids[path] for path in trie.paths()]
    inputs = inputs_of(rows, pad_token_id, batch["segments"])
    return dict(zip(inputs, moved(inputs.values(), batch["input_ids"].device), strict=True))


def pad(
    rows: Sequence[Tensor | np.ndarray],  # B of int [t]
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:  # int64 [B, T], int64 [B, T]
    """Token ids padded on the right, and their attention mask."""
    ids = [torch.as_tensor(row).long() for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    pad_sequence = nn.utils.rnn.pad_sequence
    return pad_sequence(ids, True, pad_token_id), pad_sequence(mask, True)


def inputs_of(
    rows: Sequence[Tensor | np.ndarray], pad_token_id: int, segments: bool
) -> dict[str, Tensor]:
    """Padded inputs; with ``segments``, ids of ``SEGMENT`` and more have token type 1."""
    ids, mask = pad(rows, pad_token_id)
    if not segments:
        return {"input_ids": ids, "attention_mask": mask}
    types = {"token_type_ids": ids // SEGMENT}
    return {"input_ids": ids % SEGMENT, "attention_mask": mask, **types}


class Rows(NamedTuple):
    """Where the scores of a batch come from.

    Attributes:
        scores: gives the scores ``[B]``, in fp32 (fp64 of fp64 models).
        hidden: hidden states of nodes ``[M, H]``, of a padded batch ``[B, T, H]``; None where only
            scores are known.
        head: the linear head on them; None where it is not a bare one, or on another device.
        where: what else of :func:`rmfast.ops.reward_head_pairwise_loss` says which are scored.
    """

    scores: Callable[[], Tensor]
    hidden: Tensor | None = None
    head: nn.Linear | None = None
    where: dict[str, Any] | None = None


# the sum of the losses [], the scores [B] and the metrics [6] of a batch
Objective = Callable[[Rows, Batch], tuple[Tensor, Tensor, Tensor]]


class Step:
    """A packed batch and what is minimised, for ``model(rmfast_step=step)`` on a patched model.

    The call returns ``loss``, divided by ``count``, and ``logits``. No dict and no tuple: what
    wraps a model may round every tensor that it finds in arguments and outputs, as FSDP2's mixed
    precision does. The batch is on the model's device already.

    Args:
        batch: what :class:`rmfast.train.batches.Collator` returned.
        objective: the loss, such as :class:`rmfast.train.objective.Objective`.
        count: what the sum over the batch is divided by: a number or a tensor ``[]``.

    Attributes:
        loss: after the call, the value of the loss, fp32 (of fp64 models fp64).
        scores: ``[B]``, likewise.
        metrics: ``[6]``, see :class:`rmfast.ops.PairwiseLoss`.

    Raises:
        RuntimeError: one of these is read, and no patched reward model ran the step. Models of
            Hugging Face take any argument and pass over those that they do not know.
    """

    loss: Tensor
    scores: Tensor
    metrics: Tensor

    def __init__(self, batch: Batch, objective: Objective, count: Tensor | int = 1) -> None:
        self.batch, self.objective, self.count = batch, objective, count

    def __getattr__(self, name: str) -> Tensor:  # of what is not there
        if name not in Step.__annotations__:
            raise AttributeError(f"a Step has no {name!r}")
        raise RuntimeError(
            f"the step has no {name}: no patched reward model ran it. Call rmfast.patch(model) "
            "first, and then model(rmfast_step=step)"
        )
