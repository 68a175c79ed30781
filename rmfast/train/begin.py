"""A reward model to begin training with: a new head, a pad token, one label."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rmfast import loading
from rmfast.errors import UserError
from rmfast.loading import first_names
from rmfast.packed import models
from rmfast.score.scorer import PADS_COUNT, pads_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Tokens that no text holds, by their names: made for padding, or kept free by those who trained.
_PADDING = re.compile(r"[<\[]\|?(finetune_right_)?pad(ding|_token)?(_id)?\|?[>\]]", re.I)
_FREE = re.compile(r"reserved|unused|placeholder|dummy|<\|extra_\d+\|>|\[control_\d+\]", re.I)


# Heads of language models, masked ones too: a reward model has no use for them.
_LANGUAGE_HEADS = tuple("lm_head. embed_out. cls. vocab_ lm_predictions. mask_predictions.".split())

# Where a device has no kernels for these, transformers reads them as bf16, which can be trained.
_READ_AS_BF16 = ("fp8", "mxfp4")


@dataclass(frozen=True)
class Start:
    """What a reward model is when training begins."""

    name: str  # the checkpoint
    new: list[str]  # parameters of the head that it lacks; none: it was a reward model already
    std: float | None  # standard deviation that the new head was drawn with
    unused: list[str]  # parameters of the checkpoint that a reward model has no use for
    pad: tuple[str, int]  # token and id
    pad_from: str
    warnings: list[str] = field(default_factory=list)  # what to know before training

    def __str__(self) -> str:
        head = (
            f"new ({first_names(self.new)})" if self.new else "kept: this is a reward model already"
        )
        if self.std is not None:
            head += f", drawn with a standard deviation of {self.std:.3g}"
        lines = [
            f"{self.name}: start of training",
            f"  head: {head}",
            f"  not used: {first_names(self.unused) or 'nothing'}",
            f"  pad token: {self.pad[0]!r} ({self.pad[1]}), {self.pad_from}",
        ]
        return "\n".join([*lines, *(f"  ! {warning}" for warning in self.warnings)])


class Started(NamedTuple):
    model: PreTrainedModel  # in eval mode, as from_pretrained gives it
    tokenizer: PreTrainedTokenizerBase
    start: Start


def load_to_train(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
    seed: int = 0,
    lora: bool = False,
    chat_template: str | None = None,
) -> Started:
    """A reward model to train, from a language model's checkpoint, or from a reward model's.

    A language model gets a head of one score: weights from N(0, 1/(H + 1)), where H is the size of
    the hidden states and 1/(H + 1) the variance, and no bias (Stiennon et al. 2020, arXiv
    2009.01325, appendix B.1, and their code). With hidden states of unit variance the first scores
    then have one, too. A head that the checkpoint has is kept. Equal seeds give equal heads, in
    every dtype up to its rounding.

    The pad token is the tokenizer's, else the config's, else one that no text holds, else the end
    of text; tokenizer and config agree on it afterwards.

    Args:
        dtype: as in :func:`rmfast.loading.load`. TRL's default, too, is fp32 with bf16 autocast.
        device: ``cpu``, ``cuda``, ``cuda:N``; trainers move the model themselves.
        tokenizer: folder or hub name of another tokenizer than the model's.
        seed: of the head; the process's generators are left alone.
        lora: an adapter is to be trained, and not the weights.
        chat_template: Jinja template in place of the tokenizer's.

    Raises:
        UserError: it cannot be loaded, is a classifier of more than one label, lacks more than a
            head, holds no safetensors, is an adapter without the head that it was trained with, is
            quantised (and no ``lora``), or no pad token is to be had; the message says why.
    """
    from transformers import AutoModelForSequenceClassification

    device = loading.usable_device(device)
    remote = {"trust_remote_code": trust_remote_code, "revision": revision}
    options = {"dtype": dtype, "num_labels": 1, "use_safetensors": True}
    with loading.readable(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = loading.adapter_folder(name, revision)
        if not adapter:
            _refuse_config(name, remote, lora)
        model, tokens, missing, unused = loading.read_checkpoint(
            name, AutoModelForSequenceClassification, tokenizer, remote, adapter, **options
        )
        model = loading.placed(model, device)
    quantised = getattr(model, "is_quantized", False)
    if quantised and adapter:
        base = loading.adapter_settings(adapter)["base_model_name_or_path"]
        raise UserError(
            f"{name} is the adapter of a quantised model, which cannot be merged into it: begin "
            f"with {base}, or with the adapter of a model that is not quantised"
        )
    if quantised and not lora:
        _refuse_quantised(name, f"as {device} reads it")
    # an encoder's pooler is a part of the head, wherever it is
    body = [key for key in missing if ".pooler." not in key]
    inside = [key for key in body if key.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise UserError(
            f"{name} has no {first_names(inside)}: more than a head would be random; name the "
            "checkpoint of a language model, or of a reward model"
        )
    loading.refuse_other_outputs(name, model, tokens)
    std = new_head(model, missing, seed)
    pad, source, warnings = _pad(model, tokens)
    _refuse_read_pads(name, model, tokens)
    others = [key for key in unused if not key.startswith(_LANGUAGE_HEADS)]
    if missing and others:
        warnings.append(
            f"{first_names(others)} of the checkpoint is not used: if that is a head, convert the "
            "checkpoint, so that training does not begin without it"
        )
    if chat_template is not None:
        tokens.chat_template = chat_template
    start = Start(name, missing, std, unused, pad, source, warnings)
    return Started(model, tokens, start)


@torch.no_grad()
def _refuse_read_pads(name: str, model: PreTrainedModel, tokens: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose own code would be trained on what pads a batch."""
    if models.find(model)[0] is not None:
        return
    texts = ("one", "one, two, three", "two, two, one, three, one")
    rows = [np.array(tokens(text)["input_ids"]) for text in texts]

    def score(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        return model(**inputs).logits.reshape(-1).cpu().double()

    with loading.readable(name):
        room = models.positions(model) or math.inf
        count = pads_count(model, score, rows, tokens.pad_token_id, room)
    if count:
        raise UserError(
            f"{name}: {PADS_COUNT}: let {type(model).__name__} score the last token that the "
            "attention mask lets through, and then train it"
        )


def _refuse_quantised(name: str, method: str) -> None:
    raise UserError(
        f"{name} is quantised ({method}): its weights cannot be trained; train an adapter on them "
        "with --lora-rank, or begin with the model that is not quantised"
    )


def _refuse_config(name: str, remote: dict[str, Any], lora: bool) -> None:
    """Refuse what its config says cannot be trained, before any weight is read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **remote)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not lora:
        method = getattr(quantised, "quant_method", None) or dict(quantised).get("quant_method")
        method = getattr(method, "value", method)
        if method not in _READ_AS_BF16:
            _refuse_quantised(name, method)
    kinds = config.architectures or []
    if any(kind.endswith("Classification") for kind in kinds) and config.num_labels != 1:
        raise UserError(
            f"{name} is a classifier with num_labels={config.num_labels}: a reward model has one "
            "score; name a language model, or a reward model with num_labels=1"
        )


@torch.no_grad()
def new_head(model: PreTrainedModel, missing: list[str], seed: int) -> float | None:
    """Draw what gives the score, where it is new; returns the standard deviation."""
    std = None
    generator = torch.Generator().manual_seed(seed)
    for key in missing:
        owner, _, kind = key.rpartition(".")
        layer = model.get_submodule(owner)
        if not isinstance(layer, torch.nn.Linear) or layer.out_features != 1:
            continue  # before the last layer of a deep head: as transformers draws it
        if kind == "weight":
            std = (layer.in_features + 1) ** -0.5
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * std)
        else:
            layer.bias.zero_()
    return std


def _pad(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, int], str, list[str]]:
    """Set the pad token. Returns it, where it is from, and what to know about it."""
    text, rows = model.config.get_text_config(), models.vocabulary(model)
    before, warnings = getattr(text, "pad_token_id", None), []
    eos = models.eos_tokens(text) | models.eos_tokens(tokenizer)
    if tokenizer.pad_token is not None and tokenizer.pad_token_id >= rows:
        warnings.append(
            f"the tokenizer's pad token {tokenizer.pad_token!r} ({tokenizer.pad_token_id}) has no "
            "embedding in the model: another one is used"
        )
    token, source = _choose_pad(tokenizer, before, rows, eos)
    tokenizer.pad_token = token
    pad = tokenizer.pad_token_id
    model.config.pad_token_id = text.pad_token_id = pad
    if before is not None and before != pad:
        warnings.append(
            f"the config had pad_token_id={before}, and now has {pad}: a score is read at the last "
            "token that is not this one"
        )
    if pad in eos:
        warnings.append(
            f"pad_token_id equals eos_token_id ({pad}): Hugging Face's rule passes over a final "
            "eos and scores the token before it; pooling='mask' scores the last attended token"
        )
    return (token, pad), source, warnings


def _choose_pad(
    tokenizer: PreTrainedTokenizerBase, of_config: int | None, rows: int, eos: set[int]
) -> tuple[str, str]:
    """A pad token below ``rows``, and where it is from."""
    if tokenizer.pad_token is not None and tokenizer.pad_token_id < rows:
        return tokenizer.pad_token, "the tokenizer's"
    if of_config is not None and 0 <= of_config < rows:
        token = tokenizer.convert_ids_to_tokens(of_config)
        if token is not None:
            return token, "the config's"
    token = _free_token(tokenizer, rows, eos)
    if token is not None:
        return token, "which no text holds"
    if tokenizer.eos_token is None:
        raise UserError(
            f"{tokenizer.name_or_path} has neither a pad token, nor a reserved one, nor an end of "
            "text: set tokenizer.pad_token, save the tokenizer, and name its folder"
        )
    return tokenizer.eos_token, "the end of text, for want of another"


def _free_token(tokenizer: PreTrainedTokenizerBase, rows: int, eos: set[int]) -> str | None:
    """A token of the vocabulary that was made for padding, or is not used for anything."""
    names = ("bos", "eos", "unk", "sep", "cls", "mask")
    used = eos | {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    template = str(tokenizer.chat_template or "")
    added = sorted((i, token) for token, i in tokenizer.get_added_vocab().items())
    free = [token for i, token in added if i < rows and i not in used and token not in template]
    for kind in (_PADDING.fullmatch, _FREE.search):
        found = next(filter(kind, free), None)
        if found is not None:
            return found
    return None
