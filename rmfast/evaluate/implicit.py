"""The reward that a policy trained by preference optimisation implies.

reward(x, y) = β · (log π(y|x) − log π_ref(y|x)): Rafailov et al. 2023, arXiv 2305.18290, equation 5
without the term of the prompt x, which cancels among answers to one prompt. Policy and reference
each run the packed trie, and their language head only where an answer's token follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rmfast import reference
from rmfast.errors import RowError
from rmfast.losses import check_beta, implicit_reward
from rmfast.packed import forward, models, patching, pieces
from rmfast.packed.survey import is_sharded, walk
from rmfast.score.scorer import Scorer
from rmfast.trie import SEGMENT, pack, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGITS = 1 << 25  # made at a time: 128 MB in fp32


class LikelihoodScorer(Scorer):
    """Scores conversations by the log-likelihoods of their answers; a part of ImplicitScorer.

    In its rows, the tokens of an answer have ``SEGMENT`` added; there is one before them.
    """

    _level = "backbone"

    def _check_hooks(self, patch: patching.Patch) -> None:
        """Any hook may stay: logits come from the model's own forward."""

    @staticmethod
    def _check(model: nn.Module) -> None:
        if not models.can_generate(model):
            name = type(model).__name__
            raise ValueError(f"{name} is no causal language model: an implicit reward needs two")

    def _run_trie(
        self, rows: list[np.ndarray], which: np.ndarray, lengths: np.ndarray, raw: Tensor
    ) -> None:
        """Put into ``raw`` the scores of the rows ``which``, each node of their trie run once."""
        trie = pack([rows[i] % SEGMENT for i in which])
        self.stats.nodes += len(trie)
        answers, parent = [], np.full(len(trie), -1)
        for path, i in zip(trie.paths(), which, strict=True):
            answers.append(path[np.count_nonzero(rows[i] < SEGMENT) :])
            parent[answers[-1]] = path[-1 - len(answers[-1]) : -1]
        # that of logits: not all devices have fp64, and weights may be fp8
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        gain = torch.zeros(len(trie), dtype=dtype, device=self._device)
        stand_in, ids = self._patch.overrides[0], trie.input_ids.numpy()
        most = max(1, _LOGITS // self.model.get_input_embeddings().num_embeddings)

        def take(piece: pieces.Piece, hidden: Tensor) -> None:
            nodes = np.flatnonzero((piece.start <= parent) & (parent < piece.stop))
            before, at = np.unique(parent[nodes] - piece.start, return_inverse=True)
            places = np.stack([at % most, nodes, ids[nodes]])
            for first in range(0, len(before), most):
                parts = before[first : first + most], *places[:, at // most == first // most]
                some, row, node, token = forward.sent(map(torch.from_numpy, parts), hidden.device)
                with forward.giving(stand_in, _Output(last_hidden_state=hidden[some][None])):
                    found = self._log_probs(torch.zeros_like(some), row, token)
                gain[node.to(gain.device)] = found.to(gain)
            done = lengths[which[piece.rows]]
            self._ran(piece.stop - piece.start, done.size, int(done.sum()))

        stand_in.run_pieces(trie, take, self._budget, prune=False)
        gain = gain.cpu().double()  # nothing waits for a GPU before
        raw[which] = torch.stack([gain[nodes].sum() for nodes in answers])

    def _padded_scores(self, rows: list[np.ndarray]) -> Tensor:  # fp64 [1]
        """The score of one row, by a call of the model."""
        ids = torch.from_numpy(rows[0] % SEGMENT).to(self._device).long()
        start = np.count_nonzero(rows[0] < SEGMENT)
        at = torch.arange(len(ids) - start, device=self._device)
        return self._log_probs(ids, at, ids[start:], start - 1).cpu().double().sum()[None]

    def _log_probs(self, ids: Tensor, at: Tensor, tokens: Tensor, first: int = 0) -> Tensor:
        """The log-probability of each token by the row ``first + at`` of the logits of ``ids``."""
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, first:]
        logits = logits.to(at.device, reference.wide(logits.dtype))
        return logits[at, tokens] - logits.logsumexp(-1)[at]


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
            ``chat_template``, ``chat``, ``window``, ``attention``, ``progress``. The
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
        given, options["max_tokens"] = options.get("max_tokens"), self.max_tokens
        self._other = other = LikelihoodScorer(reference, tokenizer, **options)
        self._patches += other._patches
        limit = None if given else other._patch.options.max_tokens
        self._budget.tokens = min(filter(None, (self.max_tokens, limit)))
        other._budget = self._budget
        self._pad = other._pad = None  # what cannot run packed runs a row at a time
        for name in ("vocabulary", "max_length"):
            both = (getattr(x.encoder, name) for x in (self, other))
            setattr(self.encoder, name, min(filter(None, both), default=None))

    def _is_sharded(self) -> bool:
        return super()._is_sharded() or is_sharded(walk(self.reference))

    def _scores(self, rows: list[np.ndarray]) -> np.ndarray:  # fp32 [len(rows)]
        both = self._raw(rows), self._other._raw(rows)
        return implicit_reward(*map(torch.from_numpy, both), self.beta).float().numpy()

    def _encode(self, window: list[list | RowError]) -> list[list[np.ndarray] | RowError]:
        encoded = zip(window, super()._encode(window), strict=True)
        return [x if isinstance(x, RowError) else self._answers(row, x) for row, x in encoded]

    def _answers(self, row: list, kept: list[np.ndarray]) -> list[np.ndarray] | RowError:
        """The conversations of a row, of which ``kept`` are the tokens that fit."""
        may_be_cut = max(ids.size for ids in kept) == self.encoder.max_length
        whole = self.encoder.uncut()(row) if may_be_cut else kept
        answers, shared, known = [], shared_length(whole), []
        try:
            for conversation, uncut, ids in zip(row, whole, kept, strict=True):
                prompt = self.encoder.prompt(conversation, known)
                start = shared if prompt is None else shared_length([uncut, prompt])
                start = max(1, start - (uncut.size - ids.size))
                answers.append(np.append(ids[:start], ids[start:] + SEGMENT))
        except RowError as error:
            return error
        return answers


class _Output(BaseModelOutputWithPast):
    """A backbone's output, with None for what else a family's head may ask it for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
