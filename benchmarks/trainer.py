"""Whole optimiser steps, side by side: TRL's RewardTrainer, the same on a patched model, rmfast's.

    python -m rmfast.benchmarks.trainer --data pairs.jsonl --pairs 64

All else is as TRL sets it: fp32 weights under bf16 autocast, gradient checkpointing, AdamW. A pass
is one epoch in the data's order; timed is ``trainer.train()``, data loading and logging included.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rmfast.benchmarks import contestants as shared

DEFAULT = ("trl", "trl-patched", "rmfast-trainer")


@dataclass(frozen=True)
class Job(shared.Job):
    """What a trainer is told besides."""

    packs: bool = False  # rmfast's trainer, not TRL's
    batch_pairs: int = 8
    autocast: bool = True

    def runner(self) -> Runner:
        return Runner(self)


class Runner(shared.Runner):
    """A trainer; a pass is an epoch."""

    def __init__(self, job: Job) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer

        super().__init__(job)
        if job.packs:
            from rmfast.train.trainer import RewardConfig, RewardTrainer
        else:
            from trl import RewardConfig, RewardTrainer
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        tokenizer.pad_token_id = job.pad
        rows = {"chosen_ids": job.rows[0::2], "rejected_ids": job.rows[1::2]}
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = RewardTrainer(
            model=self.model,
            args=RewardConfig(
                output_dir=self.folder.name,
                num_train_epochs=1,
                per_device_train_batch_size=job.batch_pairs,
                bf16=job.autocast,
                train_sampling_strategy="sequential",
                max_length=None,
                use_cpu=job.device == "cpu",
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
        self.trainer.remove_callback(_printer())
        shared._forget_peak(job.device)

    def _pass(self) -> None:
        self.trainer.train()
        shared._synchronise(self.job.device)

    def result(self) -> dict[str, Any]:
        out = super().result()
        # forward and the second one of checkpointing were counted; backward is as much again
        out["flops"] = self.flops * 2
        out["scores"] = [x["loss"] for x in self.trainer.state.log_history if "loss" in x]
        state = sum(p.numel() * (2 * p.element_size() + 8) for p in self.model.parameters())
        out["state_gb"] = state / 1e9  # weights, gradients, AdamW's two moments in fp32
        return out


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def main(argv: Sequence[str] | None = None) -> None:
    parser = shared.parser("trainer", DEFAULT, "Time optimiser steps: TRL against rmfast.")
    parser.set_defaults(dtype="float32")
    parser.add_argument("--no-autocast", action="store_true", help="fp32 throughout")
    args = parser.parse_args(argv)
    jobs = {
        name: Job(**vars(job), packs=name == "rmfast-trainer", batch_pairs=args.batch_pairs,
                  autocast=not args.no_autocast)
        for name, job in shared.prepare(args, train=True).items()
    }  # fmt: skip
    figures = shared.measure(jobs, args.rounds, lambda line: print(line, file=sys.stderr))
    shared.compare(figures)
    first = next(iter(figures.values()))
    for one in figures.values():
        one["score_difference"] = one["grad_norm_ratio"] = None  # no scores, and no gradient left
        one["steps_per_second"] = len(one["scores"]) / one["seconds"]
    shared.show("trainer", args, figures)
    apart = "losses of a step, at most apart from the first's:"
    memory = "peak memory less imports, weights, gradients and AdamW's state, GB:"
    differences = [
        max(abs(x - y) for x, y in zip(one["scores"], first["scores"], strict=True))
        for one in figures.values()
    ]
    print(apart, ", ".join(f"{x:.1e}" for x in differences))
    print(memory, ", ".join(
        f"{one['peak_over_baseline_gb'] - one['state_gb']:.2f}" for one in figures.values()
    ))  # fmt: skip
    if args.csv is not None:
        shared.append_csv(args.csv, "trainer", args, figures)


if __name__ == "__main__":
    main()
