"""The attention function rmfast gives to transformers, and what it knows of the packed batch.

``use(config)`` names it in the model's config, as ``config._attn_implementation``. Called with a
:class:`TrieRun` it runs on the packed trie; called without one it is the function that was there
before, so whatever the packed path cannot serve attends as if nothing had been patched.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.ops import TriePlan, trie_attention
from rmfast.ops import _cpu as cpu
from rmfast.ops._plan import made_for
from rmfast.packed.compiling import untraced
from rmfast.trie import PackedTrie

PREFIX = "rmfast_"


class KeysAndValues(Exception):
    """Leaves a decoder layer as soon as its attention function has the keys and values."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value


class SequencesMeet(Exception):
    """The model's own attention would not keep the sequences of one row apart."""

    def __init__(self, why: str = "") -> None:
        super().__init__(f"sequences in one row, which this model lets see each other{why}")


@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """Keys and values that go from one piece of a trie to the next, layer by layer.

    Attributes:
        count: how many of the trie's first nodes ran in earlier pieces.
        keep: int64 ``[K]``, the nodes that the next piece will need.
        before: what earlier pieces left of those ``count`` nodes.
        old: all of ``keep`` is among those, so it is the first of them.
        after: what this one leaves of the nodes in ``keep``.
    """

    count: int
    keep: Tensor
    before: dict[nn.Module, tuple[Tensor, Tensor]]
    old: bool = False
    after: dict[nn.Module, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)

    @untraced()
    def join(
        self, layer: nn.Module, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:  # [1, Hk, N - count, D] -> [1, Hk, N, D]
        if self.count:
            before = self.before[layer]
            key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        if self.keep.numel() and self.old:  # no copy, nor one that holds this piece's in memory
            self.after[layer] = tuple(x[:, :, : len(self.keep)] for x in before)
        elif self.keep.numel():
            keep = self.keep.to(key.device)
            self.after[layer] = tuple(x.index_select(2, keep) for x in (key, value))
        return key, value


@dataclasses.dataclass(frozen=True, eq=False)
class TrieRun:
    """What the layers of one packed forward pass are given, as the keyword ``rmfast_run``.

    Attributes:
        trie: the nodes whose keys and values there are.
        plan: of the queries that run.
        shared: a node may belong to several sequences.
        backend: as in :func:`rmfast.patch`.
        pooled: int64 ``[P]``, rising nodes that the last layer is wanted for; None: all.
        carried: of a trie that is a piece of a larger one.
        leave_at_attention: raise :class:`KeysAndValues` instead of attending.
        keys_and_values: those of all nodes, where only pooled queries run.
        apart: flash attention would have to keep sequences of one row apart.
    """

    trie: PackedTrie
    plan: TriePlan
    shared: bool
    backend: str = "auto"
    pooled: Tensor | None = None
    carried: Carried | None = None
    leave_at_attention: bool = False
    keys_and_values: tuple[Tensor, Tensor] | None = None
    apart: bool = False

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,  # [1, Hq, M, D]
        key: Tensor,  # [1, Hk, M, D]
        value: Tensor,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> Tensor:  # [1, M, Hq, D]
        """What transformers' attention functions return, given their arguments."""
        if position_bias is not None or is_causal is False:
            raise RuntimeError(
                "rmfast runs causal attention without a position bias; unpatch this model and "
                "report its class, it should not have been patched"
            )
        if self.carried is not None and self.keys_and_values is None:
            key, value = self.carried.join(layer, key, value)
        if self.leave_at_attention:
            raise KeysAndValues(key, value)
        if self.keys_and_values is not None:
            key, value = self.keys_and_values
        device = query.device.type
        if torch.is_autocast_enabled(device):  # as torch's own attention does
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        plan = self.plan.on(query.device)
        rule = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
        if not dropout:
            return trie_attention(query, key, value, plan, backend=self.backend, **rule)
        if self.shared:
            raise RuntimeError(
                "attention dropout is active, so sequences must not share prefixes: "
                "patch with share_prefixes=False, and report this model's class"
            )
        rule["scale"] = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cpu.trie_attention(
            query, key, value, *plan.tensors, dropout=dropout, made=made_for(plan.carrier), **rule
        )


def register(before: str) -> str:
    """Register rmfast's attention, which stands in for ``before``, with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + before
    AttentionInterface.register(name, functools.partial(_forward, before))
    if before in ALL_MASK_ATTENTION_FUNCTIONS:  # calls that are not packed get the mask they had
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    return name


def use(config: Any) -> str:
    """Name rmfast's attention in ``config``; returns the name it stands in for."""
    before = config._attn_implementation.removeprefix(PREFIX)
    if config._attn_implementation == before:
        config._attn_implementation_internal = register(before)
    return before


def leave(config: Any) -> None:
    """Put back the name that :func:`use` replaced; leave another name alone."""
    name = getattr(config, "_attn_implementation", None)
    if name is not None and name.startswith(PREFIX):
        config._attn_implementation_internal = name.removeprefix(PREFIX)


def unpacked_function(before: str, module: nn.Module) -> Callable | None:
    """The attention function that ``module`` called before rmfast; None where it is unknown."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if before != "eager":
        return ALL_ATTENTION_FUNCTIONS.get(before)
    # eager attention has no entry: every modelling file passes a function of its own as default
    for cls in type(module).__mro__:
        forward = cls.__dict__.get("forward")
        if forward is not None:
            found = inspect.unwrap(forward).__globals__.get("eager_attention_forward")
            if found is not None:
                return found
    return None


def name(config: Any) -> str:
    """The attention function that a model has now, without rmfast."""
    return (getattr(config, "_attn_implementation", None) or "").removeprefix(PREFIX)


def foreign(before: str) -> str | None:
    """The module of an attention function that is not transformers' own; None where it is.

    It may attend otherwise, or to tokens that other processes hold (sequence parallelism).
    """
    from transformers.integrations import flash_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(before)
    while isinstance(function, functools.partial):
        function = function.func
    owners = [] if function is None else [function.__module__]
    if "flash" in before:
        function = flash_attention._flash_attention_forward
        # verl's, SkyRL's and AReaL's splits sequences over this many processes
        size = getattr(function, "__globals__", {}).get("get_ulysses_sequence_parallel_world_size")
        if size is None or size() > 1:
            owners.append(function.__module__)
    return next((name for name in owners if not name.startswith("transformers.")), None)


@functools.cache
def _caps(function: Callable) -> bool:
    """Whether an attention function caps logits where it is asked to, or refuses to run."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    known = inspect.signature(function).parameters.keys() | set(function.__code__.co_consts)
    return "softcap" in known


def _named(module: nn.Module, before: str) -> nn.Module:
    """A layer as its attention function knew it: flash attention looks its own name up."""
    if "flash" not in before:
        return module
    out = copy.copy(module)  # threads may run this layer packed
    out.config = copy.copy(module.config)
    out.config._attn_implementation_internal = before
    return out


def _forward(
    before: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs
) -> tuple[Tensor, Any]:
    run, function = kwargs.pop("rmfast_run", None), unpacked_function(before, module)
    if run is None:
        return function(_named(module, before), query, key, value, *args, **kwargs)
    kwargs.pop("attention_mask", None)  # the trie is the mask
    if kwargs.get("softcap") is not None and not _caps(function):
        del kwargs["softcap"]
    if run.apart and "position_ids" not in kwargs:  # which flash attention goes by
        raise SequencesMeet
    return run.attend(module, query, key, value, **kwargs), None
