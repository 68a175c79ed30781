"""SkyRL's policy and critic, padded and without padding, with its attention in transformers.

Stood in for: flash-attn (``flash.py``), and before Python 3.12 its ``TypedDict``.
"""

import sys
import typing

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import flash
import tiny

PINS = [
    "skyrl==0.3.0",
    "loguru==0.7.3",
    "jaxtyping==0.3.3",
    "wadler-lindig==0.1.7",
    "einops==0.8.2",
]
pytest.importorskip("skyrl", reason="skyrl is not installed: make programs")

flash.package()
if sys.version_info < (3, 12):
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict  # pydantic takes no other

from skyrl.backends.skyrl_train.distributed.ulysses.monkey_patch import (  # noqa: E402
    apply_monkey_patch,
)
from skyrl.backends.skyrl_train.workers.model_wrapper import (  # noqa: E402
    HFModelWrapper,
    get_llm_for_sequence_regression,
)


@pytest.fixture(autouse=True)
def as_transformers_had_it(monkeypatch, flash_attention):
    """SkyRL replaces transformers' function for the whole process."""
    from transformers.integrations import flash_attention

    theirs = flash_attention._flash_attention_forward
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", theirs)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "remove_microbatch_padding"])
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_log_probabilities_and_values(kind, packed, family, tmp_path, same):
    cls = AutoModelForCausalLM if kind == "policy" else AutoModel
    tiny.model(family, cls=cls).save_pretrained(tmp_path)
    options = {"bf16": False, "use_flash_attention_2": packed, "remove_microbatch_padding": packed}
    torch.manual_seed(0)
    if kind == "policy":
        model = HFModelWrapper(str(tmp_path), **options)
        inner = model.model
    else:
        inner = model = get_llm_for_sequence_regression(str(tmp_path), "critic", **options)
    apply_monkey_patch(inner, use_remove_padding=packed)
    ids, mask = tiny.padded(tiny.rows(), "left").values()
    assert same(lambda: model(ids, 5, mask), model)[0].level == "backbone"
