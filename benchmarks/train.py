"""Training, side by side: Hugging Face on the padded batch, and rmfast.

    python -m rmfast.benchmarks.train --data pairs.jsonl --pairs 16

Timed is forward and backward of ``-logsigmoid(chosen - rejected).mean()`` over all batches, in
``model.train()``, chosen then rejected, right-padded, as TRL collates them. Gradients add up over
a pass and are dropped outside the timed part; there is no optimiser step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rmfast.benchmarks import contestants as shared

DEFAULT = ("hf", "rmfast")


def main(argv: Sequence[str] | None = None) -> None:
    parser = shared.parser("train", DEFAULT, "Time training: Hugging Face against rmfast.")
    args = parser.parse_args(argv)
    jobs = shared.prepare(args, train=True)
    figures = shared.measure(jobs, args.rounds, lambda line: print(line, file=sys.stderr))
    shared.compare(figures)
    shared.show("train", args, figures)
    if args.csv is not None:
        shared.append_csv(args.csv, "train", args, figures)


if __name__ == "__main__":
    main()
