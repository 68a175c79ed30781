"""What was asked of a patch, what became of it, and what the stand-ins ask of it."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any

from torch import nn

from rmfast.ops._common import HAS_TRITON
from rmfast.packed import attention, models, pieces
from rmfast.packed.compiling import untraced
from rmfast.packed.survey import Seen, Survey, walk

_POOLING = ("hf", "mask")
_ATTENTION = ("auto", "triton", "sdpa")


class Weak:
    """An attribute that is a weak reference; it reads None once its object is gone."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        held = getattr(instance, self.name)
        return None if held is None else held()

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self.name, None if value is None else weakref.ref(value))


class Member:
    """Base of what belongs to a patched model: pickles and copies along with the model."""

    def __getstate__(self) -> dict[str, Any]:
        names = [name.removeprefix("_") for name in self.__dict__]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`rmfast.patch`, checked."""

    share_prefixes: bool = True
    prune_last_layer: bool = True
    pooling: str = "hf"
    attention: str = "auto"
    max_tokens: int | None = None
    max_training_tokens: int | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in _POOLING:
            raise ValueError(f"pooling must be one of {_POOLING}, got {self.pooling!r}")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 (no limit) or more, got {self.max_tokens}")
        least = self.max_training_tokens
        if least is not None and least < 1:
            raise ValueError(f"max_training_tokens must be 1 or more, got {least}")
        if self.attention not in _ATTENTION:
            raise ValueError(f"attention must be one of {_ATTENTION}, got {self.attention!r}")
        if self.attention == "triton" and not HAS_TRITON:
            raise ValueError("attention='triton' needs a package: pip install triton")


@dataclasses.dataclass
class Report:
    """What ``patch`` made of a model. Print it to read it.

    Attributes:
        level: ``"trie"`` (packed backbone, pooled last layer, fp32 head), ``"backbone"`` (packed
            backbone, the model's own head) or ``"head"`` (Hugging Face's backbone).
        reasons: why this level, and what runs.
        warnings: what a user should know before trusting or timing the scores.
        fallbacks: calls that went to the original forward, counted by reason.
        packed: calls that ran packed, counted by the class that was called: the model, or its
            backbone past the model's own forward.
    """

    level: str
    reasons: list[str]
    warnings: list[str]
    fallbacks: Counter[str]
    packed: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"rmfast: level {self.level}"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines += [f"  ! {warning}" for warning in self.warnings]
        lines += [f"  + {_calls(n)} of {called} ran packed" for called, n in self.packed.items()]
        lines += [f"  > {_calls(n)} ran unpacked: {reason}" for reason, n in self.fallbacks.items()]
        return "\n".join(lines)


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


class State(Member):
    """What the stand-ins of one model ask and tell.

    Attributes:
        level: as in :class:`Report`.
        classifier: the sequence classifier whose head is served; None at level ``"backbone"``.
        base: the backbone.
        last_layer: the decoder layer that runs pooled rows only; None: it runs all.
        active: False once the patch is undone.
        fallbacks, packed: as in :class:`Report`.
        rounded: calls scored in half precision, by dtype.
        attention_before: the attention function that the model had.
    """

    classifier = Weak()
    base = Weak()
    last_layer = Weak()

    def __init__(
        self, options: Options, level: str, classifier: nn.Module | None, base: nn.Module | None
    ) -> None:
        self.options, self.level, self.classifier, self.base = options, level, classifier, base
        self.last_layer: nn.Module | None = None
        self.active = False
        self.fallbacks: Counter[str] = Counter()
        self.packed: Counter[str] = Counter()
        self.rounded: Counter[str] = Counter()
        self.budgets: dict[str, pieces.Budget] = {}  # by device
        self.attention_before: str | None = None
        self.survey: Survey | None = None
        if level == "head":
            return
        self.absolute_positions = models.has_absolute_positions(base)
        self.position_limit = models.position_limit(base.config)
        self.arguments = models.arguments(base)
        if level == "trie" and options.prune_last_layer:
            self.last_layer = models.decoder_layers(base)[-1]

    @property
    def packs(self) -> bool:
        return self.level != "head" and self.base is not None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"survey": None}  # a copy has modules of its own

    @untraced(whole=True)
    def prepare(self) -> Seen:
        """Before a packed pass: look at the modules; somebody may have renamed the attention."""
        modules = walk(self.base if self.classifier is None else self.classifier)
        survey = self.survey
        if survey is None or not survey.is_of(modules):
            survey = self.survey = Survey(modules, self.base)
        for config in survey.configs(modules):
            if getattr(config, "_attn_implementation", None) is not None:
                self.attention_before = attention.use(config)
        return survey.look(modules)

    def budget(self, training: bool = False) -> pieces.Budget:
        """The budget of calls without gradients, or with, on the device of the model."""
        device = models.device(self.base)
        key = f"{device.type}, training" if training else device.type
        if key not in self.budgets:
            tokens = self.options.max_training_tokens if training else self.options.max_tokens
            self.budgets[key] = pieces.Budget(tokens or pieces.most(device))
        return self.budgets[key]

    def is_orphan(self) -> bool:
        """Whether a backbone has outlived the classifier that was patched around it."""
        return self.level == "trie" and self.classifier is None
