"""``rmfast demo``: patch a reward model, check it, train it, and time it against the unpatched one.

``python -m rmfast.demo.demo JOB.json`` is the other end of :class:`_Process`: it loads a model,
then for every line it reads (``scoring`` or ``training``) it does that work and prints its figures.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmfast import loading
from rmfast.data.encoding import Encoder, read_template
from rmfast.data.reading import preferences
from rmfast.data.records import Pair, by_question
from rmfast.demo.options import DemoOptions
from rmfast.errors import DataError, UserError
from rmfast.evaluate.measures import interval
from rmfast.packed.patching import patch, report
from rmfast.trie import pack

Tokens = tuple[list[int], list[int]]  # chosen, rejected
Group = list[Tokens]  # pairs of one question
_HELD_OUT = 128  # pairs, or a fifth of the data
_CHECKED = 24  # held-out pairs scored by the unpatched model too
_TIMED = 3  # batches, after one that warms up
_ROUNDS = 2  # over the timed batches, in turn; the fastest counts
_WARM_UP = 6  # steps until the learning rate is at its peak


def run(args: DemoOptions) -> None:
    """The whole demo, with the options of ``rmfast demo``; prints to stdout.

    Raises:
        UserError, DataError: what the user gave cannot be used; the message is for them.
    """
    start = time.perf_counter()
    say = functools.partial(print, flush=True)  # in order with the progress bar
    loading.silence_transformers()
    if args.output is not None:
        _make_folder(Path(args.output))
    device = loading.usable_device(args.device)
    dtype = args.dtype or ("mixed" if loading.bf16_is_fast(device) else "float32")
    splits = _pairs(args)
    folder = _model(args.model)
    tokenizer = _tokenizer(folder, args)
    job = Job(folder, args.trust_remote_code, dtype, device, tokenizer.pad_token_id, args.seed)
    train, held_out, about = _tokens(args, splits, tokenizer, _limit(job, args.max_length))

    model, drawn = job.load()
    _check_vocabulary(model, itertools.chain(*train, *held_out))
    parameters = sum(p.numel() for p in model.parameters())
    head = ", its reward head drawn at random" if drawn or args.model is None else ""
    name = Path(args.model).name if args.model else "SmolLM2-135M-Instruct"
    say(f"model   {name}: {parameters / 1e6:,.1f} M parameters{head}")
    say(f"data    {about}")
    say(f"run     {job.machine()}: {_DTYPES[dtype]}; {args.batch_pairs} pairs a batch")

    say("\n1. The patch")
    flat = list(itertools.chain(*held_out))
    rows = list(dict.fromkeys(tuple(side) for pair in flat[:_CHECKED] for side in pair))
    unpatched = job.scores(model, rows, 2 * args.batch_pairs)
    try:
        patch(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    say(report(model))

    say("\n2. The same scores")
    patched = job.scores(model, rows, 2 * args.batch_pairs)
    say(_agreement(unpatched, patched, dtype))

    say("\n3. Training")
    before = _accuracy(job, model, flat, args.batch_pairs)
    say(f"held-out accuracy before  {before}")
    rate = args.learning_rate or (2e-5 if args.model else 1.5e-4)
    _train(job, model, train, args, rate)
    say(f"held-out accuracy after   {_accuracy(job, model, flat, args.batch_pairs)}")
    say(f"({len(flat)} pairs; in brackets the 95 % binomial interval, ties count as wrong)")
    if args.output is not None:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        say(f"saved to {args.output}")
    del model
    gc.collect()  # model and patch hold each other
    torch.cuda.empty_cache()

    say(f"\n4. Time and memory: {job.machine()}, this machine; each in a process of its own")
    batches = list(itertools.islice(_batches(train, args.batch_pairs, args.seed), _TIMED + 1))
    say(_comparison(job, batches))
    say(f"\nin all {time.perf_counter() - start:.0f} s")


_DTYPES = {
    "mixed": "fp32 weights, bf16 arithmetic",
    "float32": "fp32 weights and arithmetic",
    "bfloat16": "bf16 weights and arithmetic",
}


# --- what the user gave


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from None


def _model(given: str | None) -> str:
    """A folder, or the name of a model on the hub."""
    if given is None:
        from rmfast.demo import embedded

        try:
            return str(embedded.checkpoint())
        except FileNotFoundError as error:
            raise UserError(f"{error}; or pass --model") from None
    if not os.path.isdir(given) and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", given):
        raise UserError(f"--model {given}: no such folder")
    return given


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub, files, model code: the kinds are many, the user is one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} cannot be loaded: {reason[:400]}") from error


def _tokenizer(folder: str | Path, args: DemoOptions) -> Any:
    from transformers import AutoTokenizer

    with _loading(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    if args.chat_template is not None:
        tokenizer.chat_template = read_template(args.chat_template)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {folder} has neither a pad token nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
        print(f"the tokenizer has no pad token: taking its eos token, {tokenizer.eos_token!r}")
    return tokenizer


def _limit(job: Job, most: int) -> int:
    """``most`` tokens, or as many as the model has positions for."""
    from transformers import AutoConfig

    with _loading(f"the configuration of {job.model}"):
        config = AutoConfig.from_pretrained(job.model, trust_remote_code=job.trust_remote_code)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or most
    return min(most, positions)


def _pairs(args: DemoOptions) -> list[list[list[Pair]]]:
    """Pairs to train on and pairs held out, in groups of one question."""
    if args.data is None:
        from rmfast.demo import embedded

        try:
            return [by_question(embedded.pairs(name)) for name in ("train", "held-out")]
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
    pairs = preferences(args.data, ranks="pairs")
    splits = _split(by_question(pairs), args.steps * args.batch_pairs, args.seed)
    if not all(splits):
        raise DataError(f"{args.data}: pairs of two different prompts are the least")
    return splits


def _tokens(
    args: DemoOptions, splits: list[list[list[Pair]]], tokenizer: Any, longest: int
) -> tuple[list[Group], list[Group], str]:
    """What to train on, what is held out, and a few words about both."""
    dropped = 0
    out = []
    encode = Encoder(tokenizer).pair
    for groups in splits:
        encoded = [[encode(pair) for pair in group] for group in groups]
        kept = [[p for p in group if max(map(len, p)) <= longest] for group in encoded]
        dropped += sum(map(len, encoded)) - sum(map(len, kept))
        out.append([group for group in kept if group])
    source = Path(args.data).name if args.data else f"Python {platform.python_version()}'s modules"
    if not all(out):
        raise DataError(f"{args.data or source}: too few pairs of {longest} tokens or fewer a side")
    train, held_out = (sum(map(len, groups)) for groups in out)
    about = f"{source}: {train} pairs to train on, {held_out} held out"
    if args.data is None:
        about = (
            f"{train} pairs from the documentation of {source} to train on,\n"
            f"        {held_out} of other modules held out. Asked what a function does, chosen is\n"
            "        its docstring, rejected a sibling's. Two pairs a question, chosen the same.\n"
            "        Easy on purpose: a docstring that does not mention its name was left out"
        )
    if dropped:
        about += f"\n        dropped, because a side is longer than {longest} tokens: {dropped}"
    return *out, about


def _split(groups: list[list[Pair]], needed: int, seed: int) -> list[list[list[Pair]]]:
    """Groups to train on, ``needed`` pairs or more, and groups held out: no question is in both."""
    order = iter(random.Random(seed).sample(groups, len(groups)))
    total = sum(map(len, groups))
    held_out = _first(order, min(_HELD_OUT, max(1, total // 5)))
    return [_first(order, needed), held_out]


def _first(groups: Iterator[list[Pair]], pairs: int) -> list[list[Pair]]:
    """As many groups as make up so many pairs, or all."""
    out: list[list[Pair]] = []
    while sum(map(len, out)) < pairs and (group := next(groups, None)):
        out.append(group)
    return out


def _check_vocabulary(model: nn.Module, pairs: Iterator[Tokens]) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    most = max(max(side) for pair in pairs for side in pair)
    if most >= size:
        raise UserError(f"the tokenizer has an id {most}, the model embeddings for {size} only")


# --- the model at work


@dataclasses.dataclass
class Job:
    """A model, how to run it, and (for a process that measures) on what."""

    model: str
    trust_remote_code: bool
    dtype: str
    device: str
    pad: int
    seed: int
    patched: bool = True
    batches: list[list[Tokens]] = dataclasses.field(default_factory=list)

    def load(self) -> tuple[nn.Module, bool]:
        """The reward model, and whether its head was missing and had to be drawn."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(self.seed)
        with _loading(f"the model {self.model}"):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self.model,
                num_labels=1,
                dtype=torch.bfloat16 if self.dtype == "bfloat16" else torch.float32,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
            model = model.to(self.device)
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = self.pad
        return model, bool(found["missing_keys"])

    def machine(self) -> str:
        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    def autocast(self) -> torch.autocast:
        enabled = self.dtype == "mixed"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=enabled)

    def forward(self, model: nn.Module, rows: list[list[int]]) -> Tensor:  # [B]
        ids = torch.full((len(rows), max(map(len, rows))), self.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return model(**inputs, use_cache=False).logits[:, 0].float()

    def margins(self, model: nn.Module, pairs: list[Tokens]) -> Tensor:  # [pairs]
        """Score of chosen less score of rejected; chosen rows first, as trainers collate them."""
        with self.autocast():
            scores = self.forward(model, [pair[side] for side in (0, 1) for pair in pairs])
        chosen, rejected = scores.chunk(2)
        return chosen - rejected

    @torch.no_grad()
    def scores(self, model: nn.Module, rows: list, size: int) -> Tensor:  # [len(rows)]
        """In the weights' own precision, ``size`` rows a batch; gathered on the CPU."""
        model.eval()
        parts = [self.forward(model, rows[i : i + size]).cpu() for i in range(0, len(rows), size)]
        return torch.cat(parts)

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def _agreement(unpatched: Tensor, patched: Tensor, dtype: str) -> str:
    """How far two runs' scores of the same rows are apart, in size and in order."""
    apart = ((patched - unpatched).abs().max() / unpatched.std()).item()
    i, j = torch.triu_indices(len(unpatched), len(unpatched), offset=1)
    same = (unpatched[i] > unpatched[j]) == (patched[i] > patched[j])
    kept = f"{int(same.sum()):,} of {len(same):,}"
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    return (
        f"{len(unpatched)} held-out sequences, patched against unpatched, {precision}\n"
        f"largest difference: {apart:.1e} of the scores' standard deviation\n"
        f"same order: {kept} comparisons of two sequences"
    )


def _accuracy(job: Job, model: nn.Module, pairs: list[Tokens], size: int) -> str:
    model.eval()
    with torch.no_grad():
        parts = [job.margins(model, pairs[i : i + size]) for i in range(0, len(pairs), size)]
    right = int((torch.cat(parts) > 0).sum())
    low, high = interval(right, len(pairs))
    return f"{right / len(pairs):.1%} [{low:.1%}, {high:.1%}]"


def _batches(groups: list[Group], size: int, seed: int) -> Iterator[list[Tokens]]:
    """Endless batches of ``size`` pairs; pairs of one question stay together."""
    order, waiting = random.Random(seed), []
    while True:
        for group in order.sample(groups, len(groups)):
            waiting += group
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]


def _train(job: Job, model: nn.Module, groups: list[Group], args: DemoOptions, rate: float) -> None:
    from tqdm import tqdm

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    rise = min(_WARM_UP, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / rise) * (1 - 0.95 * step / args.steps)
    )
    recent: collections.deque[bool] = collections.deque(maxlen=10 * args.batch_pairs)
    batches = itertools.islice(_batches(groups, args.batch_pairs, args.seed), args.steps)
    pause = 0.1 if sys.stderr.isatty() else 10  # a log gets a line now and then
    for batch in (bar := tqdm(batches, "training", args.steps, mininterval=pause, unit="step")):
        margins = job.margins(model, batch)
        loss = -nn.functional.logsigmoid(margins).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.extend((margins > 0).tolist())
        accuracy = sum(recent) / len(recent)
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.0%}", refresh=False)


# --- time and memory


def _comparison(job: Job, batches: list[list[Tokens]]) -> str:
    """A table of seconds and peak GB, unpatched and patched, and what was in the batches."""
    figures = _measure(dataclasses.replace(job, batches=batches))
    lines = [f"{'':28}{'Hugging Face':>14}{'rmfast':>10}{'ratio':>9}"]
    for work, title in (("scoring", "scoring"), ("training", "forward and backward")):
        for kind, what in (("seconds", f"{title}, s"), ("memory", "  peak memory, GB")):
            left, right = (one[work][kind] for one in figures)
            lines.append(f"{what:28}{left:14.2f}{right:10.2f}{left / right:8.2f}x")
    rows = [[side for pair in batch for side in pair] for batch in batches[1:]]
    slots = sum(len(batch) * max(map(len, batch)) for batch in rows)
    tokens = sum(len(row) for batch in rows for row in batch)
    nodes = sum(len(pack(batch)) for batch in rows)
    pairs = sum(map(len, batches[1:]))
    lines.append(
        f"{pairs} pairs in {len(rows)} batches: {slots:,} token slots with padding, {tokens:,} "
        f"tokens, {nodes:,} distinct prefixes.\n"
        "What a batch repeats and pads is what is saved: other data, other ratios. Peak memory is\n"
        "the whole process's, weights and gradients included, without an optimizer's state."
    )
    return "\n".join(lines)


def _measure(job: Job) -> list[dict[str, dict[str, float]]]:
    """Figures of the unpatched and of the patched model: they take turns, in two processes."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_Process(dataclasses.replace(job, patched=patched)))
            for patched in (False, True)
        ]
        out: list[dict[str, dict[str, float]]] = [{}, {}]
        for work in ("scoring", "training"):
            rounds = [[process.ask(work) for process in processes] for _ in range(_ROUNDS)]
            for figures, each in zip(out, zip(*rounds, strict=True), strict=True):
                figures[work] = {
                    "seconds": min(one["seconds"] for one in each),
                    "memory": max(one["memory"] for one in each),
                }
    return out


class _Process(contextlib.ExitStack):
    """A process that measures one job; ends with the ``with`` block."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rmfast.demo.demo", str(folder / "job.json")],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.enter_context(self.process)
        self.callback(self._end)

    def _end(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # a request that nobody read
            self.process.stdin.close()

    def ask(self, work: str) -> dict[str, float]:
        with contextlib.suppress(BrokenPipeError):
            print(work, file=self.process.stdin, flush=True)
        said = "it said nothing"
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
            said = line.strip() or said
        raise UserError(f"a measuring process ended with {self.process.wait()}: {said}")


def _serve(file: str) -> None:
    """The life of a process that :class:`_Process` started."""
    loading.silence_transformers()
    job = Job(**json.loads(Path(file).read_text()))
    model, _ = job.load()
    if job.patched:
        patch(model)
    warm = set()
    for line in sys.stdin:
        work = line.strip()
        model.train(work == "training")
        if work not in warm:
            warm.add(work)
            _work(job, model, work, job.batches[:1])
        model.zero_grad()
        _forget_peak(job.device)
        job.synchronize()
        start = time.perf_counter()
        _work(job, model, work, job.batches[1:])
        job.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory": _peak_gb(job.device)}), flush=True)


def _work(job: Job, model: nn.Module, work: str, batches: list[list[Tokens]]) -> None:
    for batch in batches:
        with torch.set_grad_enabled(work == "training"):
            margins = job.margins(model, batch)
            if work == "training":
                (-nn.functional.logsigmoid(margins).mean()).backward()


def _forget_peak(device: str) -> None:
    """Start the peak again from what is held now: loading may take more than running."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts a parent's memory in the ru_maxrss of a process it starts; VmHWM has its own only
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    _serve(sys.argv[1])
