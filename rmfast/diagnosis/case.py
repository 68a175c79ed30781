"""A model under examination, its checkpoint's files, and what a check finds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rmfast import loading
from rmfast.packed import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


OK, NOTE, WARNING, WRONG = STATUSES = ("ok", "note", "warning", "wrong")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the checklist.

    Attributes:
        name: of the check, the same in every release.
        status: ``"ok"``; ``"note"``, good to know; ``"warning"``, frameworks give different scores,
            or some calls fail; ``"wrong"``, scores are wrong or random, or the model gives none.
        what: what was found.
        do: what to do about it; empty where nothing needs doing.
        figures: the numbers behind it, for programs.
    """

    name: str
    status: str
    what: str
    do: str = ""
    figures: dict[str, float | int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Case:
    """A model under examination."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    source: str | None = None  # the checkpoint's folder or hub name; None: not known
    missing: list[str] | None = None  # parameters that it lacks; None: not known

    @functools.cached_property
    def classifier(self) -> PreTrainedModel | None:
        """The sequence classifier, also one with code of its own."""
        from transformers import PreTrainedModel

        found = (m for m in self.model.modules() if isinstance(m, PreTrainedModel))
        kind = "ForSequenceClassification"
        return next((m for m in found if type(m).__name__.endswith(kind)), None)

    @functools.cached_property
    def base(self) -> nn.Module | None:
        """The decoder; None where there is none, or several."""
        try:
            return models.find(self.model)[1]
        except ValueError:
            return None

    @functools.cached_property
    def config(self) -> Any:
        """The text part of the configuration; None for a model without one."""
        return models.text_config(self.classifier or self.base or self.model)

    @property
    def pad(self) -> int | None:
        return getattr(self.config, "pad_token_id", None)

    @property
    def positions(self) -> int | None:
        return models.positions(self.classifier or self.base or self.model)

    @functools.cached_property
    def vocabulary(self) -> int | None:
        """Rows of the input embeddings."""
        return models.vocabulary(self.classifier or self.base)

    @functools.cached_property
    def quantised(self) -> bool:
        """Whether weights are rounded below half precision, and activations perhaps with them."""
        integers = any(not p.is_floating_point() for p in self.model.parameters())
        return integers or any(getattr(m, "is_quantized", False) for m in self.model.modules())

    @functools.cached_property
    def takes_pairs(self) -> bool:
        """Whether the model reads a prompt and its response as two segments."""
        return self.classifier is not None and models.takes_pairs(self.config, self.tokenizer)

    @functools.cached_property
    def head(self) -> dict[str, nn.Parameter]:
        """Parameters of the classifier outside its backbone, by name."""
        if self.classifier is None:
            return {}
        inside = f"{self.classifier.base_model_prefix}."
        return {n: p for n, p in self.classifier.named_parameters() if not n.startswith(inside)}

    @functools.cached_property
    def head_modules(self) -> list[str]:
        return sorted({name.split(".")[0] for name in self.head})

    def has_head(self, names: Iterable[str]) -> bool:
        """Whether parameters of the head are among these, whatever stands before their names."""
        return any(part in self.head_modules for name in names for part in name.split("."))

    @functools.cached_property
    def saved(self) -> list[str]:
        """Names of the checkpoint's tensors; none: they are not known."""
        return saved_tensors(self.source)

    @functools.cached_property
    def adapter_settings(self) -> dict[str, Any] | None:
        """Those of the PEFT adapter that the checkpoint is; None: it is none."""
        folder = local_folder(self.source)
        is_adapter = folder is not None and (Path(folder) / "adapter_config.json").is_file()
        return loading.adapter_settings(folder) if is_adapter else None

    @functools.cached_property
    def adapter(self) -> list[str] | None:
        """What a PEFT adapter trains and saves besides its own matrices; None: no adapter."""
        configs = [vars(c) for c in (getattr(self.model, "peft_config", None) or {}).values()]
        names = [name for config in configs for name in config.get("modules_to_save") or ()]
        is_saved = self.adapter_settings is not None
        return names + (self.saved if is_saved else []) if configs or is_saved else None

    @functools.cached_property
    def lacks_head(self) -> bool | None:
        """Whether the checkpoint, and the one under an adapter, lack the head; None: not known."""
        if self.missing is not None:
            return self.has_head(self.missing)
        saved = self.saved
        if self.adapter_settings is not None and not self.has_head(saved):
            saved = saved_tensors(self.adapter_settings.get("base_model_name_or_path"))
        return not self.has_head(saved) if saved else None


def saved_tensors(name: str | None) -> list[str]:
    """Names in a checkpoint's safetensors files but for LoRA's matrices; none: they are not known.

    Of a name on the hub, those files that are in its cache.
    """
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    folder = local_folder(name)
    try:
        for file in Path(folder).glob("*.safetensors") if folder else ():
            with safe_open(file, "pt") as tensors:
                names.update(tensors.keys())
    except (OSError, SafetensorError):
        return []
    return sorted(name for name in names if "lora_" not in name)


def local_folder(name: str | None) -> str | None:
    """The folder of a checkpoint, its own or in the hub's cache; None: it is in neither."""
    from huggingface_hub import try_to_load_from_cache

    if not name or Path(name).is_dir():
        return name
    for file in ("model.safetensors", "model.safetensors.index.json", "adapter_config.json"):
        with contextlib.suppress(ValueError):  # a path, or no name of the hub
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return str(Path(found).parent)
    return None


def conversation(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a conversation that the user begins."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
