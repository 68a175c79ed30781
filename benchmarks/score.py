"""Scoring, side by side: Hugging Face in file order and length-sorted, and rmfast.

    python -m rmfast.benchmarks.score --data pairs.jsonl --pairs 96

One call, one table. Every contestant scores the same token ids in the same dtype, in a process of
its own; they take turns. Timed is a pass over all batches: padded ids in, scores out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rmfast.benchmarks import contestants as shared

DEFAULT = ("hf", "hf-sorted", "rmfast")


def main(argv: Sequence[str] | None = None) -> None:
    parser = shared.parser("score", DEFAULT, "Time scoring: Hugging Face against rmfast.")
    parser.add_argument(
        "--oracle",
        type=int,
        default=16,
        metavar="PAIRS",
        help="half-precision scores of so many pairs are held against fp32 ones; 0: none",
    )
    args = parser.parse_args(argv)
    jobs = shared.prepare(args, train=False)
    figures = shared.measure(jobs, args.rounds, lambda line: print(line, file=sys.stderr))
    shared.compare(figures)
    if args.oracle > 0 and args.dtype != "float32":
        hold_against_fp32(figures, next(iter(jobs.values())), min(args.oracle, args.pairs))
    shared.show("score", args, figures)
    if args.csv is not None:
        shared.append_csv(args.csv, "score", args, figures)


def hold_against_fp32(figures: dict[str, dict[str, Any]], job: shared.Job, pairs: int) -> None:
    """Add each contestant's root-mean-square error to Hugging Face's fp32 scores of ``pairs``.

    The fp32 scores come one sequence at a time: without padding there is nothing to get wrong.
    ``oracle_error`` is in units of their standard deviation, ``oracle_ratio`` in Hugging Face's
    own error (in the first contestant's, where Hugging Face was not asked for).
    """
    rows = job.rows[: 2 * pairs]
    alone = [[row] for row in range(len(rows))]
    oracle = dataclasses.replace(job, options=None, dtype="float32", rows=rows, batches=alone)
    exact = torch.tensor(shared.untimed(oracle)["scores"])
    for one in figures.values():
        error = torch.tensor(one["scores"])[: len(rows)] - exact
        one["oracle_error"] = float(error.square().mean().sqrt() / exact.std())
    hf = figures.get("hf", next(iter(figures.values())))
    for one in figures.values():
        one["oracle_ratio"] = one["oracle_error"] / hf["oracle_error"]


if __name__ == "__main__":
    main()
