"""Options of ``rmfast train``: flags, keys of a YAML file, and defaults."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NamedTuple

from rmfast.cli import UserError, count, number, positive, rate


class Option(NamedTuple):
    """One of ``rmfast train``: a flag, and a key of its YAML file.

    Attributes:
        kind: ``bool``, a tuple of choices, or what turns text into the value.
        default: None: there is none, or it depends on others.
        help: what it is for.
        metavar: what the help calls its value.
    """

    kind: Any
    default: Any
    help: str
    metavar: str | None = None

    def read(self, text: str) -> Any:
        """The value.

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        if isinstance(self.kind, tuple):
            if text not in self.kind:
                raise argparse.ArgumentTypeError(f"need {', '.join(self.kind)}, got {text!r}")
            return text
        if self.kind is bool:
            if text not in ("True", "False"):
                raise argparse.ArgumentTypeError(f"need true or false, got {text!r}")
            return text == "True"
        return self.kind(text)


def _from_zero(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"need a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


_share = number("from 0 on and below 1", lambda x: 0 <= x < 1)
_RATED = ("pairs", "all_pairs", "groups")
_GROUPS: dict[str, dict[str, Option]] = {
    "": {
        "model": Option(str, None, "folder or hub name of a language model, or of a reward model"),
        "data": Option(str, None, "preferences: .jsonl, .csv (both .gz too) or .parquet; or a "
            "folder or hub name of a data set"),
        "output": Option(str, None, "folder for the model and all about it", "FOLDER"),
    },
    "model": {
        "revision": Option(str, None, "branch, tag or commit of a model on the hub"),
        "tokenizer": Option(str, None, "folder or hub name (default: the model's)", "NAME"),
        "chat-template": Option(str, None, "Jinja template, in place of the tokenizer's", "FILE"),
        "trust-remote-code": Option(bool, False, "run code that comes with the model"),
        "dtype": Option(("mixed", "float32", "bfloat16"), None, "mixed: fp32 weights, bf16 "
            "arithmetic; bfloat16: weights too, for LoRA: it rounds small updates away (default: "
            "mixed where bf16 is fast, else float32)"),
        "device": Option(("cpu", "cuda"), None, "(default: a GPU if there is one)"),
        "lora-rank": Option(count, None, "train adapters of this rank on all linear layers, and "
            "the head; they are merged at the end (default: train all weights)", "R"),
        "lora-alpha": Option(positive, None, "(default: twice the rank)", "ALPHA"),
    },
    "data": {
        "name": Option(str, None, "configuration of a data set"),
        "split": Option(str, "train", "split of a data set"),
        "limit": Option(count, None, "read so many rows", "ROWS"),
        "chat": Option(bool, None, "text becomes turns of a chat (default: ratings' prompts and "
            "answers do, other text stays as it is)"),
        "ratings": Option(_RATED, "pairs", "what becomes of rated answers: best against worst, all "
            "pairs, or ranked groups"),
        "ranks": Option(_RATED, "groups", "what becomes of ranked answers"),
        "margin": Option(("data", "ratings", "none"), "data", "data: that of the rows, where they "
            "have one; ratings: else the difference of ratings; none: none"),
        "max-length": Option(count, 1024, "pairs with a longer side are dropped", "TOKENS"),
    },
    "held-out data": {
        "eval-data": Option(str, None, "like --data (default: a share of that)"),
        "eval-data-split": Option(str, "test", "split of it, where it is a data set"),
        "eval-split": Option(_share, None, "share of --data to hold out, whole questions; 0: none "
            "(default: 0.05, and 1,000 pairs at most)", "SHARE"),
        "eval-every": Option(count, None, "(default: a tenth of the run)", "STEPS"),
    },
    "training": {
        "epochs": Option(positive, 1.0, "passes over the data: one, as reward models overfit in "
            "the second"),
        "max-steps": Option(count, None, "optimiser steps, in place of --epochs", "STEPS"),
        "batch-pairs": Option(count, 8, "pairs (or groups) a micro-batch", "N"),
        "grad-accum": Option(count, 8, "micro-batches an optimiser step: 64 pairs with the "
            "default, as InstructGPT has", "N"),
        "max-tokens-per-batch": Option(count, None, "distinct prefixes a micro-batch, in place of "
            "--batch-pairs", "TOKENS"),
        "learning-rate": Option(rate, None, "at its peak (default: 1e-5, with LoRA 1e-4: Llama "
            "2's and TRL's)", "RATE"),
        "schedule": Option(("cosine", "linear", "constant"), "cosine", "cosine: down to a tenth, "
            "as Llama 2 has it; linear: down to 0"),
        "warm-up": Option(_share, 0.03, "share of the steps in which the rate rises", "SHARE"),
        "weight-decay": Option(_from_zero, 0.0, "of AdamW", "W"),
        "loss": Option(("bradley_terry", "focal", "all_pairs", "plackett_luce"), None, "the first "
            "two for pairs, the others for ranked groups (default: the first of its kind)"),
        "focal-gamma": Option(positive, 2.0, "of focal", "GAMMA"),
        "label-smoothing": Option(_share, 0.0, "probability that a label is wrong", "P"),
        "center": Option(_from_zero, 0.0, "weight of the squared sum of a pair's rewards, which "
            "keeps their mean at 0; such as 0.01", "WEIGHT"),
        "gradient-checkpointing": Option(bool, True, "run layers again in the backward: slower, "
            "for less memory"),
        "seed": Option(_seed, 0, "of the head, the split and the order"),
        "save-every": Option(count, None, "(default: a tenth of the run)", "STEPS"),
    },
}  # fmt: skip
_BY_NAME = {name: option for group in _GROUPS.values() for name, option in group.items()}


def add(parser: argparse.ArgumentParser) -> None:
    """Put them on a command, as flags."""
    for title, group in _GROUPS.items():
        place = parser.add_argument_group(title) if title else parser
        for name, option in group.items():
            how: dict[str, Any] = {"help": option.help.replace("%", "%%")}
            if option.default is not None and option.kind is not bool:
                how["help"] += f" (default: {option.default})"
            if option.kind is bool:
                how["action"] = argparse.BooleanOptionalAction
                if option.default is not None:
                    how["help"] += f" (default: {'on' if option.default else 'off'})"
            elif isinstance(option.kind, tuple):
                how["choices"] = option.kind
            else:
                how |= {"type": option.kind, "metavar": option.metavar or name.upper()}
            place.add_argument(f"--{name}", **how)


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line, of ``--config``, and defaults, in this order, by name.

    Raises:
        UserError: the file cannot be read, has an unknown key or a value that is none, or something
            that is needed is missing.
    """
    given = {} if args.config is None else _read_yaml(args.config)
    out = {name: option.default for name, option in _BY_NAME.items()} | given
    for name in _BY_NAME:
        value = getattr(args, name.replace("-", "_"))
        if value is not None:
            out[name] = value
    missing = [f"--{name}" for name in _GROUPS[""] if out[name] is None]
    if missing:
        where = "" if args.config is None else f", here or in {args.config}"
        raise UserError(f"needed: {', '.join(missing)}{where}")
    return out


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise UserError(f"--config {path}: must be options, such as 'epochs: 2', a line each")
    out = {}
    for key, value in (found or {}).items():
        name = str(key).replace("_", "-")
        if name not in _BY_NAME:
            near = difflib.get_close_matches(name, _BY_NAME, 1)
            hint = f", did you mean {near[0]}?" if near else f"; there are: {', '.join(_BY_NAME)}"
            raise UserError(f"--config {path}: there is no option {key!r}{hint}")
        if name in out:
            raise UserError(f"--config {path}: {name} is there twice")
        if value is None:
            continue
        try:
            if isinstance(value, (list, dict)):
                raise argparse.ArgumentTypeError(f"need one value, got {value!r}")
            out[name] = _BY_NAME[name].read(str(value))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--config {path}: {name}: {error}") from None
    return out


def as_yaml(options: dict[str, Any]) -> str:
    """All options that have a value, as ``--config`` reads them."""
    import yaml

    given = {name: value for name, value in options.items() if value is not None}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
