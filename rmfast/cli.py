"""The command ``rmfast``. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

BENCHMARKS = ("score", "train", "bulk", "trainer", "parity", "kernels")


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (left out: the process's own); returns the exit code."""
    args = _parser().parse_args(argv)
    from rmfast.data import DataError

    try:
        return args.run(args) or 0
    except (UserError, DataError) as error:
        message = " ".join(str(error).split())
        print(f"rmfast {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nrmfast {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmfast",
        description="Hugging Face reward models train and score without running a token twice.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_score(commands)
    _add_eval(commands)
    _add_train(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rmfast import __version__

        print(f"rmfast {__version__}")
        parser.exit()


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"need a whole number from 1 on, got {text!r}")
    return int(text)


def number(need: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """What reads a number that ``fits``; ``need`` tells which ones do."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"need a number {need}, got {text!r}")
        return value

    return read


rate = number("between 0 and 1", lambda x: 0 < x < 1)
positive = number("above 0", lambda x: 0 < x < math.inf)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="patch a reward model, check it, train it, and time both",
        description=(
            "Patch a reward model, hold its scores against the unpatched model's, train it on "
            "preference pairs, and compare time and memory. With no options nothing is "
            "downloaded: the model comes from a package, the pairs are made from Python's own "
            "documentation, and a few minutes on two CPU cores are enough."
        ),
    )
    add = parser.add_argument
    add("--model", help="folder or hub name of a model; default: SmolLM2-135M-Instruct")
    add("--data", metavar="FILE", help="JSON lines (.gz too) with chosen, rejected and, optionally,"
        " prompt: text or lists of messages")  # fmt: skip
    add("--steps", type=count, default=60, help="training steps (default: %(default)s)")
    add("--batch-pairs", type=count, default=8, help="pairs a batch (default: %(default)s)")
    add("--max-length", type=count, default=1024, metavar="TOKENS",
        help="pairs with a longer side are dropped (default: %(default)s)")  # fmt: skip
    add("--learning-rate", type=rate, metavar="RATE",
        help="peak learning rate (default: 1.5e-4; 2e-5 with --model)")  # fmt: skip
    add("--dtype", choices=("mixed", "float32", "bfloat16"),
        help="mixed: fp32 weights, bf16 arithmetic; bfloat16: weights too, which rounds small "
        "updates away (default: mixed where bf16 is fast, else float32)")  # fmt: skip
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--chat-template", metavar="FILE", help="Jinja template, for a tokenizer without one")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--output", metavar="FOLDER", help="save the trained model and its tokenizer here")
    add("--seed", type=int, default=0, help="of the order, the split and a missing head (default: "
        "%(default)s)")  # fmt: skip
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from rmfast import demo

    demo.run(args)


def _add_model(add: Callable[..., object]) -> None:
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of the weights (default: the checkpoint's)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add(
        "--attention",
        choices=("auto", "triton", "sdpa", "flex", "flash"),
        default="auto",
        help="backend (default: triton on a GPU where it can, else sdpa)",
    )
    add("--compile", action="store_true", help="compile the decoder layers")
    add(
        "--pooling",
        choices=("hf", "mask"),
        default="hf",
        help="the token that carries the score: hf, the last that is not the pad token, as in "
        "Hugging Face; mask, the last (default: %(default)s)",
    )
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_conversations(add: Callable[..., object]) -> None:
    add("--system-prompt", metavar="TEXT", help="put before messages that have none")
    add("--chat-template", metavar="FILE", help="Jinja template, in place of the tokenizer's")
    add(
        "--plain",
        action="store_true",
        help="prompt and response are plain text, one after the other, and no turns of a chat",
    )
    add(
        "--max-length",
        type=count,
        metavar="TOKENS",
        help="most tokens of a conversation (default: the model's own limit)",
    )
    add(
        "--on-overlong",
        choices=("error", "skip", "truncate_left"),
        default="error",
        type=lambda text: text.replace("-", "_"),
        help="what becomes of a longer one: left out as an error; left out, and no error; its "
        "last tokens scored (default: %(default)s)",
    )


def _add_max_tokens(add: Callable[..., object]) -> None:
    add(
        "--max-tokens",
        type=count,
        metavar="TOKENS",
        help="distinct prefixes a micro-batch (default: what the device's memory holds)",
    )


_COLUMNS = {
    "messages": "a list of messages",
    "prompt": "what comes before, as text or messages",
    "responses": "a list of responses, each as text or messages",
    "response": "the response, as text or messages",
    "chosen": "the response that is preferred, or the whole conversation with it",
    "rejected": "the other one",
    "text": "plain text",
}


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "score",
        usage="rmfast score --model MODEL --input FILE --output FILE [--resume] [options]",
        help="score a file of conversations with a reward model",
        description=(
            "Score each row of a file and write it again with its reward. Rows are messages, "
            "prompt + response, prompt + responses, chosen + rejected (prompt or not), or text; "
            "all their columns are kept. What comes out is in the input's order, and on the disk "
            "window by window: after a kill, the same command with --resume goes on, and the "
            "output is the same as if nothing had happened."
        ),
        epilog=(
            "Rows that cannot be scored are left out and listed in OUTPUT.errors.jsonl by line "
            "and reason. Exit code: 0, all rows scored; 1, some were not; 2, it could not run, or "
            "--strict met a bad row; 130, interrupted."
        ),
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of a reward model")
    add(
        "--input",
        required=True,
        metavar="FILE",
        help=".jsonl, .csv (both .gz too) or .parquet; or a folder or hub name of a data set",
    )
    add(
        "--output",
        required=True,
        metavar="FILE",
        help="the same kinds of file; its name says which, whatever the input is",
    )

    _add_model(parser.add_argument_group("model").add_argument)
    _add_conversations(parser.add_argument_group("conversations").add_argument)

    add = parser.add_argument_group("scores").add_argument
    add("--normalize", action="store_true", help="(score - mean) / std of the model's config")
    add("--sigmoid", action="store_true", help="between 0 and 1 (default: the raw score)")
    add(
        "--reward-column",
        metavar="NAME",
        default="reward",
        help="name of the new column, or what it is made of: chosen_NAME and rejected_NAME, or "
        "NAMEs for several responses (default: %(default)s)",
    )

    add = parser.add_argument_group(
        "input",
        "Columns are found by their names: messages, prompt + responses (completions), prompt + "
        "response (completion), chosen + rejected, text, whichever comes first in this order.",
    ).add_argument
    for field, what in _COLUMNS.items():
        add(f"--{field}-column", metavar="NAME", help=what)
    add("--name", help="configuration of a data set")
    add("--split", default="train", help="split of a data set (default: %(default)s)")
    add("--limit", type=count, metavar="ROWS", help="stop after so many rows")

    group = parser.add_argument_group("run")
    add = group.add_argument
    _add_max_tokens(add)
    add(
        "--batch-window",
        type=count,
        metavar="N",
        default=1024,
        help="conversations looked at together: prefixes are shared, and the output is written, "
        "window by window (default: %(default)s)",
    )
    add("--ray", type=count, metavar="ACTORS", help="so many processes on a Ray cluster, each "
        "with a model of its own (pip install 'rmfast[ray]')")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first row that cannot be scored")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume",
        action="store_true",
        help="go on where a run with the same options was stopped, or start",
    )
    either.add_argument("--overwrite", action="store_true", help="replace the output")
    add("--report", metavar="FILE", help="JSON report (default: OUTPUT.report.json)")
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    from rmfast import score

    return score.run(args)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        usage="rmfast eval --model MODEL --input FILE [options]",
        help="measure a reward model on preference data",
        description=(
            "Accuracy of a reward model on pairs of chosen and rejected answers, by subset and "
            "with its interval; margins, length bias and calibration. Where rows have lists of "
            "answers, how often the best one is a chosen one; where these are three and three, "
            "RM-Bench's figures too."
        ),
        epilog=(
            "Exit code: 0, all rows scored; 1, some were not; 2, it could not run, or --strict met "
            "a bad row; 130, interrupted. All options may be written with _ for -, as RewardBench "
            "has them."
        ),
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of a reward model")
    add(
        "--input",
        "--dataset",
        required=True,
        metavar="FILE",
        help=".jsonl, .csv (both .gz too), .parquet or a .json list; or a folder or hub name of a "
        "data set",
    )

    add = _either_spelling(
        parser.add_argument_group(
            "implicit reward",
            "Of a policy trained by preference optimisation: beta * (log policy - log reference).",
        )
    )
    add("--ref-model", metavar="MODEL", help="the reference; --model is then the policy")
    add("--beta", type=positive, help="as in training (default: 0.1)")

    add = _either_spelling(parser.add_argument_group("model"))
    _add_model(add)
    add("--tokenizer", metavar="NAME", help="folder or hub name (default: the model's)")

    _add_conversations(_either_spelling(parser.add_argument_group("conversations")))

    add = _either_spelling(
        parser.add_argument_group(
            "input", "chosen and rejected are text, messages, or lists of these; prompt is optional"
        )
    )
    for field in ("prompt", "chosen", "rejected", "subset"):
        add(f"--{field}-column", metavar="NAME", default=field,
            help="its column (default: %(default)s)")  # fmt: skip
    add("--name", help="configuration of a data set")
    add("--split", help="split of a data set (default: train; filtered for allenai/reward-bench)")
    add("--limit", type=count, metavar="ROWS", help="stop after so many rows")

    add = _either_spelling(parser.add_argument_group("output"))
    add("--json", metavar="FILE", help="all figures")
    add("--figure", metavar="FILE", help="a picture of them: .png, or what matplotlib can write")
    add("--scores", metavar="FILE", help="scores of each row, as JSON lines")
    add(
        "--rewardbench-files",
        action="store_true",
        help="write MODEL.json and MODEL_outputs.jsonl as RewardBench does",
    )
    add("--output-dir", metavar="FOLDER", help="for these, and writes them (default: results)")
    add("--save-all", action="store_true", help="write MODEL_all.jsonl beside them")

    add = _either_spelling(parser.add_argument_group("run"))
    _add_max_tokens(add)
    add(
        "--batch-window",
        type=count,
        metavar="N",
        default=1024,
        help="answers looked at together, for their prefixes (default: %(default)s)",
    )
    add("--strict", action="store_true", help="stop at the first row that cannot be scored")

    add = _either_spelling(
        parser.add_argument_group("RewardBench's names", "for what has another one here")
    )
    dtypes = ("float16", "bfloat16", "float32", "float64")
    add("--torch-dtype", choices=dtypes, help="--dtype")
    add("--attn-implementation", choices=("eager", "sdpa", "flash_attention_2"),
        help="--attention; eager is sdpa here")  # fmt: skip
    add("--force-truncation", action="store_true", help="--on-overlong truncate_left")
    add("--debug", action="store_true", help="--limit 10")
    add("--load-json", action="store_true", help="nothing: a file's name tells what it is")
    add("--batch-size", type=count, metavar="N", help="nothing: see --max-tokens")
    parser.set_defaults(run=_eval)


def _either_spelling(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """``group.add_argument`` for options that may be written with _ for -."""

    def add(name: str, **how: Any) -> None:
        action = group.add_argument(name, **how)
        other = "--" + name[2:].replace("-", "_")
        if other != name:
            how |= {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(other, **how)

    return add


def _eval(args: argparse.Namespace) -> int:
    from rmfast import evaluate

    return evaluate.run(args)


def _add_train(commands: argparse._SubParsersAction) -> None:
    from rmfast import options

    parser = commands.add_parser(
        "train",
        usage="rmfast train --model MODEL --data FILE --output FOLDER [--resume] [options]",
        help="train a reward model on preference data",
        description=(
            "Train a reward model on preference pairs or ranked groups of answers, and measure it "
            "on held-out ones as rmfast eval does. The folder gets the model (safetensors), its "
            "tokenizer, a model card, config.yaml, metrics.jsonl, training.png, and the last two "
            "checkpoints: after a kill, the same command with --resume goes on, and the weights "
            "are the same as if nothing had happened."
        ),
        epilog=(
            "Ctrl-C and SIGTERM save a checkpoint first; a second one stops at once. Exit code: 0, "
            "trained; 2, it could not run; 130, interrupted."
        ),
    )
    group = parser.add_argument_group("run")
    group.add_argument("--config", metavar="FILE", help="YAML of the options below, without --; "
        "what the command line says goes first")  # fmt: skip
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, or start"
    )
    either.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    options.add(parser)
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from rmfast import train

    return train.run(args)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="time and check scoring and training, side by side with Hugging Face",
        description="Run a benchmark. With no name, score and train run, as they come.",
        epilog="rmfast bench score --help lists what a benchmark takes.",
    )
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, help="left out: score and train")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="handed on to it")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    code = 0
    for name in [args.name] if args.name else BENCHMARKS[:2]:
        benchmark = importlib.import_module(f"rmfast.benchmarks.{name}")
        code = code or benchmark.main(args.rest) or 0
    return code


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check a reward model for what would give wrong scores",
        description=(
            "Check a reward model, its checkpoint and its tokenizer for what people trip over, "
            "score a few built-in conversations with and without the patch, and say what to do. "
            "Exit code: 0 nothing that gives wrong scores, 1 something that does, 2 it could not "
            "be loaded."
        ),
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of a reward model or a PEFT adapter")
    add("--json", action="store_true", help="print the findings as JSON")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="of the weights (default: the checkpoint's own)")  # fmt: skip
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--revision", help="branch, tag or commit on the hub")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from rmfast import diagnosis

    return diagnosis.run(args)
