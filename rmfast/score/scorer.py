"""Scoring in bulk: any number of conversations in, fp32 rewards out, no shared prefix run twice.

The conversations of a window become one token trie, which runs in micro-batches of so many nodes;
keys and values of a prefix that the next micro-batch needs are carried over
(:mod:`rmfast.packed.pieces`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmfast.data.encoding import Encoder
from rmfast.data.form import Form
from rmfast.packed import models, patching, pieces
from rmfast.packed.stand_in import Unservable
from rmfast.packed.step import inputs_of
from rmfast.packed.survey import is_sharded, walk
from rmfast.reference import until_scored
from rmfast.score import memory
from rmfast.score.bulk import BulkScorer, evaluating
from rmfast.trie import SEGMENT, moved, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Scorer(BulkScorer):
    """Scores conversations with a reward model, in bulk.

    A conversation is text, a list of messages ``{"role", "content"}``, a (prompt, response) tuple
    or a list of token ids. The chat template is applied once, and a sequence has one BOS at most.
    Threads may use one scorer, or several of one model: a window of conversations runs at a time.

    Args:
        model: a reward model; patched in place, as by :func:`rmfast.patch`. One that is patched
            already keeps its options, but for those given here.
        tokenizer: its tokenizer; None where only token ids come.
        max_tokens: trie nodes (distinct prefixes) a micro-batch; the limit of other calls stays as
            it is. When not given, the limit that the model was patched with; where that has none,
            or 0, an estimate of what the free memory holds
            (:func:`rmfast.score.memory.bytes_a_token`). Halved when memory runs out, and doubled
            again after a while. Where processes share the parts of a model, nothing is estimated or
            halved: all must run as many micro-batches.
        max_length: most tokens of a conversation; when not given, that of the training, if the
            config records it, else the model's own limit.
        on_overlong: ``"error"``, ``"skip"`` (the score is NaN), or ``"truncate_left"``: the BOS
            and the last tokens are scored.
        pooling: as for :func:`rmfast.patch`; None: as the model was patched, ``"hf"`` if it was
            not.
        system_prompt: put before messages that have none.
        chat_template: Jinja template in place of the tokenizer's.
        chat: how text is read. True: as turns of a chat, also dialogues as in HH-RLHF. False: as
            plain text, a prompt and its response one after the other. None: as in the training of
            the model, if its config records that (``rmfast train`` does); else a prompt and its
            response as turns, and other text as it is.
        end_of_text: end plain text with the end of text. None: as in the training; where that is
            not known, only the sides of preference pairs, as TRL's trainer does.
        special_tokens: let messages hold the special tokens that the chat template writes.
        window: conversations that are looked at together: prefixes meet within a window.
        normalize: ``(score - config.mean) / config.std``, as OpenRLHF stores them.
        sigmoid: ``1 / (1 + exp(-score))``, after ``normalize``.
        attention: as for :func:`rmfast.patch`; None: as the model was patched, ``"auto"`` if it was
            not.
        progress: show a bar; or a function that is called with the conversations and the tokens
            of each micro-batch, once it was launched: a GPU may still be at it.

    Attributes:
        max_tokens: tokens a micro-batch, now.
        stats: what was done so far.

    Raises:
        ValueError: unknown options, a model with several labels, or ``normalize`` without ``mean``
            and ``std`` in the model's config.
    """

    _level = "trie"  # at which the model can run in pieces

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_tokens: int | None = None,
        max_length: int | None = None,
        on_overlong: str = "error",
        pooling: str | None = None,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        chat: bool | None = None,
        end_of_text: bool | None = None,
        special_tokens: bool = False,
        window: int = 1024,
        normalize: bool = False,
        sigmoid: bool = False,
        attention: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self._check(model)
        super().__init__(window, progress)
        config = getattr(model, "config", None)
        text = models.text_config(model)
        self._mean, self._std = _normalization(config) if normalize else (0.0, 1.0)
        self._sigmoid = sigmoid
        self.model = model
        form = Form.of(model)
        if pooling is None and form is not None and patching.attached(model) is None:
            pooling = form.pooling
        self._patch = patching.repatch(model, pooling=pooling, attention=attention)
        self._patches = [(model, self._patch)]
        self._pooling = self._patch.options.pooling
        self._pad = models.pad_token(model)
        self._position_limit = models.position_limit(text)
        limits = (form and form.max_length, models.positions(model))
        self.encoder = Encoder(
            tokenizer,
            max_length=max_length or min(filter(None, limits), default=None),
            on_overlong=on_overlong,
            system_prompt=system_prompt,
            chat_template=chat_template,
            chat=chat,
            end_of_text=end_of_text,
            special_tokens=special_tokens,
            segments=models.takes_pairs(text, tokenizer),
            form=form,
            vocabulary=models.vocabulary(model),
        )
        self._pads_count: bool | None = None  # whether pads change scores; None: not yet tried
        self._budget = self._new_budget(max_tokens or self._patch.options.max_tokens)

    def _new_budget(self, tokens: int | None) -> pieces.Budget:
        sharded = self._is_sharded()  # then all processes must run as many passes
        if not tokens and sharded:
            tokens = pieces.most(self._device)
        elif not tokens:
            base = self.model if self._patch.base is None else self._patch.base
            config = getattr(base, "config", None)
            dtype = next(self.model.parameters()).dtype
            packs = self._patch.level == self._level
            tokens = memory.most_tokens(config, dtype, self._device, packs)
        return pieces.Budget(tokens, fixed=sharded)

    def _is_sharded(self) -> bool:
        return is_sharded(walk(self.model))

    @staticmethod
    def _check(model: nn.Module) -> None:
        labels = getattr(getattr(model, "config", None), "num_labels", 1)
        if labels != 1:
            raise ValueError(f"the model has {labels} labels, and a reward model has one score")

    @property
    def max_tokens(self) -> int:
        return self._budget.tokens

    @property
    def _device(self) -> torch.device:
        return models.device(self.model)

    def about(self) -> dict[str, Any]:
        """What runs: dtype, device, and what :func:`rmfast.report` says of the model."""
        report = self._patch.report()
        dtype = next(self.model.parameters()).dtype
        warnings = [*report.warnings, *self.encoder.differences()]
        if self._pads_count:
            warnings.append(f"{PADS_COUNT}: it scores conversations of one length at a time")
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(self._device),
            "level": report.level,
            "reasons": report.reasons,
            "warnings": warnings,
            "form": self.encoder.about(),
            "fallbacks": dict(report.fallbacks),
        }

    def _scores(self, rows: list[np.ndarray]) -> np.ndarray:  # fp32 [len(rows)]
        scores = (self._raw(rows) - self._mean) / self._std
        if self._sigmoid:
            scores = np.where(np.isfinite(scores), np.exp(-np.logaddexp(0, -scores)), scores)
        return scores.astype(np.float32)

    def _raw(self, rows: list[np.ndarray]) -> np.ndarray:  # fp64 [len(rows)]
        """What the model gives the rows."""
        lengths = np.array([row.size for row in rows])
        self.stats.tokens += int(lengths.sum())
        if self._patch.level == "trie" and self._pooling == "hf":  # where rmfast pools
            rows = [until_scored(row, self._pad) for row in rows]
        raw = torch.full((len(rows),), float("nan"), dtype=torch.float64)
        with evaluating(self.model):
            self._forget_long_rows()
            packed = self._packed(rows)
            if packed.any():
                self._run_trie(rows, np.flatnonzero(packed), lengths, raw)
            if not packed.all():
                self._run_padded(rows, np.flatnonzero(~packed), raw)
        return raw.numpy()

    def _packed(self, rows: list[np.ndarray]) -> np.ndarray:  # bool [len(rows)]
        """Which rows can run in the trie."""
        patch = self._patch
        if patch.level != self._level:
            return np.zeros(len(rows), bool)
        try:
            self._check_hooks(patch)
            patch.overrides[0].check({"input_ids": torch.from_numpy(rows[0])[None]})
        except Unservable as reason:
            patch.fallbacks[str(reason)] += 1
            return np.zeros(len(rows), bool)
        return np.array([row.size < patch.position_limit for row in rows])

    def _check_hooks(self, patch: patching.Patch) -> None:
        """Hooks around the model may change its scores, and run with its own forward alone."""
        around = [self.model]
        for module in around:
            if module._forward_hooks or module._forward_pre_hooks:
                raise Unservable("forward hooks on the model or on what wraps it")
            if module is not patch.classifier:
                around += [m for m in module.children() if m is not patch.base]

    def _run_trie(
        self, rows: list[np.ndarray], which: np.ndarray, lengths: np.ndarray, raw: Tensor
    ) -> None:
        """Put into ``raw`` the scores of the rows ``which``, each node of their trie run once."""
        trie = pack([rows[i] for i in which])
        self.stats.nodes += len(trie)
        forward = self._patch.overrides[0]

        def launched(piece: pieces.Piece) -> None:
            done = which[piece.rows]
            self._ran(piece.stop - piece.start, done.size, int(lengths[done].sum()))

        scores = forward.by_piece(trie, True, self._budget, launched)
        raw[which] = scores[:, 0].cpu().double()

    def _run_padded(self, rows: list[np.ndarray], which: np.ndarray, raw: Tensor) -> None:
        """The same for rows that cannot run packed: sorted by length, or by shared prefixes."""
        self.stats.nodes += len(pack([rows[i] for i in which]))
        by_prefix = self._patch.level == "backbone"
        equal = alike({int(i): rows[i].tobytes() for i in which})
        pools = self._patch.classifier is not None or self._is_sharded()
        if self._pads_count is None and self._pad is not None and not pools:
            tried = sorted((rows[i] for i in equal), key=len)[:3]
            room = min(self._position_limit, models.positions(self.model) or self._position_limit)
            self._pads_count = pads_count(self.model, self._own_scores, tried, self._pad, room)
        by_prefix = by_prefix and not self._pads_count
        order = sorted(equal, key=lambda i: rows[i].tobytes() if by_prefix else -rows[i].size)
        left, found = order, []

        def run(batch: list[int]) -> Tensor:
            self._forget_long_rows()
            if rows[batch[0]].size >= self._position_limit:
                # a short row makes the model forget the rotary frequencies of longer ones
                self._padded_scores([rows[batch[0]][:1]])
            return self._padded_scores([rows[i] for i in batch])

        while left:
            batch = self._batch(rows, left)
            slots = len(batch) * max(rows[i].size for i in batch)
            scores = self._budget.attempt(run, batch, size=slots)
            if scores is None:
                continue
            found.append(scores.clone())  # a model may write the next ones to the same memory
            left = left[len(batch) :]
            slots = len(pack([rows[i] for i in batch])) if by_prefix else slots
            done = [rows[i].size for first in batch for i in equal[first]]
            self._ran(slots, len(done), sum(done))
        for i, score in zip(order, torch.cat(found).cpu().double(), strict=True):
            raw[equal[i]] = score

    def _forget_long_rows(self) -> None:
        for model, _ in self._patches:
            models.forget_long_rows(model)

    def _batch(self, rows: list[np.ndarray], left: list[int]) -> list[int]:
        """The next rows that fit into the budget when padded; at least one."""
        if self._pad is None:
            return left[:1]  # Hugging Face refuses to pad
        longest = 0
        for count, i in enumerate(left):
            longest = max(longest, rows[i].size)
            alone = longest >= self._position_limit  # the padded length changes the frequencies
            alone = alone or (self._pads_count and rows[i].size != longest)
            if count and (alone or (count + 1) * longest > self.max_tokens):
                return left[:count]
        return left

    def _padded_scores(self, rows: list[np.ndarray]) -> Tensor:  # [len(rows)]
        segments = any(row.max() >= SEGMENT for row in rows)
        return self._own_scores(inputs_of(rows, self._pad or 0, segments))

    def _own_scores(self, inputs: dict[str, Tensor]) -> Tensor:  # [B], where the model has them
        count = len(inputs["input_ids"])
        there = moved(inputs.values(), self._device)
        logits = self.model(**dict(zip(inputs, there, strict=True))).logits
        if logits.shape not in ((count, 1), (count,)):
            raise ValueError(
                f"{type(self.model).__name__} gave logits {tuple(logits.shape)} for "
                f"{count} sequences: a reward model gives one score each"
            )
        return logits.reshape(-1)


PADS_COUNT = "the model's own code reads what pads a batch, which changes its scores"


def pads_count(
    model: nn.Module,
    score: Callable[[dict[str, Tensor]], Tensor],
    rows: list[np.ndarray],
    pad: int,
    room: float,
) -> bool | None:
    """Whether rows that are padded have other scores, beyond what rounding can be.

    Args:
        score: the model's scores of padded inputs.
        rows: some short ones.
        room: the most tokens of a row.

    Returns:
        None where they cannot be padded.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        rounding = 0.25  # activations may be, by the largest of a batch
    segments = any(row.max() >= SEGMENT for row in rows)
    alone = torch.cat([score(inputs_of([row], pad, segments)) for row in rows]).cpu().double()
    inputs = inputs_of(rows, pad, segments)
    longest = inputs["input_ids"].shape[1]
    more = max(0, min(longest, room - 1 - longest))
    if not more and all(row.size == longest for row in rows):
        return None
    values = {name: pad if name == "input_ids" else 0 for name in inputs}
    padded = score({name: F.pad(x, (0, more), value=values[name]) for name, x in inputs.items()})
    return not bool((padded.cpu().double() - alone).abs().max() <= rounding * alone.abs().max())


def alike(keys: Mapping[int, Hashable]) -> dict[int, list[int]]:
    """Rows of equal keys, by the first of them: in two places they might be rounded differently."""
    found: dict[Hashable, list[int]] = {}
    for row, key in keys.items():
        found.setdefault(key, []).append(row)
    return {rows[0]: rows for rows in found.values()}


def _normalization(config: Any) -> tuple[float, float]:
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)
    if mean is None or not std:
        raise ValueError(
            "normalize: the model's config has no mean and std (OpenRLHF stores them there): set "
            "config.mean and config.std, or leave it off"
        )
    return float(mean), float(std)
