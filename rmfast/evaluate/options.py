"""Options of ``rmfast eval``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rmfast.arguments import option
from rmfast.score.options import FILES, INPUT, ScoringOptions

IMPLICIT = "Implicit reward: beta * (log policy - log reference)"
OUTPUT = "Output"
REWARDBENCH = "RewardBench's names for options that have another one here"


def column(name: str) -> str:
    return option(f"Read {name} from this column.", name, metavar="NAME", group=INPUT)


@dataclasses.dataclass(kw_only=True)
class EvalOptions(ScoringOptions):
    """Options of ``rmfast eval``."""

    # fmt: off
    input: str = option(
        f"Read this {FILES}", metavar="FILE", names=("--dataset",), several=True)

    ref_model: str | None = option(
        "Take --model as a policy and this as its reference.",
        None, metavar="MODEL", group=IMPLICIT)
    beta: float | None = option(
        "Use the beta of the training (default: 0.1).", None, above=0, group=IMPLICIT)

    prompt_column: str = column("prompt")
    chosen_column: str = column("chosen")
    rejected_column: str = column("rejected")
    subset_column: str = column("subset")
    split: str | None = option(
        "Read this split of a data set (default: train; of a published benchmark, its own).",
        None, group=INPUT)

    json: str | None = option("Write all figures here.", None, metavar="FILE", group=OUTPUT)
    figure: str | None = option(
        "Draw the figures here: .png, or what matplotlib can write.",
        None, metavar="FILE", group=OUTPUT)
    scores: str | None = option(
        "Write the scores of each row here, as JSON lines.", None, metavar="FILE", group=OUTPUT)
    resume: bool = option(
        "Continue what a run with the same options left in --scores, or start.", False, OUTPUT)
    overwrite: bool = option("Replace the files that are there.", False, OUTPUT)
    rewardbench_files: bool = option(
        "Write MODEL.json and MODEL_outputs.jsonl as RewardBench does.", False, OUTPUT)
    output_dir: str | None = option(
        "Write RewardBench's files to this folder (default: results).",
        None, metavar="FOLDER", group=OUTPUT)
    save_all: bool = option("Write MODEL_all.jsonl beside them.", False, OUTPUT)

    torch_dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = option(
        "Set --dtype.", None, REWARDBENCH)
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = option(
        "Set --attention; eager is sdpa here, flash_attention_2 auto.", None, REWARDBENCH)
    force_truncation: bool = option("Set --on-overlong truncate_left.", False, REWARDBENCH)
    debug: bool = option("Set --limit 10.", False, REWARDBENCH)
    load_json: bool = option("Do nothing: a file's name tells its kind.", False, REWARDBENCH)
    batch_size: int | None = option(
        "Do nothing: see --max-tokens.", None, metavar="N", least=1, group=REWARDBENCH)
    # fmt: on
