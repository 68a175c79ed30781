"""What a value of a row may be: numbers, text, messages, JSON."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rmfast.errors import RowError

Messages = list[dict[str, Any]]  # each with "role" and "content"
TURN = re.compile(r"\n\n(Human|Assistant):")  # where a turn of HH-RLHF's dialogues begins
_ROLES = {"Human": "user", "Assistant": "assistant"}


def as_messages(role: str, content: str | Messages) -> Messages:
    """Text as one message of ``role``; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def parse_json(line: bytes) -> dict[str, Any]:
    """The object of a line of JSON.

    Raises:
        RowError: not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, nested too deep
        raise RowError(f"not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"a line must be a JSON object, this is {kind_of(value)}")
    return value


def parse_list(value: Any, fits: Callable[[list], Any]) -> Any:
    """The list that a text is as JSON, if it fits; any other value as it is.

    This is how messages and lists are read from cells of CSV.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if fits(parsed) else value


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


def check_conversation(name: str, value: Any, empty: bool = False) -> Any:
    """The value, which must be text or a list of messages, and not empty but where it may be.

    Raises:
        RowError: it is not; the reason begins with ``name``.
    """
    if isinstance(value, str):
        check_text(name, value)
    elif not isinstance(value, list):
        raise RowError(f"{name} must be text or a list of messages, not {kind_of(value)}")
    else:
        for i, message in enumerate(value):
            if not isinstance(message, dict):
                raise RowError(
                    f"{name} message {i} must be an object with role and content, not "
                    f"{kind_of(message)}"
                )
            for key in ("role", "content"):
                if key not in message:
                    raise RowError(f'{name} message {i}: "{key}" must be text, is missing')
                check_text(f'{name} message {i}: "{key}"', message[key])
    if not value and not empty:
        raise RowError(f"{name} is empty")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    other = "a number" if isinstance(value, numbers.Real) else f"a {type(value).__name__}"
    return "null" if value is None else names.get(type(value), other)


# --- conversations


class Side(str):
    """Text of a side of a preference pair: what ends it in training ends it in scoring, too."""


@dataclass(frozen=True)
class Chat:
    """A conversation with what its row gives the chat template beside the messages.

    Attributes:
        conversation: messages; or prompt and response, each text or messages.
        given: ``tools``, and variables of the template.
    """

    conversation: Messages | tuple[str | Messages, str | Messages]
    given: Mapping[str, Any]


def is_whole(messages: Messages) -> bool:
    """Whether messages are a whole conversation, prompt and answer."""
    return any(message["role"] == "user" for message in messages)


def without_nulls(value: str | Messages) -> str | Messages:
    """Messages without keys that are null: Arrow gives every message the keys of all."""
    if isinstance(value, str) or not any(None in message.values() for message in value):
        return value
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def dialogue(name: str, text: str) -> Messages:
    """The messages of a dialogue as in HH-RLHF; what one side says twice in a row is one message.

    Raises:
        RowError: the text is no dialogue.
    """
    before, *parts = TURN.split(text)
    if before or not parts:
        raise RowError(
            f"{name} is text that is no dialogue, and there is no prompt: chat=True cannot tell "
            "whose turns are in it"
        )
    turns: Messages = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns += as_messages(role, content)
    return turns


def begun(name: str, text: str) -> Messages:
    """The messages of a dialogue that ends where an answer begins.

    Raises:
        RowError: the text is no dialogue, or ends within an answer.
    """
    turns = dialogue(name, text)
    if turns[-1]["role"] == "assistant" and turns.pop()["content"]:
        raise RowError(f"{name} ends within an answer: chat=True cannot part them")
    return turns
