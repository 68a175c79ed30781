"""The reward that a policy trained by preference optimisation implies.

reward(x, y) = β · (log π(y|x) − log π_ref(y|x)): Rafailov et al. 2023, arXiv 2305.18290, equation 5
without the term of the prompt x, which cancels among answers to one prompt. Policy and reference
each run the packed trie, and their language head only where an answer's token follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rmfast import reference
from rmfast.data.encoding import Encoder
from rmfast.errors import RowError
from rmfast.losses import check_beta, implicit_reward
from rmfast.packed import forward, models, patching, pieces
from rmfast.score.scorer import Scorer, alike, evaluating
from rmfast.score.windows import first_error
from rmfast.trie import PackedTrie, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOGITS = 1 << 25  # made at a time: 128 MB in fp32


class Answer(NamedTuple):
    """Tokens of a prompt and its answer, which begins at ``start``, 1 or more."""

    ids: np.ndarray  # int32 [size]
    start: int

    @property
    def size(self) -> int:
        return self.ids.size


class ImplicitScorer(Scorer):
    """Scores conversations by how much likelier a policy finds an answer than its reference does.

    Rows, windows and options are a :class:`rmfast.Scorer`'s. The prompt of a (prompt, response)
    tuple ends where the chat template would have the model go on. The prompt of other conversations
    is what all conversations of their row begin with, so a row of one such conversation scores 0.
    ``stats`` counts what the policy runs; the reference runs the same.

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

    _level = "backbone"

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
                raise ValueError(f"{name} is an option of reward models, and a policy has no head")
        self.reference, self.beta = reference, beta
        super().__init__(model, tokenizer, **options)
        given = {name: options.get(name) for name in ("attention", "compile")}
        patch = patching.repatch(reference, **given)
        self._patches.append((reference, patch))
        if options.get("max_tokens") is None and patch.options.max_tokens:
            self._budget.tokens = min(self.max_tokens, patch.options.max_tokens)
        self.encoder.vocabulary = min(map(_vocabulary, (model, reference)))
        if not options.get("max_length"):
            limits = filter(None, map(_longest, (model, reference)))
            self.encoder.max_length = min(limits, default=None)
        same = {name: getattr(self.encoder, name) for name in ("system_prompt", "chat")}
        self._uncut = Encoder(tokenizer, chat_template=options.get("chat_template"), **same)

    def _is_sharded(self) -> bool:
        return super()._is_sharded() or models.is_sharded(self.reference)

    def _check_hooks(self, patch: patching.Patch) -> None:
        """Any hook may stay: logits come from the model's own forward."""

    @staticmethod
    def _check(model: nn.Module) -> None:
        if not models.can_generate(model):
            raise ValueError(
                f"{type(model).__name__} is no causal language model: an implicit reward needs two"
            )

    # --- answers

    def _encode(self, window: list[list | RowError]) -> list[list[Answer] | RowError]:
        flat = [c for row in window if isinstance(row, list) for c in row]
        encoded = iter(self._uncut(flat))
        out: list[list[Answer] | RowError] = []
        for row in window:
            if isinstance(row, list):
                whole = [next(encoded) for _ in row]
                row = first_error(whole) or self._answers(row, whole)
            out.append(row)
        return out

    def _answers(self, row: list, whole: list[np.ndarray]) -> list[Answer] | RowError:
        """The answers of a row; ``whole`` has all tokens of its conversations."""
        kept = self.encoder(whole)
        shared = min(_common(whole[0], other) for other in whole)
        try:
            starts = [
                shared if prompt is None else _common(prompt, ids)
                for prompt, ids in zip(self._prompts(row), whole, strict=True)
            ]
        except RowError as error:
            return error
        return first_error(kept) or [
            Answer(ids, max(1, start - (uncut.size - ids.size)))
            for ids, uncut, start in zip(kept, whole, starts, strict=True)
        ]

    def _prompts(self, row: list) -> Iterator[np.ndarray | None]:
        """Token ids of the prompt of each (prompt, response) tuple, None for the others."""
        before = ids = None
        for conversation in row:
            prompt = _prompt(conversation)
            if prompt is not None and prompt != before:
                before, ids = prompt, self._uncut.prompt(prompt)
            yield None if prompt is None else ids

    # --- likelihoods

    def _scores(self, rows: list[Answer]) -> np.ndarray:  # fp32 [len(rows)]
        self._count(rows)
        both = [self._log_likelihoods(model, rows) for model in (self.model, self.reference)]
        return implicit_reward(*map(torch.from_numpy, both), self.beta).float().numpy()

    def _log_likelihoods(self, model: nn.Module, rows: list[Answer]) -> np.ndarray:  # fp64 [B]
        total = np.zeros(len(rows))
        with evaluating(model):
            packed = self._packed([row.ids for row in rows], patching.attached(model))
            for run, which in ((self._run_packed, packed), (self._run_padded, ~packed)):
                if which.any():
                    some = [rows[i] for i in np.flatnonzero(which)]
                    trie = pack([row.ids for row in some])
                    if model is self.model:
                        self.stats.nodes += len(trie)
                    total[which] = run(model, some, trie)
        return total

    def _run_packed(self, model: nn.Module, rows: list[Answer], trie: PackedTrie) -> list[float]:
        """Log-likelihoods of the answers, each node of their trie run once."""
        paths = trie.paths()
        parent, child = _edges(trie, rows, paths)
        token = trie.input_ids[child]
        gain = np.zeros(len(trie))

        def take(piece: pieces.Piece, hidden: Tensor) -> None:
            here = slice(*np.searchsorted(parent, [piece.start, piece.stop]))
            if here.stop > here.start:
                row = torch.from_numpy(parent[here] - piece.start)
                gain[child[here]] = _log_probs(model, hidden, row, token[here])
            self._tell(model, piece.stop - piece.start, [rows[i] for i in piece.rows])

        stand_in = patching.attached(model).overrides[0]
        pieces.run(stand_in, trie, self._budget, take, prune=False)
        return [gain[path[row.start :]].sum() for path, row in zip(paths, rows, strict=True)]

    def _run_padded(self, model: nn.Module, rows: list[Answer], trie: PackedTrie) -> list[float]:
        """The same by the model's own forward, for what cannot run packed."""
        total = np.zeros(len(rows))
        equal = alike({i: (row.ids.tobytes(), row.start) for i, row in enumerate(rows)})
        left = sorted(equal, key=lambda i: -rows[i].size)
        limit = models.position_limit(model.config.get_text_config())
        while left:
            longest = rows[left[0]].size
            fit = min(self.max_tokens, max(1, _LOGITS // _vocabulary(model))) // longest
            batch = left[: max(1, fit) if longest < limit else 1]
            some, slots = [rows[i] for i in batch], len(batch) * longest
            found = self._budget.attempt(_padded_log_probs, model, some, size=slots)
            if found is None:
                continue
            left = left[len(batch) :]
            for i, log_likelihood in zip(batch, found, strict=True):
                total[equal[i]] = log_likelihood
            self._tell(model, slots, [rows[i] for first in batch for i in equal[first]])
        return total

    def _tell(self, model: nn.Module, run: int, rows: list[Answer]) -> None:
        """Count a micro-batch of ``run`` tokens that finished some rows of the policy's."""
        if model is self.model:
            self._ran(run, len(rows), sum(row.size for row in rows))


def _prompt(conversation: Any) -> str | list | None:
    """What stands before the response of a (prompt, response) tuple; None: nothing does."""
    if not isinstance(conversation, tuple) or len(conversation) != 2:
        return None
    prompt, response = conversation
    if isinstance(prompt, (int, np.integer)):  # token ids
        return None
    if isinstance(response, list) and response[0]["role"] in ("system", "user"):
        return None  # the response is the whole conversation
    return prompt


def _vocabulary(model: nn.Module) -> int:
    return model.get_input_embeddings().num_embeddings


def _longest(model: nn.Module) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    least = min(left.size, right.size)
    differ = np.flatnonzero(left[:least] != right[:least])
    return int(differ[0]) if differ.size else least


def _edges(
    trie: PackedTrie, rows: list[Answer], paths: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:  # int64 [E], int64 [E]
    """The nodes before the answers' tokens, rising, and the nodes of these tokens."""
    before = np.full(len(trie), -1)
    for path, row in zip(paths, rows, strict=True):
        before[path[row.start :]] = path[row.start - 1 : -1]
    child = np.flatnonzero(before >= 0)
    child = child[np.argsort(before[child], kind="stable")]
    return before[child], child


def _log_probs(
    model: nn.Module,
    hidden: Tensor,  # [n, H]
    row: Tensor,  # int64 [E], on the CPU, rising: the row of hidden before each token
    token: Tensor,  # int64 [E], on the CPU
) -> Tensor:  # fp64 [E], on the CPU
    """Log-likelihood of each token; the logits of some rows are made at a time."""
    used, place = row.unique_consecutive(return_inverse=True)
    size = max(1, _LOGITS // _vocabulary(model))
    found = []
    for first in range(0, used.numel(), size):
        here = (first <= place) & (place < first + size)
        logits = _logits(model, hidden[used[first : first + size].to(hidden.device)])
        at, wanted = (x.to(hidden.device) for x in (place[here] - first, token[here]))
        found.append((logits[at, wanted] - logits.logsumexp(-1)[at]).cpu().double())
    return torch.cat(found)


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:  # [S, H] -> [S, V]
    """What the model's own forward makes of its backbone's output, which is put in."""
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


def _padded_log_probs(model: nn.Module, rows: list[Answer]) -> list[float]:
    """Log-likelihoods of answers, the longest first, in one call of the model."""
    device = models.device(model)
    if rows[0].size >= models.position_limit(model.config.get_text_config()):
        # a short call: it makes the model forget the rotary frequencies of longer rows
        model(input_ids=torch.from_numpy(rows[0].ids[None, :2]).to(device), use_cache=False)
    ids, mask = (x.to(device) for x in _pad([row.ids for row in rows]))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logits = logits.to(reference.wide(logits.dtype)).log_softmax(-1)
    gain = logits.gather(-1, ids[:, 1:, None])[..., 0].cpu().double().numpy()
    return [gain[i, row.start - 1 : row.size - 1].sum() for i, row in enumerate(rows)]


def _pad(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:  # int64 [B, T], int64 [B, T]
    """Token ids padded on the right, and their attention mask."""
    ids = [torch.from_numpy(row).long() for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return nn.utils.rnn.pad_sequence(ids, True), nn.utils.rnn.pad_sequence(mask, True)
