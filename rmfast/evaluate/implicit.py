"""The reward that a policy trained by preference optimisation implies.

reward(x, y) = β · (log π(y|x) − log π_ref(y|x)): Rafailov et al. 2023, arXiv 2305.18290, equation 5
without the term of the prompt x, which cancels among answers to one prompt. Policy and reference
each run the packed trie, and their language head only where an answer's token follows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rmfast import reference
from rmfast.errors import RowError
from rmfast.losses import check_beta, implicit_reward
from rmfast.packed import forward, models, patching, pieces
from rmfast.score.scorer import Scorer, alike, evaluating
from rmfast.trie import pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOGITS = 1 << 25  # made at a time: 128 MB in fp32


class Answer(NamedTuple):
    """Tokens of a prompt and its answer."""

    ids: np.ndarray  # int32 [size]
    start: int  # of the answer, 1 or more

    @property
    def size(self) -> int:
        return self.ids.size


class LikelihoodScorer(Scorer):
    """Scores conversations by the log-likelihoods of their answers; a part of ImplicitScorer."""

    _level = "backbone"

    def _check_hooks(self, patch: patching.Patch) -> None:
        """Any hook may stay: logits come from the model's own forward."""

    @staticmethod
    def _check(model: nn.Module) -> None:
        if not models.can_generate(model):
            raise ValueError(
                f"{type(model).__name__} is no causal language model: an implicit reward needs two"
            )

    def _scores(self, rows: list[Answer]) -> np.ndarray:  # fp64 [len(rows)]
        self._count(rows)
        self.stats.nodes += len(pack([row.ids for row in rows]))
        found = np.zeros(len(rows))
        with evaluating(self.model):
            packed = self._packed([row.ids for row in rows])
            for run, which in ((self._run_packed, packed), (self._run_alone, ~packed)):
                if which.any():
                    found[which] = run([rows[i] for i in np.flatnonzero(which)])
        return found

    def _run_packed(self, rows: list[Answer]) -> list[float]:
        """Log-likelihoods of answers, each node of their trie run once."""
        trie = pack([row.ids for row in rows])
        paths = trie.paths()
        parent = np.full(len(trie), -1)  # of the nodes of answers
        for path, row in zip(paths, rows, strict=True):
            parent[path[row.start :]] = path[row.start - 1 : -1]
        nodes = np.argsort(parent, kind="stable")[np.count_nonzero(parent < 0) :]
        rising, gain = parent[nodes], np.zeros(len(trie))

        def take(piece: pieces.Piece, hidden: Tensor) -> None:
            here = nodes[slice(*np.searchsorted(rising, [piece.start, piece.stop]))]
            if here.size:
                before = torch.from_numpy(parent[here] - piece.start)
                gain[here] = _log_probs(self.model, hidden, before, trie.input_ids[here])
            done = [rows[i].size for i in piece.rows]
            self._ran(piece.stop - piece.start, len(done), sum(done))

        self._forward.run_pieces(trie, take, self._budget, prune=False)
        return [gain[path[row.start :]].sum() for path, row in zip(paths, rows, strict=True)]

    def _run_alone(self, rows: list[Answer]) -> np.ndarray:
        """Log-likelihoods of answers that cannot run packed, by a call of the model for each."""
        found = np.zeros(len(rows))
        keys = {i: (row.ids.tobytes(), row.start) for i, row in enumerate(rows)}
        for equal in alike(keys).values():
            row, one = rows[equal[0]], None
            while one is None:
                one = self._budget.attempt(_log_likelihood, self.model, row, size=row.size)
            found[equal] = one
            self._ran(row.size, len(equal), row.size * len(equal))
        return found


class ImplicitScorer(LikelihoodScorer):
    """Scores conversations by how much likelier a policy finds an answer than its reference does.

    It is called as :class:`rmfast.Scorer` is. The prompt of a (prompt, response) tuple ends where
    the chat template would have the model go on. The prompt of other conversations is what all
    conversations of their row begin with, so a row of one such conversation scores 0. ``stats``
    counts what the policy runs; the reference runs the same.

    Args:
        model: the policy, a causal language model; patched in place.
        reference: the model that the policy was trained from, with the same tokens; patched in
            place. Several scorers may share it, also in several threads.
        tokenizer: of both.
        beta: β of the training; above 0.
        options: ``max_tokens``, ``max_length``, ``on_overlong``, ``system_prompt``,
            ``chat_template``, ``chat``, ``window``, ``attention``, ``compile``, ``progress``. The
            default of ``max_tokens`` is the lower limit that the two models were patched with.

    Raises:
        ValueError: an option of reward models alone, a model without a language head, or a
            ``beta`` that is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        beta: float = 0.1,
        **options: Any,
    ) -> None:
        self._check(reference)
        check_beta(beta)
        for name in ("pooling", "normalize", "sigmoid"):
            if name in options:
                raise ValueError(f"{name} is an option of reward models: a policy has no such head")
        self.reference, self.beta = reference, beta
        super().__init__(model, tokenizer, **options)
        limited = options.get("max_tokens") is not None
        options["max_tokens"] = self.max_tokens
        self._other = other = LikelihoodScorer(reference, tokenizer, **options)
        self._patches += other._patches
        limit = other._patch.options.max_tokens
        if limit and not limited:
            self._budget.tokens = min(self.max_tokens, limit)
        other._budget = self._budget
        encoders = (self.encoder, other.encoder)
        self.encoder.vocabulary = min(encoder.vocabulary for encoder in encoders)
        limits = filter(None, (encoder.max_length for encoder in encoders))
        self.encoder.max_length = min(limits, default=None)

    def _is_sharded(self) -> bool:
        return super()._is_sharded() or models.is_sharded(self.reference)

    def _scores(self, rows: list[Answer]) -> np.ndarray:  # fp32 [len(rows)]
        both = super()._scores(rows), self._other._scores(rows)
        return implicit_reward(*map(torch.from_numpy, both), self.beta).float().numpy()

    def _encode(self, window: list[list | RowError]) -> list[list[Answer] | RowError]:
        encoded = zip(window, super()._encode(window), strict=True)
        return [x if isinstance(x, RowError) else self._answers(row, x) for row, x in encoded]

    def _answers(self, row: list, kept: list[np.ndarray]) -> list[Answer] | RowError:
        """The conversations of a row, of which ``kept`` are the tokens that fit."""
        whole = kept
        if max(ids.size for ids in kept) == self.encoder.max_length:  # some may be cut
            encoder = copy.copy(self.encoder)
            encoder.max_length = None
            whole = encoder(row)
        try:
            prompts = list(self._prompts(row))
        except RowError as error:
            return error
        answers, shared = [], _common(whole)
        for ids, uncut, prompt in zip(kept, whole, prompts, strict=True):
            start = shared if prompt is None else _common([uncut, prompt])
            answers.append(Answer(ids, max(1, start - (uncut.size - ids.size))))
        return answers

    def _prompts(self, row: list) -> Iterator[np.ndarray | None]:
        """Token ids of the prompts of (prompt, response) tuples, None for other conversations."""
        before = ids = None
        for conversation in row:
            prompt = _prompt(conversation)
            if prompt is not None and prompt != before:
                before, ids = prompt, self.encoder.prompt(prompt)
            yield None if prompt is None else ids


def _prompt(conversation: Any) -> str | list | None:
    """The prompt of a (prompt, response) tuple; None where it is not such a tuple."""
    if not isinstance(conversation, tuple) or len(conversation) != 2:
        return None
    prompt, response = conversation
    whole = isinstance(response, list) and response[0]["role"] in ("system", "user")
    token_ids = isinstance(prompt, (int, np.integer))
    return None if whole or token_ids else prompt


def _common(rows: list[np.ndarray]) -> int:
    """How many tokens all rows begin with."""
    least = min(row.size for row in rows)
    differ = [row[:least] != rows[0][:least] for row in rows]
    return int(np.append(np.any(differ, 0), True).argmax())


def _vocabulary(model: nn.Module) -> int:
    return model.get_input_embeddings().num_embeddings


def _log_probs(
    model: nn.Module,
    hidden: Tensor,  # [n, H]
    before: Tensor,  # int64 [E], rising, on the CPU: the row of hidden that each token follows
    tokens: Tensor,  # int64 [E], on the CPU
) -> Tensor:  # fp64 [E], on the CPU
    """Log-probability of each token. Logits are made of some rows at a time."""
    device, found = hidden.device, []
    used, place = before.unique_consecutive(return_inverse=True)
    for rows in used.split(max(1, _LOGITS // _vocabulary(model))):
        logits = _logits(model, hidden[rows.to(device)])
        here = (rows[0] <= before) & (before <= rows[-1])
        at = (place[here] - place[here][0]).to(device)
        picked = logits[at, tokens[here].to(device)] - logits.logsumexp(-1)[at]
        found.append(picked.cpu().double())
    return torch.cat(found)


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:  # [S, H] -> [S, V]
    """Logits by the model's own forward, which is given ``hidden`` as its backbone's output."""
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    output = _Output(last_hidden_state=hidden[None])
    with forward.giving(patching.attached(model).overrides[0], output):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits.to(reference.wide(logits.dtype))


class _Output(BaseModelOutputWithPast):
    """A backbone's output, with None for what else a family's head may ask it for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _log_likelihood(model: nn.Module, row: Answer) -> float:
    """Log-likelihood of one answer, by a call of the model."""
    ids = torch.from_numpy(row.ids[None]).long().to(models.device(model))
    if row.size >= models.position_limit(model.config.get_text_config()):
        model(input_ids=ids[:, :2], use_cache=False)  # forgets rotary frequencies of longer rows
    logits = model(input_ids=ids, use_cache=False).logits[0, row.start - 1 : -1]
    logits = logits.to(reference.wide(logits.dtype)).log_softmax(-1)
    return logits.gather(1, ids[0, row.start :, None]).cpu().double().sum().item()
