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
from rmfast.data.coats import read_conversation, unwrapped
from rmfast.data.values import Chat, is_whole
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
        answers = [(path, _start(rows[i])) for path, i in zip(trie.paths(), which, strict=True)]
        parent = np.full(len(trie), -1)  # of the nodes of answers
        for path, start in answers:
            parent[path[start:]] = path[start - 1 : -1]
        nodes = np.argsort(parent, kind="stable")[np.count_nonzero(parent < 0) :]
        rising, gain = parent[nodes], np.zeros(len(trie))
        found: dict[int, Tensor] = {}  # by where a piece begins, should one run again in parts

        def take(piece: pieces.Piece, hidden: Tensor) -> None:
            here = nodes[slice(*np.searchsorted(rising, [piece.start, piece.stop]))]
            before = torch.from_numpy(parent[here] - piece.start)
            found[piece.start] = _log_probs(self.model, hidden, before, trie.input_ids[here])
            done = lengths[which[piece.rows]]
            self._ran(piece.stop - piece.start, done.size, int(done.sum()))

        self._patch.overrides[0].run_pieces(trie, take, self._budget, prune=False)
        gain[nodes] = torch.cat([*found.values()]).cpu()  # nothing waits for a GPU before
        raw[which] = torch.tensor([gain[path[start:]].sum() for path, start in answers])

    def _padded_scores(self, rows: list[np.ndarray]) -> Tensor:  # fp64 [1]
        """The score of one row, by a call of the model."""
        start, ids = _start(rows[0]), torch.from_numpy(rows[0] % SEGMENT)
        ids = ids[None].long().to(self._device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        found = _picked(logits, torch.arange(len(logits)), ids[0, start:])
        return found.cpu().double().sum()[None]


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
        whole = kept
        if max(ids.size for ids in kept) == self.encoder.max_length:  # some may be cut
            encoder = self.encoder._uncounted()
            encoder.max_length = None
            whole = encoder(row)
        answers, known, shared = [], None, shared_length(whole)
        try:
            for prompt, uncut, ids in zip(map(_prompt, row), whole, kept, strict=True):
                if prompt is not None and prompt != known:  # it is tokenised once
                    known, before = prompt, self.encoder.prompt(*prompt)
                start = shared if prompt is None else shared_length([uncut, before])
                start = max(1, start - (uncut.size - ids.size))
                answers.append(np.append(ids[:start], ids[start:] + SEGMENT))
        except RowError as error:
            return error
        return answers


def _start(row: np.ndarray) -> int:
    """Where the answer of a row begins."""
    return np.count_nonzero(row < SEGMENT)


def _prompt(conversation: Any) -> tuple[str | list, Any] | None:
    """The prompt of a (prompt, response) tuple, and what its row gives the template; None: none."""
    given = None
    if isinstance(conversation, Chat):
        conversation, given = conversation.conversation, conversation.given
    if not isinstance(conversation, tuple) or len(conversation) != 2:
        return None
    prompt, response = conversation
    if isinstance(prompt, (int, np.integer)):
        return None  # token ids
    response = unwrapped("", read_conversation("the response", response), {})
    return None if isinstance(response, list) and is_whole(response) else (prompt, given)


def _log_probs(
    model: nn.Module,
    hidden: Tensor,  # [n, H]: the model's own forward gets it as its backbone's output
    before: Tensor,  # int64 [E], rising, on the CPU: the row that each token follows
    tokens: Tensor,  # int64 [E], on the CPU
) -> Tensor:  # [E]
    """Log-probabilities of tokens. Logits are made of some rows at a time."""
    found = [torch.zeros(0, device=hidden.device)]
    rows, place = before.unique_consecutive(return_inverse=True)
    count = max(1, _LOGITS // model.get_input_embeddings().num_embeddings)
    for first in range(0, len(rows), count):
        here = slice(*np.searchsorted(place.numpy(), [first, first + count]))
        parts = rows[first : first + count], place[here] - first, tokens[here]
        some, at, wanted = forward.sent(parts, hidden.device)
        output = _Output(last_hidden_state=hidden[some][None])
        with forward.giving(patching.attached(model).overrides[0], output):
            logits = model(input_ids=torch.zeros_like(some)[None], use_cache=False).logits[0]
        found.append(_picked(logits, at, wanted).to(hidden.device))
    return torch.cat(found)


def _picked(logits: Tensor, at: Tensor, tokens: Tensor) -> Tensor:  # [S, V], [E], [E] -> [E]
    """The log-probability of each token by the row ``at`` of the logits."""
    logits = logits.to(reference.wide(logits.dtype))
    at, tokens = at.to(logits.device), tokens.to(logits.device)
    return logits[at, tokens] - logits.logsumexp(-1)[at]


class _Output(BaseModelOutputWithPast):
    """A backbone's output, with None for what else a family's head may ask it for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
