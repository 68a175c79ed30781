"""The form of the conversations that a model was trained on, kept in its config.

``rmfast train`` records it; whatever scores with the model obeys, or is told otherwise by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KEY = "rmfast_form"  # of config.json


@dataclasses.dataclass(frozen=True)
class Form:
    """How conversations became tokens in training."""

    chat: bool  # as turns in the chat template; False: as plain text
    ends: bool  # plain text ends with the end of text
    bos: bool  # the tokenizer puts a BOS before text
    template: str | None  # digest of the chat template; None for plain text
    max_length: int  # longer conversations were not trained on
    segments: bool = False  # prompt and response are two segments, as encoders take them
    pooling: str = "hf"  # which token is scored, as for rmfast.patch

    @classmethod
    def of(cls, model: Any) -> Form | None:
        """The form that the model's config records, or None; ValueError where it cannot be read."""
        found = getattr(getattr(model, "config", None), _KEY, None)
        try:
            return None if found is None else cls(**found)
        except TypeError as error:
            raise ValueError(f"{_KEY} in the model's config cannot be read: {error}") from None

    @staticmethod
    def hand_on(folder: str, config: Any) -> None:
        """Give a config the record of the folder of an adapter, if there is one."""
        file = Path(folder) / "config.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if _KEY in found:
            setattr(config, _KEY, found[_KEY])

    @staticmethod
    def forget(config: Any) -> None:
        """Take the record out of a model's config."""
        if hasattr(config, _KEY):
            delattr(config, _KEY)

    def record(self, config: Any) -> None:
        """Put the form into a model's config, with which it is saved."""
        setattr(config, _KEY, dataclasses.asdict(self))

    def differences(self, bos: bool, template: str | None) -> Iterator[str]:
        """Warnings about a tokenizer that puts a BOS before text, and has this template."""
        if bos != self.bos:
            yield (
                f"in training the tokenizer put {'a' if self.bos else 'no'} BOS before text, and "
                f"this one puts {'one' if bos else 'none'}: scores are not those of the training"
            )
        if self.chat and digest(template) != self.template:
            yield "this chat template is not the one of the training, and scores are not either"


def digest(template: str | None) -> str | None:
    """What a chat template is told by."""
    return template and hashlib.sha256(template.encode()).hexdigest()[:16]
