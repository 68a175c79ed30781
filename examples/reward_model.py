"""Train a reward model on preference pairs, with TRL's trainer alone and with rmfast's.

    python examples/reward_model.py --data hh-harmless.jsonl.gz --trainer both

Both start from the same checkpoint and see the same pairs in the same order. Shown are held-out
accuracy with its 95 % interval, seconds a step, peak memory, and how far the loss curves lie apart.
Each trainer is a process of its own; they run one after the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

SMOOTH = 20  # steps that the curves are averaged over
SIDES = ("chosen", "rejected")


def main() -> None:
    args = _parser().parse_args()
    if args.trainer != "both":
        train(args)
        return
    results = {}
    for name in ("trl", "rmfast"):
        folder = Path(args.output) / name
        options = [x for x in sys.argv[1:] if x not in ("--trainer", "both", "--trainer=both")]
        options += ["--trainer", name, "--output", str(folder)]
        subprocess.run([sys.executable, __file__, *options], check=True)
        results[name] = json.loads((folder / "result.json").read_text())
    compare(results, Path(args.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name, or a folder; "
        "'embedded': the one that rmfast[demo] brings")  # fmt: skip
    add(
        "--data", default="Anthropic/hh-rlhf", help="hub name, or JSON lines of chosen and rejected"
    )
    add("--data-dir", default="harmless-base", help="folder of the hub's data set")
    add("--trainer", choices=("rmfast", "trl", "both"), default="rmfast")
    add("--steps", type=int, default=300)
    add("--batch-pairs", type=int, default=2, help="pairs an optimiser step")
    add("--held-out", type=int, default=300, help="pairs the accuracy is of: the data's last ones")
    add("--learning-rate", type=float, default=2e-5)
    add("--bf16", action="store_true", help="bf16 autocast, as TRL has it by default; else fp32")
    add("--seed", type=int, default=0)
    add("--output", default="reward-model", help="folder of the model and of result.json")
    return parser


def train(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    import rmfast

    if args.trainer == "rmfast":
        from rmfast.train.trainer import RewardConfig, RewardTrainer
    else:
        from trl import RewardConfig, RewardTrainer
    name = _model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = _pairs(args)
    if len(rows) < args.steps * args.batch_pairs + args.held_out:
        raise SystemExit(f"{len(rows)} pairs are too few for these --steps and --held-out")
    trainer = RewardTrainer(
        model=name,
        args=RewardConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_pairs,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 10,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=rows.take(args.steps * args.batch_pairs),
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = _peak_gb()
    trainer.save_model()
    held_out = rows.skip(len(rows) - args.held_out)
    held_out = [row[side] + tokenizer.eos_token for row in held_out for side in SIDES]
    scores = rmfast.Scorer(trainer.model, tokenizer).score(held_out).reshape(-1, 2)
    result = {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "seconds_a_step": seconds / args.steps,
        "peak_gb": peak,
        "right": int((scores[:, 0] > scores[:, 1]).sum()),
        "held_out": args.held_out,
    }
    (Path(args.output) / "result.json").write_text(json.dumps(result))
    print(f"held-out accuracy: {_accuracy(result)}")


def compare(results: dict[str, dict[str, Any]], folder: Path) -> None:
    ours, theirs = results["rmfast"], results["trl"]
    curves = {name: np.array(result["losses"]) for name, result in results.items()}
    width = min(SMOOTH, len(curves["trl"]))
    kernel = np.ones(width) / width
    smooth = {name: np.convolve(curve, kernel, "valid") for name, curve in curves.items()}
    apart = np.abs(smooth["rmfast"] - smooth["trl"]).max()
    for name, result in results.items():
        print(f"{name:>6}: held-out accuracy {_accuracy(result)}")
    print(f"steps a second, rmfast / TRL: {theirs['seconds_a_step'] / ours['seconds_a_step']:.2f}")
    print(f"peak memory, rmfast / TRL: {ours['peak_gb'] / theirs['peak_gb']:.2f}")
    print(f"loss curves, means of {width} steps, at most apart: {apart:.1e}")
    _draw(smooth, width, folder / "losses.png")


def _draw(curves: dict[str, np.ndarray], width: int, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture of the losses: pip install 'rmfast[eval]'")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(np.arange(width, width + len(curve)), curve, style, label=name)
    axes.set(xlabel="step", ylabel=f"loss, mean of {width} steps")
    axes.legend()
    figure.savefig(path)
    print(f"losses drawn: {path}")


def _accuracy(result: dict[str, Any]) -> str:
    from rmfast.evaluate.measures import interval

    low, high = interval(result["right"], result["held_out"])
    share = result["right"] / result["held_out"]
    return f"{share:.1%} (95 %: {low:.1%} to {high:.1%}, {result['held_out']} pairs)"


def _model(given: str) -> str:
    if given != "embedded":
        return given
    from rmfast.demo import embedded

    return str(embedded.checkpoint())


def _pairs(args: argparse.Namespace) -> Dataset:
    from rmfast import data

    source: Any = args.data
    if not Path(source).exists():
        from datasets import load_dataset

        source = load_dataset(source, data_dir=args.data_dir, split="train")
    pairs = data.preferences(source)
    print(pairs)
    return pairs.dataset()


def _peak_gb() -> float:
    """Most memory the process has held: on the GPU where it trains there, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
