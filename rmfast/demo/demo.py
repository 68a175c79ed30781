"""``rmfast demo``: train a reward model, then hold its scores and its speed against plain ones."""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmfast import data, loading
from rmfast.arguments import flag
from rmfast.data.records import Preferences
from rmfast.demo import embedded
from rmfast.demo.options import DemoOptions
from rmfast.losses import bradley_terry
from rmfast.packed import patching
from rmfast.packed.step import pad
from rmfast.score.scorer import Scorer
from rmfast.train import job
from rmfast.train.options import TrainOptions
from rmfast.train.rows import tokens
from rmfast.trie import pack

Batches = list[tuple[Tensor, Tensor]]  # padded token ids and their masks, int64 [2P, T] each
_QUESTIONS = 12  # held out, of two pairs each, that are scored and timed
_BATCH = 8  # pairs
_ROUNDS = 3  # of unpatched and patched in turn; the median counts


def run(options: DemoOptions) -> int:
    """The whole demo, with the options of ``rmfast demo``; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stdout):
        print(embedded.ABOUT)
        code = _train(options, folder)
        if code == 0:
            _compare(folder, loading.usable_device(options.device))
    return code


def _train(options: DemoOptions, folder: str) -> int:
    given = {
        "model": str(embedded.checkpoint()),
        "data": str(embedded.file("train")),
        "eval_data": str(embedded.file("held-out")),
        "max_steps": options.steps,
        "eval_every": options.steps,
        "save_every": options.steps,
        "batch_pairs": _BATCH,
        "grad_accum": 1,
        "learning_rate": 1.5e-4,
        "warm_up": 0.1,
    }
    words = " ".join(f"{flag(name)} {value}" for name, value in given.items())
    words += " --no-gradient-checkpointing"
    print(
        f"\n1. Training; FOLDER is deleted at the end\nrmfast train {words} --output FOLDER\n",
        flush=True,
    )
    more = {"output": folder, "device": options.device, "gradient_checkpointing": False}
    return job.run(TrainOptions(**given, **more))


def _compare(folder: str, device: str) -> None:
    """The trained model's scores and times, without and with the patch."""
    model, tokenizer, _ = loading.load(folder, dtype="float32", device=device)
    scorer = Scorer(model, tokenizer)  # patches the model
    questions = random.Random(0).sample(data.by_question(embedded.pairs("held-out")), _QUESTIONS)
    pairs = Preferences([pair for question in questions for pair in question])
    batches = _batches(tokens(pairs, scorer.encoder)[0], tokenizer.pad_token_id)
    print(f"\n2. The patch\n{patching.report(model)}")
    _compare_scores(model, batches)
    threads = f"{torch.get_num_threads()} CPU threads"
    machine = torch.cuda.get_device_name() if device == "cuda" else threads
    print(f"\n4. Time, without and with the patch in turn, on this machine: {machine}")
    with torch.autocast(device, torch.bfloat16, enabled=loading.bf16_is_fast(device)):
        _compare_times(model, batches)


def _batches(rows: list[dict[str, Any]], pad_token_id: int) -> Batches:
    """In each batch all chosen, then all rejected."""
    parts = [rows[first : first + _BATCH] for first in range(0, len(rows), _BATCH)]
    sides = ("chosen_ids", "rejected_ids")
    return [pad([row[side] for side in sides for row in part], pad_token_id) for part in parts]


def _scores(model: Any, batches: Batches, train: bool = False) -> Tensor:  # [P, 2]
    """Scores of chosen and rejected; with ``train``, a backward of Bradley-Terry's loss too."""
    model.train(train)
    found = []
    for batch in batches:
        ids, mask = (x.to(model.device) for x in batch)
        with torch.set_grad_enabled(train):
            scores = model(ids, mask, use_cache=False).logits[:, 0].float().chunk(2)
        if train:
            bradley_terry(*scores).backward()
        found.append(torch.stack(scores, 1).detach().cpu())  # waits for the device
    model.zero_grad()
    return torch.cat(found)


def _both(model: Any, work: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``work`` gives without and with the patch."""
    with patching.unpatched(model):
        plain = work()
    return plain, work()


def _compare_scores(model: Any, batches: Batches) -> None:
    plain, ours = _both(model, lambda: _scores(model, batches))
    apart = ((ours - plain).abs().max() / plain.std()).item()
    same = (plain[:, 0] > plain[:, 1]) == (ours[:, 0] > ours[:, 1])
    print(f"\n3. The same scores\n{len(plain)} held-out pairs, patched against unpatched, fp32")
    print(f"largest difference: {apart:.1e} of the scores' standard deviation")
    print(f"the same answer preferred: in {int(same.sum())} of {len(same)} pairs")


def _seconds(model: Any, batches: Batches, train: bool) -> list[float]:
    """Medians without and with the patch, after a round that warms up."""

    def timed() -> float:
        start = time.perf_counter()
        _scores(model, batches, train)
        return time.perf_counter() - start

    rounds = [_both(model, timed) for _ in range(1 + _ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def _compare_times(model: Any, batches: Batches) -> None:
    print(f"{'':28}{'Hugging Face':>14}{'rmfast':>10}{'ratio':>9}", flush=True)
    for train, title in ((False, "scoring, s"), (True, "forward and backward, s")):
        plain, ours = _seconds(model, batches, train)
        print(f"{title:28}{plain:14.2f}{ours:10.2f}{plain / ours:8.2f}x", flush=True)
    slots = sum(mask.numel() for _, mask in batches)
    count = sum(int(mask.sum()) for _, mask in batches)
    nodes = sum(len(pack(*batch)) for batch in batches)
    print(f"Those pairs in {len(batches)} batches: {slots:,} token slots with padding, "
          f"{count:,} tokens, {nodes:,} distinct prefixes.")  # fmt: skip
    print("What a batch repeats and pads is what is saved: other data, other ratios.")
