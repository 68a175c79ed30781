"""What a value of a row may be: numbers, text, messages, JSON."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

from rmfast.errors import RowError

Messages = list[dict[str, Any]]  # each with "role" and "content"
TURN = re.compile(r"\n\n(Human|Assistant):")  # where a turn of HH-RLHF's dialogues begins


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


def why_not_number(value: Any) -> str | None:
    """What is wrong with a number, which must be finite; None: nothing."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return f"must be a number, not {kind_of(value)}"
    try:
        return None if math.isfinite(value) else f"must be a finite number, not {value}"
    except OverflowError:
        return "is too large a number"


def why_not_text_or_messages(value: Any) -> str | None:
    """What is wrong with text, or with a list of messages; None: nothing. Both may be empty."""
    if isinstance(value, str):
        return why_not_unicode(value)
    if not isinstance(value, list):
        return f"must be text or a list of messages, not {kind_of(value)}"
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            return f"message {i} must be an object with role and content, not {kind_of(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = kind_of(message[key]) if key in message else "missing"
                return f'message {i}: "{key}" must be text, is {kind}'
            reason = why_not_unicode(message[key])
            if reason is not None:
                return f'message {i}: "{key}" {reason}'
    return None


def checked(name: str, value: Any, empty: bool = False) -> Any:
    """The value, which must be text or a list of messages.

    Args:
        name: what the value is called in an error.
        empty: the value may be empty.

    Raises:
        RowError: the value is something else, or empty.
    """
    reason = why_not_text_or_messages(value)
    if reason is None and not value and not empty:
        reason = "is empty"
    if reason is not None:
        raise RowError(f"{name} {reason}")
    return value


def why_not_unicode(text: str) -> str | None:
    """Where a text has half a surrogate pair, which UTF-8 cannot hold; None: nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair at character {error.start}"
    return None


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    other = "a number" if isinstance(value, numbers.Real) else f"a {type(value).__name__}"
    return "null" if value is None else names.get(type(value), other)
