"""Models and tokenizers for the commands, refused where their scores would mean nothing."""

from __future__ import annotations

import timeit
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError

from rmfast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)


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
        name: a checkpoint; or the folder of a PEFT adapter, which is merged into its model.
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
    labels = {"num_labels": 1} if task == "reward" and is_adapter(name) else {}
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    model, found, missing, _ = read_checkpoint(name, auto, tokenizer, remote, dtype=dtype, **labels)
    if check:
        _refuse_random_scores(name, model, missing, task)
    return Loaded(model.to(device).eval(), found, missing)


def is_adapter(name: str) -> bool:
    """Whether this is the folder of a PEFT adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def read_checkpoint(
    name: str, auto: Any, tokenizer: str | None, remote: dict[str, Any], **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str], list[str]]:
    """The model of a checkpoint or of an adapter, and its tokenizer or another.

    Args:
        auto: one of transformers' auto classes.
        remote: ``revision`` and ``trust_remote_code``.
        options: more of ``from_pretrained``.

    Returns:
        Model, tokenizer, the parameters that the checkpoint lacks, and those that are not used.
    """
    from transformers import AutoTokenizer

    code = {"trust_remote_code": remote["trust_remote_code"]}
    try:
        # another tokenizer, and an adapter's model, have revisions of their own
        found = AutoTokenizer.from_pretrained(tokenizer or name, **(code if tokenizer else remote))
        if is_adapter(name):
            model, missing, unused = load_adapter(name, auto, **options, **code)
        else:
            model, keys = auto.from_pretrained(name, output_loading_info=True, **options, **remote)
            missing, unused = sorted(keys["missing_keys"]), sorted(keys["unexpected_keys"])
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be loaded: {error}") from None
    return model, found, missing, unused


def load_adapter(
    name: str, auto: Any, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model that a PEFT adapter's folder was made for, with the adapter merged into it.

    Args:
        auto: one of transformers' auto classes.
        options: of its ``from_pretrained``.

    Returns:
        The model, parameters that neither model nor adapter has, and those of the model's
        checkpoint that are not used.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError(f"{name} holds a PEFT adapter: pip install peft") from None
    settings = peft.PeftConfig.from_pretrained(name)
    base, keys = auto.from_pretrained(
        settings.base_model_name_or_path,
        revision=settings.revision,
        output_loading_info=True,
        **options,
    )
    # PEFT loads an adapter only for the task that it was saved for; but its wrapper for language
    # models wants one that generates
    if settings.task_type == "CAUSAL_LM" and not base.can_generate():
        settings.task_type = None
    model = peft.PeftModel.from_pretrained(base, name, config=settings)
    saved = {key.removeprefix("base_model.model.") for key in peft.utils.load_peft_weights(name)}
    missing = sorted(keys["missing_keys"] - saved)
    return model.merge_and_unload(), missing, sorted(keys["unexpected_keys"])


def usable_device(name: str | None) -> str:
    """The device of that name, or the default.

    Raises:
        UserError: nothing can be put on it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
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


def _refuse_random_scores(name: str, model: PreTrainedModel, missing: list[str], task: str) -> None:
    if missing:
        kind = "reward" if task == "reward" else "language"
        raise UserError(
            f"{name} has no {first_names(missing)}: it would be random, and so would the scores; "
            f"name the checkpoint of a {kind} model"
        )
    if task == "reward" and model.config.num_labels != 1:
        raise UserError(
            f"{name} has {model.config.num_labels} labels: a reward model has one score"
        )
