"""A row's values as text and as JSON."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import uuid
from typing import Any

import numpy as np

from rmfast.data import columns
from rmfast.errors import RowError


def as_text(score: columns.Scores) -> str:
    """The shortest decimal that gives the same fp32; several as a list of JSON."""
    if isinstance(score, np.ndarray):
        return f"[{', '.join(map(str, score))}]"
    return str(score)


def to_json(value: Any) -> str:
    """JSON, with what it has no words for as text.

    Raises:
        RowError: text that is not Unicode, or a kind of object nobody can write.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
        text.encode()
    except UnicodeEncodeError:
        raise RowError("it has half a surrogate pair, which only JSON lines can keep") from None
    except TypeError as error:
        raise RowError(str(error)) from None
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, (decimal.Decimal, datetime.timedelta, uuid.UUID)):
        return str(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    else:
        text = to_json(value)
        if text.startswith('"'):  # a time, bytes, …
            text = json.loads(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("it has half a surrogate pair, which only JSON lines can keep") from None
    return text
