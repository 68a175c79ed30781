"""``rmfast score`` over and over in forks of one process, and stopped: see test_score.py.

Reads a job from stdin, and prints what became of each try as JSON. A fork saves the seconds that
imports take; it is a process of its own, and what stops it is a real signal.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import torch
from processes import status
from pyarrow.parquet import ParquetFile

from rmfast import loading, resume
from rmfast.score import job as score_job
from rmfast.score import output, parquet, scorer, start

WATCHED = {module.__file__ for module in (resume, output, parquet, score_job, start)}
forked = functools.partial(processes.forked, watched=WATCHED)


def slowly(windows: Iterator) -> Iterator:
    for window in windows:
        yield window
        time.sleep(1)


def slow() -> None:
    """So that there is time to stop it."""
    windows = scorer.Scorer.windows
    scorer.Scorer.windows = lambda *args: slowly(windows(*args))


def kept(path: Path) -> dict[str, object]:
    """What a run leaves, times left out."""
    texts = [f for name in ("", ".errors.jsonl") if (f := Path(f"{path}{name}")).exists()]
    report = json.loads(path.with_name(f".{path.name}.report.json").read_text())
    for name in ("seconds", "seconds_scoring", "tokens_per_second", "output"):
        del report[name]
    return {"report": report, **{f.name: f.read_bytes() for f in texts}}


def rows_done(path: Path) -> int:
    state = path.with_name(f".{path.name}.state.json")
    return json.loads(state.read_text())["rows"] if state.exists() else 0


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def whole(argv: list[str], folder: Path, name: str) -> tuple[dict[str, object], int]:
    """What a run leaves that nobody stops, and how many calls it takes."""
    reading, writing = os.pipe()
    path = new(folder, "whole") / name
    code = status(forked([*argv, "--output", str(path)], calls=writing))
    return {**kept(path), "code": code}, int(os.read(reading, 99))


def resumed(command: list[str], path: Path) -> dict[str, object]:
    """What the run leaves that goes on."""
    code = status(forked([*command, "--resume"]))
    return {**kept(path), "code": code}


def kill(argv: list[str], folder: Path, name: str, calls: int, timers: int) -> None:
    """Kill runs at random calls and at random times, and let each go on."""
    draw = random.Random(0)
    start = time.perf_counter()
    expected, most = whole(argv, folder, name)
    seconds = time.perf_counter() - start
    edges = [1 + (most - 1) * i // calls for i in range(calls + 1)]
    tries = [draw.randrange(*edges[i : i + 2]) for i in range(calls)]
    for number, at in enumerate([*tries, *(draw.uniform(0, seconds) for _ in range(timers))]):
        path = new(folder, str(number)) / name
        command = [*argv, "--output", str(path)]
        if number < calls:
            ended = status(forked(command, at=at))
        else:
            child = forked(command)
            time.sleep(at)
            os.kill(child, signal.SIGKILL)
            ended = status(child)
        rows = rows_done(path)
        same = resumed(command, path) == expected
        left = sorted(file.name.replace(name, "") for file in path.parent.iterdir())
        say(do="kill", name=name, at=at, ended=ended, rows=rows, same=same, left=left)


def chain(argv: list[str], folder: Path, name: str, share: float) -> None:
    """Kill one run again and again, after the same number of calls, until it is done."""
    expected, most = whole(argv, folder, name)
    path = new(folder, "chain") / name
    command = [*argv, "--output", str(path)]
    kills, ended = 0, status(forked(command, at=int(most * share)))
    while ended == -signal.SIGKILL and kills < 50:
        kills += 1
        ended = status(forked([*command, "--resume"], at=int(most * share)))
    assert ended >= 0, (kills, ended, most)
    say(do="chain", name=name, kills=kills, same={**kept(path), "code": ended} == expected)


def interrupt(argv: list[str], folder: Path, name: str) -> None:
    """Send a run the signals that ask it to stop, once it has written something."""
    expected, _ = whole(argv, folder, name)
    for number in (signal.SIGINT, signal.SIGTERM):
        path = new(folder, number.name) / name
        command = [*argv, "--output", str(path)]
        log = folder / f"{number.name}.log"
        child = forked(command, log=log, first=slow)
        while not rows_done(path):
            time.sleep(0.01)
        os.kill(child, number)
        ended = status(child)
        rows = rows_done(path)
        same = resumed(command, path) == expected
        say(do="interrupt", ended=ended, rows=rows, said=log.read_text(), same=same)


def new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def main() -> None:
    torch.set_num_threads(1)  # a fork has one thread only
    jobs = json.load(sys.stdin)
    loaded = loading.load(jobs["model"])
    loading.load = lambda *_, **__: loaded
    assert scorer.Scorer and ParquetFile  # imported before the forks
    does: dict[str, Callable] = {"kill": kill, "chain": chain, "interrupt": interrupt}
    for number, job in enumerate(jobs["jobs"]):
        folder = new(Path(jobs["folder"]), str(number))
        does[job.pop("do")](["score", "--model", "x", *jobs["argv"]], folder, **job)


if __name__ == "__main__":
    main()
