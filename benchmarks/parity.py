"""How far the patched model's numbers are from Hugging Face's, on real text. Nothing is timed.

Scores: the largest difference, relative to the spread (standard deviation) of all scores.
Gradients: relative L2 distance over all parameters together, of the pairwise loss over all pairs.
"""

from __future__ import annotations

import math

from torch import Tensor

import rmfast
from rmfast.benchmarks import contestants


def _run(runner: contestants.Runner) -> tuple[Tensor, list[Tensor]]:
    """Scores of all rows, and the summed gradient of every parameter, on the CPU."""
    runner.model.zero_grad(set_to_none=True)
    runner._pass()
    return runner.scores.clone(), [p.grad.cpu() for p in runner.model.parameters()]


def main(argv: list[str] | None = None) -> None:
    parser = contestants.parser("parity", ["rmfast"], __doc__)
    parser.set_defaults(dtype="float32", rounds=1)
    parser.add_argument("--max-training-tokens", type=int, help="pieces of a batch, of patch")
    args = parser.parse_args(argv)
    [job] = contestants.prepare(args, train=True).values()
    runner = contestants.Runner(job)
    theirs, their_grads = _run(runner)
    rmfast.patch(runner.model, **job.options, max_training_tokens=args.max_training_tokens)
    ours, our_grads = _run(runner)
    print(rmfast.report(runner.model))
    apart = [(a.double() - b.double()).norm() for a, b in zip(our_grads, their_grads, strict=True)]
    grads = math.hypot(*apart) / math.hypot(*(b.double().norm() for b in their_grads))
    scores = float((ours - theirs).abs().max() / theirs.std())
    print(f"{args.pairs} pairs, {args.dtype}, {args.batch_pairs} pairs a batch")
    print(f"scores, largest difference / spread   {scores:.1e}")
    print(f"gradients, relative L2                {grads:.1e}")


if __name__ == "__main__":
    main()
