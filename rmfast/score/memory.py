"""How many tokens a micro-batch may hold, from the model's config and the free memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from rmfast.packed import pieces

_SHARE = 0.6  # of the free memory that a micro-batch may take
_STEP = 64  # the number of tokens is a multiple of this
_PADDED = 1024  # keys a query sees in a padded batch, for its attention weights


def most_tokens(config: Any, dtype: torch.dtype, device: torch.device, packs: bool) -> int:
    """Tokens that a share of the device's free memory holds, at most :func:`pieces.most`.

    An estimate, for which nothing is run: the micro-batch is halved where it was too high.
    """
    most, free = pieces.most(device), free_bytes(device)
    if free is None or getattr(config, "hidden_size", None) is None:
        return most
    tokens = int(_SHARE * free / bytes_a_token(config, dtype, packs))
    return max(_STEP, min(most, tokens) // _STEP * _STEP)


def bytes_a_token(config: Any, dtype: torch.dtype, packs: bool = True) -> int:
    """Bytes that a token takes in a forward pass without gradients.

    With the hidden width H, the MLP width I (of all experts that a token visits), A attention
    heads and K key heads of size D, L layers, and s bytes an element::

        s · 4H              residual stream, its norm, outputs of attention and MLP
        4 · 2H              the norm in fp32
        s · 2 (A + 2K) D    queries, keys and values, before and after rotation
        s · 3I              gate, up projection and their product
        s · 2 K D L         if packed: keys and values of carried prefixes, of all layers
        4 · 1024 A          if padded: attention weights

    Logits over the vocabulary are not made.

    Args:
        config: of the backbone, with Hugging Face's names of the sizes.
        dtype: of the weights.
        packs: the model runs packed, not in padded batches.
    """

    def size(name: str, otherwise: int) -> int:
        value = getattr(config, name, None) or otherwise
        return max(value) if isinstance(value, (list, tuple)) else value  # some list their layers'

    hidden, layers = size("hidden_size", 1), size("num_hidden_layers", 1)
    heads = size("num_attention_heads", 1)
    key_heads, head = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
    experts = size("moe_intermediate_size", 0) * size("num_experts_per_tok", 1)
    mlp = max(size("intermediate_size", 4 * hidden), experts)
    width = max(2, dtype.itemsize)  # quantized weights compute in 16 bits
    layer = width * (4 * hidden + 2 * (heads + 2 * key_heads) * head + 3 * mlp) + 8 * hidden
    carried = width * 2 * key_heads * head * layers
    return layer + (carried if packs else 4 * _PADDED * heads)


def free_bytes(device: torch.device) -> int | None:
    """Bytes of the device's memory that are free; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(free, 0)
