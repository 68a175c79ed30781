"""transformers' path of FlashAttention 2 on a CPU: SDPA, by sequence, in place of flash-attn's own.

Everything but the two functions of flash-attn is transformers': names, masks, lengths, unpadding.
"""

import importlib.machinery
import importlib.util
import sys
import types

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations import flash_attention

NAME = "flash_attention_2"


def dense(q, k, v, causal=False, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1)):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H, D] -> [B, H, T, D]
    mask, is_causal = None, causal
    if window_size[0] >= 0:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        mask, is_causal = (distance >= 0) & (distance <= window_size[0]), False
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=0, max_seqlen_k=0, causal=False,
           softmax_scale=None, dropout_p=0.0, window_size=(-1, -1)):  # fmt: skip
    lengths = cu_seqlens_q.diff().tolist()
    each = zip(*(x[None].split(lengths, 1) for x in (q, k, v)), strict=True)  # [N, H, D]
    options = causal, softmax_scale, dropout_p, window_size
    return torch.cat([dense(*one, *options)[0] for one in each])


def stand_in(monkeypatch):
    """Models load with ``attn_implementation="flash_attention_2"`` from here on."""

    def functions(implementation, *_, **__):
        assert implementation == NAME, "transformers knows no other"
        cached = [None] * hasattr(utils, "_flash_with_kvcache_fn")  # from 5.5 on
        return dense, varlen, *cached, utils._pad_input, utils._unpad_input

    monkeypatch.setattr(utils, "_lazy_imports", functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    for name in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):  # of now, of 5.0
        if hasattr(PreTrainedModel, name):
            monkeypatch.setattr(PreTrainedModel, name, lambda *_, **__: True)
    # programs put another there, for the whole process: it is put back
    function = flash_attention._flash_attention_forward
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", function)


def module(name, **attributes):
    """A module that is imported as ``name`` from here on, and has nothing but these."""
    made = sys.modules[name] = types.ModuleType(name)
    vars(made).update(attributes, __spec__=importlib.machinery.ModuleSpec(name, None))
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, made)


def package():
    """flash-attn's padding functions, where it is missing: transformers has them as well."""
    if importlib.util.find_spec("flash_attn") is None:
        from einops import rearrange

        module("flash_attn"), module("flash_attn.utils")
        module("flash_attn.utils.distributed", all_gather=None)
        own = {"pad_input": utils._pad_input, "unpad_input": utils._unpad_input}
        own |= {"index_first_axis": lambda x, where: x[where], "rearrange": rearrange}
        module("flash_attn.bert_padding", **own)
