"""``rmfast demo``: patch a reward model, check it, train it, and time both."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, TrainerCallback

from rmfast import data, loading
from rmfast.data.encoding import read_template
from rmfast.data.records import Preferences
from rmfast.demo import embedded
from rmfast.demo.options import DemoOptions
from rmfast.errors import DataError, UserError
from rmfast.evaluate.measures import interval
from rmfast.losses import bradley_terry
from rmfast.packed import patching
from rmfast.packed.step import pad
from rmfast.resume import locked, make_folder, saving
from rmfast.train import begin
from rmfast.train.rows import Rows, hold_out, tokenised
from rmfast.train.trainer import RewardConfig, RewardTrainer
from rmfast.trie import pack

_HELD_OUT = 128  # pairs, or a fifth of the data
_CHECKED = 24  # held-out pairs scored by the unpatched model too
_TIMED = 3  # batches
_ROUNDS = 3  # of unpatched and patched in turn; the median counts
_DTYPES = {
    "mixed": "fp32 weights, bf16 arithmetic",
    "float32": "fp32 weights and arithmetic",
    "bfloat16": "bf16 weights and arithmetic",
}
_PAIRS = """\
Asked what a function of Python's standard library does, chosen is its docstring, rejected a
sibling's. Two pairs a question. Held out are other modules. Easy on purpose: a docstring that does
not mention its name was left out."""


def run(options: DemoOptions) -> None:
    """The whole demo, with the options of ``rmfast demo``; prints to stdout."""
    with warnings.catch_warnings(), _output(options):
        warnings.simplefilter("ignore", FutureWarning)  # names that only newer libraries have
        _run(options)


def _run(options: DemoOptions) -> None:
    start = time.perf_counter()
    loading.silence_transformers()
    disable_progress_bars()
    device = loading.usable_device(options.device)
    dtype = options.dtype or ("mixed" if loading.bf16_is_fast(device) else "float32")
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "mixed")
    started, rows = _start(options, device, dtype)
    _say("\n1. The patch")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(options, device, dtype, started, rows, folder)
        _say(trainer.report)
        _say("\n2. The same scores")
        _say(_agreement(trainer.model, rows, options.batch_pairs))
        _say("\n3. Training")
        _say(f"held-out accuracy before  {_accuracy(trainer)}")
        trainer.train()
        _say(f"held-out accuracy after   {_accuracy(trainer)}")
        _say("(in brackets the 95 % interval; ties count as wrong)")
        if options.output is not None:
            rows.form.record(started.model.config)
            with patching.unpatched(trainer.model) as model, saving(Path(options.output)):
                model.save_pretrained(options.output)
                started.tokenizer.save_pretrained(options.output)
            _say(f"saved to {options.output}")
        _say(f"\n4. Time, without and with the patch in turn, on this machine: {_machine(device)}")
        with autocast:
            _say(_comparison(trainer.model, rows, options.batch_pairs))
    _say(f"\nin all {time.perf_counter() - start:.0f} s")


def _say(words: object) -> None:
    print(words, flush=True)


def _start(options: DemoOptions, device: str, dtype: str) -> tuple[begin.Started, Rows]:
    """The model, and the data as token ids; says what they are."""
    template = read_template(options.chat_template)
    train, held_out = _preferences(options)
    try:
        model = options.model or str(embedded.checkpoint())
    except FileNotFoundError as error:
        raise UserError(f"{error}; or name a --model") from None
    started = begin.load_to_train(
        model,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        device=device,
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
    )
    if template is not None:
        started.tokenizer.chat_template = template
    if options.model is None:
        _say("SmolLM2-135M-Instruct, with a reward head drawn at random:")
    _say(started.start)
    rows = tokenised(started, train, held_out, options.max_length)
    _say(f"  data: {len(rows.train)} pairs to train on, {len(rows.held_out)} held out; "
         f"{options.batch_pairs} pairs a batch")  # fmt: skip
    _say(f"  machine: {_machine(device)}; {_DTYPES[dtype]}")
    if options.data is None:
        _say(_PAIRS)
    return started, rows


@contextlib.contextmanager
def _output(options: DemoOptions) -> Iterator[None]:
    """Keep the output's folder for this run; raise UserError where something would be lost."""
    if options.output is None:
        yield
        return
    folder = Path(options.output)
    make_folder(folder, {"--model": options.model, "--data": options.data})
    with locked(folder):
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"--output {folder} is not empty: name another folder")
        yield


def _preferences(options: DemoOptions) -> tuple[Preferences, Preferences]:
    """Pairs to train on and pairs held out, of other questions; each in an order of questions."""
    if options.data is None:
        train, held_out = (Preferences(embedded.pairs(name)) for name in ("train", "held-out"))
    else:
        found = data.preferences(options.data, ranks="pairs")
        if len(data.by_question(found)) < 2:
            raise DataError(f"{options.data}: needs pairs of two different prompts, or more")
        share = min(0.2, _HELD_OUT / len(found))
        train, held_out = hold_out(found, share, options.seed)
    questions = data.by_question(train)
    random.Random(options.seed).shuffle(questions)
    pairs = [pair for question in questions for pair in question]
    needed = max(options.steps, _TIMED) * options.batch_pairs
    return dataclasses.replace(train, records=pairs[:needed]), held_out


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


class _Lines(TrainerCallback):
    """A line of progress for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            print(f"  step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}, "
                  f"accuracy {logs['accuracy']:.0%}", flush=True)  # fmt: skip


def _trainer(
    options: DemoOptions, device: str, dtype: str, started: begin.Started, rows: Rows, folder: str
) -> RewardTrainer:
    args = RewardConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_pairs,
        per_device_eval_batch_size=options.batch_pairs,
        learning_rate=options.learning_rate or (2e-5 if options.model else 1.5e-4),
        warmup_steps=0.1,
        adam_beta2=0.95,
        bf16=dtype != "float32",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",  # pairs of one question in one batch
        max_length=None,  # longer pairs were dropped already
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        seed=options.seed,
        logging_steps=max(1, options.steps // 6),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    args._n_gpu = min(1, args.n_gpu)  # one process trains on one GPU
    sets = {
        "train_dataset": Dataset.from_list(rows.train),
        "eval_dataset": Dataset.from_list(rows.held_out),
    }
    try:
        trainer = RewardTrainer(
            started.model, args, processing_class=started.tokenizer, callbacks=[_Lines()], **sets
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _scores(model: Any, batches: list[list[Any]], train: bool = False) -> list[float]:
    """Scores of padded batches; with ``train``, a backward of Bradley-Terry's loss too."""
    out, device = [], model.device
    for batch in batches:
        ids, mask = pad([torch.tensor(row) for row in batch], model.config.pad_token_id)
        with torch.set_grad_enabled(train):
            scores = model(ids.to(device), mask.to(device), use_cache=False).logits[:, 0].float()
        if train:
            bradley_terry(*scores.chunk(2)).backward()
        out += scores.tolist()  # waits for the device
    return out


def _agreement(model: Any, rows: Rows, batch_pairs: int) -> str:
    """How far patched and unpatched scores of the same sequences are apart, in size and order."""
    model.eval()
    (held_out,) = _batches(rows.held_out[:_CHECKED], _CHECKED)
    sides = list(dict.fromkeys(map(tuple, held_out)))
    batches = [sides[i : i + 2 * batch_pairs] for i in range(0, len(sides), 2 * batch_pairs)]
    patched = torch.tensor(_scores(model, batches))
    with patching.unpatched(model):
        unpatched = torch.tensor(_scores(model, batches))
    apart = ((patched - unpatched).abs().max() / unpatched.std()).item()
    i, j = torch.triu_indices(len(unpatched), len(unpatched), offset=1)
    same = (unpatched[i] > unpatched[j]) == (patched[i] > patched[j])
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"{len(unpatched)} held-out sequences, patched against unpatched, {precision}\n"
        f"largest difference: {apart:.1e} of the scores' standard deviation\n"
        f"same order: {int(same.sum()):,} of {len(same):,} comparisons of two sequences"
    )


def _accuracy(trainer: RewardTrainer) -> str:
    count = len(trainer.eval_dataset)
    accuracy = trainer.evaluate()["eval_accuracy"]
    low, high = interval(round(accuracy * count), count)
    return f"{accuracy:.1%} [{low:.1%}, {high:.1%}] of {count} pairs"


def _batches(rows: list[dict[str, Any]], size: int) -> list[list[list[int]]]:
    """Token ids of ``size`` pairs a batch: all chosen, then all rejected."""
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    sides = ("chosen_ids", "rejected_ids")
    return [[row[side].tolist() for side in sides for row in part] for part in parts]


def _comparison(model: Any, rows: Rows, batch_pairs: int) -> str:
    """A table of seconds, unpatched and patched, and what was in the batches."""
    batches = _batches(rows.train[: _TIMED * batch_pairs], batch_pairs)
    lines = [f"{'':28}{'Hugging Face':>14}{'rmfast':>10}{'ratio':>9}"]
    for train, title in ((False, "scoring, s"), (True, "forward and backward, s")):
        model.train(train)
        plain, ours = _seconds(model, batches, train)
        lines.append(f"{title:28}{plain:14.2f}{ours:10.2f}{plain / ours:8.2f}x")
    slots = sum(len(batch) * max(map(len, batch)) for batch in batches)
    tokens = sum(map(len, itertools.chain(*batches)))
    nodes = sum(len(pack(batch)) for batch in batches)
    pairs = sum(map(len, batches)) // 2
    lines.append(
        f"{pairs} pairs in {len(batches)} batches: {slots:,} token slots with padding, {tokens:,} "
        f"tokens, {nodes:,} distinct prefixes.\n"
        "What a batch repeats and pads is what is saved: other data, other ratios."
    )
    return "\n".join(lines)


def _seconds(model: Any, batches: list[list[list[int]]], train: bool) -> tuple[float, float]:
    """Medians without and with the patch, after a round that warms up."""

    def timed() -> float:
        start = time.perf_counter()
        _scores(model, batches, train)
        model.zero_grad()
        return time.perf_counter() - start

    plain, ours = [], []
    for _ in range(1 + _ROUNDS):
        with patching.unpatched(model):
            plain.append(timed())
        ours.append(timed())
    return statistics.median(plain[1:]), statistics.median(ours[1:])
