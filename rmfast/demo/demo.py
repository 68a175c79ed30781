"""``rmfast demo``: patch a reward model, check it, train it, and time both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback

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
from rmfast.train import begin, fit
from rmfast.train.rows import Rows, hold_out, tokenised
from rmfast.train.trainer import RewardConfig, RewardTrainer
from rmfast.trie import pack

_HELD_OUT = 128  # pairs, or a fifth of the data
_CHECKED = 24  # held-out pairs scored by the unpatched model too
_TIMED = 3  # batches
_ROUNDS = 3  # of unpatched and patched in turn; the median counts

_say = functools.partial(print, flush=True)


def run(options: DemoOptions) -> None:
    """The whole demo, with the options of ``rmfast demo``; prints to stdout."""
    loading.silence_transformers()
    disable_progress_bars()
    device = loading.usable_device(options.device)
    dtype = options.dtype or ("mixed" if loading.bf16_is_fast(device) else "float32")
    options = dataclasses.replace(options, device=device, dtype=dtype)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", FutureWarning)  # names that only newer libraries have
        if options.output is not None:
            folder = Path(options.output)
            make_folder(folder, {"--model": options.model, "--data": options.data})
            stack.enter_context(locked(folder))
            if any(not path.name.startswith(".") for path in folder.iterdir()):
                raise UserError(f"--output {folder} is not empty: name another folder")
        _run(options, stack.enter_context(tempfile.TemporaryDirectory()))


def _run(options: DemoOptions, folder: str) -> None:
    started, rows = _start(options)
    trainer = _trainer(options, started, rows, folder)
    _say(f"\n1. The patch\n{trainer.report}\n\n2. The same scores")
    _say(_agreement(trainer.model, rows, options.batch_pairs))
    _say(f"\n3. Training\nheld-out accuracy before  {_accuracy(trainer)}")
    trainer.train()
    _say(f"held-out accuracy after   {_accuracy(trainer)}")
    _say("(in brackets the 95 % interval; ties count as wrong)")
    if options.output is not None:
        with patching.unpatched(trainer.model) as model, saving(Path(options.output)):
            model.save_pretrained(options.output)
            started.tokenizer.save_pretrained(options.output)
        _say(f"saved to {options.output}")
    machine = f"{torch.get_num_threads()} CPU threads"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    _say(f"\n4. Time, without and with the patch in turn, on this machine: {machine}")
    with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "mixed"):
        _say(_comparison(trainer.model, rows, options.batch_pairs))


def _start(options: DemoOptions) -> tuple[begin.Started, Rows]:
    """The model, and the data as token ids; says what they are."""
    template = read_template(options.chat_template)
    train, held_out = _preferences(options)
    try:
        model = options.model or str(embedded.checkpoint())
    except FileNotFoundError as error:
        raise UserError(f"{error}; or name a --model") from None
    started = begin.load_to_train(
        model,
        dtype="bfloat16" if options.dtype == "bfloat16" else "float32",
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
        chat_template=template,
    )
    if options.model is None:
        _say("SmolLM2-135M-Instruct, with a reward head drawn at random:")
    _say(started.start)
    rows = tokenised(started, train, held_out, options.max_length)
    _say(f"  data: {len(rows.train)} pairs to train on, {len(rows.held_out)} held out; "
         f"{options.batch_pairs} pairs a batch, {options.dtype}")  # fmt: skip
    if options.data is None:
        _say(embedded.ABOUT)
    return started, rows


def _preferences(options: DemoOptions) -> tuple[Preferences, Preferences]:
    """Pairs to train on and pairs held out, of other questions; each in an order of questions."""
    if options.data is None:
        train, held_out = (Preferences(embedded.pairs(name)) for name in ("train", "held-out"))
    else:
        found = data.preferences(options.data, ranks="pairs")
        if len(data.by_question(found)) < 2:
            raise DataError(f"{options.data}: needs pairs of two different prompts, or more")
        train, held_out = hold_out(found, min(0.2, _HELD_OUT / len(found)), options.seed)
    questions = data.by_question(train)
    random.Random(options.seed).shuffle(questions)
    pairs = [*itertools.chain(*questions)]
    needed = max(options.steps, _TIMED) * options.batch_pairs
    return dataclasses.replace(train, records=pairs[:needed]), held_out


class _Lines(TrainerCallback):
    """A line of progress for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            _say(f"  step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}, "
                 f"accuracy {logs['accuracy']:.0%}")  # fmt: skip


def _trainer(options: DemoOptions, started: begin.Started, rows: Rows, folder: str) -> Any:
    args = RewardConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_pairs,
        per_device_eval_batch_size=options.batch_pairs,
        learning_rate=options.learning_rate or (2e-5 if options.model else 1.5e-4),
        warmup_steps=0.1,
        adam_beta2=0.95,
        bf16=options.dtype != "float32",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",  # pairs of one question in one batch
        max_length=None,  # longer pairs were dropped already
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device != "cpu",
        seed=options.seed,
        logging_steps=max(1, options.steps // 6),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    return fit.of_rows(RewardTrainer, started, rows, args, callbacks=[_Lines()])


def _scores(model: Any, batches: list[list[Any]], train: bool = False) -> torch.Tensor:
    """Scores of padded batches; with ``train``, a backward of Bradley-Terry's loss too."""
    out = []
    for batch in batches:
        inputs = pad([*map(torch.tensor, batch)], model.config.pad_token_id)
        ids, mask = (x.to(model.device) for x in inputs)
        with torch.set_grad_enabled(train):
            scores = model(ids, mask, use_cache=False).logits[:, 0].float()
        if train:
            bradley_terry(*scores.chunk(2)).backward()
        out.append(scores.detach().cpu())  # waits for the device
    return torch.cat(out)


def _agreement(model: Any, rows: Rows, batch_pairs: int) -> str:
    """How far patched and unpatched scores of the same sequences are apart, in size and order."""
    model.eval()
    (held_out,) = _batches(rows.held_out[:_CHECKED], _CHECKED)
    sides = list(dict.fromkeys(map(tuple, held_out)))
    batches = [sides[i : i + 2 * batch_pairs] for i in range(0, len(sides), 2 * batch_pairs)]
    ours = _scores(model, batches)
    with patching.unpatched(model):
        plain = _scores(model, batches)
    apart = ((ours - plain).abs().max() / plain.std()).item()
    i, j = torch.triu_indices(len(plain), len(plain), offset=1)
    same = (plain[i] > plain[j]) == (ours[i] > ours[j])
    return (
        f"{len(plain)} held-out sequences, patched against unpatched, {model.dtype}\n"
        f"largest difference: {apart:.1e} of the scores' standard deviation\n"
        f"same order: {int(same.sum()):,} of {len(same):,} comparisons of two sequences"
    )


def _accuracy(trainer: RewardTrainer) -> str:
    count, accuracy = len(trainer.eval_dataset), trainer.evaluate()["eval_accuracy"]
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
    lines.append(
        f"{sum(map(len, batches)) // 2} pairs in {len(batches)} batches: {slots:,} token slots "
        f"with padding, {tokens:,} tokens, {sum(len(pack(x)) for x in batches):,} distinct "
        "prefixes.\nWhat a batch repeats and pads is what is saved: other data, other ratios."
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
