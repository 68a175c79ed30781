"""``patch``: give a Hugging Face reward model a backbone that runs no token twice.

Only instances change: ``forward`` of the model (level ``trie``) or of its backbone (level
``backbone``), ``forward`` of the last decoder layer, and the name of the attention function in the
config. What the packed path cannot serve goes to the forward that was there before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from rmfast import attention
from rmfast.families import LAST_TOKEN_HEADS, TRIE_BACKBONES
from rmfast.forwards import (
    BackboneForward,
    LastLayer,
    Override,
    ScoringForward,
    draws_noise,
    untraced,
)

_POOLING = ("hf", "mask")
_ATTRIBUTE = "_rmfast"


@dataclasses.dataclass(frozen=True)
class Options:
    share_prefixes: bool = True
    prune_last_layer: bool = True
    pooling: str = "hf"
    attention: str = "auto"
    compile: bool = False


@dataclasses.dataclass
class Report:
    """What ``patch`` made of a model. Print it to read it.

    Attributes:
        level: ``"trie"`` (packed backbone, pooled last layer, fp32 head), ``"backbone"`` (packed
            backbone, the model's own head) or ``"head"`` (Hugging Face's backbone).
        reasons: why this level, and what runs.
        warnings: what a user should know before trusting or timing the scores.
        fallbacks: calls that went to the original forward, counted by reason.
    """

    level: str
    reasons: list[str]
    warnings: list[str]
    fallbacks: Counter[str]

    def __str__(self) -> str:
        lines = [f"rmfast: level {self.level}"]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines += [f"  ! {warning}" for warning in self.warnings]
        lines += [
            f"  > {count} call{'s' if count > 1 else ''} ran unpacked: {reason}"
            for reason, count in self.fallbacks.items()
        ]
        return "\n".join(lines)


# --- finding out what a model is


def _class_of_forward(module: nn.Module) -> type:
    """The class whose ``forward`` runs: a subclass that leaves it alone is as good as that."""
    return next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)


def _is_transformers(module: nn.Module) -> bool:
    return _class_of_forward(module).__module__.startswith("transformers.")


def _decoder_layers(module: nn.Module) -> nn.ModuleList | None:
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def _why_not_trie(base: nn.Module) -> str | None:
    """The reason a backbone cannot run packed; None when it can."""
    config, name = base.config, type(base).__name__
    if not _is_transformers(base):
        return f"{name} has a forward of its own, which rmfast does not know"
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        return f"{name} has {', '.join(sorted(kinds))} layers, which carry state across branches"
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if not getattr(config, "is_causal", True) or bidirectional:
        return f"{name} is configured bidirectional: a token sees what comes after it"
    if config.model_type not in TRIE_BACKBONES:
        return f"{name} ({config.model_type}) is not among the backbones proved to run packed"
    before = (config._attn_implementation or "").removeprefix(attention.PREFIX)
    layers = _decoder_layers(base)
    callers = [m for m in layers[0].modules() if _is_transformers(m)]
    if not any(attention.unpacked_function(before, m) for m in callers):
        return f"{name} uses attention {before!r}, which rmfast cannot call back"
    return None


def _find(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The sequence classifier that scores by its last token, and the decoder; None where absent."""
    from transformers import PreTrainedModel

    bases = [
        m
        for m in model.modules()
        if isinstance(m, PreTrainedModel) and _decoder_layers(m) is not None
    ]
    if len(bases) > 1:
        names = ", ".join(type(m).__name__ for m in bases)
        raise ValueError(f"{type(model).__name__} holds several backbones ({names}): patch each")
    base = bases[0] if bases else None
    heads = [m for m in model.modules() if isinstance(m, PreTrainedModel) and _scores_last_token(m)]
    return heads[0] if heads else None, base


def _scores_last_token(module: nn.Module) -> bool:
    from transformers.modeling_layers import GenericForSequenceClassification

    inner = getattr(module, module.base_model_prefix, None)
    if not isinstance(inner, nn.Module) or not hasattr(module, "score"):
        return False
    owner = _class_of_forward(module)
    return owner is GenericForSequenceClassification or (
        owner.__name__.endswith("ForSequenceClassification")
        and owner.__module__.startswith("transformers.models.")
        and module.config.model_type in LAST_TOKEN_HEADS
    )


def _inner(outer: nn.Module) -> nn.Module:
    return getattr(outer, outer.base_model_prefix)


def _position_limit(config: Any) -> int | None:
    """Length from which the rotary frequencies depend on the padded batch; None: they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    if not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return None
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds]
    lengths += [
        getattr(config, "original_max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    ]
    return min(length for length in lengths if length)


class Patch:
    """What was changed in one model, and how to undo it."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        self.root = root
        self.options = options
        self.active = False
        self.fallbacks: Counter[str] = Counter()
        self.last_layer: nn.Module | None = None
        self.overrides: list[Override] = []
        self.attention_before: str | None = None
        self.level, self.reasons, self.outer, self.base = _choose(root, options)
        self.inner = _inner(self.outer) if self.outer is not None else None
        # not a wrapper such as PEFT's: the patch is found again from inside and from outside it
        self.holder = next(m for m in (self.outer, self.base, root) if m is not None)
        if self.level != "head":
            base = self.base
            others = [m for m in base.modules() if isinstance(m, nn.Embedding)]
            self.absolute_positions = any(m is not base.get_input_embeddings() for m in others)
            self.position_limit = _position_limit(base.config)
            self.meaningful = _meaningful_arguments(base)
            if self.level == "trie" and options.prune_last_layer:
                self.last_layer = _decoder_layers(base)[-1]

    def apply(self) -> None:
        if self.level == "head":
            if self.outer is not None:
                self.override(ScoringForward(self.outer, self))
        else:
            if self.level == "trie":
                self.override(ScoringForward(self.outer, self))
            else:
                self.override(BackboneForward(self.base, self))
            if self.last_layer is not None:
                self.override(LastLayer(self.last_layer, self))
        self.active = True
        self.prepare()
        setattr(self.holder, _ATTRIBUTE, self)

    def override(self, stand_in: Override) -> None:
        untraced(type(stand_in))
        stand_in.module.forward = stand_in
        self.overrides.append(stand_in)

    def prepare(self) -> None:
        """Before a packed pass: somebody may have renamed the attention, or copied the model."""
        if self.level == "head":
            return
        self.attention_before = attention.use(self.base.config)
        if self.options.compile:
            for layer in _decoder_layers(self.base):
                if layer is not self.last_layer and layer._compiled_call_impl is None:
                    layer.compile(dynamic=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.attention_before is not None:  # another process has registries of its own
            attention.register(self.attention_before)

    def undo(self) -> None:
        self.active = False  # should somebody have wrapped a stand-in, it hands everything on
        for stand_in in self.overrides:
            module = stand_in.module
            if module.__dict__.get("forward") is stand_in:
                if stand_in.before is not None:
                    module.forward = stand_in.before
                else:
                    del module.forward
        if self.attention_before is not None:
            self.base.config._attn_implementation_internal = self.attention_before
        if self.options.compile and self.level != "head":
            for layer in _decoder_layers(self.base):
                if layer is not self.last_layer:
                    layer._compiled_call_impl = None
        delattr(self.holder, _ATTRIBUTE)

    def report(self) -> Report:
        return Report(self.level, list(self.reasons), self.warnings(), Counter(self.fallbacks))

    def warnings(self) -> list[str]:
        out = []
        if self.outer is not None:
            text = self.outer.config.get_text_config()
            eos = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
            if self.options.pooling == "hf":
                if text.pad_token_id is None:
                    out.append(
                        "no pad token: batches of more than one sequence are refused, as in "
                        "Hugging Face; set config.pad_token_id"
                    )
                elif text.pad_token_id in eos:
                    out.append(
                        f"pad_token_id equals eos_token_id ({text.pad_token_id}): Hugging Face's "
                        "rule passes over a final eos and scores the token before it; "
                        "pooling='mask' scores the last attended token"
                    )
        shares = self.level != "head" and self.options.share_prefixes
        if shares and draws_noise(self.holder, active=False):
            out.append(
                "the model has dropout: in training mode prefixes are not shared, because each "
                "sequence draws its own noise"
            )
        if self.level == "backbone":
            out.append("hidden states of tokens that the attention mask hides are zeros")
        return out


def _meaningful_arguments(base: nn.Module) -> frozenset[str]:
    """Names of arguments the backbone reads; what else a caller passes is ignored, as it was."""
    from transformers.utils import TransformersKwargs

    signature = inspect.signature(type(base).forward)
    return frozenset(signature.parameters) | frozenset(TransformersKwargs.__annotations__)


def _choose(
    root: nn.Module, options: Options
) -> tuple[str, list[str], nn.Module | None, nn.Module | None]:
    """Level, reasons, the sequence classifier and the backbone."""
    outer, base = _find(root)
    name = type(root).__name__
    why_not = _why_not_trie(base) if base is not None else f"{name} has no decoder rmfast knows"
    backend = attention.BACKENDS[0] if options.attention == "auto" else options.attention
    if why_not is None and outer is not None and _inner(outer) is base:
        reasons = [
            f"{type(outer).__name__}: causal decoder with an attention interface, scored by its "
            "last token in fp32",
            f"attention: {backend}",
        ]
        if not options.share_prefixes:
            reasons.append("prefixes are not shared: share_prefixes=False")
        if not options.prune_last_layer:
            reasons.append("the last layer runs on every token: prune_last_layer=False")
        return "trie", reasons, outer, base
    if options.pooling == "mask" and outer is None:
        raise ValueError(
            f"pooling='mask' cannot be honoured: {name} scores by a head of its own; "
            "leave pooling at 'hf'"
        )
    if why_not is None:
        reasons = [f"{type(base).__name__} runs packed; the head of {name} is its own"]
        return "backbone", reasons, None, base
    if outer is not None:
        reasons = [
            why_not,
            "the padded batch runs as it was; pooled first, scored in fp32",
        ]
        return "head", reasons, outer, base
    return "head", [why_not, "its forward runs as it was"], None, base


# --- the public functions


def _attached(model: nn.Module) -> Patch | None:
    found = (module.__dict__.get(_ATTRIBUTE) for module in model.modules())
    return next((patch for patch in found if patch is not None), None)


def patch(
    model: nn.Module,
    *,
    share_prefixes: bool = True,
    prune_last_layer: bool = True,
    pooling: str = "hf",
    attention: str = "auto",
    compile: bool = False,
) -> nn.Module:
    """Make a Hugging Face reward model train and score without running a token twice.

    In place, on this instance alone; the numbers stay Hugging Face's. Patching a patched model
    changes its options.

    Args:
        model: a reward model, or any module around one supported backbone (PEFT included).
        share_prefixes: run a prefix that several sequences of a batch share once. Off by itself
            while dropout is active.
        prune_last_layer: run the last decoder layer's queries, MLP and norm on pooled tokens only.
        pooling: the token that carries the score. ``"hf"``: the rightmost that is not the pad
            token, as Hugging Face has it. ``"mask"``: the last one the attention mask lets through.
        attention: ``"auto"`` or a backend of :mod:`rmfast.attention` (``"sdpa"``).
        compile: compile the decoder layers, for changing shapes.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: an unknown option, several backbones in one model, or ``pooling="mask"`` on a
            model that does not score by its last token.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    if pooling not in _POOLING:
        raise ValueError(f"pooling must be one of {_POOLING}, got {pooling!r}")
    backends = _backends()
    if attention not in backends:
        raise ValueError(f"attention must be one of {backends}, got {attention!r}")
    unpatch(model)
    options = Options(share_prefixes, prune_last_layer, pooling, attention, compile)
    Patch(model, options).apply()
    return model


def _backends() -> tuple[str, ...]:
    return ("auto", *attention.BACKENDS)


def unpatch(model: nn.Module) -> nn.Module:
    """Put everything back as it was before :func:`patch`. Does nothing to an unpatched model."""
    found = _attached(model)
    if found is not None:
        found.undo()
    return model


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """:func:`patch` for the length of a ``with`` block, then as it was."""
    found = _attached(model)
    before = found.options if found else None
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)
        if before is not None:
            patch(model, **dataclasses.asdict(before))


def report(model: nn.Module) -> Report:
    """What :func:`patch` made of ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    found = _attached(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not patched: call rmfast.patch(model) first")
    return found.report()
