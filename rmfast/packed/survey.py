"""What a call has to know of a model's modules, found in one walk over them.

People train, freeze, hook, wrap and replace modules between two calls. So each call looks again,
but only where there is something to see.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

_NOISE = ("drop", "jitter", "noise")
_state = operator.attrgetter("__dict__")
_pre_hooks = operator.attrgetter("_forward_pre_hooks")


class Seen(NamedTuple):
    """What a call has to know of a model, as it is now.

    Attributes:
        why_not: what somebody changed in the backbone so that the call cannot run packed, or None.
        noisy: the model draws noise for each token.
        whole: the call must run in one: it keeps something for a backward, or processes share it.
        sharded: processes share the model.
    """

    why_not: str | None
    noisy: bool
    whole: bool
    sharded: bool


def walk(root: nn.Module) -> list[nn.Module]:
    """All modules, level by level, each once.

    ``root.modules()`` hands each through as many generators as it lies deep.
    """
    level = found = {root: None}
    while level:
        inside = (child for module in level for child in module._modules.values())
        level = dict.fromkeys(child for child in inside if child is not None and child not in found)
        found |= level
    return [*found]


class Survey:
    """The places in a model that a call looks at: right until modules or attributes come or go.

    It keeps no module alive and no value of an attribute.

    Args:
        modules: :func:`walk` of the model.
        base: the backbone in it.
    """

    def __init__(self, modules: list[nn.Module], base: nn.Module) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._names = _names(modules)
        self._causal: list[int] = []  # indices of modules, as the lists below
        self._windows: list[int] = []
        self._configs: list[int] = []
        self._chances: list[tuple[int, str]] = []
        inside = set(walk(base))
        for i, module in enumerate(modules):
            names = module.__dict__.keys()
            self._chances += [(i, name) for name in names if any(x in name for x in _NOISE)]
            if isinstance(module, nn.modules.dropout._DropoutNd):
                self._chances.append((i, "p"))
            if module not in inside:
                continue
            if "is_causal" in names:
                self._causal.append(i)
            if "config" in names:
                self._configs.append(i)
            if names >= {"sliding_window", "layer_idx", "config"}:
                self._windows.append(i)

    def is_of(self, modules: list[nn.Module]) -> bool:
        """Whether these are the same modules, each with as many attributes and the same newest."""
        return (
            len(self._modules) == len(modules)
            and all(map(operator.is_, modules, [ref() for ref in self._modules]))
            and self._names == _names(modules)
        )

    def configs(self, modules: list[nn.Module]) -> list[Any]:
        """The configs in the backbone, each once: copied layers have their own."""
        found = (modules[i].__dict__.get("config") for i in self._configs)
        return list({id(config): config for config in found}.values())

    def look(self, modules: list[nn.Module]) -> Seen:
        """What a call has to know of the modules, as they are now."""
        every = (p for m in reversed(modules) for p in m._parameters.values())  # adapters first
        learns = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in every)
        why_not, noisy = self._why_not(modules), self.draws_noise(modules, active=True)
        sharded = is_sharded(modules)
        return Seen(why_not, noisy, learns or sharded, sharded)

    def _why_not(self, modules: list[nn.Module]) -> str | None:
        if any(modules[i].__dict__.get("is_causal") is False for i in self._causal):
            return "attention modules were made bidirectional"
        for i in self._windows:
            state = modules[i].__dict__
            used = state["sliding_window"] if state.get("is_sliding", True) else None
            if used != _window_of_mask(state["config"], state["layer_idx"]):
                return "mask and attention have different sliding windows"
        for hooks in filter(None, map(_pre_hooks, modules)):
            for hook in hooks.values():
                name = getattr(getattr(hook, "func", hook), "__name__", None)
                if name == "_adapter_names_pre_forward_hook":
                    return "PEFT's adapter_names: each row has an adapter of its own"
        return None

    def draws_noise(self, modules: list[nn.Module], active: bool) -> bool:
        """Whether a model can draw noise for each token; with ``active``, whether it does now."""
        places = ((modules[i], name) for i, name in self._chances)
        chances = (m.__dict__.get(name) for m, name in places if m.training or not active)
        return any(
            isinstance(chance, (int, float)) and not isinstance(chance, bool) and chance > 0
            for chance in chances
        )


def _names(modules: list[nn.Module]) -> list[Any]:
    """How many attributes each has, and the newest: what is new comes last."""
    states = list(map(_state, modules))
    return [*map(len, states), *map(next, map(reversed, states))]


def _window_of_mask(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def draws_noise(model: nn.Module, active: bool) -> bool:
    """Whether a model can draw noise for each token; with ``active``, whether it does now."""
    modules = walk(model)
    return Survey(modules, model).draws_noise(modules, active)


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether other processes hold parts of the parameters, and so must run as many passes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(
        # FSDP1, and tensor parallelism before transformers had it by DTensor
        module.__dict__.get("_is_fsdp_managed_module")
        or "_hf_device_mesh" in module.__dict__
        # FSDP2 and tensor parallelism, DeepSpeed's ZeRO-3
        or any(
            type(p).__name__ == "DTensor" or hasattr(p, "ds_id")
            for p in module._parameters.values()
        )
        for module in modules
    )
