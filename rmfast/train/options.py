"""Options of ``rmfast train``: flags, keys of a YAML file, and defaults."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from rmfast.arguments import Options, option
from rmfast.score.options import FILES

_model = functools.partial(option, group="Model")
_data = functools.partial(option, group="Data")
_held_out = functools.partial(option, group="Held-out data")
_training = functools.partial(option, group="Training")
_run = functools.partial(option, group="Run")


@dataclasses.dataclass(kw_only=True)
class TrainOptions(Options):
    """Options of ``rmfast train``."""

    # fmt: off
    model: str = option("Train this language model or reward model: a folder or a name on the hub.")
    data: str = option(f"Read preferences from this {FILES}")
    output: str = option("Write the model and all that belongs to it here.", metavar="FOLDER")

    revision: str | None = _model("Take this branch, tag or commit of a model on the hub.", None)
    tokenizer: str | None = _model(
        "Use this tokenizer, a folder or hub name (default: the model's).", None, metavar="NAME")
    chat_template: str | None = _model(
        "Use the Jinja template in this file instead of the tokenizer's.", None, metavar="FILE")
    trust_remote_code: bool = _model("Run code that comes with the model.", False, both=True)
    dtype: Literal["mixed", "float32", "bfloat16"] | None = _model(
        "Choose the arithmetic; mixed: fp32 weights, bf16 arithmetic; bfloat16: weights too, for "
        "LoRA: it rounds small updates away (default: mixed where bf16 is fast, else float32).",
        None)
    device: Literal["cpu", "cuda"] | None = _model(
        "Run here (default: a GPU if there is one).", None)
    lora_rank: int | None = _model(
        "Train adapters of this rank on all linear layers, and the head; they are merged at the "
        "end (default: train all weights).", None, metavar="R", least=1)
    lora_alpha: float | None = _model(
        "Scale the adapters by this over their rank (default: twice the rank).",
        None, metavar="ALPHA", above=0)

    name: str | None = _data("Read this configuration of a data set.", None)
    split: str = _data("Read this split of a data set.", "train")
    ignore_columns: str | None = _data(
        "Pass over these columns, with commas between, whose names seem to belong to the prompt.",
        None, metavar="NAMES")
    limit: int | None = _data("Read this many rows.", None, metavar="ROWS", least=1)
    chat: bool | None = _data(
        "Read text as turns of a chat, or not (default: only prompts and answers with ratings).",
        None)
    special_tokens: bool = _data(
        "Take special tokens of the chat template in messages as they are, instead of refusing "
        "the row.", False, both=True)
    ratings: Literal["pairs", "all_pairs", "groups"] = _data(
        "Make these of rated answers: best against worst, all pairs, or ranked groups.", "pairs")
    ranks: Literal["pairs", "all_pairs", "groups"] = _data(
        "Make these of ranked answers.", "groups")
    margin: Literal["data", "ratings", "none"] = _data(
        "Take margins from the data where rows have one; ratings: else from the difference of "
        "ratings; none: train without margins.", "data")
    max_length: int = _data("Drop pairs with a longer side.", 1024, metavar="TOKENS", least=1)

    eval_data: str | None = _held_out(
        "Measure on these preferences, given as for --data (default: a share of that).", None)
    eval_data_split: str = _held_out("Read this split of --eval-data.", "test")
    eval_split: float | None = _held_out(
        "Hold out this share of --data, whole questions; 0: none (default: 0.05, and 1,000 pairs "
        "at most).", None, metavar="SHARE", least=0, below=1)
    eval_every: int | None = _held_out(
        "Measure after this many steps (default: a tenth of the run).",
        None, metavar="STEPS", least=1)
    keep_best: bool = _held_out(
        "Write the model of the highest held-out accuracy, of the first of equals, instead of the "
        "last; checkpoints are saved where it is measured.", False, both=True)

    epochs: float = _training(
        "Pass over the data this often; reward models overfit in the second pass.", 1.0, above=0)
    max_steps: int | None = _training(
        "Stop after this many optimiser steps, in place of --epochs.",
        None, metavar="STEPS", least=1)
    batch_pairs: int = _training(
        "Put this many pairs (or groups) in a micro-batch.", 8, metavar="N", least=1)
    grad_accum: int = _training(
        "Use this many micro-batches an optimiser step: 64 pairs with the defaults, as InstructGPT "
        "does.", 8, metavar="N", least=1)
    max_tokens_per_batch: int | None = _training(
        "Fill a micro-batch up to this many distinct prefixes, in place of --batch-pairs; run a "
        "pair or group that has more in pieces.",
        None, metavar="TOKENS", least=1)
    learning_rate: float | None = _training(
        "Peak at this learning rate (default: 1e-5, with LoRA 1e-4: Llama 2's and TRL's).",
        None, metavar="RATE", above=0, below=1)
    schedule: Literal["cosine", "linear", "constant"] = _training(
        "Lower the learning rate; cosine: to a tenth, as Llama 2 does; linear: to 0.", "cosine")
    warm_up: float = _training(
        "Raise the learning rate in this share of the steps: a tenth at most, none under 10 steps.",
        0.03, metavar="SHARE", least=0, below=1)
    weight_decay: float = _training("Set the weight decay of AdamW.", 0.0, metavar="W", least=0)
    loss: Literal["bradley_terry", "focal", "all_pairs", "plackett_luce"] | None = _training(
        "Choose the loss: the first two for pairs, the others for ranked groups (default: the "
        "first of its kind).", None)
    focal_gamma: float = _training("Set the exponent of focal.", 2.0, metavar="GAMMA", above=0)
    label_smoothing: float = _training(
        "Take labels as wrong with this probability.", 0.0, metavar="P", least=0, below=0.5)
    center: float = _training(
        "Weight the squared sum of a pair's rewards, which keeps their mean at 0; such as 0.01.",
        0.0, metavar="WEIGHT", least=0)
    gradient_checkpointing: bool = _training(
        "Run layers again in the backward: slower, with less memory.", True)
    seed: int = _training("Seed the head, the split and the order.", 0, least=0, below=2**32)
    save_every: int | None = _training(
        "Save a checkpoint after this many steps (default: a tenth of the run).",
        None, metavar="STEPS", least=1)

    report_to: str | None = _run(
        "Report metrics to these, such as wandb,tensorboard (default: none).",
        None, metavar="NAMES")
    resume: bool = _run("Continue from the last checkpoint, or start.", False)
    overwrite: bool = _run("Replace what an earlier run wrote to the folder.", False)
    # fmt: on

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
