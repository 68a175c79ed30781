"""Text of messages by a chat template, and whether all that is to be scored is in it."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rmfast.data.values import Messages
from rmfast.errors import DataError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = {"system", "developer"}  # a template may write it into another turn
_REASONED = "</think>"  # templates leave out what comes before it
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of it
REASONED = re.compile(rf"</think>|'({'|'.join(_REASONING)})': ")  # in messages written out
_MOST = 1000  # kinds of conversations whose probes are kept
_OURS = {"tokenize", "add_generation_prompt", "chat_template", "conversation", "return_dict"}


class Renderer:
    """Applies a chat template.

    Args:
        template: Jinja template in place of the tokenizer's; of several that the tokenizer has,
            transformers chooses.
        special_tokens: let messages hold the special tokens that the template writes.

    Attributes:
        warnings: what the template left out or moved on purpose, and in how many conversations.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        template: str | None = None,
        special_tokens: bool = False,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.warnings: Counter[str] = Counter()
        self._takes_special = special_tokens
        self._special: dict[str, tuple[tuple[str, ...], str, str]] = {}  # by template
        self._probed: dict[Any, str] = {}

    def source(self, given: Mapping[str, Any] | None = None) -> str | None:
        """The template for conversations that come with these values; None: there is none."""
        if self.template or self.tokenizer is None or not self.tokenizer.chat_template:
            return self.template
        try:
            return self.tokenizer.get_chat_template(tools=(given or {}).get("tools"))
        except ValueError as error:  # several, and no default
            raise DataError(f"chat_template (--chat-template FILE) has to say: {error}") from None

    def __call__(
        self, messages: Messages, given: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> str:
        """Text of messages; ``given`` is what the template gets beside them, such as ``tools``.

        Raises:
            RowError: the template refuses them, or does not write all of them once and in order.
            DataError: there is no template, or none is chosen.
        """
        template = self.source(given)
        if not template:
            raise DataError(
                "the tokenizer has no chat template to make a text of messages: pass "
                "chat_template (--chat-template FILE), plain text, or chat=False (--no-chat) for "
                "prompts and responses that are text"
            )
        if wrong := _OURS.intersection(given):
            raise RowError(f'"{wrong.pop()}" is no variable of a chat template')
        self._refuse_special_tokens(messages, template)
        shapes = ((m["role"], bool(m.get("content")), *m) for m in messages)
        kind = (template, json.dumps(given, sort_keys=True, default=str), *shapes)
        try:
            text = self._apply(messages, given, add_generation_prompt)
            if kind not in self._probed:
                if len(self._probed) == _MOST:  # rows may each have documents of their own
                    self._probed.clear()
                self._probed[kind] = self._probe(messages, given)
        except Exception as error:  # whatever a template's own code raises
            raise RowError(f"the chat template refuses the messages: {error}") from None
        if self._probed[kind] not in ("", _MOVED):
            raise RowError(self._probed[kind])
        warnings = {_left_out(i, m, text) for i, m in enumerate(messages)} | {self._probed[kind]}
        warnings |= set(_unread(given, template))
        if messages[-1]["role"] == "user" and not add_generation_prompt:
            warnings.add("a conversation ends with what the user says, and has no answer")
        self.warnings.update(warnings - {""})
        return text

    def _apply(self, messages: Messages, given: Mapping[str, Any], prompt: bool = False) -> str:
        how = {"tokenize": False, "add_generation_prompt": prompt, "chat_template": self.template}
        return self.tokenizer.apply_chat_template(messages, **how, **given)

    def _probe(self, messages: Messages, given: Mapping[str, Any]) -> str:
        """What is wrong with the template for messages of these roles, or a warning.

        Empty: it writes each message once, in order.
        """
        marks = {i: f"turn-{i}-content" for i, m in enumerate(messages) if m.get("content")}
        marked = [{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)]
        calls = {}
        for i, message in enumerate(messages):
            if message.get("tool_calls"):
                marked[i], calls[i] = _with_marked_calls(marked[i], i)
        try:
            text = self._apply(marked, given)
            rest = {name: value for name, value in given.items() if name != "tools"}
            if given.get("tools") and text == self._apply(marked, rest):
                return 'the chat template leaves out "tools": they would not be scored'
        except Exception:  # it depends on the content; that of the row was taken
            return ""
        named = [f"turn {i} ({m['role']}) of {len(messages)}" for i, m in enumerate(messages)]
        for i, mark in marks.items():
            if mark not in text:
                return f"the chat template leaves out {named[i]}: it would not be scored"
            if text.count(mark) > 1:
                return f"the chat template writes {named[i]} twice"
        for i, names in calls.items():
            if not all(name in text for name in names):
                return f"the chat template leaves out tool calls of {named[i]}"
        order = sorted(marks, key=lambda i: text.index(marks[i]))
        turns = [i for i in order if messages[i]["role"] not in _SYSTEM]
        for i, j in itertools.pairwise(turns):
            if i > j:
                return f"the chat template writes {named[i]} before {named[j]}"
        return _MOVED if order != sorted(order) else ""

    def _refuse_special_tokens(self, messages: Messages, template: str) -> None:
        if self._takes_special:
            return
        if template not in self._special:
            self._special[template] = self._written(template)
        tokens, opens, closes = self._special[template]
        for i, message in enumerate(messages):
            whole, content = str(message), (message.get("content") or "").lstrip()
            found = next((token for token in tokens if token in whole), None)
            if (
                found is None
                and message["role"] == "user"
                and closes in content
                and any(content.startswith(opens[k:]) for k in range(len(opens) - 2))
            ):
                found = closes
            if found:
                raise RowError(
                    f'turn {i} ({message["role"]}) has "{found}", which the chat template '
                    "writes itself: pass messages without it, --no-chat (chat=False) for text "
                    "that was templated already, or --special-tokens (special_tokens=True) to "
                    "take it as it is"
                )

    def _written(self, template: str) -> tuple[tuple[str, ...], str, str]:
        """Special tokens that a template writes, and what it puts before and after what users say.

        What is after is on one line; empty: it puts nothing there.
        """
        turns = [{"role": "user", "content": "{asked}"}, {"role": "assistant", "content": "{said}"}]
        texts = []
        for more in ([], [{"role": "system", "content": "-"}]):
            with contextlib.suppress(Exception):  # of the template's own code
                texts.append(self._apply([*more, *turns], {}))
        tokens = {str(x) for x in self.tokenizer.added_tokens_decoder.values() if x.special}
        named = {name: getattr(self.tokenizer, name, None) for name in ("bos_token", "eos_token")}
        written = {token for name, token in named.items() if token and name in template}
        written |= {x for x in tokens if any(x in text for text in (template, *texts))}
        before, _, after = "".join(texts[:1]).partition("{asked}")
        between = after.partition("{said}")[0].strip()
        opens, closes = before.strip()[-40:], between.partition("\n")[0]
        if not re.search(r"[^\w\s:]", opens + closes):  # words alone, which users may say
            closes = ""
        return tuple(sorted(written)), opens if closes else "", closes


_MOVED = "the chat template moved the system prompt"


def _left_out(i: int, message: Mapping[str, Any], text: str) -> str:
    """A warning where a message's reasoning is not in the text; RowError: more is missing."""
    content = (message.get("content") or "").strip()
    if _is_in(content, text):
        left = any(not _is_in(str(message.get(key, "")).strip(), text) for key in _REASONING)
        return "the chat template left out the reasoning of a message" if left else ""
    _, reasoned, answer = content.rpartition(_REASONED)
    if reasoned and message["role"] == "assistant" and _is_in(answer.strip(), text):
        return "the chat template left out the reasoning before </think>"
    raise RowError(
        f"the chat template leaves out a part of turn {i} ({message['role']}), or changes it: it "
        "would not be scored as it is"
    )


def _with_marked_calls(message: Mapping[str, Any], i: int) -> tuple[dict[str, Any], list[str]]:
    """A message whose tool calls have names of their own, and these names."""
    calls, names = [], []
    for j, call in enumerate(message["tool_calls"]):
        names.append(f"turn-{i}-call-{j}")
        if "function" in call:
            calls.append({**call, "function": {**call["function"], "name": names[-1]}})
        else:
            calls.append({**call, "name": names[-1]})
    return {**message, "tool_calls": calls}, names


def _unread(given: Mapping[str, Any], template: str) -> Iterator[str]:
    """Warnings about what a row gives its template, which does not read it.

    Raises:
        RowError: the template leaves out documents.
    """
    for name in given:
        if name == "documents" and name not in template:
            raise RowError('the chat template leaves out "documents": they would not be scored')
        if name != "tools" and name not in template:
            yield f'the chat template does not read "{name}" of chat_template_kwargs'


def _is_in(content: str, text: str) -> bool:
    """Whether a text holds some content as it is, as JSON, or but for white space."""
    if content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(content.split()) in "".join(text.split())
