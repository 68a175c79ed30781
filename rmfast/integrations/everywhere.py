"""Patch the models that other people's programs load, without a change to these programs."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterable
from multiprocessing.util import Finalize
from typing import Any

from torch import nn

from rmfast.packed import models, patching
from rmfast.packed.state import Options, Report

_active: list[everywhere] = []
_replaced: list[classmethod] = []  # the loader of transformers and ours, while one is active
_reports: list[Report] = []  # with the counters of the patches, which outlive the models
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_reports.clear)


class everywhere(contextlib.ContextDecorator):
    """While it is active, patch each reward model that transformers loads in this process.

    For programs that load a model by its path and hand it on, such as OpenRLHF and verl; ``rmfast
    run`` does it to whole programs. **The one place where rmfast replaces a method of another
    library's class**: ``PreTrainedModel.from_pretrained``, which every way of loading goes through.
    Leaving the block puts the original back; models loaded meanwhile stay patched. Blocks may be
    nested, the innermost goes first, and each works as a decorator, too.

    A reward model is a sequence classifier, a token classifier with one label, or a decoder under
    nothing but heads of one output, as OpenRLHF makes them. What :func:`rmfast.patch` refuses, and
    what nothing can be done for, stays as it was; a line on stderr says why. When the process ends,
    the report of each model that was patched is printed there.

    Args:
        classes: names of classes whose instances are patched, too: a policy's, for example.
        options: of :func:`rmfast.patch`.

    Raises:
        TypeError: :func:`rmfast.patch` has no such option.
        ValueError: an unknown value of one, or a backend that is not installed.
    """

    def __init__(self, classes: Iterable[str] = (), **options: Any) -> None:
        Options(**options)
        self.classes, self.options = frozenset(classes), options

    def __enter__(self) -> everywhere:
        from transformers.modeling_utils import PreTrainedModel

        if not _active:
            before = vars(PreTrainedModel)["from_pretrained"]
            _replaced[:] = before, _patching(before)
            PreTrainedModel.from_pretrained = _replaced[1]
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        from transformers.modeling_utils import PreTrainedModel

        _active.remove(self)
        now = vars(PreTrainedModel)["from_pretrained"]
        # in somebody's wrapper, put there meanwhile, ours stays, and hands everything on
        if not _active and getattr(now, "__func__", None) is _replaced[1].__func__:
            PreTrainedModel.from_pretrained = _replaced[0]


def _patching(before: classmethod) -> classmethod:
    """``from_pretrained`` that patches what it has loaded."""

    @functools.wraps(before.__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = before.__get__(None, cls)(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for one in reversed(_active):
            if type(model).__name__ in one.classes or _is_reward_model(model):
                _patch(model, one.options)
                break
        return loaded

    return classmethod(from_pretrained)


def _is_reward_model(model: nn.Module) -> bool:
    kinds = [cls.__name__ for cls in type(model).__mro__]  # programs subclass at run time
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return True
    if any(kind.endswith("ForTokenClassification") for kind in kinds):
        return model.config.num_labels == 1
    base = models.inner(model)
    if not isinstance(base, nn.Module) or models.decoder_layers(base) is None:
        return False
    beside = [[*child.modules()] for child in model.children() if child is not base]
    linears = [[m for m in modules if isinstance(m, nn.Linear)] for modules in beside]
    return {some[-1].out_features for some in linears if some} == {1}  # no language model's head


def _patch(model: nn.Module, options: dict[str, Any]) -> None:
    if patching.attached(model) is not None:  # one was loaded in the course of loading another
        return
    name = type(model).__name__
    try:
        made = patching.attached(patching.patch(model, **options))
    except ValueError as error:
        return _say(f"rmfast: {name} stays as it was: {error}")
    if not made.overrides:
        patching.unpatch(model)
        return _say(f"rmfast: {name} stays as it was: {made.reasons[0]}")
    _say(f"rmfast: {name} is patched, level {made.level}")
    if not _reports:
        Finalize(None, _tell, exitpriority=-100)  # after those of child processes
    about = [f"{name} in process {os.getpid()}"]
    about += made.reasons[:1] if made.level == "head" else []
    made.fallbacks = _Fallbacks()
    _reports.append(Report(made.level, about, [], made.fallbacks, made.packed))


class _Fallbacks(Counter):
    """Says a reason when it is first met: processes that are killed, as Ray's, print no report."""

    def __setitem__(self, reason: str, count: int) -> None:
        if reason not in self:
            _say(f"rmfast: a call ran unpacked in process {os.getpid()}: {reason}")
        super().__setitem__(reason, count)


def _tell() -> None:
    for report in _reports:
        if not report.packed:
            report.warnings.append("no call ran packed")
        _say(str(report))


def _say(text: str) -> None:
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one write, as others write, too
