"""Options of ``rmfast train``: flags, keys of a YAML file, and defaults."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rmfast.arguments import Options, option

MODEL = {"group": "Model"}
DATA = {"group": "Data"}
HELD_OUT = {"group": "Held-out data"}
TRAINING = {"group": "Training"}
RUN = {"group": "Run"}


@dataclasses.dataclass(kw_only=True)
class TrainOptions(Options):
    """Options of ``rmfast train``."""

    model: str = option("Train this language model or reward model: a folder or a name on the hub.")
    data: str = option(
        "Read preferences from this .jsonl, .csv (both .gz too) or .parquet file, or a folder or "
        "hub name of a data set.",
    )
    output: str = option("Write the model and all that belongs to it here.", metavar="FOLDER")

    revision: str | None = option(
        "Take this branch, tag or commit of a model on the hub.", None, **MODEL
    )
    tokenizer: str | None = option(
        "Use this tokenizer, a folder or hub name (default: the model's).",
        None,
        metavar="NAME",
        **MODEL,
    )
    chat_template: str | None = option(
        "Use the Jinja template in this file instead of the tokenizer's.",
        None,
        metavar="FILE",
        **MODEL,
    )
    trust_remote_code: bool = option("Run code that comes with the model.", False, **MODEL)
    dtype: Literal["mixed", "float32", "bfloat16"] | None = option(
        "Choose the arithmetic; mixed: fp32 weights, bf16 arithmetic; bfloat16: weights too, for "
        "LoRA: it rounds small updates away (default: mixed where bf16 is fast, else float32).",
        None,
        **MODEL,
    )
    device: Literal["cpu", "cuda"] | None = option(
        "Run here (default: a GPU if there is one).", None, **MODEL
    )
    lora_rank: int | None = option(
        "Train adapters of this rank on all linear layers, and the head; they are merged at the "
        "end (default: train all weights).",
        None,
        metavar="R",
        least=1,
        **MODEL,
    )
    lora_alpha: float | None = option(
        "Scale the adapters by this over their rank (default: twice the rank).",
        None,
        metavar="ALPHA",
        above=0,
        **MODEL,
    )

    name: str | None = option("Read this configuration of a data set.", None, **DATA)
    split: str = option("Read this split of a data set.", "train", **DATA)
    limit: int | None = option("Read this many rows.", None, metavar="ROWS", least=1, **DATA)
    chat: bool | None = option(
        "Read text as turns of a chat, or not (default: only prompts and answers with ratings).",
        None,
        **DATA,
    )
    ratings: Literal["pairs", "all_pairs", "groups"] = option(
        "Make these of rated answers: best against worst, all pairs, or ranked groups.",
        "pairs",
        **DATA,
    )
    ranks: Literal["pairs", "all_pairs", "groups"] = option(
        "Make these of ranked answers.", "groups", **DATA
    )
    margin: Literal["data", "ratings", "none"] = option(
        "Take margins from the data where rows have one; ratings: else from the difference of "
        "ratings; none: train without margins.",
        "data",
        **DATA,
    )
    max_length: int = option(
        "Drop pairs with a longer side.", 1024, metavar="TOKENS", least=1, **DATA
    )

    eval_data: str | None = option(
        "Measure on these preferences, given as for --data (default: a share of that).",
        None,
        **HELD_OUT,
    )
    eval_data_split: str = option("Read this split of --eval-data.", "test", **HELD_OUT)
    eval_split: float | None = option(
        "Hold out this share of --data, whole questions; 0: none (default: 0.05, and 1,000 pairs "
        "at most).",
        None,
        metavar="SHARE",
        least=0,
        below=1,
        **HELD_OUT,
    )
    eval_every: int | None = option(
        "Measure after this many steps (default: a tenth of the run).",
        None,
        metavar="STEPS",
        least=1,
        **HELD_OUT,
    )

    epochs: float = option(
        "Pass over the data this often; reward models overfit in the second pass.",
        1.0,
        above=0,
        **TRAINING,
    )
    max_steps: int | None = option(
        "Stop after this many optimiser steps, in place of --epochs.",
        None,
        metavar="STEPS",
        least=1,
        **TRAINING,
    )
    batch_pairs: int = option(
        "Put this many pairs (or groups) in a micro-batch.", 8, metavar="N", least=1, **TRAINING
    )
    grad_accum: int = option(
        "Use this many micro-batches an optimiser step: 64 pairs with the defaults, as "
        "InstructGPT does.",
        8,
        metavar="N",
        least=1,
        **TRAINING,
    )
    max_tokens_per_batch: int | None = option(
        "Fill a micro-batch up to this many distinct prefixes, in place of --batch-pairs.",
        None,
        metavar="TOKENS",
        least=1,
        **TRAINING,
    )
    learning_rate: float | None = option(
        "Peak at this learning rate (default: 1e-5, with LoRA 1e-4: Llama 2's and TRL's).",
        None,
        metavar="RATE",
        above=0,
        below=1,
        **TRAINING,
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "Lower the learning rate; cosine: to a tenth, as Llama 2 does; linear: to 0.",
        "cosine",
        **TRAINING,
    )
    warm_up: float = option(
        "Raise the learning rate in this share of the steps.",
        0.03,
        metavar="SHARE",
        least=0,
        below=1,
        **TRAINING,
    )
    weight_decay: float = option(
        "Set the weight decay of AdamW.", 0.0, metavar="W", least=0, **TRAINING
    )
    loss: Literal["bradley_terry", "focal", "all_pairs", "plackett_luce"] | None = option(
        "Choose the loss: the first two for pairs, the others for ranked groups (default: the "
        "first of its kind).",
        None,
        **TRAINING,
    )
    focal_gamma: float = option(
        "Set the exponent of focal.", 2.0, metavar="GAMMA", above=0, **TRAINING
    )
    label_smoothing: float = option(
        "Take labels as wrong with this probability.",
        0.0,
        metavar="P",
        least=0,
        below=0.5,
        **TRAINING,
    )
    center: float = option(
        "Weight the squared sum of a pair's rewards, which keeps their mean at 0; such as 0.01.",
        0.0,
        metavar="WEIGHT",
        least=0,
        **TRAINING,
    )
    gradient_checkpointing: bool = option(
        "Run layers again in the backward: slower, with less memory.", True, **TRAINING
    )
    seed: int = option(
        "Seed the head, the split and the order.", 0, least=0, below=2**32, **TRAINING
    )
    save_every: int | None = option(
        "Save a checkpoint after this many steps (default: a tenth of the run).",
        None,
        metavar="STEPS",
        least=1,
        **TRAINING,
    )

    resume: bool = option("Continue from the last checkpoint, or start.", False, **RUN)
    overwrite: bool = option("Replace what is in the folder.", False, **RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("resume", "overwrite")

    def as_yaml(self) -> str:
        """All options that have a value, as ``--config`` reads them."""
        import yaml

        run = ("resume", "overwrite")
        given = {
            name.replace("_", "-"): value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and name not in run
        }
        return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
