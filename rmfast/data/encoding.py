"""Token ids of conversations: messages, prompt and response, text, or token ids already."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rmfast.data.coats import read_conversation, unwrapped
from rmfast.data.form import Form, digest
from rmfast.data.rendering import REASONED, Renderer
from rmfast.data.values import (
    TURN,
    Chat,
    Messages,
    Side,
    as_messages,
    begun,
    check_answer,
    dialogue,
    holds,
    is_whole,
)
from rmfast.errors import DataError, RowError, UserError
from rmfast.trie import SEGMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Conversation = str | Messages | tuple[str | Messages, str | Messages] | Sequence[int] | Tensor
_MOST_CHARACTERS = 64  # a token: what is longer is not tokenised whole to learn by how much
_PIECES = 256  # that a token may come to where a text is cut within it
_ENDED = (
    "text of preference pairs was given the end of text, as TRL trains, for the model does not say "
    "how it was trained (--no-end-of-text, end_of_text=False leaves text as it is)"
)
_TEMPLATED = (
    "text of preference pairs has special tokens already, and was taken as it is, without the end "
    "of text (--end-of-text, end_of_text=True puts it there)"
)
ON_OVERLONG = ("error", "skip", "truncate_left")


def read_template(path: str | None) -> str | None:
    """The chat template in a file, as ``--chat-template`` names it; None where nothing is named."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {path}: not a text file with a Jinja template (names of FastChat's "
            f"templates are not known here): {error}"
        ) from None


def counted(warnings: Mapping[str, int]) -> list[str]:
    """Warnings with the number of their conversations, for people."""
    return [f"{what}: {n:,} conversation{'s' * (n > 1)}" for what, n in warnings.items()]


class Encoder:
    """Makes token ids of conversations, with at most one BOS each.

    Options that are not told here are those of :class:`rmfast.Scorer`.

    Args:
        tokenizer: None where only token ids come.
        on_overlong: what becomes of a longer one: ``"error"`` and ``"skip"`` make it a
            :class:`rmfast.data.RowError` of kind ``"overlong"``; ``"truncate_left"`` keeps the BOS,
            if it has one, and the last tokens.
        segments: text of a prompt and its response are two segments, as encoders take them; ids of
            the second are returned plus :data:`rmfast.trie.SEGMENT`.
        form: how the model was trained.
        vocabulary: rows of the model's input embeddings, to refuse ids beyond them.

    Attributes:
        warnings: what is to know about conversations so far, and the number of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_length: int | None = None,
        on_overlong: str = "error",
        system_prompt: str | None = None,
        chat_template: str | None = None,
        chat: bool | None = None,
        end_of_text: bool | None = None,
        special_tokens: bool = False,
        segments: bool = False,
        form: Form | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if on_overlong not in ON_OVERLONG:
            raise ValueError(f"on_overlong must be one of {ON_OVERLONG}, got {on_overlong!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be 1 or more, or None, got {max_length}")
        self.tokenizer, self.form = tokenizer, form
        self.max_length, self.on_overlong = max_length, on_overlong
        self.system_prompt, self.vocabulary = system_prompt, vocabulary
        self.chat = form.chat if form and chat is None else chat
        self.end_of_text = form.ends if form and end_of_text is None else end_of_text
        self.render = Renderer(tokenizer, chat_template, special_tokens)
        self.warnings = self.render.warnings
        self.segments = segments and not self.render.source()
        self.first: set[int | None] = set()
        self.bos, self.adds_bos, self.special = None, False, []
        if tokenizer is not None:
            self.special = [str(x) for x in tokenizer.added_tokens_decoder.values() if x.special]
            self.bos = tokenizer.bos_token_id
            self.first = {self.bos, tokenizer.cls_token_id} - {None}
            # to text; a template writes its own special tokens
            self.adds_bos = self.bos is not None and self.bos in self._ids(["a"], False)[0][:1]

    def form_of_training(self) -> Form:
        """What a model that is trained on these tokens records."""
        template = self.render.source() if self.chat else None
        ends = bool(self.end_of_text and not self.chat and self.tokenizer.eos_token)
        return Form(
            self.chat, ends, self.adds_bos, digest(template), self.max_length, self.segments
        )

    def differences(self) -> list[str]:
        """Warnings about the tokenizer: it is another one than in the model's training."""
        if self.form is None or self.tokenizer is None:
            return []
        return list(self.form.differences(self.adds_bos, self.render.source()))

    def lost(self, conversations: Sequence[Any], ids: Sequence[np.ndarray]) -> RowError | None:
        """Why conversations cannot be compared: all have one text, without what tells them apart.

        Of several, only some of which are alike, a warning says that the template left out a part.
        """
        if len(ids) < 2 or len({row.tobytes() for row in ids}) > 1:
            return None
        texts = {str(conversation) for conversation in conversations}
        if len(texts) < 2 or not any(map(REASONED.search, texts)):
            return None
        return RowError(
            "the conversations have the same tokens: they differ in reasoning that the chat "
            "template leaves out"
        )

    def about(self) -> dict[str, Any]:
        """How conversations become tokens, for reports."""
        ends = "pairs" if self.end_of_text is None else self.end_of_text
        reads = {None: "prompt and response as turns", True: "as turns", False: "as it is"}
        return {
            "text": reads[self.chat],
            "end_of_text": ends,
            "bos": self.adds_bos,
            "max_length": self.max_length,
            "as_recorded_in_training": self.form is not None,
            "warnings": self.differences(),
        }

    def __call__(self, conversations: Sequence[Conversation]) -> list[np.ndarray | RowError]:
        """int32 token ids of each conversation, or why it has none.

        Raises:
            DataError: a tokenizer or a chat template is needed, and there is none.
        """
        encoded: list[Any] = []
        for conversation in conversations:
            try:
                prepared = self._prepare(conversation)
                if isinstance(prepared, tuple) and self._is_far_too_long(prepared[0]):
                    raise self._overlong("far too many")
                encoded.append(prepared)
            except RowError as error:
                encoded.append(error)
        for templated in (False, True):
            which = [i for i, x in enumerate(encoded) if isinstance(x, tuple) and x[1] is templated]
            texts = [encoded[i][0] for i in which]
            for i, ids in zip(which, self._ids(texts, templated), strict=True):
                encoded[i] = ids
        return [x if isinstance(x, RowError) else self._fit(x) for x in encoded]

    def text(self, conversation: Conversation) -> str:
        """What is tokenised of text or messages, or decoded from token ids; RowError: nothing."""
        prepared = self.uncut()._prepare(conversation)
        if isinstance(prepared, tuple):
            return prepared[0]
        self._need_tokenizer()
        return self.tokenizer.decode(prepared % SEGMENT if self.segments else prepared)

    def prompt(self, conversation: Conversation, known: list[tuple]) -> np.ndarray | None:
        """int32 token ids of a (prompt, response) tuple up to where the response begins, uncut.

        None for other conversations, and where the response holds its prompt. Prompts in ``known``
        are not tokenised again; a new one is added.
        """
        given: dict[str, Any] = {}
        pair = _pair(unwrapped("the conversation", conversation, given), given)
        if pair is None or (isinstance(pair[1], list) and is_whole(pair[1])):
            return None
        key = pair[0], dict(given)
        found = [ids for other, ids in known if other == key]
        if found:
            return found[0]
        if isinstance(pair[0], str) and self.chat is False:
            text, templated = pair[0], False
        else:
            text, templated = self.uncut()._render(self._turns(pair[0]), given, True)
        known.append((key, self._ids([text], templated)[0]))
        return known[-1][1]

    def uncut(self) -> Encoder:
        """The same with no limit, and warnings of its own: for what is looked at again."""
        other = copy.copy(self)
        other.max_length = None
        other.render = copy.copy(self.render)
        other.warnings = other.render.warnings = Counter()
        return other

    def _prepare(self, conversation: Any) -> tuple[str, bool] | np.ndarray:
        """Text and whether a template wrote it; or token ids."""
        given: dict[str, Any] = {}
        if isinstance(conversation, (str, Mapping, Chat)) or _has_turns(conversation):
            conversation = _uncoated("the conversation", conversation, given)
        pair = _pair(conversation, given)
        if pair is not None:
            return self._answered(*pair, given)
        if isinstance(conversation, list) and conversation and isinstance(conversation[0], dict):
            if self.segments and [x["role"] for x in conversation] == ["user", "assistant"]:
                return self._two(*(_only_text([x], x["role"]) for x in conversation), given)
            return self._render(conversation, given)
        if not isinstance(conversation, str):
            return _token_ids(conversation)
        if self.chat and TURN.match(conversation):
            return self._render(dialogue("the text", conversation), given)
        if self.form is not None and self.chat:
            self.warnings["text was scored as it is, and the model was trained on messages"] += 1
        return self._plain(conversation, given, isinstance(conversation, Side))

    def _plain(
        self, text: str, given: Mapping[str, Any], is_side: bool = False
    ) -> tuple[str, bool]:
        self._need_messages(given)
        if is_side if self.end_of_text is None else self.end_of_text:
            end = getattr(self.tokenizer, "eos_token", None) or ""
            if text.endswith(end):
                return text, False
            marks, bare = tuple(self.special), text.strip()
            if self.end_of_text is None and (bare.startswith(marks) or bare.endswith(marks)):
                self.warnings[_TEMPLATED] += 1
                return text, False
            if self.end_of_text is None:
                self.warnings[_ENDED] += 1
            text += end
        return text, False

    def _need_messages(self, given: Mapping[str, Any]) -> None:
        """Refuse for text what only a chat template can take."""
        if self.system_prompt is not None or given:
            name = "a system prompt" if self.system_prompt is not None else next(iter(given))
            raise RowError(f"{name} goes with messages, and this is plain text")

    def _turns(self, prompt: str | Messages) -> Messages:
        if self.chat and isinstance(prompt, str) and TURN.match(prompt):
            return begun("the prompt", prompt)
        return as_messages("user", prompt)

    def _answered(
        self, prompt: Any, response: Any, given: dict[str, Any]
    ) -> tuple[str, bool] | np.ndarray:
        if self.chat is False:
            if not (isinstance(prompt, str) and isinstance(response, str)):
                raise RowError("messages need the chat template: do not read them as plain text")
            if self.segments:
                return self._two(prompt, response, given)
            return self._plain(prompt + response, given, isinstance(response, Side))
        if self.segments:
            texts = (_only_text(x, role) for x, role in ((prompt, "user"), (response, "assistant")))
            return self._two(*texts, given)
        before, after = self._turns(prompt), as_messages("assistant", response)
        if isinstance(response, str) and before != as_messages("user", prompt):  # of a dialogue
            after = as_messages("assistant", response.strip())
        if isinstance(response, list) and (is_whole(response) or holds(response, before)):
            if not holds(response, prompt):
                raise RowError("the response is a whole conversation without the prompt")
            return self._render(response, given)
        check_answer("the response", response, before)
        return self._render(before + after, given)

    def _render(
        self, messages: Messages, given: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> tuple[str, bool]:
        if self.chat is False and self.form is not None:
            raise RowError(
                "messages, and the model was trained on text as it is: --chat (chat=True) scores "
                "them all the same"
            )
        if self.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        self._need_tokenizer()
        return self.render(messages, given, add_generation_prompt), True

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise DataError("text and messages need a tokenizer: pass one, or token ids")

    def _two(self, prompt: str, response: str, given: Mapping[str, Any]) -> np.ndarray:
        """int32 token ids of two segments, those of the second plus SEGMENT."""
        self._need_messages(given)
        both = self.tokenizer(prompt, response, verbose=False)
        types = both.get("token_type_ids", 0)  # a tokenizer may have none
        return np.array(both["input_ids"], np.int32) + SEGMENT * np.array(types, np.int32)

    def _ids(self, texts: list[str], templated: bool) -> list[np.ndarray]:
        """int32 token ids of texts, with one BOS each if the tokenizer puts one before text."""
        if not texts:
            return []
        self._need_tokenizer()
        rows = self.tokenizer(
            texts,
            add_special_tokens=not templated,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for i, tokens in enumerate(rows):
            while self.bos is not None and tokens[:2] == [self.bos, self.bos]:
                tokens = tokens[1:]
            if templated and self.adds_bos and tokens[:1] != [self.bos]:
                tokens = [self.bos, *tokens]
            rows[i] = np.array(tokens, np.int32)
        return rows

    def _is_far_too_long(self, text: str) -> bool:
        """Whether a beginning of the text shows that, so that the rest need not be tokenised."""
        if self.max_length is None or self.on_overlong == "truncate_left":
            return False
        beginning = text[: _MOST_CHARACTERS * (self.max_length + _PIECES)]
        if len(beginning) == len(text):
            return False
        return self._ids([beginning], True)[0].size > self.max_length + _PIECES

    def _fit(self, ids: np.ndarray) -> np.ndarray | RowError:
        if not ids.size:
            return RowError("it has no tokens")
        tokens = ids % SEGMENT if self.segments else ids
        if self.vocabulary is not None and tokens.max() >= self.vocabulary:
            wrong = tokens[tokens >= self.vocabulary][0]
            return RowError(f"token id {wrong}, and the model has embeddings for {self.vocabulary}")
        limit = self.max_length
        if limit is None or ids.size <= limit:
            return ids
        if self.on_overlong == "truncate_left" and ids.max() < SEGMENT:
            begins = int(ids[0] in self.first and limit > 1)
            return np.concatenate([ids[:begins], ids[begins - limit :]])
        return self._overlong(f"{ids.size}")

    def _overlong(self, tokens: str) -> RowError:
        return RowError(
            f"{tokens} tokens, more than max_length {self.max_length}: raise that, or choose "
            "on_overlong 'skip' or 'truncate_left'",
            "overlong",
        )


def _uncoated(name: str, value: Any, given: dict[str, Any]) -> Any:
    """A conversation without its coat, of which the rest is put into ``given``."""
    value = unwrapped(name, value, given)
    if isinstance(value, tuple):
        return value
    return unwrapped(name, read_conversation(name, value), given)


def _pair(value: Any, given: dict[str, Any]) -> tuple[Any, Any] | None:
    """A (prompt, response) tuple without coats; None: it is none, but two token ids perhaps."""
    if not isinstance(value, tuple) or len(value) != 2 or isinstance(value[0], (int, np.integer)):
        return None
    prompt = _uncoated("the prompt", value[0], given)
    return prompt, _uncoated("the response", value[1], given)


def _has_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], (Mapping, str))


def _only_text(value: str | Messages, role: str) -> str:
    """The text of one message of this role, or text."""
    if isinstance(value, str):
        return value
    if len(value) == 1 and value[0]["role"] == role and value[0].keys() <= {"role", "content"}:
        return value[0]["content"]
    raise RowError(
        "an encoder takes a prompt and a response as two texts, and these are several turns, or "
        "other than the user's and the assistant's: pass chat_template (--chat-template FILE)"
    )


def _token_ids(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.cpu()
    try:
        ids = np.asarray(value)
    except (ValueError, TypeError):
        ids = np.empty((0, 0))
    if ids.size == 0 and ids.ndim == 1:
        raise RowError("it is empty")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RowError(
            "a conversation is text, a list of messages, a (prompt, response) tuple or a list of "
            f"token ids, not {type(value).__name__}"
        )
    if ids.min() < 0 or ids.max() >= 2**31:
        wrong = int(ids[(ids < 0) | (ids >= 2**31)][0])
        raise RowError(f"token id {wrong} is not in 0 <= id < 2**31")
    return ids.astype(np.int32)
