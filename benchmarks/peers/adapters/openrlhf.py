"""OpenRLHF's reward model, 8 rows a batch in file order: padded on the left, and packed.

What is stood in for where it is missing: deepspeed, of which nothing is called, and flash-attn's
padding functions, which transformers has as well. Attention is FlashAttention 2 where flash-attn is
installed, as OpenRLHF sets it, else SDPA: then packed rows meet under one dense mask.
"""

import importlib.machinery
import importlib.util
import sys
import types

import torch
from einops import rearrange
from transformers import modeling_flash_attention_utils as padding

PEERS = {"openrlhf": {"batch": 8}, "openrlhf-packed": {"batch": 8, "packed": True}}
PINS = ["openrlhf==0.11.2", "pylatexenc==2.11", "einops==0.8.2"]
SHOWS = ["openrlhf", "flash-attn"]


def stand_in(name, **attributes):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes, __spec__=importlib.machinery.ModuleSpec(name, None))


FLASH = importlib.util.find_spec("flash_attn") is not None
if importlib.util.find_spec("deepspeed") is None:
    stand_in("deepspeed")
if not FLASH:
    own = {name[1:]: getattr(padding, name) for name in ("_pad_input", "_unpad_input")}
    stand_in("flash_attn"), stand_in("flash_attn.utils")
    stand_in("flash_attn.utils.distributed", all_gather=None)
    own |= {"index_first_axis": lambda x, where: x[where], "rearrange": rearrange}
    stand_in("flash_attn.bert_padding", **own)

from openrlhf.models import get_llm_for_sequence_regression  # noqa: E402


class Peer:
    def __init__(self, model, dtype, device, batch, packed=False):
        if dtype == "float32":
            raise NotImplementedError("it knows bf16 and fp16")
        how = {"attn_implementation": "flash_attention_2" if FLASH else "sdpa"}
        how |= {"param_dtype": {"bfloat16": "bf16", "float16": "fp16"}[dtype]}
        self.model = get_llm_for_sequence_regression(model, "reward", packing_samples=packed, **how)
        self.model.to(device).eval()
        self.batch, self.device = batch, device

    @torch.no_grad()
    def scores(self, rows):
        found = []
        for part in (rows[i : i + self.batch] for i in range(0, len(rows), self.batch)):
            width = max(map(len, part))
            pad = [width - len(row) for row in part]
            ids = torch.tensor([[0] * n + row for n, row in zip(pad, part, strict=True)])
            mask = (torch.arange(width) >= torch.tensor(pad)[:, None]).long()
            found += self.model(ids.to(self.device), mask.to(self.device)).float().cpu().tolist()
        return found
