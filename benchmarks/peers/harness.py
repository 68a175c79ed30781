"""Runs alternatives side by side, a process each, and judges their scores before any time counts.

Processes stay alive and sleep on a pipe; one at a time runs a pass, in turn, so that whatever else
the machine does meets all of them alike. The untimed round comes first: whose scores are further
from the fp32 oracle than :data:`FACTOR` times the baseline's is wrong, and is not timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, pstdev
from typing import Any

import torch
import transformers

from rmfast.benchmarks.peers import environments
from rmfast.benchmarks.peers.environments import Alternative
from rmfast.benchmarks.peers.workloads import Workload

HERE = Path(__file__).parent
FACTOR = 3.0  # the largest differences of two ways to round are not alike
PAUSE = 0.3  # seconds between turns, in which the threads of the last one stop to spin
PATIENCE = 3600.0  # seconds for one answer
ROOF = Alternative("roof", HERE / "roof.py", {}, [], False)
Answers = dict[str, list[float]]  # "score"; in training "loss" and "grad_norm", of each step


class Ended(Exception):
    """A process that gave no answer; the message says why."""


class Process:
    """An alternative with a model loaded: ``run`` sends rows, or runs those sent last again."""

    def __init__(
        self,
        one: Alternative,
        options: dict[str, str],
        start: tuple[str, dict[str, str]],
        log: Path,
    ) -> None:
        python, variables = start
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.versions = log, {}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, HERE / "worker.py", one.file, json.dumps({**options, **one.options})],
                env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True,
            )  # fmt: skip
        try:
            self.versions = self._answer()["versions"]
        except Ended:
            self.close()
            raise

    def run(self, rows: Sequence[list[int]] | None = None) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # the answer says so
            print(json.dumps(rows), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            code, said = self.process.wait(), self.log.read_text(errors="replace").split("\n")
            last = next((text.strip() for text in reversed(said) if text.strip()), "")
            raise Ended(f"died with exit code {code}: {last}")
        answer = json.loads(line)
        if "skipped" in answer:
            raise Ended(f"not run: {answer['skipped']}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


# --- right or wrong


def difference(answers: Answers, exact: Answers) -> float:
    """The largest difference, in units of the exact values' standard deviation."""
    out = 0.0
    for name, values in exact.items():
        given = answers.get(name, [])
        if len(given) != len(values):
            return float("inf")
        spread = (pstdev(values) or abs(values[0]) or 1.0) if values else 1.0
        for x, y in zip(given, values, strict=True):
            out = max(out, float("inf") if math.isnan(x) else abs(x - y) / spread)
    return out


def allowed(baseline: float, exact: Answers, dtype: str) -> float:
    """How far from the oracle an answer may be; both in its standard deviations.

    :data:`FACTOR` times what the baseline's own is, and a rounding of the largest value.
    """
    rounding = max(
        torch.finfo(getattr(torch, dtype)).eps * max(map(abs, values))
        / (pstdev(values) or abs(values[0]) or 1.0)
        for values in exact.values()
    )  # fmt: skip
    return FACTOR * (baseline + rounding)


# --- one run


@dataclasses.dataclass
class Tally:
    """What comes of a workload: by name, passes, of which the first is untimed, and differences."""

    work: Workload
    exact: Answers
    names: dataclasses.InitVar[list[str]]
    most: float = float("inf")  # how far off an answer may be
    roofs: list[list[float]] = dataclasses.field(default_factory=list)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self, names: list[str]) -> None:
        self.passes: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.off = dict.fromkeys(names, 0.0)


class Contest:
    """All that stays the same from workload to workload.

    Args:
        who: the alternatives, by name.
        build: folder of environments, logs and the oracle's answers.
        models: by name, the folders of the models.
        dtype: of weights and arithmetic; in training of autocast.
        device: ``"cpu"`` or ``"cuda"``.
        python: by adapter, another Python.
        say: told what is done.
    """

    def __init__(
        self, who: dict[str, Alternative], build: Path, models: dict[str, Path], dtype: str,
        device: str, python: dict[str, str], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.who, self.build, self.models = who, build, models
        self.dtype, self.device, self.python, self.say = dtype, device, python, say
        self.versions: dict[str, dict[str, str]] = {}

    def start(self, one: Alternative, model: str, dtype: str, name: str = "") -> Process:
        options = {"model": str(self.models[model]), "dtype": dtype, "device": self.device}
        ready = environments.environment(one, self.build, self.python)
        log = self.build / "log" / f"{name or one.name}.log"
        return Process(one, options, ready, log)

    def oracle(self, one: Alternative, work: Workload) -> Answers:
        """The baseline's answers in fp32, in scoring row by row; kept on the disk."""
        weights = sorted((f.name, f.stat().st_mtime) for f in self.models[work.model].iterdir())
        named = [work.trains, work.rows, weights, torch.__version__, transformers.__version__]
        named.append(one.file.read_text())
        file = self.build / "oracle" / hashlib.sha256(json.dumps(named).encode()).hexdigest()
        if not file.is_file():
            self.say(f"{work.name}: the oracle")
            if not work.trains:
                one = Alternative("oracle", one.file, {"batch": 1}, one.pins, False)
            with contextlib.closing(self.start(one, work.model, "float32", "oracle")) as process:
                answers = process.run(work.rows)["answers"]
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(answers))
        return json.loads(file.read_text())

    def run(
        self, works: Sequence[Workload], baseline: str, rounds: int, starts: int = 1
    ) -> list[dict[str, Any]]:
        """Workloads of one model, all scored or all trained on; the processes live that long.

        Args:
            rounds: timed ones, after an untimed one, of each start.
            starts: how often all processes are started anew.

        Returns:
            For each workload and alternative what :func:`measured` says.
        """
        first = works[0]
        names = [n for n, one in self.who.items() if one.trains == first.trains and n != baseline]
        names.insert(0, baseline)
        try:
            exact = [self.oracle(self.who[baseline], work) for work in works]
        except Ended as reason:
            self._lose(baseline, str(reason), baseline, {})
        tallies = [Tally(work, right, names) for work, right in zip(works, exact, strict=True)]
        lost: dict[str, str] = {}
        for _ in range(starts):
            processes: dict[str, Process] = {}
            try:
                for name in ("roof", *(name for name in names if name not in lost)):
                    one = ROOF if name == "roof" else self.who[name]
                    self.say(f"starting {name}")
                    try:
                        processes[name] = self.start(one, first.model, self.dtype)
                        self.versions[name] = processes[name].versions
                    except Ended as reason:
                        self._lose(name, str(reason), baseline, lost)
                for tally in tallies:
                    tally.lost |= lost
                    self._contest(tally, baseline, processes, rounds)
            finally:
                for process in processes.values():
                    process.close()
        return [
            measured(
                name, tally.work, tally.passes[name], tally.off[name], tally.most,
                tally.lost.get(name), tally.roofs,
            )
            for tally in tallies for name in names
        ]  # fmt: skip

    def _lose(self, name: str, reason: str, baseline: str, lost: dict[str, str]) -> None:
        self.say(f"{name} {reason}")
        if name == baseline:  # nobody could be judged
            raise SystemExit(f"the baseline {baseline} {reason}")
        lost[name] = reason

    def _contest(
        self, tally: Tally, baseline: str, processes: dict[str, Process], rounds: int
    ) -> None:
        """An untimed round, and the timed ones of who was right in all before."""
        work = tally.work
        for number in range(rounds + 1):
            self.say(f"{work.name}: {f'round {number} of {rounds}' if number else 'untimed round'}")
            if "roof" in processes:
                time.sleep(PAUSE)
                tally.roofs.append(processes["roof"].run(work.rows)["answers"]["score"])
            for name, passes in tally.passes.items():
                if name in tally.lost or tally.off[name] > tally.most:
                    continue
                time.sleep(PAUSE)
                try:
                    done = self._turn(name, work, number, processes)
                except Ended as reason:
                    self._lose(name, str(reason), baseline, tally.lost)
                    continue
                tally.off[name] = max(tally.off[name], difference(done["answers"], tally.exact))
                if name == baseline and not passes:
                    tally.most = allowed(tally.off[name], tally.exact, self.dtype)
                if number or not passes:  # the untimed pass of another start tells nothing new
                    passes.append(done)

    def _turn(
        self, name: str, work: Workload, number: int, processes: dict[str, Process]
    ) -> dict[str, Any]:
        if processes[name].process.poll() is not None:  # died at another workload
            processes[name].close()
            processes[name] = self.start(self.who[name], work.model, self.dtype)
        return processes[name].run(None if number else work.rows)


def measured(
    name: str, work: Workload, passes: list[dict[str, Any]], off: float, most: float,
    lost: str | None, roofs: list[list[float]],
) -> dict[str, Any]:  # fmt: skip
    """What one alternative did with one workload. Only who was right has a time.

    ``difference`` and ``allowed`` are in standard deviations of the oracle's values.
    ``trie_share``: distinct prefixes ÷ tokens run. ``floor_share``: time of the linear layers'
    products on the distinct prefixes (three times that in training), at the best rate of the same
    run, ÷ time.
    """
    verdict = lost or ("right" if off <= most else "wrong")
    row = {
        "workload": work.name, "alternative": name, "verdict": verdict,
        "difference": off if passes else None, "allowed": most, "rows": len(work.rows),
        "tokens": work.tokens, "nodes": work.nodes,
    }  # fmt: skip
    times = [one["seconds"] for one in passes[1:]]
    if verdict != "right" or not times:
        return row
    seconds, run = median(times), passes[0]["tokens"]
    row |= {
        "seconds": seconds, "seconds_min": min(times), "seconds_max": max(times),
        "tokens_per_second": work.tokens / seconds, "tokens_run": run,
        "trie_share": work.nodes / run if run else None,
    }  # fmt: skip
    if roofs:
        flops, *rates = (median(column) for column in zip(*roofs, strict=True))
        floor = flops * work.nodes * (3 if work.trains else 1) / max(rates)
        row |= {"matmul": rates[0], "prepacked": rates[1], "floor_seconds": floor}
        row["floor_share"] = floor / seconds
    return row
