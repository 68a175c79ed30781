"""The reward that a policy trained by preference optimisation implies.

r(x, y) = β · (log π(y|x) − log π_ref(y|x)), Rafailov et al. 2023, arXiv 2305.18290, eq. 5 without
the term that depends on x alone: differences of rewards of one prompt are exact, and so is which
answer wins. Both models run on one packed token trie, and the language head on those of its nodes
that an answer's token follows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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


_LOGITS = 1 << 25  # that are there at once: 128 MB in fp32


class Answer(NamedTuple):
    """A sequence of which the tokens from ``start`` on are the answer; the first one never is."""

    ids: np.ndarray  # int32 [size]
    start: int

    @property
    def size(self) -> int:
        return self.ids.size


class ImplicitScorer(Scorer):
    """Scores conversations by how much more likely a policy finds an answer than its reference.

    Rows, windows and options are a :class:`rmfast.Scorer`'s. The prompt of a (prompt, response)
    tuple ends where the chat template would have the model go on. Of other conversations it is what
    all those of a row begin with: what they share adds the same to each of their rewards, so
    :meth:`score` gives 0 for what has nothing to be compared with.

    ``stats`` counts what the policy runs; the reference runs the same.

    Args:
        model: the policy, a causal language model; patched in place.
        reference: the model it was trained from, of the same tokens; patched in place. Several
            scorers may share it, also in several threads.
        tokenizer: of both.
        beta: β, as in training; above 0.
        options: ``max_tokens``, ``max_length``, ``on_overlong``, ``system_prompt``,
            ``chat_template``, ``chat``, ``window``, ``attention``, ``compile``, ``progress``. Not
            given, ``max_tokens`` is the lower limit of the two that the models were patched with.

    Raises:
        ValueError: options of a reward model's, a model without a language head, or ``beta``.
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
        check_beta(beta)  # now, not after a window has run
        for name in ("pooling", "normalize", "sigmoid"):
            if name in options:
                raise ValueError(f"{name} belongs to a reward model's score, not to a policy's")
        self.reference = reference
        super().__init__(model, tokenizer, **options)
        given = {name: options.get(name) for name in ("attention", "compile")}
        patch = patching.repatch(reference, **given)
        self._patches.append((reference, patch))
        if options.get("max_tokens") is None and patch.options.max_tokens:
            least = min(self.max_tokens, patch.options.max_tokens)
            self._budget = dataclasses.replace(self._budget, tokens=least)
        self.beta = beta
        rows = [m.get_input_embeddings().num_embeddings for m in (model, reference)]
        self.encoder.vocabulary = min(rows)
        if options.get("max_length") is None:
            limits = [self.encoder.max_length, _longest(reference)]
            self.encoder.max_length = min((x for x in limits if x is not None), default=None)
        same = {name: getattr(self.encoder, name) for name in ("system_prompt", "chat")}
        self._uncut = Encoder(tokenizer, chat_template=options.get("chat_template"), **same)

    def _is_sharded(self) -> bool:
        return super()._is_sharded() or models.is_sharded(self.reference)

    def _check_hooks(self, patch: patching.Patch) -> None:
        """None are passed over: logits come from the model's own forward."""

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
        kept = self.encoder(whole)
        try:
            prompts = self._prompts(row)
        except RowError as error:
            return error
        shared = min(_common(whole[0], other) for other in whole)
        begins = [
            shared if prompt is None else _common(prompt, ids)
            for prompt, ids in zip(prompts, whole, strict=True)
        ]
        return first_error(kept) or [
            Answer(ids, max(1, ids.size - (uncut.size - begin)))
            for ids, uncut, begin in zip(kept, whole, begins, strict=True)
        ]

    def _prompts(self, row: list) -> list[np.ndarray | None]:
        """Token ids of prompts that stand by themselves; the same one once."""
        out: list[np.ndarray | None] = []
        before = ids = None
        for conversation in row:
            prompt = _prompt(conversation)
            if prompt is not None and prompt != before:
                before, ids = prompt, self._uncut.prompt(prompt)
            out.append(None if prompt is None else ids)
        return out

    # --- likelihoods

    def _scores(self, rows: list[Answer]) -> np.ndarray:  # fp32 [len(rows)]
        self._count(rows)
        ids = [row.ids for row in rows]
        likelihoods = np.zeros((2, len(rows)))
        for model, out in zip((self.model, self.reference), likelihoods, strict=True):
            with evaluating(model):
                packed = self._packed(ids, patching.attached(model))
                for which, run in (
                    (np.flatnonzero(packed), self._run_trie),
                    (np.flatnonzero(~packed), self._run_padded),
                ):
                    if which.size:
                        out[which] = run(model, [rows[i] for i in which])
        return implicit_reward(*torch.from_numpy(likelihoods), self.beta).float().numpy()

    def _run_trie(self, model: nn.Module, rows: list[Answer]) -> np.ndarray:  # fp64 [len(rows)]
        """Log-likelihoods of the answers, each node of their trie run once."""
        trie = pack([row.ids for row in rows])
        paths = trie.paths()
        parent, child = _edges(trie, rows, paths)
        tokens = trie.input_ids.numpy()[child]
        gain = np.zeros(len(trie))
        lengths = np.array([row.size for row in rows])
        first = model is self.model
        if first:
            self.stats.nodes += len(trie)

        def take(piece: pieces.Piece, hidden: Tensor) -> None:
            here = slice(*np.searchsorted(parent, [piece.start, piece.stop]))
            if here.stop > here.start:
                row = parent[here] - piece.start
                gain[child[here]] = _log_probs(model, hidden, row, tokens[here])
            if first:
                done = int(lengths[piece.rows].sum())
                self._ran(piece.stop - piece.start, len(piece.rows), done)

        forward = patching.attached(model).overrides[0]
        forward.run_pieces(trie, take, self._budget, prune=False)
        return np.array(
            [gain[path[row.start :]].sum() for path, row in zip(paths, rows, strict=True)]
        )

    def _run_padded(self, model: nn.Module, rows: list[Answer]) -> np.ndarray:  # fp64 [len(rows)]
        """The same by the model's own forward, for what cannot run packed."""
        first = model is self.model
        if first:
            self.stats.nodes += len(pack([row.ids for row in rows]))
        out = np.zeros(len(rows))
        equal = alike({i: (row.ids.tobytes(), row.start) for i, row in enumerate(rows)})
        left = sorted(equal, key=lambda i: -rows[i].size)
        fit = max(1, _LOGITS // model.get_input_embeddings().num_embeddings)
        limit = models.position_limit(model.config.get_text_config())

        def run(batch: list[int], alone: bool) -> np.ndarray:
            if alone:  # a short one makes it forget the rotary frequencies of longer ones
                self._padded_log_probs(model, [Answer(rows[batch[0]].ids[:2], 1)])
            return self._padded_log_probs(model, [rows[i] for i in batch])

        while left:
            longest = rows[left[0]].size
            alone = longest >= limit  # what is padded to would count
            batch = left[: 1 if alone else max(1, min(self.max_tokens, fit) // longest)]
            likelihoods = self._budget.attempt(run, batch, alone, size=len(batch) * longest)
            if likelihoods is None:
                continue
            left = left[len(batch) :]
            for i, likelihood in zip(batch, likelihoods, strict=True):
                out[equal[i]] = likelihood
            if first:
                done = [rows[i].size for one in batch for i in equal[one]]
                self._ran(len(batch) * longest, len(done), sum(done))
        return out

    def _padded_log_probs(self, model: nn.Module, rows: list[Answer]) -> np.ndarray:
        ids = torch.zeros(len(rows), rows[0].size, dtype=torch.int64)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : row.size] = torch.from_numpy(row.ids)
            mask[i, : row.size] = 1
            answer[i, row.start : row.size] = True
        ids, mask = (x.to(models.device(model)) for x in (ids, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logits = logits.to(reference.wide(logits.dtype)).log_softmax(-1)
        gain = logits.gather(-1, ids[:, 1:, None])[..., 0].cpu().double()
        return gain.where(answer[:, 1:], 0).sum(1).numpy()


def _prompt(conversation: Any) -> str | list | None:
    """What stands before the response of a (prompt, response) tuple."""
    if not isinstance(conversation, tuple) or len(conversation) != 2:
        return None
    prompt, response = conversation
    if isinstance(prompt, (int, np.integer)):  # token ids
        return None
    if isinstance(response, list) and response[0]["role"] in ("system", "user"):
        return None  # the response is the whole conversation
    return prompt


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
    """Nodes whose next token's likelihood is asked for, rising, and the nodes of these tokens."""
    before = np.zeros(len(trie), np.int64)
    asked = np.zeros(len(trie), bool)
    for path, row in zip(paths, rows, strict=True):
        before[path[row.start :]] = path[row.start - 1 : -1]
        asked[path[row.start :]] = True
    child = np.flatnonzero(asked)
    order = np.argsort(before[child], kind="stable")
    return before[child][order], child[order]


def _log_probs(
    model: nn.Module,
    hidden: Tensor,  # [n, H]
    row: np.ndarray,  # int64 [E], rising
    token: np.ndarray,  # int64 [E]
) -> np.ndarray:  # fp64 [E]
    """Log-likelihood of each token after its row's; logits are made a slice of rows at a time."""
    used, place = np.unique(row, return_inverse=True)
    size = max(1, _LOGITS // model.get_input_embeddings().num_embeddings)
    out = np.empty(row.size)
    for first in range(0, used.size, size):
        here = slice(*np.searchsorted(place, [first, first + size]))
        index = torch.from_numpy(used[first : first + size]).to(hidden.device)
        logits = _logits(model, hidden.index_select(0, index))
        at = torch.from_numpy(place[here] - first).to(hidden.device)
        picked = logits[at, torch.from_numpy(token[here]).to(hidden.device)]
        out[here] = (picked - logits.logsumexp(-1)[at]).cpu().double().numpy()
    return out


def _logits(model: nn.Module, hidden: Tensor) -> Tensor:  # [S, H] -> [S, V]
    """What the model makes of its backbone's output: its own forward, with that put in."""
    output = _output_class()(last_hidden_state=hidden[None])
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with forward.giving(patching.attached(model).overrides[0], output):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits.to(reference.wide(logits.dtype))


@functools.cache
def _output_class() -> type:
    """A backbone's output, with None for what else a family's head may ask it for."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Output
