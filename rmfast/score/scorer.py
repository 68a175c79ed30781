"""Scoring in bulk: any number of conversations in, fp32 rewards out, no shared prefix run twice.

Conversations are read and tokenised in a background thread, a window ahead. The conversations of a
window become one token trie, which runs in micro-batches of so many trie nodes; what one of them
has of a prefix that goes on in the next is carried over (:mod:`rmfast.packed.pieces`).
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rmfast.data.encoding import Conversation, Encoder
from rmfast.data.records import Pair
from rmfast.data.rows import RowReader
from rmfast.errors import DataError, RowError
from rmfast.packed import models, patching, pieces
from rmfast.packed.models import keeping_modes
from rmfast.packed.stand_in import Unservable
from rmfast.score.memory import _most_tokens
from rmfast.score.windows import Scored, Stats, _ahead, first_error, gathered
from rmfast.trie import pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PADDED = 16  # sequences in the padded batches that `padded_slots` supposes


class Scorer:
    """Scores conversations with a reward model, in bulk.

    A conversation is text, a list of messages ``{"role", "content"}``, a (prompt, response) tuple
    or a list of token ids. The chat template is applied once, and a sequence has one BOS at most.
    Threads may use one scorer, or several of one model: a window of conversations runs at a time.

    Args:
        model: a reward model; patched in place, as by :func:`rmfast.patch`. One that is patched
            already keeps its options, but for those given here.
        tokenizer: its tokenizer; None where only token ids come.
        max_tokens: trie nodes (distinct prefixes) a micro-batch. When not given, the limit that the
            model was patched with; where that has none, or 0, what the device's memory holds is
            looked for. What is given here leaves the limit of other calls as it is. Halved when
            memory runs out all the same, and doubled again, up to there, after a while. Where
            processes share the parts of a model, they must run as many micro-batches: memory is
            not looked at then, and nothing is halved.
        max_length: most tokens of a conversation; the model's own limit when not given.
        on_overlong: ``"error"``, ``"skip"`` (the score is NaN), or ``"truncate_left"``: the BOS
            and the last tokens are scored.
        pooling: as for :func:`rmfast.patch`; None: as the model was patched, ``"hf"`` if it was
            not.
        system_prompt: put before messages that have none.
        chat_template: Jinja template in place of the tokenizer's.
        chat: how (prompt, response) texts are read: as turns of a chat, or with ``False`` as plain
            text, one after the other.
        window: conversations that are looked at together: prefixes meet within a window.
        normalize: ``(score - config.mean) / config.std``, as OpenRLHF stores them.
        sigmoid: ``1 / (1 + exp(-score))``, after ``normalize``.
        attention: as for :func:`rmfast.patch`; None: as the model was patched, ``"auto"`` if it was
            not.
        compile: likewise; ``False`` if it was not.
        progress: show a bar; or a function that is called with the conversations and the tokens
            each micro-batch finished.

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
        window: int = 1024,
        normalize: bool = False,
        sigmoid: bool = False,
        attention: str | None = None,
        compile: bool | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        config = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._check(model)
        self._mean, self._std = _normalization(config) if normalize else (0.0, 1.0)
        self._sigmoid = sigmoid
        self.model = model
        self._patch = patching.repatch(model, pooling=pooling, attention=attention, compile=compile)
        self._patches = [(model, self._patch)]
        self._pad = getattr(text, "pad_token_id", None)
        self._position_limit = models.position_limit(text)
        self._pooling = self._patch.options.pooling
        embeddings = (
            model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        )
        self.encoder = Encoder(
            tokenizer,
            max_length=max_length or getattr(text, "max_position_embeddings", None),
            on_overlong=on_overlong,
            system_prompt=system_prompt,
            chat_template=chat_template,
            chat=chat,
            vocabulary=getattr(embeddings, "num_embeddings", None),
        )
        self.window = window
        self.stats = Stats()
        self._progress = progress
        self._told: bool | Callable[[int, int], None] = False  # of the window that runs
        sharded = self._is_sharded()  # then all processes must run as many passes
        most = max_tokens or self._patch.options.max_tokens
        if not most:
            most = pieces.most(self._device) if sharded else _most_tokens(self._device, self._probe)
        self._budget = pieces.Budget(most, fixed=sharded)

    def _is_sharded(self) -> bool:
        return models.is_sharded(self.model)

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

    # --- what people call

    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Scores of conversations, fp32 ``[n]``, in their order; NaN for those skipped.

        Raises:
            DataError: a conversation that cannot be scored; the message names it.
        """
        rows = ([conversation] for conversation in conversations)
        return self._table(rows, len(conversations), 1)[:, 0]

    def score_pairs(self, pairs: Sequence[Any]) -> np.ndarray:
        """Scores of preference pairs, fp32 ``[n, 2]``: chosen, rejected.

        Args:
            pairs: (chosen, rejected) tuples of conversations, ``{"chosen", "rejected"}`` with or
                without ``"prompt"``, or :class:`rmfast.data.Pair`.

        Raises:
            DataError: a pair that cannot be scored; the message names it.
        """
        return self._table(map(_sides, pairs), len(pairs), 2)

    def stream(self, conversations: Iterable[Conversation]) -> Iterator[float]:
        """Scores one by one, in order, for an iterable of any length; NaN for those skipped.

        Scores come a window at a time: the first when ``window`` conversations were read.

        Raises:
            DataError: a conversation that cannot be scored; those before it have been given out.
        """
        rows = ([conversation] for conversation in conversations)
        for scored in self._each(rows, None):
            yield float("nan") if scored is None else float(scored[0])

    def windows(self, rows: Iterable[Sequence[Conversation] | RowError]) -> Iterator[list[Scored]]:
        """Score rows of conversations that belong together, a window at a time.

        Args:
            rows: each some conversations, or the reason why a row could not be read, which is
                handed on. They are read in a background thread, a window ahead.

        Yields:
            The rows of a window, in input order. A window ends when it holds ``window``
            conversations or more (a row without one counts as one), so where it ends depends on
            the rows alone.

        Raises:
            DataError: messages without a chat template, or text without a tokenizer.
            MemoryError: not even a few tokens fit.
            RuntimeError: somebody unpatched the model, or patched it anew.
        """
        return self._windows(rows, self._progress)

    def about(self) -> dict[str, Any]:
        """What runs: dtype, device, and what :func:`rmfast.report` says of the model."""
        report = self._patch.report()
        dtype = next(self.model.parameters()).dtype
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(self._device),
            "level": report.level,
            "reasons": report.reasons,
            "warnings": report.warnings,
            "fallbacks": dict(report.fallbacks),
        }

    # --- rows

    def _windows(
        self, rows: Iterable, progress: bool | Callable[[int, int], None]
    ) -> Iterator[list[Scored]]:
        with contextlib.closing(_ahead(self._encoded(rows))) as encoded:
            for window in encoded:
                with _alone(self):
                    if any(patching.attached(model) is not patch for model, patch in self._patches):
                        raise RuntimeError(
                            "a model was unpatched or patched anew since this Scorer was made: "
                            "make another one"
                        )
                    start = time.perf_counter()
                    self._told = progress
                    out = self._scored(window)
                    self.stats.seconds += time.perf_counter() - start
                yield out

    def _table(self, rows: Iterable, count: int, width: int) -> np.ndarray:  # fp32 [count, width]
        out = np.full((count, width), np.nan, np.float32)
        for i, scores in enumerate(self._each(rows, count)):
            if scores is not None:
                out[i] = scores
        return out

    def _each(self, rows: Iterable, count: int | None) -> Iterator[np.ndarray | None]:
        """A row's scores; None for one that is skipped."""
        at = 0
        with (
            self._bar(count) as progress,
            contextlib.closing(self._windows(rows, progress)) as windows,
        ):
            for window in windows:
                for one in window:
                    skip = self.encoder.on_overlong == "skip"
                    if one.error is not None and not (skip and one.error.kind == "overlong"):
                        raise DataError(f"row {at}: {one.error}")
                    yield one.scores
                    at += 1

    @contextlib.contextmanager
    def _bar(self, count: int | None) -> Iterator[bool | Callable[[int, int], None]]:
        if self._progress is not True:
            yield self._progress
            return
        from tqdm import tqdm

        with tqdm(total=count, desc="scoring", unit="row") as bar:
            yield lambda conversations, tokens: bar.update(conversations)

    def _encoded(self, rows: Iterable) -> Iterator[list[tuple[Any, int]]]:
        """Windows of rows: each a list of token ids, or the reason why it has none."""
        return map(self._encode, gathered(rows, self.window))

    def _encode(self, window: list[list | RowError]) -> list[list[np.ndarray] | RowError]:
        flat = iter(self.encoder([c for row in window if isinstance(row, list) for c in row]))
        out: list[list[np.ndarray] | RowError] = []
        for row in window:
            if isinstance(row, list):
                ids = [next(flat) for _ in row]
                row = first_error(ids) or ids
            out.append(row)
        return out

    def _scored(self, window: list[list[np.ndarray] | RowError]) -> list[Scored]:
        rows = [ids for row in window if isinstance(row, list) for ids in row]
        scores = iter(self._scores(rows) if rows else ())
        out = []
        for row in window:
            if isinstance(row, list):
                got = np.array([next(scores) for _ in row], np.float32)
                lengths = np.array([ids.size for ids in row])
                if np.isfinite(got).all():
                    out.append(Scored(got, lengths, None))
                    continue
                row = RowError(
                    f"its score is {got[~np.isfinite(got)][0]}: weights that are not finite, or "
                    "too large for their dtype (rmfast doctor tells)"
                )
            out.append(Scored(None, None, row))
        stats = self.stats
        stats.halvings = self._budget.halvings
        stats.rows += sum(one.error is None for one in out)
        stats.conversations += sum(len(one.scores) for one in out if one.error is None)
        overlong = sum(one.error is not None and one.error.kind == "overlong" for one in out)
        stats.overlong += overlong
        stats.errors += sum(one.error is not None for one in out) - overlong
        return out

    # --- sequences

    def _scores(self, rows: list[np.ndarray]) -> np.ndarray:  # fp32 [len(rows)]
        lengths = self._count(rows)
        rows = [row[: self._pooled(row) + 1] for row in rows]
        out = torch.full((len(rows),), float("nan"), dtype=torch.float64)
        packed = self._packed(rows)
        with evaluating(self.model):
            if packed.any():
                self._run_trie(rows, np.flatnonzero(packed), lengths, out)
            if not packed.all():
                self._run_padded(rows, np.flatnonzero(~packed), out)
        scores = (out.numpy() - self._mean) / self._std
        if self._sigmoid:
            scores = np.exp(-np.logaddexp(0, -scores))
        return scores.astype(np.float32)

    def _count(self, rows: Sequence[Any]) -> np.ndarray:  # int64 [len(rows)], their lengths
        lengths = np.array([row.size for row in rows])
        batches = np.add.reduceat(lengths * 0 + 1, np.arange(0, lengths.size, _PADDED))
        widths = np.maximum.reduceat(lengths, np.arange(0, lengths.size, _PADDED))
        self.stats.tokens += int(lengths.sum())
        self.stats.padded_slots += int((batches * widths).sum())
        return lengths

    def _pooled(self, row: np.ndarray) -> int:
        """The token that carries the score; what comes after it changes nothing in a decoder."""
        if self._patch.level == "head" or self._pooling == "mask" or self._pad is None:
            return row.size - 1
        counts = np.flatnonzero(row != self._pad)
        return int(counts[-1]) if counts.size else 0

    def _packed(
        self, rows: list[np.ndarray], patch: patching.Patch | None = None
    ) -> np.ndarray:  # bool [len(rows)]
        """Which rows can run in the trie."""
        patch = patch or self._patch
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
        inside = set(patch.classifier.modules()) - {patch.classifier}
        for module in self.model.modules():
            if module not in inside and (module._forward_hooks or module._forward_pre_hooks):
                raise Unservable("forward hooks on the model or on what wraps it")

    @property
    def _forward(self) -> Any:
        return self._patch.overrides[0]

    def _run_trie(
        self, rows: list[np.ndarray], which: np.ndarray, lengths: np.ndarray, out: Tensor
    ) -> None:
        trie = pack([rows[i] for i in which])
        self.stats.nodes += len(trie)

        def take(piece: pieces.Piece, hidden: Tensor) -> None:
            done = which[piece.rows]
            if done.size:
                # a node once: a matmul may round equal rows differently, and equal is a tie
                nodes, place = piece.trie.pool_index.unique(return_inverse=True)
                scores = self._forward.scores(hidden, nodes - piece.carried)
                out[done] = scores[place, 0].cpu().double()
            self._ran(piece.stop - piece.start, done.size, int(lengths[done].sum()))

        self._forward.run_pieces(trie, take, self._budget)

    def _run_padded(self, rows: list[np.ndarray], which: np.ndarray, out: Tensor) -> None:
        """What cannot run in pieces: by length, or so that prefixes meet in a batch."""
        self.stats.nodes += len(pack([rows[i] for i in which]))
        by_prefix = self._patch.level == "backbone"
        equal = alike({int(i): rows[i].tobytes() for i in which})
        left = sorted(equal, key=lambda i: rows[i].tobytes() if by_prefix else -rows[i].size)

        def run(batch: list[int]) -> Tensor:
            if rows[batch[0]].size >= self._position_limit:
                self._padded_scores([rows[batch[0]][:1]])  # forgets the frequencies of longer
            return self._padded_scores([rows[i] for i in batch])

        while left:
            batch = self._batch(rows, left)
            slots = len(batch) * max(rows[i].size for i in batch)
            scores = self._budget.attempt(run, batch, size=slots)
            if scores is None:
                continue
            for i, score in zip(batch, scores, strict=True):
                out[equal[i]] = score
            left = left[len(batch) :]
            slots = len(pack([rows[i] for i in batch])) if by_prefix else slots
            done = [rows[i].size for first in batch for i in equal[first]]
            self._ran(slots, len(done), sum(done))

    def _batch(self, rows: list[np.ndarray], left: list[int]) -> list[int]:
        """The next rows that fit into the budget when padded; at least one."""
        if self._pad is None:
            return left[:1]  # Hugging Face refuses to pad
        longest = 0
        for count, i in enumerate(left):
            longest = max(longest, rows[i].size)
            alone = longest >= self._position_limit  # what is padded to would count
            if count and (alone or (count + 1) * longest > self.max_tokens):
                return left[:count]
        return left

    def _padded_scores(self, rows: list[np.ndarray]) -> Tensor:  # fp64 [len(rows)]
        ids = torch.full((len(rows), max(row.size for row in rows)), self._pad or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : row.size] = torch.from_numpy(row)
            mask[i, : row.size] = 1
        inputs = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
        logits = self.model(**inputs).logits
        if logits.shape not in ((len(rows), 1), (len(rows),)):
            raise ValueError(
                f"{type(self.model).__name__} gave logits {tuple(logits.shape)} for "
                f"{len(rows)} sequences: a reward model gives one score each"
            )
        return logits.reshape(-1).cpu().double()

    def _ran(self, run: int, conversations: int, tokens: int) -> None:
        self.stats.micro_batches += 1
        self.stats.tokens_run += run
        if callable(self._told):
            self._told(conversations, tokens)

    def _probe(self, tokens: int) -> None:
        """One pass over so many tokens, for what it takes of memory."""
        length = min(tokens, self.encoder.max_length or tokens)
        draw = np.random.default_rng(0).integers
        size = (-(-tokens // length), length)
        rows = list(draw(self.encoder.vocabulary or 2, size=size, dtype=np.int32))
        with evaluating(self.model):
            if self._packed(rows).all():
                self._forward.run_pieces(pack(rows), lambda *_: None, pieces.Budget(tokens))
            elif self._pad is not None and self._level == "trie":
                self._padded_scores(rows)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients, then in the modes it was in.

    One thread at a time: these modes are the model's, and so are rotary frequencies that depend on
    what ran before.
    """
    with _alone(patching.attached(model) or model), keeping_modes(model):
        model.eval()
        with torch.inference_mode():
            yield


_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKING = threading.Lock()


def _alone(what: Any) -> threading.RLock:
    """The lock of a scorer or a model: as an attribute it could be neither copied nor pickled."""
    with _LOCKING:
        return _LOCKS.setdefault(what, threading.RLock())


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


def _is_text_or_messages(side: Any) -> bool:
    return isinstance(side, str) or (isinstance(side, list) and isinstance([*side, 0][0], dict))


def _sides(pair: Any) -> list[Conversation] | RowError:
    if isinstance(pair, Pair):
        pair = {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}
    if isinstance(pair, Mapping):
        sides = [pair.get("chosen"), pair.get("rejected")]
        if pair.get("prompt") is None and not any(map(_is_text_or_messages, sides)):
            return sides  # token ids
        try:
            return RowReader().read(pair, "pair").conversations
        except RowError as error:
            return error
    if len(pair) != 2:
        raise DataError(f"a pair has two sides, this one {len(pair)}")
    return list(pair)
