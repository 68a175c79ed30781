"""Models and tokenizers for the commands, refused where their scores would mean nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rmfast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DTYPES = ("auto", "bfloat16", "float16", "float32")


class Loaded(NamedTuple):
    model: PreTrainedModel  # in eval mode, on its device
    tokenizer: PreTrainedTokenizerBase
    missing: list[str]  # parameters that the checkpoint lacks, which are random now


def quiet() -> None:
    """No bars and warnings of transformers' between a command's own lines."""
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
    """A model from a folder or the hub, with its tokenizer.

    Args:
        dtype: one of :data:`DTYPES`; ``"auto"``: the checkpoint's own.
        device: ``cpu``, ``cuda``, ``cuda:N``; None: a GPU if there is one.
        task: ``"reward"``, a sequence classifier with one label; ``"causal"``, a language model.
        tokenizer: folder or hub name of another tokenizer than the model's.
        check: refuse missing parameters and more than one label; else only list what is missing.

    Raises:
        UserError: it cannot be loaded, or would give random scores; the message says why.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    device = usable_device(device)
    remote = {"trust_remote_code": trust_remote_code, "revision": revision}
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        if (Path(name) / "adapter_config.json").is_file():
            labels = {} if task == "causal" else {"num_labels": 1}
            model, missing, _ = _adapter(
                name, auto, dtype=kind, trust_remote_code=trust_remote_code, **labels
            )
        else:
            model, found = auto.from_pretrained(
                name, dtype=kind, output_loading_info=True, **remote
            )
            missing = sorted(found["missing_keys"])
        other = {"trust_remote_code": trust_remote_code} if tokenizer else remote
        tokens = AutoTokenizer.from_pretrained(tokenizer or name, **other)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise UserError(f"{name} cannot be loaded: {error}") from None
    if check:
        _check(name, model, missing, task)
    return Loaded(model.to(device).eval(), tokens, missing)


def bf16_is_fast(device: str) -> bool:
    """Whether this device multiplies bf16 matrices itself, rather than by way of fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def usable_device(name: str | None) -> str:
    """The device of that name, or the default; UserError where nothing can be put on it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _adapter(name: str, auto: Any, **kwargs: Any) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A PEFT adapter's folder: the model it was made for, with the adapter merged into it.

    Returns it with the parameters that neither has, and those of the model that are not used.
    """
    try:
        import peft
    except ImportError:
        raise UserError(f"{name} holds a PEFT adapter: pip install peft") from None
    settings = peft.PeftConfig.from_pretrained(name)
    base, found = auto.from_pretrained(
        settings.base_model_name_or_path,
        revision=settings.revision,
        output_loading_info=True,
        **kwargs,
    )
    if settings.task_type == "CAUSAL_LM" and not base.can_generate():
        settings.task_type = None  # PEFT's wrapper for language models wants one that generates
    # else as the task it was saved for: for another one, PEFT looks for a head that is not there
    model = peft.PeftModel.from_pretrained(base, name, config=settings)
    saved = {key.removeprefix("base_model.model.") for key in peft.utils.load_peft_weights(name)}
    missing = sorted(found["missing_keys"] - saved)
    return model.merge_and_unload(), missing, sorted(found["unexpected_keys"])


def _check(name: str, model: PreTrainedModel, missing: list[str], task: str) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{name} has no {missing[0]}{more}: it would be random, and so would the scores; "
            f"name the checkpoint of a {'reward' if task == 'reward' else 'language'} model"
        )
    if task == "reward" and model.config.num_labels != 1:
        raise UserError(
            f"{name} has {model.config.num_labels} labels: a reward model has one score"
        )
