"""Token ids of conversations: messages, prompt and response, text, or token ids already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rmfast.data.records import Pair
from rmfast.data.values import Messages, as_messages, check_conversation
from rmfast.errors import DataError, RowError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Conversation = str | Messages | tuple[str | Messages, str | Messages] | Sequence[int] | Tensor
ON_OVERLONG = ("error", "skip", "truncate_left")


def read_template(path: str | None) -> str | None:
    """The chat template in a file, as ``--chat-template`` names it; None where nothing is named.

    Raises:
        UserError: there is no such file, or it is not text.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {path}: not a text file with a Jinja template (names of FastChat's "
            f"templates are not known here): {error}"
        ) from None


class Encoder:
    """Makes token ids of conversations, with at most one BOS each.

    Args:
        tokenizer: None where only token ids come.
        max_length: most tokens of a conversation; None: any number.
        on_overlong: what becomes of a longer one: ``"error"`` and ``"skip"`` make it a
            :class:`rmfast.data.RowError` of kind ``"overlong"``; ``"truncate_left"`` keeps the BOS,
            if it has one, and the last tokens.
        system_prompt: put before messages that have none.
        chat_template: Jinja template in place of the tokenizer's.
        chat: how a (prompt, response) pair of texts is read. None or True: as a user's and an
            assistant's turn. False: as plain text, one after the other.
        vocabulary: rows of the model's input embeddings, to refuse ids beyond them.

    Raises:
        ValueError: an unknown ``on_overlong``, or ``max_length`` below 1.
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
        vocabulary: int | None = None,
    ) -> None:
        if on_overlong not in ON_OVERLONG:
            raise ValueError(f"on_overlong must be one of {ON_OVERLONG}, got {on_overlong!r}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be 1 or more, or None, got {max_length}")
        self.tokenizer = tokenizer
        self.max_length, self.on_overlong = max_length, on_overlong
        self.system_prompt, self.chat, self.vocabulary = system_prompt, chat, vocabulary
        self.bos, self.adds_bos = None, False
        if tokenizer is not None:
            self.template = chat_template or tokenizer.chat_template
            self.bos = tokenizer.bos_token_id
            # to text; a template writes its own special tokens
            self.adds_bos = self.bos is not None and self.bos in self._ids(["a"], False)[0][:1]

    def __call__(self, conversations: Sequence[Conversation]) -> list[np.ndarray | RowError]:
        """int32 token ids of each conversation, or why it has none.

        Raises:
            DataError: a tokenizer or a chat template is needed and there is none.
        """
        encoded: list[Any] = []
        for conversation in conversations:
            try:
                encoded.append(self._prepare(conversation))
            except RowError as error:
                encoded.append(error)
        for templated in (False, True):
            text = {
                i: x[0] for i, x in enumerate(encoded) if isinstance(x, tuple) and x[1] is templated
            }
            for i, ids in zip(text, self._ids([*text.values()], templated), strict=True):
                encoded[i] = ids
        return [x if isinstance(x, RowError) else self._fit(x) for x in encoded]

    def text(self, conversation: Conversation) -> str:
        """What is tokenised of text or messages, or decoded from token ids.

        Raises:
            RowError: there is none.
            DataError: as for calls.
        """
        prepared = self._prepare(conversation)
        if isinstance(prepared, tuple):
            return prepared[0]
        self._need_tokenizer()
        return self.tokenizer.decode(prepared)

    def prompt(self, prompt: str | Messages) -> np.ndarray:
        """int32 token ids of a pair's prompt, up to where the response begins; nothing is cut.

        Raises:
            RowError, DataError: as above.
        """
        check_conversation("the prompt", prompt)
        if isinstance(prompt, str) and self.chat is False:
            text, templated = self._plain(prompt)
        else:
            text, templated = self._render(as_messages("user", prompt), add_generation_prompt=True)
        return self._ids([text], templated)[0]

    def pair(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Token ids of chosen and of rejected, text prompts put before text as it is.

        Raises:
            DataError: why not, with the place that the pair is from.
        """
        try:
            sides = self(pair.whole())
        except DataError as error:
            raise DataError(f"{pair.where}: {error}") from None
        for name, ids in zip(("chosen", "rejected"), sides, strict=True):
            if isinstance(ids, RowError):
                raise DataError(f'{pair.where}: "{name}": {ids.reason}')
        return sides[0].tolist(), sides[1].tolist()

    def _prepare(self, conversation: Any) -> tuple[str, bool] | np.ndarray:
        """Text and whether a template wrote it; or token ids."""
        if isinstance(conversation, str):
            return self._plain(conversation)
        if isinstance(conversation, tuple) and len(conversation) == 2:
            prompt, response = conversation
            if not isinstance(prompt, (int, np.integer)):
                return self._answered(prompt, response)
        if isinstance(conversation, list) and conversation and isinstance(conversation[0], dict):
            return self._render(conversation)
        return _token_ids(conversation)

    def _plain(self, text: str) -> tuple[str, bool]:
        check_conversation("the text", text)
        if self.system_prompt is not None:
            raise RowError("a system prompt goes with messages, and this is plain text")
        return text, False

    def _answered(self, prompt: Any, response: Any) -> tuple[str, bool]:
        check_conversation("the prompt", prompt)
        check_conversation("the response", response)
        if self.chat is False:
            if not (isinstance(prompt, str) and isinstance(response, str)):
                raise RowError("messages need the chat template: do not read them as plain text")
            return self._plain(prompt + response)
        prompt = as_messages("user", prompt)
        if isinstance(response, list) and (
            response[: len(prompt)] == prompt or response[0]["role"] in ("system", "user")
        ):
            return self._render(response)  # it is the whole conversation
        return self._render(prompt + as_messages("assistant", response))

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> tuple[str, bool]:
        check_conversation("the list of messages", messages)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        self._need_tokenizer()
        if not self.template:
            raise DataError(
                "the tokenizer has no chat template to make a text of messages: pass "
                "chat_template (--chat-template FILE), plain text, or chat=False (--plain) for "
                "prompts and responses that are text"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # whatever a template's own code raises
            raise RowError(f"the chat template refuses the messages: {error}") from None
        return text, True

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise DataError("text and messages need a tokenizer: pass one, or token ids")

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

    def _fit(self, ids: np.ndarray) -> np.ndarray | RowError:
        if not ids.size:
            return RowError("it has no tokens")
        if self.vocabulary is not None and (ids.min() < 0 or ids.max() >= self.vocabulary):
            wrong = ids[(ids < 0) | (ids >= self.vocabulary)][0]
            return RowError(f"token id {wrong}, and the model has embeddings for {self.vocabulary}")
        limit = self.max_length
        if limit is None or ids.size <= limit:
            return ids
        if self.on_overlong == "truncate_left":
            begins = int(self.bos is not None and ids[0] == self.bos and limit > 1)
            return np.concatenate([ids[:begins], ids[begins - limit :]])
        return RowError(
            f"{ids.size} tokens, more than max_length {limit}: raise that, or choose on_overlong "
            "'skip' or 'truncate_left'",
            "overlong",
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
