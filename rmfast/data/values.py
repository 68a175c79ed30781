"""What a value of a row may be: numbers, text, messages in any coat, JSON."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rmfast.errors import RowError

Messages = list[dict[str, Any]]  # each with "role" and "content"
TURN = re.compile(r"\n\n(Human|Assistant):")  # where a turn of HH-RLHF's dialogues begins
TURNS = ("messages", "conversations", "conversation")  # columns of turns, and what wraps messages
ASKED = ("prompt", "question", "instruction", "query")  # columns of what the user says
_SYSTEM = ("system", "system_prompt")
_UNREAD = ("input", "context", "history", "passage", "documents", "functions", "image", "images")
_PROMPT = {*TURNS, *ASKED, *_SYSTEM, *_UNREAD, "audio", "audios", "video", "videos"}
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant"}  # as in ShareGPT
# text that begins as an object or a list of them does, in JSON or in Python
_OPENS = re.compile(r"""[\s\["']*\{\s*\\*["'](\w+)\\*["']\s*:""")
_TRACES = {"role", "content", "from", "value", "tools", *_SYSTEM, *TURNS}  # keys of conversations


@dataclass(frozen=True)
class Chat:
    """A conversation, and what its row gives the chat template besides.

    Attributes:
        conversation: messages, or a (prompt, response) tuple.
        given: ``tools``, and all that the row's ``chat_template_kwargs`` name.
    """

    conversation: Messages | tuple[str | Messages, str | Messages]
    given: Mapping[str, Any]


def as_messages(role: str, content: str | Messages) -> Messages:
    """Text as one message of ``role``; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def read_json(text: str) -> Any:
    """The value of JSON.

    Raises:
        ValueError, RecursionError: it cannot be read; a RowError where an object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise RowError(f'"{double}" is twice in one object: JSON readers differ in which they take')
    return found


def parse_json(line: bytes) -> dict[str, Any]:
    """The object of a line of JSON.

    Raises:
        RowError: not UTF-8, not JSON, no object, or an object with a key twice.
    """
    try:
        value = read_json(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RowError:
        raise
    except (ValueError, RecursionError) as error:  # a number of too many digits, nested too deep
        raise RowError(f"not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"a line must be a JSON object, this is {kind_of(value)}")
    return value


def parse_text(text: str) -> Any:
    """The value that a text is as JSON, or as Python writes it; the text where it is neither."""
    try:
        return read_json(text)
    except RowError:  # a key twice, of which Python would take the last
        return text
    except (ValueError, RecursionError):
        pass
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ast.literal_eval(text.strip())
    return text


def has_arrow_json(field: Any) -> bool:
    """Whether an Arrow field has Arrow's JSON type, or has it within; Arrow reads that as text."""
    json_type = getattr(field.type, "extension_name", None) == "arrow.json"
    return json_type or any(map(has_arrow_json, _inner(field.type)))


def from_arrow(field: Any, value: Any) -> Any:
    """A value of an Arrow field, with the JSON in it read."""
    if value is None or not has_arrow_json(field):
        return value
    inner = _inner(field.type)
    if not inner:
        return parse_text(value)
    if isinstance(value, list):
        return [from_arrow(inner[0], item) for item in value]
    return {x.name: from_arrow(x, value[x.name]) for x in inner}


def _inner(kind: Any) -> list[Any]:
    """The fields of an Arrow list or struct."""
    if hasattr(kind, "value_field"):
        return [kind.value_field]
    is_struct = hasattr(kind, "get_field_index")
    return [kind.field(i) for i in range(kind.num_fields)] if is_struct else []


def check_number(name: str, value: Any) -> float:
    """The value, which must be a finite number.

    Args:
        name: what the value is called in an error.

    Raises:
        RowError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RowError(f"{name} must be a number, not {kind_of(value)}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise RowError(f"{name} is too large a number") from None
    if not finite:
        raise RowError(f"{name} must be a finite number, not {value}")
    return float(value)


def check_text(name: str, value: Any) -> None:
    """See that the value is text, and has no half of a surrogate pair, which UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, is {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"has half a surrogate pair at character {error.start}"
        raise RowError(f"{name} {reason}") from None


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    other = "a number" if isinstance(value, numbers.Real) else f"a {type(value).__name__}"
    return "null" if value is None else names.get(type(value), other)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, blank text, or a list or an object of nothing."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, numbers.Real):
        return not value or math.isnan(value)
    return not without_nulls(value)


# --- messages


def check_conversation(name: str, value: Any, empty: bool = False) -> str | Messages:
    """Text, or messages as chat templates take them.

    Keys that are null are dropped, content in parts of text is joined, and ShareGPT's names become
    the usual ones. Only a message with ``tool_calls`` may have no content.

    Args:
        name: what the value is called in an error.
        value: text or a list of messages.
        empty: whether it may be empty.

    Raises:
        RowError: it is something else; the reason begins with ``name``.
    """
    if isinstance(value, str):
        check_text(name, value)
    elif not isinstance(value, list):
        raise RowError(f"{name} must be text or a list of messages, not {kind_of(value)}")
    else:
        value = [_message(f"{name} message {i}", message) for i, message in enumerate(value)]
    if not value and not empty:
        raise RowError(f"{name} is empty")
    return value


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        kind = kind_of(message)
        raise RowError(f"{name} must be an object with role and content, not {kind}")
    null = [key for key in message if message[key] is None]
    message = without_nulls(message)
    if "role" not in message and "from" in message:
        role, content = message.pop("from"), message.pop("value", None)
        if str(role).lower() not in _ROLES:
            raise RowError(f'{name}: "from" is {role!r}, and known are {", ".join(_ROLES)}')
        message |= {"role": role.lower(), "content": content}
    role, content = message.get("role"), message.get("content")
    missing = "role" if role is None else "content"
    if role is None or (content is None and not message.get("tool_calls")):
        how = "null" if missing in null else "missing"
        raise RowError(f'{name}: "{missing}" must be text, is {how}')
    check_text(f'{name}: "role"', role)
    message["role"] = _ROLES.get(role, role)
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = parse_text(message["tool_calls"])
    if isinstance(content, list):
        content = message["content"] = _joined(f'{name}: "content"', content)
    if content is not None:
        check_text(f'{name}: "content"', content)
    return message


def _joined(name: str, parts: list[Any]) -> str:
    """The text of content in parts."""
    for i, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
        if kind != "text":
            raise RowError(f"{name} part {i} is of type {kind}, and only text is scored")
        check_text(f'{name} part {i}: "text"', part.get("text"))
    return "".join(part["text"] for part in parts)


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth.

    Arrow gives every message, and every object within one, the keys of all.
    """
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_whole(conversation: str | Messages) -> bool:
    """Whether it has what the user says before any answer, whatever else comes first."""
    if isinstance(conversation, str):
        return TURN.match(conversation) is not None
    roles = (message["role"] for message in conversation)
    return next((role for role in roles if role in ("user", "assistant")), "") == "user"


def holds(conversation: str | Messages, part: Any) -> bool:
    """Whether a part of the prompt, text or messages, is in a conversation before its answer."""
    if isinstance(part, str) and isinstance(conversation, str):
        return part.strip() in conversation
    if not (conversation and part and isinstance(conversation, list)):
        return False
    if isinstance(part, str):
        before = conversation[:-1] if conversation[-1]["role"] == "assistant" else conversation
        return any(part.strip() in message.get("content", "") for message in before)
    roles = [message["role"] for message in conversation]
    begin = next((i for i, role in enumerate(roles) if role in ("user", "assistant")), len(roles))
    last = len(conversation) - len(part)  # something must come after it
    return any(conversation[i : i + len(part)] == part for i in range(min(begin + 1, last)))


# --- conversations in another coat


def uncoat(name: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """A conversation without what it comes in, and what that gives the chat template.

    Messages may be text (JSON, or as Python writes them), all or each; one may stand alone; and
    an object with ``messages`` or ``conversations`` may be around them, with ``tools``,
    ``chat_template_kwargs`` and ``system`` beside. Other values stay as they are.

    Raises:
        RowError: it seems to be a conversation that cannot be read.
    """
    if hasattr(value, "tolist"):  # an array, as pandas has of Parquet
        value = value.tolist()
    value = _parsed(name, value)
    if isinstance(value, list):
        return [_parsed(f"{name} message {i}", item) for i, item in enumerate(value)], {}
    if not isinstance(value, Mapping) or not is_conversation(value):
        return value, {}
    key = next((key for key in TURNS if key in value), None)
    if key is None:
        return [value], {}
    messages, given = uncoat(f'{name} "{key}"', value[key])
    messages = check_conversation(f'{name} "{key}"', messages)
    (messages,) = with_parts(value, {key}, [messages], name=f"{name} ")
    return messages, given_by(value) | given


def _parsed(name: str, value: Any) -> Any:
    """The conversation that a text is; any other value as it is."""
    opens = _OPENS.match(value) if isinstance(value, str) else None
    if opens is None:
        return value
    parsed = parse_text(value)
    if isinstance(parsed, str) and parsed != value:  # JSON of JSON
        parsed = _parsed(name, parsed)
    if isinstance(parsed, str) and parsed == value and opens[1] in _TRACES:
        raise RowError(
            f"{name} is text that begins as messages do, and neither JSON nor Python's notation "
            "that can be read: write a list of messages"
        )
    return parsed if not isinstance(parsed, str) and is_conversation(parsed) else value


def is_conversation(value: Any) -> bool:
    """Whether a value seems to be messages, one or several lists of them, or an object around."""
    if isinstance(value, str):
        return not isinstance(_parsed("an item", value), str)
    if isinstance(value, list):
        return any(map(is_conversation, value))
    if not isinstance(value, Mapping):
        return False
    wraps = any(is_conversation(value[key]) for key in TURNS if key in value)
    return wraps or is_message(value)


def is_message(value: Any) -> bool:
    """Whether a value, as text too, seems to be one message."""
    value = _parsed("an item", value)
    if not isinstance(value, Mapping):
        return False
    if {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys():
        return True
    return any(str(value.get(key)).lower() in _ROLES for key in ("role", "from"))


def with_parts(
    record: Mapping[str, Any],
    used: Collection[str],
    conversations: list[Any],
    prompt: bool = False,
    name: str = "",
) -> list[Any]:
    """Conversations with what other columns have of their prompt.

    A system prompt is put before them. Any other part must be in all of them already.

    Args:
        record: the columns.
        used: those that were read.
        conversations: text or messages.
        prompt: whether these are prompts, and the answers are elsewhere.
        name: how an error begins.

    Raises:
        RowError: a column seems to belong to the prompt, and is not in it.
    """
    for column, value in record.items():
        part = str(column).lower()
        if part not in _PROMPT or column in used or is_empty(value):
            continue
        if part in TURNS or part in ASKED:
            value = check_conversation(f'"{column}"', uncoat(f'"{column}"', value)[0])
        if value in conversations or all(holds(x, value) for x in conversations):
            continue
        fits = part in _SYSTEM and isinstance(value, str)
        if not fits or not all(_takes_system(x, prompt) for x in conversations):
            raise RowError(
                f'{name}has "{column}", which seems to belong to the prompt and is not read: put '
                'it into "prompt", or take the column away'
            )
        system = as_messages("system", value)
        conversations = [system + as_messages("user", x) for x in conversations]
    return conversations


def _takes_system(conversation: str | Messages, prompt: bool) -> bool:
    if isinstance(conversation, str):
        return prompt and not is_whole(conversation)
    begins = conversation and conversation[0]["role"] not in ("system", "developer")
    return begins and (prompt or is_whole(conversation))


def given_by(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ``tools`` and ``chat_template_kwargs`` of a row give its chat template.

    Raises:
        RowError: they are something else than a list of objects and an object.
    """
    columns = {str(name).lower(): value for name, value in record.items()}
    given = dict(_given(columns, "chat_template_kwargs", dict, "an object"))
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
    return without_nulls(value)
