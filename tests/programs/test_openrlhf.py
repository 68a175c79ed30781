"""OpenRLHF's reward model and critic, and a step of its reward trainer.

Stood in for where they are missing: deepspeed, of which nothing is called, and flash-attn's
padding functions, which transformers has as well. Attention is SDPA.
"""

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from transformers import AutoModel
from transformers import modeling_flash_attention_utils as padding

import tiny

PINS = ["openrlhf==0.11.2", "pylatexenc==2.11", "einops==0.8.2"]
pytest.importorskip("openrlhf", reason="openrlhf is not installed: make programs")


def stand_in(name, **attributes):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes, __spec__=importlib.machinery.ModuleSpec(name, None))


if importlib.util.find_spec("deepspeed") is None:
    stand_in("deepspeed")
    stand_in("deepspeed.utils", set_z3_leaf_modules=lambda model, classes: None)
    sys.modules["deepspeed"].utils = sys.modules["deepspeed.utils"]
if importlib.util.find_spec("flash_attn") is None:
    from einops import rearrange

    own = {name[1:]: getattr(padding, name) for name in ("_pad_input", "_unpad_input")}
    stand_in("flash_attn"), stand_in("flash_attn.utils")
    stand_in("flash_attn.utils.distributed", all_gather=None)
    own |= {"index_first_axis": lambda x, where: x[where], "rearrange": rearrange}
    stand_in("flash_attn.bert_padding", **own)

from openrlhf.models import get_llm_for_sequence_regression  # noqa: E402

SIDES = ["left", "right"]


def loaded(folder, kind, family="llama", **options):
    """Its model on random weights, in fp32: it loads 16 bits alone."""
    tiny.model(family, cls=AutoModel).save_pretrained(folder)
    options |= {"param_dtype": "bf16", "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    return get_llm_for_sequence_regression(str(folder), kind, **options).float().eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_reward_model(family, side, packed, tmp_path, same):
    model = loaded(tmp_path, "reward", family, packing_samples=packed, init_value_head=True)
    batch = tiny.padded(tiny.rows(), side)
    same(lambda: model(**batch), model)
