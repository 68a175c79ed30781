"""What both benchmarks share: contestants, a process for each, their counts, table and CSV.

Every contestant lives in a process of its own, so that its peak memory is its own. The processes
stay alive and wait on a pipe; the parent lets one at a time do one pass over all batches, in turn,
so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import itertools
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import rmfast
from rmfast import data, errors
from rmfast.data.encoding import Encoder
from rmfast.demo import embedded as embedded

DTYPES = ("bfloat16", "float16", "float32")
_MATMULS = 5  # timings of each shape, of which the median counts
_GPU_REPEATS = 20  # launches in one timing: a single one would time the launch


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Somebody's way to run the same sequences."""

    title: str
    options: dict[str, Any] | None  # of rmfast.patch; None: Hugging Face as it comes
    by_length: bool = False  # batches of all sequences sorted by length, not of pairs in file order
    only: str = ""  # the one benchmark that it can run in


CONTESTANTS = {
    "hf": Contestant("Hugging Face", None),
    "hf-sorted": Contestant("HF, sorted", None, by_length=True),
    "rmfast": Contestant("rmfast", {}),
    "rmfast-bare": Contestant("patched model", {}, only="bulk"),  # on the scorer's micro-batches
    "rmfast-score": Contestant("rmfast score", {}, only="bulk"),  # from file to file
    "trl": Contestant("TRL", None, only="trainer"),
    "trl-patched": Contestant("TRL, patched model", {}, only="trainer"),
    "rmfast-trainer": Contestant("rmfast's trainer", {}, only="trainer"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a contestant's process is told."""

    options: dict[str, Any] | None
    model: str
    dtype: str
    device: str
    threads: int | None
    trust_remote_code: bool
    train: bool
    rows: list[list[int]]  # token ids: chosen, rejected, chosen, rejected, ...
    batches: list[list[int]]  # which rows run together; in training chosen ones, then rejected
    pad: int

    def runner(self) -> Runner:
        return Runner(self)


# --- batches, and what is in them


def in_file_order(pairs: int, size: int) -> list[list[int]]:
    """``size`` pairs a batch, the chosen ones and then the rejected, as TRL collates them."""
    chosen = range(0, 2 * pairs, 2)
    parts = [chosen[start : start + size] for start in range(0, pairs, size)]
    return [[*part, *(row + 1 for row in part)] for part in parts]


def by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """``size`` sequences a batch, longest first, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def token_slots(rows: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]) -> int:
    """What padding every batch to its longest row makes of the tokens."""
    return sum(len(batch) * max(len(rows[row]) for row in batch) for batch in batches)


def trie_nodes(rows: Sequence[Sequence[int]]) -> int:
    """Distinct prefixes of one batch, counted apart from :func:`rmfast.pack`.

    No exact method that runs a causal model on tokens can run fewer of them.
    """
    ordered = sorted(rows)
    shared = sum(_common(left, right) for left, right in itertools.pairwise(ordered))
    return sum(map(len, ordered)) - shared


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    same = (a == b for a, b in zip(left, right, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def padded(rows: Sequence[Sequence[int]], batch: Sequence[int], pad: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids`` and ``attention_mask``, int64 ``[B, T]``."""
    width = max(len(rows[row]) for row in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(batch):
        ids[line, : len(rows[row])] = torch.tensor(rows[row])
        mask[line, : len(rows[row])] = 1
    return {"input_ids": ids, "attention_mask": mask}


# --- inside a contestant's process


def _peak_gb(device: str) -> float:
    """Most memory this process has held: resident on the host, or allocated on the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux hands a parent's ru_maxrss on to a process it starts; VmHWM is this process's alone
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _forget_peak(device: str) -> None:
    """Start the peak again from what is held now, where the system can (Linux, CUDA)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _weight(module: nn.Module) -> Tensor | None:  # [in, out]
    """The matrix of a linear layer; None for any other module, and for packed quantised ones."""
    from transformers.pytorch_utils import Conv1D

    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and weight.shape == (module.out_features, module.in_features):
        return weight.detach().t() if weight.is_floating_point() else None
    return weight.detach() if isinstance(module, Conv1D) else None


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a layer is given, whether it is named or not."""
    return next(iter((*args, *kwargs.values())))


class Runner:
    """A contestant at home: the model, its batches, and what is measured of them."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.disable_progress_bar()
        if job.threads:
            torch.set_num_threads(job.threads)
        if job.device.startswith("cuda"):
            torch.cuda.set_device(job.device)
        self.job = job
        self.baseline_gb = _peak_gb(job.device)
        torch.manual_seed(0)  # a head the checkpoint lacks is drawn alike for all
        model = AutoModelForSequenceClassification.from_pretrained(
            job.model, dtype=getattr(torch, job.dtype), trust_remote_code=job.trust_remote_code
        )
        model.config.get_text_config().pad_token_id = job.pad
        self.model = model.to(job.device).train(job.train)
        self.batches = [padded(job.rows, batch, job.pad) for batch in job.batches]
        self.scores = torch.full((len(job.rows),), float("nan"))
        _forget_peak(job.device)  # reading a checkpoint may take more than running it
        self.linears: list[nn.Module] = []
        self.flops = 0  # of linear layers in the backbone, one forward pass over all batches
        self.calls: list[int] = []  # tokens in each call of the input embeddings

    def warm_up(self) -> None:
        """The untimed round. It counts, with hooks that are gone in the timed ones."""
        job = self.job
        if job.options is not None:
            rmfast.patch(self.model, **job.options)
        with self._counting():
            self._pass()

    def timed(self) -> dict[str, float | None]:
        """One pass over all batches, and the matmul rate right after it."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        _synchronise(self.job.device)
        start = time.perf_counter()
        self._pass()
        seconds = time.perf_counter() - start
        peak_gb = _peak_gb(self.job.device)
        return {"seconds": seconds, "peak_gb": peak_gb, "rate": self._matmul_rate()}

    def result(self) -> dict[str, Any]:
        """What does not change from round to round."""
        job = self.job
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        out = {
            "scores": self.scores.tolist(),
            "tokens_run": sum(self.calls),
            "flops": self.flops * (3 if job.train else 1),
            "baseline_gb": self.baseline_gb,
            "threads": torch.get_num_threads(),
            "device_name": _device_name(job.device),
            "grad_norm": float(nn.utils.get_total_norm([g.float() for g in grads]))
            if grads
            else None,
            "level": None,
            "fallbacks": {},
        }
        if job.options is not None:
            report = rmfast.report(self.model)
            out.update(level=report.level, fallbacks=dict(report.fallbacks))
        return out

    def _pass(self) -> None:
        run = self._train if self.job.train else self._score
        for rows, batch in zip(self.job.batches, self.batches, strict=True):
            inputs = {name: x.to(self.job.device) for name, x in batch.items()}
            self.scores[rows] = run(inputs).float().cpu()
        _synchronise(self.job.device)

    def _score(self, inputs: dict[str, Tensor]) -> Tensor:  # [B]
        with torch.inference_mode():
            return self.model(**inputs, use_cache=False).logits[:, 0]

    def _train(self, inputs: dict[str, Tensor]) -> Tensor:  # [B]
        scores = self.model(**inputs, use_cache=False).logits[:, 0]
        chosen, rejected = scores.chunk(2)
        (-nn.functional.logsigmoid(chosen - rejected).mean()).backward()
        return scores.detach()

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        def embedded(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.calls.append(_first(args, kwargs).numel())

        def multiplied(width: int, _: nn.Module, args: tuple, kwargs: dict) -> None:
            self.flops += 2 * _first(args, kwargs).numel() * width

        hooks = [
            self.model.get_input_embeddings().register_forward_pre_hook(embedded, with_kwargs=True)
        ]
        for module in self.model.base_model.modules():
            weight = _weight(module)
            if weight is not None:
                self.linears.append(module)
                count = functools.partial(multiplied, weight.shape[1])
                hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _matmul_rate(self) -> float | None:
        """FLOP/s of the model's own linear layers, each shape weighted by how often it occurs.

        On as many rows as a batch of this contestant typically has, with weights of different
        layers in turn, so that they come from memory as they do in the model.
        """
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for module in self.linears:
            weight = _weight(module)
            shapes.setdefault(tuple(weight.shape), []).append(weight)
        rows, device = int(median(self.calls)), self.job.device
        repeats = _GPU_REPEATS if device.startswith("cuda") else 1
        flops = seconds = 0.0
        for (width, out), weights in shapes.items():
            x = torch.randn(rows, width, device=device).to(weights[0].dtype)
            times = []
            for weight in itertools.islice(itertools.cycle(weights), _MATMULS + 1):
                _synchronise(device)
                start = time.perf_counter()
                for _ in range(repeats):
                    torch.matmul(x, weight)
                _synchronise(device)
                times.append((time.perf_counter() - start) / repeats)
            flops += len(weights) * 2 * rows * width * out
            seconds += len(weights) * median(times[1:])  # the first one warms up
        return flops / seconds if shapes else None


def _serve(job: Job, pipe: multiprocessing.connection.Connection) -> None:
    """A process's whole life: do what is asked for, and sleep on the pipe in between."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            runner = job.runner()
            pipe.send((True, None))
            while True:
                pipe.send((True, getattr(runner, pipe.recv())()))
        except (EOFError, BrokenPipeError):
            raise
        except BaseException:
            pipe.send((False, traceback.format_exc()))


# --- the parent's side


class Process:
    """A contestant's process. ``ask`` sends it a request; ``answer`` sleeps until it is done."""

    def __init__(self, name: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(job, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, request: str) -> Any:
        self.pipe.send(request)
        return self.answer()

    def answer(self) -> Any:
        try:
            well, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"the process of {self.name} died with exit code {code}") from None
        if not well:
            raise RuntimeError(f"the process of {self.name} failed:\n{value}")
        return value

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():  # in the middle of a pass
            self.process.terminate()
            self.process.join()


def measure(
    jobs: dict[str, Job], rounds: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """Run all contestants in turn: an untimed round, then ``rounds`` timed ones.

    Returns:
        For each contestant the figures of :data:`COLUMNS` that it alone decides, and ``scores``,
        in the order of the job's rows.
    """
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, job in jobs.items():
            processes[name] = Process(name, job)
            stack.callback(processes[name].close)
        for process in processes.values():
            process.answer()  # loaded
        timed: dict[str, list[dict]] = {name: [] for name in jobs}
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "warm-up and counting")
            for name, process in processes.items():
                if number:
                    timed[name].append(process.ask("timed"))
                else:
                    process.ask("warm_up")
        results = {name: process.ask("result") for name, process in processes.items()}
    return {name: _figures(jobs[name], timed[name], results[name]) for name in jobs}


def untimed(job: Job) -> dict[str, Any]:
    """One pass in a process that ends with it: what :meth:`Runner.result` gives."""
    process = Process("the oracle", job)
    try:
        process.answer()
        process.ask("warm_up")
        return process.ask("result")
    finally:
        process.close()


def _figures(job: Job, timed: list[dict], result: dict[str, Any]) -> dict[str, Any]:
    seconds = [one["seconds"] for one in timed]
    peak = max(one["peak_gb"] for one in timed)
    rates = [one["rate"] for one in timed if one["rate"]]
    nodes = sum(trie_nodes([job.rows[row] for row in batch]) for batch in job.batches)
    rate = median(rates) if rates else None
    floor = result["flops"] / rate if rate else None
    return {
        **result,
        "seconds": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "sequences_per_second": len(job.rows) / median(seconds),
        "token_slots": token_slots(job.rows, job.batches),
        "tokens": sum(len(job.rows[row]) for batch in job.batches for row in batch),
        "trie_nodes": nodes,
        "run_per_node": result["tokens_run"] / nodes,
        "matmul_rate": rate,
        "floor_seconds": floor,
        "floor_share": floor / median(seconds) if floor else None,
        "peak_gb": peak,
        "peak_over_baseline_gb": peak - result["baseline_gb"],
    }


def compare(figures: dict[str, dict[str, Any]]) -> None:
    """Add what needs two contestants: ratios to rmfast, distances to Hugging Face's scores.

    Where rmfast or Hugging Face was not asked for, the first contestant stands in.
    """
    first = next(iter(figures.values()))
    ours = ("rmfast-trainer", "rmfast-score", "rmfast")
    rmfast_ = next((figures[name] for name in ours if name in figures), first)
    hf = figures.get("hf", first)
    theirs = torch.tensor(hf["scores"])
    for one in figures.values():
        one["time_ratio"] = one["seconds"] / rmfast_["seconds"]
        one["memory_ratio"] = one["peak_over_baseline_gb"] / rmfast_["peak_over_baseline_gb"]
        apart = (torch.tensor(one["scores"]) - theirs).abs().max()
        one["score_difference"] = float(apart / theirs.std())
        if hf["grad_norm"] is not None:
            one["grad_norm_ratio"] = one["grad_norm"] / hf["grad_norm"]


# --- the command line


def parser(benchmark: str, contestants: Sequence[str], about: str) -> argparse.ArgumentParser:
    """The options that both benchmarks take; ``contestants`` run unless others are named."""

    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"need at least 1, got {text}")
        return int(text)

    out = argparse.ArgumentParser(
        prog=f"python -m rmfast.benchmarks.{benchmark}",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = out.add_argument
    add("--model", help="checkpoint folder or hub name of a reward model; default: the embedded")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of weights and arithmetic")
    add("--data", type=Path, help="JSONL (.gz too) of chosen and rejected; default: the embedded")
    add("--pairs", type=count, help="take the first so many; default: all")
    add("--batch-pairs", type=count, default=8, help="pairs a batch, in file order")
    add("--sorted-batch", type=count, default=16, help="sequences a batch, sorted by length")
    alone = benchmark == "trainer"
    who = [
        x for x, one in CONTESTANTS.items() if one.only in (benchmark, benchmark if alone else "")
    ]
    add("--contestants", nargs="+", default=list(contestants), choices=who, help="who runs")
    add("--rounds", type=count, default=3, help="timed rounds, after an untimed one")
    add("--threads", type=count, help="CPU threads; default: torch's")
    add("--device", default="cpu", help="cpu, cuda, or cuda:N")
    add("--csv", type=Path, help="append a line per contestant to this file")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return out


def prepare(args: argparse.Namespace, train: bool) -> dict[str, Job]:
    """The contestants' jobs: one tokenisation, the same rows for all."""
    from transformers import AutoTokenizer

    if args.model is None:
        args.model = str(embedded.checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    rows = _rows(args, tokenizer)
    args.pairs = len(rows) // 2
    batches = {}
    for name in args.contestants:
        if CONTESTANTS[name].by_length and train:
            raise SystemExit(f"{name} splits pairs up, so it cannot train on them")
        sort = CONTESTANTS[name].by_length
        file_order = in_file_order(args.pairs, args.batch_pairs)
        batches[name] = by_length(rows, args.sorted_batch) if sort else file_order
    return jobs(args, rows, batches, tokenizer, train)


def jobs(
    args: argparse.Namespace,
    rows: list[list[int]],
    batches: dict[str, list[list[int]]],
    tokenizer: Any,
    train: bool = False,
) -> dict[str, Job]:
    """A job for each contestant, with its batches of these rows."""
    from transformers import AutoConfig

    if args.csv is not None:
        check_csv(args.csv)
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    known = (
        config.get_text_config().pad_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        0,
    )
    pad = next(token for token in known if token is not None)
    return {
        name: Job(
            CONTESTANTS[name].options, args.model, args.dtype, args.device, args.threads,
            args.trust_remote_code, train, rows, batches[name], pad,
        )
        for name in dict.fromkeys(args.contestants)
    }  # fmt: skip


def _rows(args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Token ids: chosen, rejected, chosen, ..."""
    try:
        if args.data is None:
            pairs = embedded.pairs("held-out")
        else:
            pairs = data.preferences(args.data, ranks="pairs").records
        encode = Encoder(tokenizer)
        rows = [(pair.where, row) for pair in pairs[: args.pairs] for row in encode(pair.whole())]
    except errors.DataError as error:
        raise SystemExit(str(error)) from None
    for where, row in rows:
        if isinstance(row, errors.RowError):
            raise SystemExit(f"{where}: {row.reason}")
    return [row.tolist() for _, row in rows]


# --- the table and the CSV file

COLUMNS = (
    "date benchmark contestant model dtype device device_name threads data pairs batch_pairs "
    "sorted_batch rounds python rmfast torch transformers level seconds seconds_min seconds_max "
    "time_ratio sequences_per_second token_slots tokens trie_nodes tokens_run run_per_node flops "
    "matmul_rate floor_seconds floor_share baseline_gb peak_gb peak_over_baseline_gb memory_ratio "
    "score_difference grad_norm grad_norm_ratio oracle_error oracle_ratio"
).split()

_TABLE: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("time / rmfast's", lambda f: f"{f['time_ratio']:.2f}"),
    ("seconds, median", lambda f: f"{f['seconds']:.3f}"),
    ("seconds, min..max", lambda f: f"{f['seconds_min']:.3f}..{f['seconds_max']:.3f}"),
    ("sequences / s", lambda f: f"{f['sequences_per_second']:.2f}"),
    ("token slots, padded", lambda f: f"{f['token_slots']:,}"),
    ("tokens", lambda f: f"{f['tokens']:,}"),
    ("distinct prefixes (nodes)", lambda f: f"{f['trie_nodes']:,}"),
    ("tokens run", lambda f: f"{f['tokens_run']:,}"),
    ("nodes run / trie nodes", lambda f: f"{f['run_per_node']:.2f}"),
    ("matmul GFLOP/s, measured", lambda f: _or_dash(f["matmul_rate"], 1e-9, ".0f")),
    ("matmul floor, seconds", lambda f: _or_dash(f["floor_seconds"], 1, ".3f")),
    ("share of the matmul floor", lambda f: _or_dash(f["floor_share"], 1, ".0%")),
    ("peak memory, GB", lambda f: f"{f['peak_gb']:.2f}"),
    ("  less what imports take", lambda f: f"{f['peak_over_baseline_gb']:.2f}"),
    ("  that / rmfast's", lambda f: f"{f['memory_ratio']:.2f}"),
    ("scores, off HF's / their std", lambda f: _or_dash(f["score_difference"], 1, ".1e")),
    ("gradient norm / HF's", lambda f: _or_dash(f.get("grad_norm_ratio"), 1, ".4f")),
    ("error to fp32 / HF's error", lambda f: _or_dash(f.get("oracle_ratio"), 1, ".2f")),
]
_NOTES = """\
Ratios are what transfers to other machines; seconds and GB are this one's.
Tokens run: what the input embeddings were called with. Matmul floor: the linear layers' FLOPs of
what this contestant ran (attention itself left out; three times for training) at the rate those
layers' shapes reached in its own process. Its share of the time is how near that one is to it."""


def _or_dash(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value * unit, form)


def show(benchmark: str, args: argparse.Namespace, figures: dict[str, dict[str, Any]]) -> None:
    """Print what was run and the table, a column per contestant."""
    first = next(iter(figures.values()))
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    print(f"{benchmark}: {_name(args.model)}, {args.dtype}, {args.device} ({first['device_name']})")
    print(
        f"{args.pairs} pairs of {_name(args.data)}, {args.batch_pairs} pairs a batch "
        f"(sorted: {args.sorted_batch} sequences), {first['threads']} threads, "
        f"timed rounds: {args.rounds}"
    )
    print(versions, end="\n\n")
    lines = [["", *(CONTESTANTS[name].title for name in figures)]]
    for title, text in _TABLE:
        cells = [text(one) for one in figures.values()]
        if set(cells) != {"-"}:
            lines.append([title, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for title, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([title.ljust(widths[0]), *right]).rstrip())
    print()
    for name, one in figures.items():
        if one["level"] is not None:
            print(f"{CONTESTANTS[name].title}: level {one['level']}")
        for reason, calls in one["fallbacks"].items():
            print(f"  {calls} calls ran unpacked: {reason}")
    print(_NOTES)


def check_csv(path: Path) -> None:
    """Refuse, before anything runs, a file whose columns are not these."""
    if path.is_file() and path.stat().st_size:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != list(COLUMNS):
                raise SystemExit(f"{path} has other columns: name a new file")


def append_csv(
    path: Path, benchmark: str, args: argparse.Namespace, figures: dict[str, dict[str, Any]]
) -> None:
    """Append a line per contestant; the header too, where the file is new."""
    check_csv(path)
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "benchmark": benchmark,
        "model": _name(args.model),
        "data": _name(args.data),
        **{name: getattr(args, name) for name in ("dtype", "device", "pairs", "batch_pairs")},
        **{name: getattr(args, name) for name in ("sorted_batch", "rounds")},
        **_versions(),
    }
    new = not path.is_file() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        for name, one in figures.items():
            writer.writerow({**run, "contestant": name, **one})


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "rmfast": rmfast.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def _name(given: str | Path | None) -> str:
    """A hub name as it is, a path without its folders: results are read on other machines."""
    if given is None:
        return "the embedded pairs"
    return Path(given).name if os.path.exists(given) else str(given)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
