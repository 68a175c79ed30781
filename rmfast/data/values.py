"""What a value of a row may be: numbers, text, messages, JSON."""

from __future__ import annotations

import json
import math
import numbers
from typing import Any

from rmfast.errors import RowError

Message = dict[str, Any]
Conversation = list[Message]
DEEPEST = 64  # lists and objects inside one another, in a line of JSON


def parse_json(line: bytes) -> Any:
    """What a line of JSON says.

    Raises:
        RowError: not UTF-8, not JSON, an object that names something twice, or nested too deep.
    """
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError(f"nested more than {DEEPEST} deep") from None
    except RowError:
        raise
    except ValueError as error:  # a number of too many digits
        raise RowError(f"not JSON that can be read: {error}") from None
    if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(value) > DEEPEST:
        raise RowError(f"nested more than {DEEPEST} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"{json.dumps(twice)} is there twice")
    return out


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return depth


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
                what = kind_of(message[key]) if key in message else "missing"
                return f'message {i}: "{key}" must be text, is {what}'
            reason = why_not_unicode(message[key])
            if reason is not None:
                return f'message {i}: "{key}" {reason}'
    return None


def checked(what: str, value: Any) -> Any:
    """The value, which must be text or a list of messages, and not empty.

    Raises:
        RowError: it is not; the reason begins with ``what``.
    """
    reason = why_not_text_or_messages(value)
    if reason is None and not value:
        reason = "is empty"
    if reason is not None:
        raise RowError(f"{what} {reason}")
    return value


def why_not_unicode(text: str) -> str | None:
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
