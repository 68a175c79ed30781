"""Conversations in another coat, and a prompt in several columns, as one conversation."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from rmfast.data.values import (
    ROLES,
    Chat,
    Messages,
    as_messages,
    cleaned,
    holds,
    is_empty,
    is_whole,
    kind_of,
    parse_text,
)
from rmfast.errors import RowError

TURNS = ("messages", "conversations", "conversation")  # columns of turns, and what wraps messages
ASKED = ("prompt", "question", "instruction", "query")  # columns of what the user says
_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
_ANSWERS = ("response", "responses", "completion", "completions", "choices", "output", "answer")
_UNREAD = """input inputs instructions problem user_prompt context contexts background passage
    passages document documents history chat_history conversation_history dialog dialogue functions
    image images audio audios video videos article post ctx ctxs few_shot knowledge attachments
    user_input user_message user_query conversation_input""".split()
_PROMPT = {*TURNS, *ASKED, *_SYSTEM, *_UNREAD}
# how text begins that is a list or an object, in JSON or in Python; and one that is a conversation
_QUOTE = r"""(?:\\*["'“”]|&quot;|&#34;)+"""
_OPENS = re.compile(rf"""(?:\s|[\[("'\ufeff]|array\()*[\[{{(]\s*{_QUOTE}\w""")
_KEYS = ("role", "from", *TURNS)
_BEGINS = re.compile(
    rf"""(?:\s|[\[("'\ufeff]|array\()*\{{\s*{_QUOTE}(?:{"|".join(_KEYS)}){_QUOTE}\s*:"""
)
_USERS, _ASSISTANTS = {"user", "human", "prompter"}, {"assistant", "gpt", "bot"}


def read_conversation(name: str, value: Any, empty: bool = False) -> str | Messages | Chat:
    """Text, or messages as chat templates take them, of a conversation in any coat.

    A :class:`Chat` where its coat has ``tools`` or ``chat_template_kwargs``. Coats are those that
    :func:`uncoat` takes off; for the other arguments see :func:`rmfast.data.values.cleaned`.
    """
    value, given = uncoat(name, value)
    value = cleaned(name, value, empty)
    return Chat(value, given) if given else value


def unwrapped(name: str, value: Any, given: dict[str, Any]) -> Any:
    """The conversation of a Chat, of which the rest is put into ``given``; others as they are."""
    if not isinstance(value, Chat):
        return value
    for key, more in value.given.items():
        if given.setdefault(key, more) != more:
            raise RowError(f'{name} has another "{key}" than the rest of the row')
    return value.conversation


def uncoat(name: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """A conversation without what it comes in, and what that gives the chat template.

    Messages may be text (JSON, or as Python writes them), all or each; one may stand alone; and
    an object with ``messages`` or ``conversations`` may be around them, with ``tools``,
    ``chat_template_kwargs`` and ``system`` beside. Other values stay as they are; what seems to be
    a conversation and cannot be read is a RowError.
    """
    parsed = _parsed(name, value)
    if isinstance(value, str) and isinstance(parsed, Mapping) and parsed.keys().isdisjoint(TURNS):
        raise RowError(f"{name} is text that is one message: write a list of messages, or its text")
    value = parsed
    if isinstance(value, list):
        return [_parsed(f"{name} message {i}", item) for i, item in enumerate(value)], {}
    if not isinstance(value, Mapping) or not is_conversation(value):
        return value, {}
    key = next((key for key in TURNS if not is_empty(value.get(key))), None)
    if key is None:
        return [value], {}
    messages, given = uncoat(f'{name} "{key}"', value[key])
    messages = cleaned(f'{name} "{key}"', messages)
    beside = next((x for x in _ANSWERS if not is_empty(value.get(x))), None)
    if not isinstance(messages, list):
        raise RowError(f'{name} "{key}" must be a list of messages, not text')
    if messages[-1]["role"] == "user" and beside is not None:
        raise RowError(f'{name} "{key}" has no answer, and "{beside}" is beside it: join them')
    (messages,) = with_parts(value, {key}, [messages], name=f"{name} ")
    return messages, given_by(value) | given


def _parsed(name: str | None, value: Any) -> Any:
    """The conversation that a text is; any other value as it is. Without a name, nothing raises."""
    if not isinstance(value, str) or not _OPENS.match(value):
        return value
    parsed = parse_text(value.lstrip("\ufeff"))
    if isinstance(parsed, str) and parsed != value:  # JSON of JSON
        parsed = _parsed(name, parsed)
    if not isinstance(parsed, str) and is_conversation(parsed):
        return parsed
    if name is not None and (_has_turns(parsed) or (parsed == value and _BEGINS.match(value))):
        raise RowError(
            f"{name} is text that seems to be a conversation, in a notation that cannot be read: "
            "write a list of messages"
        )
    return value


def _has_turns(value: Any) -> bool:
    """Whether a parsed text seems to be turns in a notation that is not read: of both speakers."""
    if isinstance(value, Mapping):
        return any(_has_turns(x) for x in value.values() if isinstance(x, list))
    words: set[Any] = set()
    for item in value if isinstance(value, list) else ():
        parts = item[:1] if isinstance(item, (list, tuple)) else ()
        parts = [*item, *item.values()] if isinstance(item, Mapping) else parts
        words |= {word.lower() for word in parts if isinstance(word, str)}
    return bool(words & _USERS) and bool(words & _ASSISTANTS)


def is_conversation(value: Any) -> bool:
    """Whether a value seems to be messages, one or several lists of them, or an object around."""
    if isinstance(value, str):
        return not isinstance(_parsed(None, value), str)
    if isinstance(value, list):
        return any(is_conversation(x) or begins_as_message(x) for x in value)
    if not isinstance(value, Mapping):
        return False
    wraps = any(is_conversation(value[key]) for key in TURNS if key in value)
    return wraps or is_message(value)


def begins_as_message(value: Any) -> bool:
    """Whether an item of a list begins with its role, whatever else it has."""
    name, role = next(iter(value.items()), ("", "")) if isinstance(value, Mapping) else ("", "")
    return name in ("role", "from") and str(role).lower() in ROLES


def is_message(value: Any) -> bool:
    """Whether a value, as text too, seems to be one message."""
    value = _parsed(None, value)
    if not isinstance(value, Mapping):
        return False
    if {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys():
        return True
    return "tool_calls" in value and str(value.get("role")).lower() in ROLES


def with_parts(
    record: Mapping[str, Any],
    used: Collection[str],
    conversations: list[Any],
    prompt: bool = False,
    name: str = "",
) -> list[Any]:
    """Conversations with what the columns of ``record``, but those ``used``, have of their prompt.

    A system prompt is put before them. Any other part must be in all of them already, else it is a
    RowError, which begins with ``name``.

    Args:
        prompt: whether these are prompts, and the answers are elsewhere.
    """
    for column, value in record.items():
        part = str(column).lower()
        if part not in _PROMPT or column in used or is_empty(value):
            continue
        if part in TURNS and not isinstance(value, (list, dict)) and len(str(value).split()) == 1:
            continue  # it only names the conversation
        if part in TURNS or part in ASKED:
            value = cleaned(f'"{column}"', uncoat(f'"{column}"', value)[0])
        # with an answer, as UltraFeedback has the chosen one
        if part in TURNS and prompt and isinstance(value, list):
            value = value[:-1] if value[-1]["role"] == "assistant" else value
            same = value == as_messages("user", conversations[0])
            value = conversations[0] if same else value
        if part in _SYSTEM and isinstance(value, str):
            found = [_with_system(value, x, prompt) for x in conversations]
        else:
            same = isinstance(value, list) and value in conversations
            found = conversations if same or all(holds(x, value) for x in conversations) else [None]
        if None in found:
            raise RowError(
                f'{name}has "{column}", which seems to belong to the prompt and is not read: put '
                'it into "prompt", or pass over it by name (--ignore-columns)'
            )
        conversations = found
    return conversations


def _with_system(text: str, conversation: str | Messages, prompt: bool) -> str | Messages | None:
    """A conversation with a system prompt, put before it if need be; None where that is unclear."""
    said = text.strip()
    if isinstance(conversation, str):
        if prompt and said not in conversation and not is_whole(conversation):
            return as_messages("system", text) + as_messages("user", conversation)
        there = conversation.lstrip().startswith(said) if prompt else said in conversation
        return conversation if there else None
    first = [x.get("content", "") for x in conversation if x["role"] in ("system", "developer")]
    if first:
        return conversation if any(said in content for content in first) else None
    clear = not holds(conversation, text) and (prompt or is_whole(conversation))
    return as_messages("system", text) + conversation if clear else None


def given_by(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ``tools`` and ``chat_template_kwargs`` of a row give its chat template."""
    columns = {str(name).lower(): value for name, value in record.items()}
    given = _given(columns, "chat_template_kwargs", dict, "an object")
    given = {name: value for name, value in given.items() if value is not None}
    tools = _given(columns, "tools", list, "a list of objects")
    tools = [parse_text(tool) if isinstance(tool, str) else tool for tool in tools]
    for tool in tools:
        if not (isinstance(tool, Mapping) or callable(tool)):
            raise RowError(f'"tools" must be a list of objects, one is {kind_of(tool)}')
    return given | {"tools": tools} if tools else given


def _given(columns: Mapping[str, Any], name: str, kind: type, words: str) -> Any:
    value = columns.get(name)
    value = parse_text(value) if isinstance(value, str) else value
    if is_empty(value):
        return kind()
    if not isinstance(value, kind):
        raise RowError(f'"{name}" must be {words}, not {kind_of(value)}')
    return value
