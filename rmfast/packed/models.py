"""What a model is, and whether it, or one call of it, can run packed.

Everything here only looks. A wrong yes is a wrong score, so what is not known to be right is a no.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rmfast.packed import attention
from rmfast.packed.families import LAST_TOKEN_HEADS, TRIE_BACKBONES
from rmfast.packed.survey import walk

# What stands in any family's models; the rest is written in its own file.
_PARTS = ("torch.nn.", "peft.", *(f"transformers.{x}" for x in ("activations", "modeling_")))
_LABELS = {"labels", "start_positions"}
_SEES_PREFIXES = {"full_attention", "sliding_attention"}
# A module of these gives each token an output of its own.
_POINTWISE = tuple(
    f"torch.nn.modules.{kind}"
    for kind in ("linear", "activation", "dropout", "normalization", "container")
)


@functools.cache
def _transformers_folder() -> str:
    import transformers

    return os.path.dirname(transformers.__file__) + os.sep


def _owner(module: nn.Module) -> type:
    """The class that defines the ``forward`` of a module."""
    return next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)


def family(module: nn.Module) -> str:
    """The model type of the class whose forward runs; a config of one's own may say another."""
    config = getattr(_owner(module), "config_class", None)
    return getattr(config, "model_type", None) or module.config.model_type


def runs_transformers(module: nn.Module) -> bool:
    """Whether the class's forward, and all that wraps it, is transformers' own code."""
    function = _owner(module).__dict__["forward"]
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_transformers_folder()):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def hooked(module: nn.Module) -> bool:
    """Whether accelerate has wrapped the forward to move weights and inputs to a device."""
    function = getattr(module.__dict__.get("forward"), "func", None)
    hooks = getattr(function, "__module__", None) == "accelerate.hooks"
    return hooks and "_old_forward" in module.__dict__


def slot(module: nn.Module) -> str:
    """The attribute that holds an instance's forward, inside of accelerate's wrapper."""
    return "_old_forward" if hooked(module) else "forward"


def replaced(module: nn.Module) -> Any:
    """The forward that somebody put on an instance; None: it runs its class's."""
    now = module.__dict__.get(slot(module))
    own = hooked(module) and getattr(now, "__func__", None) is type(module).forward
    return None if own else now


def device(model: nn.Module) -> torch.device:
    """The device of a model's inputs, also while its weights are offloaded."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            hook = getattr(module, "_hf_hook", None)
            runs_on = getattr(hook, "execution_device", None) if p.is_meta else None
            return p.device if runs_on is None else torch.device(runs_on)
    return torch.device("cpu")


def decoder_layers(module: nn.Module) -> nn.ModuleList | None:
    """The one stack of decoder layers that a backbone holds; None where there is no such one."""
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def inner(outer: nn.Module) -> nn.Module | None:
    """The backbone of a model with a head."""
    return getattr(outer, outer.base_model_prefix, None)


def find(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The sequence classifier that scores by its last token, and the decoder; None where absent."""
    from transformers import PreTrainedModel

    known = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    bases = [m for m in known if decoder_layers(m) is not None]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        bases = []  # its own forward runs, as an encoder's does
    if len(bases) > 1:
        names = ", ".join(type(m).__name__ for m in bases)
        raise ValueError(f"{type(model).__name__} holds several backbones ({names}): patch each")
    heads = [m for m in known if _scores_last_token(m)]
    return next(iter(heads), None), next(iter(bases), None)


def _scores_last_token(module: nn.Module) -> bool:
    wrapped = replaced(module) is not None  # by somebody: that must stay outermost
    if wrapped or not isinstance(inner(module), nn.Module) or not hasattr(module, "score"):
        return False
    own = _owner(module).__name__.endswith("ForSequenceClassification")
    listed = own and family(module) in LAST_TOKEN_HEADS and _pools_rightmost(module)
    known = runs_transformers(module) and (is_generic(module) or listed)
    return known and is_pointwise(module.score)


def _pools_rightmost(module: nn.Module) -> bool:
    """Whether a forward that a family wrote out takes the rightmost token that is no pad.

    Up to transformers 5.12, biogpt's counted the tokens: another one, where pads are on the left.
    """
    forward = inspect.unwrap(_owner(module).__dict__["forward"])
    return "last_non_pad_token" in forward.__code__.co_varnames


def is_generic(module: nn.Module) -> bool:
    """Whether forward is the sequence classifier's that most families share."""
    from transformers.modeling_layers import GenericForSequenceClassification

    return _owner(module) is GenericForSequenceClassification


def is_pointwise(head: nn.Module) -> bool:
    """Whether a head gives each token a score of its own: it may then see the pooled ones alone."""
    return all(
        isinstance(m, nn.Linear) or type(m).__module__.startswith(("peft.", *_POINTWISE))
        for m in head.modules()
    )


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see what goes into a module or comes out, in either direction."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or _has_any_global_hook()


def linear(head: nn.Module) -> nn.Linear | None:
    """The bare linear layer behind a head, through PEFT's ``modules_to_save``; None if not bare."""
    for module in head.modules():
        moves = type(getattr(module, "_hf_hook", None)).__name__ in ("NoneType", "AlignDevicesHook")
        if not moves or replaced(module) or is_watched(module):
            return None
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = getattr(head, "active_adapters", None) or []
        if getattr(head, "disable_adapters", False) or not active:
            head = head.original_module
        elif len(active) == 1 and active[0] in copies:
            head = copies[active[0]]
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter
    return head if plain and not head.weight.is_meta else None


def why_not_trie(base: nn.Module) -> str | None:
    """The reason a backbone cannot run packed; None when it can."""
    config, name = base.config, type(base).__name__
    if not runs_transformers(base):
        return f"{name} has a forward of its own, which rmfast does not know"
    kinds = set(getattr(config, "layer_types", None) or ()) - _SEES_PREFIXES
    if kinds:
        return f"{name} has {', '.join(sorted(kinds))} layers, which carry state across branches"
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if not getattr(config, "is_causal", True) or bidirectional:
        return f"{name} is configured bidirectional: a token sees what comes after it"
    if family(base) not in TRIE_BACKBONES:
        return f"{name} ({family(base)}) is not among the backbones proved to run packed"
    known = (*_PARTS, _owner(base).__module__)
    for module in walk(base)[1:] if config.model_type != family(base) else ():
        if not type(module).__module__.startswith(known):
            return f"{name} has a {type(module).__name__}, which rmfast does not know"
    if getattr(config, "output_attentions", False):
        return "config.output_attentions asks for attention weights in every call"
    before = attention.name(config)
    callers = [m for m in decoder_layers(base)[0].modules() if runs_transformers(m)]
    named = {x for m in callers for x in inspect.signature(type(m).forward).parameters}
    if "cache_position" in named and _scales_by_position(config):  # up to transformers 5.3
        return f"{name} scales attention by cache_position, the place in the padded batch"
    if not any(attention.unpacked_function(before, m) for m in callers):
        return f"{name} uses attention {before!r}, which rmfast cannot call back"
    return None


def _rope(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(v for v in rope.values() if isinstance(v, dict))]


def position_limit(config: Any) -> float:
    """Length from which the rotary frequencies depend on the padded batch; inf: they never do."""
    kinds = _rope(config)
    if not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return math.inf
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds]
    lengths += [
        getattr(config, name, None)
        for name in ("original_max_position_embeddings", "max_position_embeddings")
    ]
    return min(length for length in lengths if length)


def forget_long_rows(model: nn.Module) -> None:
    """Let short rows have their own rotary frequencies again, after long ones.

    Up to transformers 5.12 they keep the long ones': the length goes to a name that nobody reads.
    """
    for module in walk(model):
        if module.__dict__.pop("None_max_seq_len_cached", None) is not None:
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)


def text_config(model: nn.Module) -> Any:
    """The text part of a model's config; None for a model without one."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def pad_token(model: nn.Module) -> int | None:
    """The pad token of the config; None where there is none that has an embedding.

    A token without one is in no conversation, and cannot fill a batch.
    """
    pad, rows = getattr(text_config(model), "pad_token_id", None), vocabulary(model)
    return pad if pad is not None and 0 <= pad < (rows or math.inf) else None


def eos_tokens(config: Any) -> set[int]:
    """The tokens that end a text, of a text model's config; many have none, or several."""
    found = getattr(config, "eos_token_id", None)
    return {i for i in (found if isinstance(found, list) else [found]) if i is not None}


def vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embeddings; None where they are not known."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return table.weight.shape[0] if hasattr(table, "weight") else None


def positions(model: nn.Module) -> int | None:
    """The most tokens that a model has positions for; None: it has no limit, or none is known."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1
        return None
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings"):
            if table.num_embeddings == limit and table.padding_idx is not None:  # as RoBERTa's
                return limit - table.padding_idx - 1
    return limit


def takes_pairs(config: Any, tokenizer: Any) -> bool:
    """Whether a model reads two texts as two segments, ``tokenizer(prompt, response)``.

    Encoders such as BERT do, whose tokenizer puts a separator between the texts. A decoder reads
    one text, even where its tokenizer begins each of two with a BOS.
    """
    from transformers.models.auto import modeling_auto

    if config is None or tokenizer is None:
        return False
    config = config.get_text_config()
    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.model_type not in encoders or getattr(config, "is_decoder", False):
        return False
    one, two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
    return two > one


def has_absolute_positions(base: nn.Module) -> bool:
    """Whether a token's position counts, not only its distance to other tokens."""
    tokens = base.get_input_embeddings()
    learned = any(isinstance(m, nn.Embedding) and m is not tokens for m in base.modules())
    return learned or _scales_by_position(base.config)


def _scales_by_position(config: Any) -> bool:
    return any("llama_4_scaling_beta" in kind for kind in _rope(config))


def arguments(base: nn.Module) -> frozenset[str]:
    """Names of the arguments that the backbone reads; it ignores all others."""
    from transformers.utils import TransformersKwargs

    named = inspect.signature(type(base).forward).parameters
    return frozenset(named) | frozenset(TransformersKwargs.__annotations__)


def can_generate(model: nn.Module) -> bool:
    """Whether there is a causal language model in a model."""
    from transformers import PreTrainedModel

    return any(isinstance(m, PreTrainedModel) and m.can_generate() for m in model.modules())


def losses(root: nn.Module, base: nn.Module) -> list[nn.Module]:
    """The models around a backbone whose loss is one of tokens: it may read hidden ones."""
    from transformers import PreTrainedModel

    around = (
        m for m in root.modules()
        if isinstance(m, PreTrainedModel) and m is not base and any(x is base for x in m.modules())
    )  # fmt: skip
    names = {m: inspect.signature(m.forward).parameters.keys() for m in around}
    return [m for m in names if m.can_generate() or names[m] & _LABELS]


class NoCache:
    """Returned where transformers would return a key/value cache that nobody asked for by name.

    The packed pass keeps none. Using this one is an error, so that decoding step by step on a
    patched model fails loudly.
    """

    MESSAGE = (
        "this call ran packed and kept no key/value cache: pass use_cache=True to the call whose "
        "past_key_values you want to use"
    )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: {self.MESSAGE}")

    def __len__(self) -> int:
        raise RuntimeError(self.MESSAGE)

    def __iter__(self) -> Any:
        raise RuntimeError(self.MESSAGE)

    def __getitem__(self, index: Any) -> Tensor:
        raise RuntimeError(self.MESSAGE)


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[bool]:
    """Put every module back into the mode, training or eval, that it had before.

    Yields:
        Whether any is in training mode.
    """
    modules = walk(model)
    modes = [module.training for module in modules]
    try:
        yield any(modes)
    finally:
        before = list(zip(modules, modes, strict=True))
        for module, training in before:
            if module.training is not training:
                module.train(training)  # which may do more than to set it, also for what is inside
        for module, training in before:
            if module.training is not training:
                module.training = training
