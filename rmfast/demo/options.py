"""Options of ``rmfast demo``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rmfast.arguments import Options, option


@dataclasses.dataclass(kw_only=True)
class DemoOptions(Options):
    """Options of ``rmfast demo``."""

    # fmt: off
    model: str | None = option(
        "Use this model, a folder or hub name (default: SmolLM2-135M-Instruct).", None)
    data: str | None = option(
        "Read these JSON lines (.gz too) with chosen, rejected and, optionally, prompt: text or "
        "lists of messages.", None, metavar="FILE")
    steps: int = option("Train for this many steps.", 60, least=1)
    batch_pairs: int = option("Put this many pairs in a batch.", 8, least=1)
    max_length: int = option("Drop pairs with a longer side.", 1024, metavar="TOKENS", least=1)
    learning_rate: float | None = option(
        "Peak at this learning rate (default: 1.5e-4; 2e-5 with --model).",
        None, metavar="RATE", above=0, below=1)
    dtype: Literal["mixed", "float32", "bfloat16"] | None = option(
        "Choose the arithmetic; mixed: fp32 weights, bf16 arithmetic; bfloat16: weights too, which "
        "rounds small updates away (default: mixed where bf16 is fast, else float32).", None)
    device: Literal["cpu", "cuda"] | None = option(
        "Run here (default: a GPU if there is one).", None)
    chat_template: str | None = option(
        "Use the Jinja template in this file, for a tokenizer without one.", None, metavar="FILE")
    trust_remote_code: bool = option("Run code that comes with the model.", False)
    output: str | None = option(
        "Save the trained model and its tokenizer here.", None, metavar="FOLDER")
    seed: int = option("Seed the order, the split and a missing head.", 0, least=0, below=2**32)
    # fmt: on
