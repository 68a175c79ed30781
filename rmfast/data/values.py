"""What a value of a row may be: numbers, text, messages, JSON."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rmfast.errors import RowError

Messages = list[dict[str, Any]]  # each with "role" and "content"
TURN = re.compile(r"\n\n(Human|Assistant):")  # where a turn of HH-RLHF's dialogues begins
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant"}  # as in ShareGPT
# content in parts, written out
_PARTS = re.compile(r"""\s*\[\s*\{\s*["']type["']\s*:\s*["'](text|image|image_url)["']""")


@dataclass(frozen=True)
class Chat:
    """A conversation, and what its row gives the chat template besides."""

    conversation: Messages | tuple[str | Messages, str | Messages]
    given: Mapping[str, Any]  # ``tools``, and all that the row's ``chat_template_kwargs`` name


class Side(str):
    """Text of a side of a preference pair: what ends it in training ends it in scoring, too."""


def as_messages(role: str, content: str | Messages) -> Messages:
    """Text as one message of ``role``; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def read_json(text: str) -> Any:
    """The value of JSON; ValueError or RecursionError: it cannot be read; RowError: a key twice."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise RowError(f'"{double}" is twice in one object: JSON readers differ in which they take')
    return found


def parse_json(line: bytes) -> dict[str, Any]:
    """The object of a line of JSON; RowError: not UTF-8, not JSON, no object, or a key twice."""
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
        found = ast.literal_eval(text.strip())
        return list(found) if isinstance(found, tuple) else found
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
    """The value, called ``name`` in an error, which must be a finite number."""
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
        raise RowError(f"{name} has half a surrogate pair at character {error.start}") from None


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
    if isinstance(value, list):
        return all(item is None for item in value)
    return not without_nulls(value)


# --- messages


def cleaned(name: str, value: Any, empty: bool = False) -> str | Messages:
    """Text, or messages as chat templates take them.

    Keys that are null are dropped, content in parts of text is joined, and ShareGPT's names become
    the usual ones. Only a message with ``tool_calls`` may have no content. Anything else is a
    RowError, which begins with ``name``, and so is what is empty but where ``empty`` allows it.
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
        raise RowError(f"{name} must be an object with role and content, not {kind_of(message)}")
    null = [key for key in message if message[key] is None]
    if isinstance(message.get("tool_calls"), str):
        message = {**message, "tool_calls": parse_text(message["tool_calls"])}
    message = {k: v for k, v in message.items() if v is not None and (v or k != "tool_calls")}
    calls = message.get("tool_calls", [])
    named = [x.get("function", x) if isinstance(x, Mapping) else x for x in _listed(calls)]
    if not all(isinstance(x, Mapping) and isinstance(x.get("name"), str) for x in named):
        raise RowError(f'{name}: "tool_calls" must be a list of objects with a function\'s name')
    if "role" not in message and "from" in message:
        role, content = message.pop("from"), message.pop("value", None)
        if str(role).lower() not in ROLES:
            raise RowError(f'{name}: "from" is {role!r}, and known are {", ".join(ROLES)}')
        message |= {"role": role.lower(), "content": content}
    role, content = message.get("role"), message.get("content")
    missing = "role" if role is None else "content"
    if role is None or (content is None and not message.get("tool_calls")):
        how = "null" if missing in null else "missing"
        raise RowError(f'{name}: "{missing}" must be text, is {how}')
    check_text(f'{name}: "role"', role)
    message["role"] = ROLES.get(role.lower(), role)
    if isinstance(content, str) and _PARTS.match(content):
        content = parse_text(content)
    if isinstance(content, list):
        content = message["content"] = _joined(f'{name}: "content"', content)
    if content is not None:
        check_text(f'{name}: "content"', content)
    return message


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _joined(name: str, parts: list[Any]) -> str:
    """The text of content in parts."""
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise RowError(f'{name} part {i} must be an object with "type", not {kind_of(part)}')
        if (kind := part.get("type", "text")) != "text":
            raise RowError(f"{name} part {i} is of type {kind}, and only text is scored")
        check_text(f'{name} part {i}: "text"', part.get("text"))
    return "".join(part["text"] for part in parts)


def without_nulls(value: Any) -> Any:
    """The value without keys that are null, and without empty ``tool_calls``, at any depth.

    Arrow gives every message, and every object within one, the keys of all.
    """
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if v is not None and (k, v) != ("tool_calls", [])}
        return {k: without_nulls(v) for k, v in kept.items()}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def without_inner_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls within its values; its columns stay."""
    return {k: without_nulls(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}


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
    if isinstance(part, list) and part and all(isinstance(x, str) for x in part):
        return all(holds(conversation, x) for x in part)
    if not (conversation and part and isinstance(conversation, list)):
        return False
    if isinstance(part, str):
        before = conversation[:-1] if conversation[-1]["role"] == "assistant" else conversation
        return any(part.strip() in message.get("content", "") for message in before)
    if not isinstance(part, list):
        return False
    roles = [message["role"] for message in conversation]
    begin = next((i for i, role in enumerate(roles) if role in ("user", "assistant")), len(roles))
    last = len(conversation) - len(part)  # something must come after it
    return any(conversation[i : i + len(part)] == part for i in range(min(begin + 1, last)))


def check_answer(name: str, answer: str | Messages, prompt: str | Messages) -> None:
    """See that messages after a prompt do not say it again: they might be a whole conversation."""
    last = as_messages("user", prompt)[-1]
    if isinstance(answer, list) and last["role"] == "user" and last in answer:
        raise RowError(
            f"{name} begins with an answer and has the prompt in it, which would be scored twice: "
            "take the prompt away if it is a whole conversation"
        )


def dialogue(name: str, text: str) -> Messages:
    """The messages of a dialogue; what one side says twice in a row is one message."""
    before, *parts = TURN.split(text)
    if before or not parts:
        raise RowError(
            f"{name} is text that is no dialogue, and there is no prompt: chat=True cannot tell "
            "whose turns are in it"
        )
    turns: Messages = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = _SPEAKERS[speaker], content.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns += as_messages(role, content)
    return turns


def begun(name: str, text: str) -> Messages:
    """The messages of a dialogue that ends where an answer begins."""
    turns = dialogue(name, text)
    if turns[-1]["role"] == "assistant" and turns.pop()["content"]:
        raise RowError(f"{name} ends within an answer: chat=True cannot part them")
    return turns
