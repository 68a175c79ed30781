"""``patch``: give a Hugging Face reward model a backbone that runs no token twice.

Only instances change: ``forward`` of the classifier (level ``trie``), of the backbone and of models
around it that have a loss of tokens, of the last decoder layer, and the name of the attention
function in the config. What the packed path cannot serve goes to the forward that was there before.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from rmfast import reference
from rmfast.packed import attention as packed_attention
from rmfast.packed import elementwise, models, survey
from rmfast.packed.backbone import BackboneForward, LossForward
from rmfast.packed.last_layer import LastLayer
from rmfast.packed.scoring import ScoringForward
from rmfast.packed.stand_in import Override
from rmfast.packed.state import Options, Report, State, Weak
from rmfast.packed.survey import walk

_ATTRIBUTE = "_rmfast"
Model = TypeVar("Model", bound=nn.Module)


class Patch(State):
    """What was changed in one model, and how to undo it."""

    holder = Weak()

    def __init__(self, root: nn.Module, options: Options, before: Patch | None = None) -> None:
        level, self.reasons, classifier, base = _choose(root, options)
        super().__init__(options, level, classifier, base)
        # not a wrapper such as PEFT's: the patch is found again from inside and from outside it
        self.holder = next(m for m in (classifier, base, root) if m is not None)
        # of an earlier patch from further outside
        old = [] if before is None else before.overrides
        losses = [one.module for one in old if isinstance(one, LossForward)]
        self.overrides = self._overrides(root, [m for m in losses if m is not None])

    def _overrides(self, root: nn.Module, losses: list[nn.Module]) -> list[Override]:
        out: list[Override] = []
        if self.classifier is not None:
            out.append(ScoringForward(self.classifier, self))
        if self.level != "head":  # also beside a classifier: trainers call the backbone past it
            out.append(BackboneForward(self.base, self))
            around = dict.fromkeys([*models.losses(root, self.base), *losses])
            out += [LossForward(m, self) for m in around if m is not self.classifier]
        if self.last_layer is not None:
            out.append(LastLayer(self.last_layer, self))
        if self.packs:
            out += elementwise.overrides(self.base, self)
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for stand_in in self.overrides:
            stand_in.patch = self
            if isinstance(stand_in, elementwise.Kernel) and stand_in.placed:
                stand_in.place()
        if self.attention_before is not None:  # another process has registries of its own
            packed_attention.register(self.attention_before)

    def apply(self) -> None:
        for stand_in in self.overrides:
            stand_in.put()
        self.active = True
        if self.packs:
            _keep_the_heap(self.base)
            self.prepare()
        for module in self.marked():
            setattr(module, _ATTRIBUTE, self)

    def undo(self) -> None:
        self.active = False  # should somebody have wrapped a stand-in, it hands everything on
        for stand_in in self.overrides:
            stand_in.leave()
        if self.packs:
            for module in self.base.modules():
                packed_attention.leave(module.__dict__.get("config"))
        for module in self.marked():
            delattr(module, _ATTRIBUTE)

    def marked(self) -> list[nn.Module]:
        """Modules that know of the patch, so that it is found inside and outside of wrappers."""
        marked = [self.holder, self.base if self.packs else None]
        return [m for m in dict.fromkeys(marked) if m is not None]

    def report(self) -> Report:
        if self.is_orphan():
            why = "the classifier that was patched is gone: its backbone runs as it was"
            return Report("head", [why], [], Counter(self.fallbacks), Counter(self.packed))
        reasons = list(self.reasons)
        if self.level == "trie" and self.packs and not survey.is_sharded(walk(self.base)):
            cuts = {False: self.options.max_tokens != 0, True: self.options.max_training_tokens}
            for training in (kind for kind in cuts if cuts[kind]):
                budget, with_ = self.budget(training), "with" if training else "without"
                reasons.append(f"{with_} gradients at most {budget.tokens} tokens run at once")
                if budget.halvings:
                    reasons[-1] += f": memory ran out {budget.halvings} times, and it was halved"
                if budget.doublings:
                    reasons[-1] += f"; it was doubled again {budget.doublings} times"
        kernels = elementwise.report(self.overrides)
        if kernels is not None:
            reasons.append(kernels)
        if self.options.cuda_graphs and self.level == "trie":
            reasons.append(str(self.overrides[0].graphs))
        warnings = [*self._of_the_head(), *self._of_the_backbone()]
        counts = Counter(self.fallbacks), Counter(self.packed)
        return Report(self.level, reasons, warnings, *counts)

    def _of_the_head(self) -> Iterator[str]:
        """Warnings: which token is scored, and in what precision."""
        if self.classifier is not None:
            text = self.classifier.config.get_text_config()
            pad = getattr(text, "pad_token_id", None)
            if self.options.pooling == "hf" and pad is None:
                yield (
                    "no pad token: batches of more than one sequence are refused, as in Hugging "
                    "Face; set config.pad_token_id"
                )
            elif self.options.pooling == "hf" and pad in models.eos_tokens(text):
                yield (
                    f"pad_token_id equals eos_token_id ({pad}): Hugging Face's rule "
                    "passes over a final eos and scores the token before it; pooling='mask' scores "
                    "the last attended token"
                )
            head = self.classifier.score
            dtype = next((p.dtype for p in head.parameters()), torch.float32)
            if models.linear(head) is None and reference.wide(dtype) != dtype:
                yield f"the reward head is no bare linear layer: it runs in {dtype}, not in fp32"
        for dtype, count in self.rounded.items():
            calls = "1 call was" if count == 1 else f"{count} calls were"
            yield f"{calls} scored by the model's own forward, in {dtype} and not in fp32"

    def _of_the_backbone(self) -> Iterator[str]:
        """Warnings: what differs from the model's own forward."""
        if not self.packs:
            return
        if _drops_soft_cap(self.base, self.attention_before):
            yield (
                "gemma2: in transformers up to 5.20, SDPA leaves out the soft cap of the attention "
                "logits (config.attn_logit_softcapping) that the model was trained with, and so do "
                "packed calls; loaded with attn_implementation='eager', both have it"
            )
        if any(map(_looks_for_outliers, self.base.modules())):
            yield (
                "in 8 bits, bitsandbytes looks for outliers in all tokens of a batch, pads too: "
                "scores depend on the batch, and packed ones differ as much as those of another "
                "batch; with llm_int8_threshold=0 they do not"
            )
        if self.options.share_prefixes and survey.draws_noise(self.marked()[0], active=False):
            yield (
                "the model has dropout: in training mode prefixes are not shared, because each "
                "sequence draws its own noise"
            )
        if self.level == "backbone" or type(self.base).__name__ in self.packed:
            yield (
                "hidden states of tokens that the attention mask hides are zeros: a head or a loss "
                "that reads them gives other numbers"
            )
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.base.modules()):
            yield "forward hooks on the backbone see packed rows [1, N, H], not [B, T, H]"


def _drops_soft_cap(base: nn.Module, attention_before: str | None) -> bool:
    """Whether the model's own attention ignores the soft cap of its config.

    gemma2 alone hands one on, of the families that run packed. Later versions refuse it with SDPA.
    """
    cap = getattr(base.config, "attn_logit_softcapping", None)
    return models.family(base) == "gemma2" and cap is not None and attention_before == "sdpa"


def _looks_for_outliers(module: nn.Module) -> bool:
    """Whether bitsandbytes keeps columns in 16 bits where any token of the batch is large."""
    state = getattr(module, "state", None)
    return type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0) > 0


def _keep_the_heap(base: nn.Module) -> None:
    """On a CPU, tell glibc's malloc to keep what a layer frees for the next layer.

    Freeing a block just below 32 MB lets it hold on to twice that (mallopt(3), "dynamic mmap
    threshold"). Else it returns a layer's memory to the system and faults it in again for the next.
    Other allocators take no notice.
    """
    if models.device(base).type == "cpu":
        torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def _choose(
    root: nn.Module, options: Options
) -> tuple[str, list[str], nn.Module | None, nn.Module | None]:
    """Level, reasons, the sequence classifier and the backbone."""
    outer, base = models.find(root)
    name = type(root).__name__
    why_not = (
        models.why_not_trie(base) if base is not None else f"{name} has no decoder rmfast knows"
    )
    backend = options.attention
    if backend == "auto":
        backend = "auto (triton on a GPU where it can, else sdpa)"
    if why_not is None and outer is not None and models.inner(outer) is base:
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


def attached(model: nn.Module) -> Patch | None:
    found = (module.__dict__.get(_ATTRIBUTE) for module in model.modules())
    return next((patch for patch in found if patch is not None), None)


def patch(
    model: Model,
    *,
    share_prefixes: bool = True,
    prune_last_layer: bool = True,
    pooling: str = "hf",
    attention: str = "auto",
    max_tokens: int | None = None,
    max_training_tokens: int | None = None,
    cuda_graphs: bool = False,
) -> Model:
    """Make a Hugging Face reward model train and score without running a token twice.

    In place, on this instance alone; the numbers stay Hugging Face's. Patching a patched model
    changes its options.

    Args:
        model: a reward model, or any module around one supported backbone (PEFT included).
        share_prefixes: run a prefix that several sequences of a batch share once. Off by itself
            while dropout is active.
        prune_last_layer: run the last decoder layer's attention and MLP, and the final norm, on
            pooled tokens only; its queries, keys and values are made of all. The final norm runs on
            all in gpt2 and gpt_bigcode, and where a hook or somebody else's code may see it.
        pooling: the token that carries the score. ``"hf"``: the rightmost that is not the pad
            token, as Hugging Face has it. ``"mask"``: the last one the attention mask lets through.
        attention: ``"triton"``, the kernel of this library; ``"sdpa"``, torch's own operations,
            on any device, and no kernel elsewhere in the layers; ``"auto"``, the kernel on a GPU
            where it can and torch's own elsewhere.
        max_tokens: trie nodes (distinct prefixes) that run at once in a call without gradients, at
            level ``"trie"``: a larger batch, such as all rollouts of a step of GRPO, runs in
            pieces, each node once, halved when memory runs out and doubled again after a while.
            Not given: 4096 on a CPU, 65536 on a GPU. 0: never in pieces. Calls at other levels,
            calls that fall back, and calls of a model that is sharded over processes never run in
            pieces.
        max_training_tokens: trie nodes that run at once in a call with gradients, at level
            ``"trie"``: a larger batch runs in pieces, each node twice forward and once backward, in
            the memory of a piece and of the keys and values of a path; halved when memory runs out.
            Not given: a batch runs whole, as one of a model that is sharded over processes does,
            but by FSDP2 applied to the model itself.
        cuda_graphs: replay small tries as CUDA graphs, in calls as those of ``max_tokens`` and of a
            Scorer, where the host would take longer than the GPU. A size (rounded up by an eighth
            at most) is captured when it comes for the third time; weights may be trained in place,
            and what is changed on modules is seen. Models whose passes ask the host something, and
            hooks, adapters and offloaded weights, run as without it.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: an unknown option or a backend that is not installed, several backbones in one
            model, or ``pooling="mask"`` on a model that does not score by its last token.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, got {type(model).__name__}")
    options = Options(
        share_prefixes=share_prefixes,
        prune_last_layer=prune_last_layer,
        pooling=pooling,
        attention=attention,
        max_tokens=max_tokens,
        max_training_tokens=max_training_tokens,
        cuda_graphs=cuda_graphs,
    )
    found = attached(model)
    if found is not None:
        if found.holder is not None and found.holder not in model.modules():
            raise ValueError(
                f"the backbone of this {type(model).__name__} is already patched as part of a "
                f"{type(found.holder).__name__}: unpatch that one first"
            )
        found.undo()
    try:
        made = Patch(model, options, found)
    except ValueError:
        if found is not None:  # refused: it stays patched as it was
            _apply_again(model, found)
        raise
    made.apply()
    return model


def repatch(model: nn.Module, **given: Any) -> Patch:
    """Patch a model with the options given; the others stay as they are, or are the defaults.

    Where somebody has wrapped the model's forward since, the wrapper has a say in the scores: it is
    patched anew, inside of it.

    Args:
        given: options of :func:`patch`; None: as they are.

    Raises:
        ValueError: as :func:`patch`.
    """
    found = attached(model)
    options = Options() if found is None else found.options
    wanted = {name: value for name, value in given.items() if value is not None}
    wanted = dataclasses.replace(options, **wanted)
    stale = found is None or found.is_orphan() or found.holder not in model.modules()
    if stale or wanted != options or any(one.slot() is None for one in found.overrides[:1]):
        patch(model, **dataclasses.asdict(wanted))
    return attached(model)


def _apply_again(model: nn.Module, found: Patch) -> None:
    """Apply a patch that was undone; make a new one where somebody has replaced a forward since."""
    if all(stand_in.fits() for stand_in in found.overrides):
        found.apply()
    else:
        patch(model, **dataclasses.asdict(found.options))


def unpatch(model: Model) -> Model:
    """Put everything back as it was before :func:`patch`. Does nothing to an unpatched model."""
    found = attached(model)
    if found is not None:
        found.undo()
    return model


@contextlib.contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """:func:`patch` for the length of a ``with`` block, then as it was.

    With gradient checkpointing the backward belongs inside: it runs the layers again.
    """
    found = attached(model)
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)
        if found is not None:
            _apply_again(model, found)


@contextlib.contextmanager
def unpatched(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`unpatch` for the length of a ``with`` block, then as it was, with what it counted."""
    found = attached(model)
    if found is not None:
        found.undo()
    try:
        yield model
    finally:
        if found is not None:
            _apply_again(model, found)


def report(model: nn.Module) -> Report:
    """What :func:`patch` made of ``model``.

    Raises:
        ValueError: the model is not patched.
    """
    found = attached(model)
    if found is None:
        raise ValueError(f"{type(model).__name__} is not patched: call rmfast.patch(model) first")
    return found.report()
