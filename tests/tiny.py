"""Tiny random models of every family, batches with all kinds of sharing, and how to compare."""

from __future__ import annotations

import math

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, __version__

PAD, VOCAB = 0, 97
# Levels of families whose code was another one in older versions of transformers; else "trie".
LOWER = {}
if Version(__version__) < Version("5.13"):
    LOWER["biogpt"] = "backbone"  # its classifier counts the tokens
if Version(__version__) < Version("5.4"):
    LOWER["ministral3"] = "head"  # it scales attention by cache_position

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 5,  # smaller than the sequences
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    # GPT-2 and its kin
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 48,
    "rotary_dim": 4,
    # multi-head latent attention
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # OPT, MPT, Bloom, GPT-Neo
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 5,
}
_KEEP_NONE = {"sliding_window", "pad_token_id", "head_dim"}


def config(family: str, **overrides):
    """A small config of a family, with a sliding window on some layers where it can have one."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    names = {
        name: value
        for name, value in _SMALL.items()
        if hasattr(default, name) and (getattr(default, name) is not None or name in _KEEP_NONE)
    } | {"pad_token_id": PAD}  # transformers 5.0 left some configs without that name
    if family == "falcon":
        del names["head_dim"]  # derived, and not to be set
    layer_types = getattr(default, "layer_types", None)
    if hasattr(default, "use_sliding_window"):
        names |= {"use_sliding_window": True, "max_window_layers": 1}
    elif family == "jamba":
        names |= {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    elif layer_types:
        count = names["num_hidden_layers"]
        names["layer_types"] = [*layer_types[: count - 1], "full_attention"]
    if "kv_lora_rank" in names:
        names["num_key_value_heads"] = names["num_attention_heads"]
    out = kind(**(names | overrides))
    out._experts_implementation = "eager"  # the grouped matmul knows no fp64
    return out


def model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    num_labels: int = 1,
    cls: type = AutoModelForSequenceClassification,
    attn_implementation: str | None = None,
    **overrides,
) -> nn.Module:
    """A random model whose scores spread, in eval mode."""
    torch.manual_seed(0)
    cfg = config(family, num_labels=num_labels, **overrides)
    if getattr(cfg, "attn_logit_softcapping", None) and attn_implementation is None:
        attn_implementation = "eager"  # SDPA left the cap out before transformers 5.21
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    build = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    out = build(cfg, **kwargs).to(dtype).eval()
    embeddings = {id(m.weight) for m in out.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in out.named_parameters():
            if p.ndim > 1 or "sink" in name:
                p.normal_(0, 1.0 if id(p) in embeddings else 0.3)
    return out


_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}
{{ raise_exception("no such role") }}
{%- endif -%}
{{ message.role + ": " + message.content + eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "assistant: " }}{%- endif -%}"""
WORDS = 3 + 256  # pad, BOS, eos and every byte: rows of embeddings a model needs


def tokenizer(adds_bos: bool = False, writes_bos: bool = False, template: bool = True):
    """Bytes as tokens, and PAD, 1 and 2 for pad, BOS and eos.

    Args:
        adds_bos: put a BOS before every text.
        writes_bos: the chat template begins with one.
        template: whether there is a chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if template:
        out.chat_template = ("{{ bos_token }}" if writes_bos else "") + _TEMPLATE
    return out


def rows(seed: int = 0) -> list[list[int]]:
    """Pairs of one prompt, a row inside another, a duplicate, and a stranger."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    prompt = draw(9)
    a, b = prompt + draw(4), prompt + draw(7)
    return [a, b, prompt + draw(1), draw(13), a[:11], list(b)]


def padded(sequences: list[list[int]], side: str = "right", pad: int = PAD) -> dict[str, Tensor]:
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(sequences):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def run(m: nn.Module, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and every parameter's gradient under a loss that weighs each score its own way."""
    m.zero_grad()
    logits = m(**inputs).logits
    weight = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype, device=logits.device)
    (logits * weight.view_as(logits)).sum().backward()
    grads = {n: p.grad.detach().clone() for n, p in m.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def score_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the spread of the scores."""
    spread = theirs.double().std().item() if theirs.numel() > 1 else theirs.abs().item()
    return (ours.double() - theirs.double()).abs().max().item() / spread


def grad_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative L2 distance over all parameters together; a missing gradient counts as zero."""
    zero = torch.zeros(())
    names = ours.keys() | theirs.keys()
    gap = sum(
        (ours.get(n, zero).double() - theirs.get(n, zero).double()).square().sum() for n in names
    )
    norm = sum(g.double().square().sum() for g in theirs.values())
    return math.sqrt(gap / norm)


def double(model):
    """Somebody's wrapper around the instance's forward, which has a say in the scores."""
    inner = model.forward

    def doubled(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    return doubled
