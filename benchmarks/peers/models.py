"""The folders that all alternatives load: one model each, with a tokenizer that reads ids.

An alternative that takes text alone is handed a row's ids written out, ``"17 4 256"``; this
tokenizer makes the same ids of them, so that all score the same tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from rmfast.demo import embedded

# hidden, intermediate, layers, heads, key-value heads, head_dim, positions
SMALL = {
    "tiny": (64, 128, 2, 2, 1, 32, 65_536),  # for long rows
    "attention": (256, 256, 2, 32, 8, 128, 131_072),  # DualKV's heads, little beside them
}
SIZES = """hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings""".split()
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.", "chat_template")


def folder(build: Path, name: str, given: str | None) -> Path:
    """The folder of a model, made when it is missing: ``"main"`` is the one ``given``."""
    source = original(given) if name == "main" else None
    out = build / "model" / (name if source is None else f"main-{source.name}")
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as parts:
            part = Path(parts) / out.name
            _small(part, name) if source is None else _linked(part, source)
            part.rename(out)
    return out


def original(given: str | None) -> Path:
    """Folder of the reward model given, by folder or name of the hub, or of the embedded one."""
    if given is None:
        return embedded.checkpoint()
    if Path(given).is_dir():
        return Path(given).resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(given))


def vocabulary(path: Path) -> int:
    return json.loads((path / "config.json").read_text())["vocab_size"]


def _linked(out: Path, source: Path) -> None:
    out.mkdir()
    for file in source.iterdir():
        if not file.name.startswith((*TOKENIZER, "config.json")):
            (out / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    if config.get("pad_token_id") is None:  # all but one row a batch need it
        config["pad_token_id"] = 0
    (out / "config.json").write_text(json.dumps(config, indent=1))
    _reads_ids(config["vocab_size"], config["pad_token_id"]).save_pretrained(out)


def _small(out: Path, name: str) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = dict(zip(SIZES, SMALL[name], strict=True))
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=1000, pad_token_id=0, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(out)
    _reads_ids(1000, 0).save_pretrained(out)


def _reads_ids(count: int, pad: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # special tokens are found inside other words: the pad's number is an unknown word instead
    words = {"<pad>" if i == pad else str(i): i for i in range(count)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]  # no token types of pairs
    special = {"pad_token": "<pad>", "eos_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)
