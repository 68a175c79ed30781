"""Models and tokenizers for the commands, refused where their scores would mean nothing."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
import timeit
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from rmfast.data.form import Form
from rmfast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loaded(NamedTuple):
    model: PreTrainedModel  # in eval mode, on its device
    tokenizer: PreTrainedTokenizerBase
    missing: list[str]  # parameters that the checkpoint lacks: they are random


def silence_transformers() -> None:
    """Turn off transformers' progress bars and warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    task: str = "reward",
    tokenizer: str | None = None,
    check: bool = True,
) -> Loaded:
    """Load a model from a folder or the hub, with its tokenizer.

    Args:
        name: a checkpoint; or a PEFT adapter, which is merged into its model, or put on it where
            that is quantised.
        dtype: ``"auto"``, the checkpoint's own; ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        device: ``cpu``, ``cuda``, ``cuda:N``; None: a GPU if there is one.
        task: ``"reward"``, a sequence classifier with one label; ``"causal"``, a language model.
        tokenizer: folder or hub name of another tokenizer than the model's.
        check: refuse missing parameters and more than one label; else only list what is missing.

    Raises:
        UserError: it cannot be loaded, or would give random scores; the message says why.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    device = usable_device(device)
    remote = {"trust_remote_code": trust_remote_code, "revision": revision}
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    with readable(name):
        adapter = adapter_folder(name, revision)
        labels = {"num_labels": 1} if task == "reward" and adapter else {}
        model, found, missing, _ = read_checkpoint(
            name, auto, tokenizer, remote, adapter, dtype=dtype, **labels
        )
        model = placed(model, device)
    if check and missing:
        kind = "reward" if task == "reward" else "language"
        raise UserError(
            f"{name} has no {first_names(missing)}: it would be random, and so would the scores; "
            f"name the checkpoint of a {kind} model"
        )
    if check and task == "reward":
        labels = model.config.num_labels
        if labels != 1:
            raise UserError(f"{name} has {labels} labels: a reward model has one score")
        refuse_other_outputs(name, model, found)
    return Loaded(model, found, missing)


def adapter_folder(name: str, revision: str | None = None) -> str | None:
    """The folder of a PEFT adapter, here or in the hub's cache; None: this is no adapter."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    _refuse_no_folder(name)
    config = find_adapter_config_file(name, revision=revision)
    if config is None or Path(name).is_dir():
        return None if config is None else name
    needed = ["adapter_model.*", *(f"*.{kind}" for kind in "json jinja model txt py".split())]
    return snapshot_download(name, revision=revision, allow_patterns=needed)


def read_checkpoint(
    name: str,
    auto: Any,
    tokenizer: str | None,
    remote: dict[str, Any],
    adapter: str | None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str], list[str]]:
    """Model, tokenizer, the parameters that the checkpoint lacks, and those that are not used.

    Args:
        auto: one of transformers' auto classes.
        remote: ``revision`` and ``trust_remote_code``.
        adapter: what :func:`adapter_folder` gives.
        options: more of ``from_pretrained``.
    """
    from transformers import AutoTokenizer

    code = {"trust_remote_code": remote["trust_remote_code"]}
    # another tokenizer, and an adapter's model, have revisions of their own
    beside = adapter_folder(tokenizer) if tokenizer else adapter
    source = _with_tokenizer(beside) if beside else tokenizer or name
    found = AutoTokenizer.from_pretrained(source, **(remote if source == name else code))
    if len(found) == len(found.all_special_ids):  # made of nothing, by transformers up to 5.5
        raise ValueError("no backend tokenizer")
    if adapter:
        model, missing, unused = load_adapter(adapter, auto, **options, **code)
        if found.pad_token_id is not None and found.pad_token_id < _rows(model):
            # an adapter has no config that would say which token it was trained to pass over
            model.config.get_text_config().pad_token_id = found.pad_token_id
    else:
        model, keys = auto.from_pretrained(name, output_loading_info=True, **options, **remote)
        missing, unused = sorted(keys["missing_keys"]), sorted(keys["unexpected_keys"])
    return model, found, missing, unused


def _with_tokenizer(adapter: str) -> str:
    """The adapter's folder, or its model where no tokenizer was saved with it."""
    if (Path(adapter) / "tokenizer_config.json").is_file():
        return adapter
    return adapter_settings(adapter)["base_model_name_or_path"]


def adapter_settings(folder: str) -> dict[str, Any]:
    """What is in ``adapter_config.json``."""
    return json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))


def _rows(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def load_adapter(
    folder: str, auto: Any, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model that a PEFT adapter was made for, with the adapter merged into it.

    The embeddings get as many rows as the adapter saved. A quantised model would be rounded by
    merging: it keeps the adapter beside its weights. Returned with it are the parameters that
    neither model nor adapter has, and those of the model's checkpoint that are not used.
    """
    try:
        import peft
    except ImportError:
        raise UserError(f"{folder} holds a PEFT adapter: pip install peft") from None
    settings = peft.PeftConfig.from_pretrained(folder)
    if not any(Path(folder).glob("adapter_model.*")):
        raise UserError(f"{folder} has an adapter_config.json, and no adapter_model.safetensors")
    under = settings.base_model_name_or_path
    if not under or adapter_folder(under, settings.revision):
        what = f"was trained on another adapter, {under}" if under else "does not name its model"
        raise UserError(
            f"{folder} {what}: give its adapter_config.json the name of a whole model "
            "(base_model_name_or_path)"
        )
    with readable(under):
        base, keys = auto.from_pretrained(
            under, revision=settings.revision, output_loading_info=True, **options
        )
    Form.hand_on(folder, base.config)
    weights = peft.utils.load_peft_weights(folder, device="cpu")
    saved = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    heads = settings.modules_to_save or ["score", "classifier"]
    if settings.task_type == "SEQ_CLS" and not _has_part(saved, heads):
        raise UserError(
            f"{folder} is the adapter of a reward model, and the head that it was trained with is "
            f"not in it: it was not saved; begin with {under}"
        )
    table = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is table)
    for key in (f"{name}.weight", f"{name}.base_layer.weight"):
        if key in saved and len(saved[key]) != _rows(base):
            base.resize_token_embeddings(len(saved[key]), mean_resizing=False)
    # PEFT loads an adapter only for the task that it was saved for; but its wrapper for language
    # models wants one that generates
    if settings.task_type == "CAUSAL_LM" and not base.can_generate():
        settings.task_type = None
    model = peft.PeftModel.from_pretrained(base, folder, config=settings)
    lost = peft.set_peft_model_state_dict(model, weights).unexpected_keys
    # a classifier has no use for those of a language model; a table that is saved has two names
    lost = [key for key in lost if not _has_part([key], ["lm_head", "modules_to_save"])]
    if lost:
        raise UserError(
            f"{folder} has {first_names(lost)}, and {type(base).__name__} has no place for it: "
            "this adapter was made for another kind of model"
        )
    missing, unused = sorted(keys["missing_keys"] - saved.keys()), sorted(keys["unexpected_keys"])
    merges = not getattr(base, "is_quantized", False)
    return model.merge_and_unload() if merges else model, missing, unused


def _has_part(keys: Iterable[str], names: Iterable[str]) -> bool:
    return any(part in names for key in keys for part in key.split("."))


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Say in a sentence why a model cannot be loaded, whatever a library or its own code raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be loaded: {_why(name, error)}") from None


# What a part of a library's message means here, and what to do.
_KNOWN = {
    "trust_remote_code": "it comes with code of its own: read that, then allow it with "
    "--trust-remote-code",
    "Unrecognized model in": "it has no config.json that names a kind of model (model_type)",
    "backend tokenizer": "it has no tokenizer: name one with --tokenizer",
    "ignore_mismatched_sizes": "its weights have other sizes than its config.json says: take both "
    "from one model",
    "Padding_idx must be within": "its config.pad_token_id has no embedding: set another one in "
    "its config.json",
}


def _why(name: str, error: Exception) -> str:
    text, damaged = " ".join(str(error).split()), _damaged(name)
    if damaged or isinstance(error, SafetensorError):
        return f"{damaged or 'a safetensors file'} is cut off or damaged: download or copy it again"
    known = next((said for part, said in _KNOWN.items() if part in text), None)
    if known:
        return known
    if "Unrecognized configuration class" in text:
        kind = re.search(r"kind of AutoModel: (\w+)", text)
        kind = kind[1] if kind else "the class that is needed"
        if "transformers_modules" in text:
            return (
                f"its own code has no {kind}: name a class for it in auto_map of its config.json, "
                "one that returns logits [B, 1]"
            )
        return f"its config is for a kind of model that has no {kind} in transformers"
    sentence = re.match(r".{30,240}?[.!](?= [A-Z]|$)|.{,240}", text)[0]
    if isinstance(error, OSError) and not Path(name).exists():
        return f"there is no such folder, and the hub did not give it: {sentence}"
    usual = isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
    return sentence if usual else f"{type(error).__name__}: {sentence}"


def _damaged(name: str) -> str | None:
    """The first file of a folder that is not whole."""
    for file in sorted(Path(name).glob("*")):
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt")
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
        except (OSError, SafetensorError, ValueError):
            return str(file)
    return None


def _refuse_no_folder(name: str) -> None:
    """Look for no name on the hub that is a path."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"{name} is a file: name the folder of the model")
    if not path.exists() and (name.count("/") > 1 or name.endswith("/") or name[:1] in "./~\\"):
        raise UserError(f"there is no folder {name}")


def placed(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model on a device, in eval mode; bitsandbytes puts a model where it stays."""
    fixed = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    return (model if fixed else model.to(device)).eval()


def usable_device(name: str | None) -> str:
    """The device of that name, or the default; UserError: nothing can be put on it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).item()
    except (AssertionError, RuntimeError) as error:
        why = textwrap.shorten(str(error), 80, placeholder=" …")
        raise UserError(f"--device {name}: {why}; cpu, cuda and cuda:N are devices") from None
    return name


def bf16_is_fast(device: str) -> bool:
    """Whether this device multiplies bf16 matrices itself, rather than by way of fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=6))
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def first_names(names: list[str]) -> str:
    """The first three of some names, and the number of the others."""
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + others


@torch.no_grad()
def refuse_other_outputs(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a checkpoint's own code that gives something else than a score."""
    if not type(model).__module__.startswith("transformers_modules."):
        return
    inputs = tokenizer("one, two, three", return_tensors="pt").to(model.device)
    with readable(name):
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape not in ((1, 1), (1,)):
        given = type(output).__name__ if logits is None else f"logits {list(logits.shape)}"
        raise UserError(
            f"{name}: the forward of {type(model).__name__} gives {given} for one conversation: "
            "let it return an output with logits [B, 1], as sequence classifiers do"
        )
