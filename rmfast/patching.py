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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rmfast import attention, ops, reference
from rmfast.families import LAST_TOKEN_HEADS, TRIE_BACKBONES
from rmfast.trie import PackedTrie, pack

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
    """The class whose ``forward`` runs: a subclass that leaves it alone is as good as its parent."""
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


def _linear(head: nn.Module) -> nn.Linear | None:
    """The plain linear layer behind a score head, through PEFT's ``modules_to_save`` wrapper."""
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = getattr(head, "active_adapters", None) or []
        if getattr(head, "disable_adapters", False) or not active:
            head = head.original_module
        elif len(active) == 1 and active[0] in copies:
            head = copies[active[0]]
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter
    return head if plain and not head._forward_hooks and not head._forward_pre_hooks else None


def _dropout(model: nn.Module, training: bool) -> bool:
    """Whether any dropout has a chance above zero (and is active, with ``training``)."""
    for module in model.modules():
        if training and not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        for name in ("attention_dropout", "dropout", "attn_pdrop"):
            chance = getattr(module, name, 0)
            if isinstance(chance, float) and chance > 0:
                return True
    return False


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


# --- standing in for a forward


class _Override:
    """Stands in for ``forward`` on one instance. Pickles and copies along with its module."""

    def __init__(self, module: nn.Module, patch: Patch) -> None:
        self.module = module
        self.patch = patch
        self.before = module.__dict__.get("forward")  # an instance forward of somebody else's

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # trainers drop the columns it does not name
        return inspect.signature(self.before or getattr(type(self.module), "forward").__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate rebinds a forward it unwraps as a method
            args = args[1:]
        if not self.patch.active:
            return self.original(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Unservable(Exception):
    """A call the packed path cannot serve; the message is the reason."""


class _PackedForward(_Override):
    """What the model's and the backbone's stand-ins share: read a call, pack it, run it."""

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return dict(kwargs)
        bound = self.__signature__.bind(*args, **kwargs)
        named = dict(bound.arguments)
        named.update(named.pop("kwargs", {}))
        return named

    def check(self, call: dict[str, Any]) -> None:
        """Raise :class:`_Unservable` unless the call is ids, mask and positions alone."""
        ids, mask = call.get("input_ids"), call.get("attention_mask")
        config = self.patch.base.config
        if ids is None or call.get("inputs_embeds") is not None:
            raise _Unservable("inputs_embeds instead of input_ids")
        if ids.ndim != 2 or ids.numel() == 0:
            raise _Unservable("input_ids is not a batch [B, T] of tokens")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            raise _Unservable("attention_mask is not [B, T]")
        if call.get("use_cache") or call.get("past_key_values") is not None:
            raise _Unservable("a key/value cache was asked for")
        limit = self.patch.position_limit
        if limit is not None and ids.shape[1] > limit:
            raise _Unservable(f"longer than {limit} positions, where frequencies depend on padding")
        for name, value in call.items():
            if name not in _KNOWN and value is not None and value is not False:
                if name in self.patch.meaningful:
                    raise _Unservable(f"the argument {name}")
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if call.get(name, getattr(config, name, False)) and name not in self.served:
                raise _Unservable(f"the argument {name}")
        if getattr(self.patch.base.get_input_embeddings(), "neftune_noise_alpha", None):
            if self.module.training:
                raise _Unservable("NEFTune noise depends on the padded length")

    served: frozenset[str] = frozenset()

    def pack(self, call: dict[str, Any], pooled: Tensor | None) -> tuple[PackedTrie, bool, Tensor]:
        """The trie of the attended tokens up to ``pooled``, whether it is shared, and [B, T] kept."""
        ids = call["input_ids"].cpu()
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        columns = torch.arange(ids.shape[1])
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.cpu() != 0
        if pooled is not None:
            if not keep.gather(1, pooled[:, None]).all():
                raise _Unservable("a row is scored at a token that its attention_mask hides")
            keep = keep & (columns <= pooled[:, None])
        elif not keep.any(1).all():
            raise _Unservable("a row has no attended token")
        if positions is not None:
            positions = positions.cpu()
            if positions.ndim != 2 or positions.shape[1] != ids.shape[1]:
                raise _Unservable("position_ids is not [B, T]")
            offset = (positions - columns).expand(ids.shape)
            first = offset.gather(1, keep.int().argmax(1, keepdim=True))
            if (keep & (offset != first)).any():
                raise _Unservable("position_ids that do not rise by one with each token")
        elif self.patch.absolute_positions:
            positions = columns[None]
        share = self.patch.options.share_prefixes and not (
            self.patch.root.training and _dropout(self.patch.root, training=True)
        )
        trie = pack(ids, keep, position_ids=positions, share_prefixes=share)
        device = call["input_ids"].device
        fields = dataclasses.fields(trie)
        return PackedTrie(*(getattr(trie, f.name).to(device) for f in fields)), share, keep

    def backbone(
        self, call: Callable, trie: PackedTrie, shared: bool, pooled: Tensor | None, **kwargs: Any
    ) -> Any:
        run = attention.TrieRun(trie, shared, pooled)
        # a 4D mask is handed to the layers as it is; this one fails loudly should any use it
        no_mask = torch.empty(0, 0, 0, 0, device=trie.input_ids.device)
        return call(
            input_ids=trie.input_ids[None],
            attention_mask=no_mask,
            position_ids=trie.position_ids[None],
            use_cache=False,
            rmfast_run=run,
            **kwargs,
        )


_KNOWN = frozenset(
    "input_ids attention_mask position_ids labels inputs_embeds past_key_values use_cache "
    "output_attentions output_hidden_states output_router_logits return_dict "
    "num_items_in_batch cache_position".split()
)


class _ScoringForward(_PackedForward):
    """``forward`` of a sequence classifier that scores by its last token."""

    @torch.compiler.disable(recursive=False)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        try:
            if self.patch.level == "head":
                raise _Unservable("")
            self.check(call)
            return self.packed(call)
        except _Unservable as reason:
            if str(reason):
                self.patch.fallbacks[str(reason)] += 1
        if self.patch.options.pooling == "hf" and self.patch.level == "trie":
            return self.unpacked(call)
        return self.padded(call)

    def packed(self, call: dict[str, Any]) -> Any:
        patch = self.patch
        pooled = self.pooled(call).cpu()
        trie, shared, _ = self.pack(call, pooled)
        rows = trie.pool_index.unique() if patch.last_layer is not None else None
        patch.prepare()
        out = self.backbone(patch.base, trie, shared, rows)
        return self.scored(call, self.scores(out[0][0], trie.pool_index))

    def padded(self, call: dict[str, Any]) -> Any:
        """Hugging Face's backbone on the padded batch; pooled first, so the head sees B rows."""
        ids = call.get("input_ids")
        if ids is None:
            if self.patch.options.pooling == "mask":
                raise ValueError("pooling='mask' needs input_ids: inputs_embeds alone has no rule")
            return self.unpacked(call)
        inputs = {k: v for k, v in call.items() if k not in ("labels", "return_dict")}
        out = self.patch.inner(**inputs, return_dict=True)
        batch, length, width = out[0].shape
        start = torch.arange(batch, device=out[0].device) * length
        index = start + self.pooled(call).to(out[0].device)
        scores = self.scores(out[0].reshape(batch * length, width), index)
        return self.scored(call, scores, out)

    def unpacked(self, call: dict[str, Any]) -> Any:
        as_dict = self.return_dict(call)
        out = self.original(**{**call, "return_dict": True})
        out.logits = out.logits.to(reference.wide(out.logits.dtype))
        return out if as_dict else out.to_tuple()

    def pooled(self, call: dict[str, Any]) -> Tensor:  # int64 [B]
        ids, pad = call["input_ids"], self.module.config.get_text_config().pad_token_id
        pooling = self.patch.options.pooling
        if pad is None and pooling == "hf" and ids.shape[0] != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        return reference.last_token(ids, call.get("attention_mask"), pad, pooling)

    def scores(self, hidden: Tensor, index: Tensor) -> Tensor:  # [M, H], [B] -> [B, num_labels]
        linear = _linear(self.module.score)
        if linear is not None:
            return ops.reward_head(hidden, index, linear.weight, linear.bias)
        scores = self.module.score(hidden[index])
        return scores.to(reference.wide(scores.dtype))

    def return_dict(self, call: dict[str, Any]) -> bool:
        asked = call.get("return_dict")
        return self.module.config.return_dict if asked is None else asked

    def scored(self, call: dict[str, Any], scores: Tensor, backbone: Any = None) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        loss = None
        if call.get("labels") is not None:
            model = self.module
            loss = model.loss_function(
                logits=scores, labels=call["labels"], pooled_logits=scores, config=model.config
            )
        names = ("past_key_values", "hidden_states", "attentions")
        rest = {name: getattr(backbone, name, None) for name in names}
        out = SequenceClassifierOutputWithPast(loss=loss, logits=scores, **rest)
        return out if self.return_dict(call) else out.to_tuple()


class _BackboneForward(_PackedForward):
    """``forward`` of a backbone under somebody else's head: packed inside, ``[B, T, H]`` outside."""

    served = frozenset({"output_hidden_states"})

    @torch.compiler.disable(recursive=False)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        try:
            self.check(call)
            trie, shared, keep = self.pack(call, None)
        except _Unservable as reason:
            self.patch.fallbacks[str(reason)] += 1
            return self.original(*args, **kwargs)
        self.patch.prepare()
        as_dict = call.get("return_dict")
        passed = {k: call[k] for k in ("output_hidden_states",) if k in call}
        out = self.backbone(self.original, trie, shared, None, return_dict=True, **passed)
        node = torch.full(keep.shape, len(trie))  # one row more, of zeros, for what is not attended
        node[keep] = torch.cat([torch.from_numpy(path) for path in trie.paths()])
        node = node.to(trie.input_ids.device)
        out.last_hidden_state = _unpack(out.last_hidden_state, node)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(_unpack(h, node) for h in out.hidden_states)
        as_dict = self.module.config.return_dict if as_dict is None else as_dict
        return out if as_dict else out.to_tuple()


def _unpack(hidden: Tensor, node: Tensor) -> Tensor:  # [1, N, H], int64 [B, T] -> [B, T, H]
    # in fp32, so that the gradients of a shared token are summed in fp32
    rows = nn.functional.pad(hidden[0].to(reference.wide(hidden.dtype)), (0, 0, 0, 1))
    return nn.functional.embedding(node, rows).to(hidden.dtype)


class _LastLayer(_Override):
    """``forward`` of the last decoder layer: keys and values for all rows, the rest for pooled ones.

    The layer runs until its attention function has the keys and values and is left there by an
    exception; then it runs on the pooled rows with those keys and values. Nothing is known of the
    layer's inside. Rows that were not asked for come back as zeros.
    """

    @torch.compiler.disable
    def run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = kwargs.get("rmfast_run")
        if run is None or run.pooled is None:
            return self.original(hidden, *args, **kwargs)
        nodes, rows = len(run.trie), run.pooled
        until = dataclasses.replace(run, leave_at_attention=True)
        try:
            self.layer(hidden, *args, **{**kwargs, "rmfast_run": until})
        except attention.KeysAndValues as left:
            key, value = left.key, left.value
        else:
            raise RuntimeError(
                f"{type(self.module).__name__} never called its attention function; "
                "patch with prune_last_layer=False, and report this model's class"
            )

        def pick(x: Any) -> Any:
            along = isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == (1, nodes)
            return x.index_select(1, rows) if along else x

        kwargs["rmfast_run"] = dataclasses.replace(run, keys_and_values=(key, value))
        out = self.layer(pick(hidden), *tree_map(pick, args), **tree_map(pick, kwargs))

        def put(x: Any) -> Any:
            along = isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == (1, len(rows))
            return x.new_zeros(1, nodes, *x.shape[2:]).index_copy(1, rows, x) if along else x

        return tree_map(put, out)

    def layer(self, *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            return self.before(*args, **kwargs)
        # past the checkpointing wrapper: an exception must not leave through it
        return inspect.unwrap(type(self.module).forward)(self.module, *args, **kwargs)


class Patch:
    """What was changed in one model, and how to undo it."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        self.root = root
        self.options = options
        self.active = False
        self.fallbacks: Counter[str] = Counter()
        self.last_layer: nn.Module | None = None
        self.overrides: list[_Override] = []
        self.attention_before: str | None = None
        self.level, self.reasons, self.outer, self.base = _choose(root, options)
        self.inner = _inner(self.outer) if self.outer is not None else None
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
                self.override(_ScoringForward(self.outer, self))
        else:
            if self.level == "trie":
                self.override(_ScoringForward(self.outer, self))
            else:
                self.override(_BackboneForward(self.base, self))
            if self.last_layer is not None:
                self.override(_LastLayer(self.last_layer, self))
        self.active = True
        self.prepare()
        setattr(self.root, _ATTRIBUTE, self)

    def override(self, stand_in: _Override) -> None:
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
        delattr(self.root, _ATTRIBUTE)

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
        if self.level != "head" and self.options.share_prefixes:
            if _dropout(self.root, training=False):
                out.append(
                    "the model has dropout: in training mode prefixes are not shared, because "
                    "each sequence draws its own noise"
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
    if why_not is None and outer is not None and _inner(outer) is base:
        reasons = [
            f"{type(outer).__name__}: causal decoder with an attention interface, scored by its "
            "last token in fp32",
            f"attention: {options.attention}",
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
        reasons = [why_not, "the padded batch runs as it was; pooled first, scored in fp32"]
        return "head", reasons, outer, base
    return "head", [why_not, "its forward runs as it was"], None, base


# --- the public functions


def _attached(model: nn.Module) -> tuple[nn.Module, Patch] | None:
    for module in model.modules():  # PEFT or a wrapper may have been put around a patched model
        found = module.__dict__.get(_ATTRIBUTE)
        if found is not None:
            return module, found
    return None


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
        found[1].undo()
    return model


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """:func:`patch` for the length of a ``with`` block, then as it was."""
    found = _attached(model)
    before = found[1].options if found else None
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
    return found[1].report()
