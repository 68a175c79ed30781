"""What goes with the steps of ``rmfast train``: metrics, checkpoints, progress and signals."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from rmfast import resume
from rmfast.errors import UserError
from rmfast.evaluate import measures, show
from rmfast.resume import saving
from rmfast.score.scorer import Scorer

if TYPE_CHECKING:
    from rmfast.train.job import _Job


_PAUSE = 10.0  # seconds between lines of progress
COMPLETE = "complete.json"  # in a checkpoint of which nothing is missing


class Watch(TrainerCallback):
    """Metrics, checkpoints, progress and signals of a run, which lasts as long as a ``with``."""

    def __init__(self, job: _Job, held_out: list[dict[str, Any]] | None) -> None:
        self.folder, self.trainer = job.folder, job.trainer
        self.stopped, self.summary = False, None
        self.rows = None if held_out is None else [_sides(row) for row in held_out]
        # made before accelerate wraps the model: after that only its backbone could run packed
        self.scorer = Scorer(self.trainer.model) if self.rows else None
        done = 0 if job.checkpoint is None else int(job.checkpoint.rpartition("-")[2])
        self.lines = _kept_lines(self.folder / "metrics.jsonl", done)
        for line in self.lines:
            if line["kind"] == "eval":
                self.summary = line
            else:
                self.trainer._total_train_tokens = line["tokens"]
        self._draws = _can_draw()

    # --- signals

    def __enter__(self) -> Watch:
        self._before = {}
        with contextlib.suppress(ValueError):  # not the main thread, which alone hears of signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._told)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _told(self, *_: object) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        print(
            "\nrmfast train: stops after this step; once more: at once",
            file=sys.stderr,
            flush=True,
        )

    # --- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = self._said = time.perf_counter()
        self._begun = state.global_step
        say = f"{state.max_steps:,} steps"
        if self._begun:
            say += f", going on after step {self._begun:,}"
        self._say(say)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stopped:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            control.should_log = True  # else a run that goes on would not know of these losses
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"] + logs.get("grad_norm", 0.0)):
            raise UserError(
                f"step {state.global_step:,}: the loss is {logs['loss']}, the gradient's norm "
                f"{logs.get('grad_norm')}: lower --learning-rate, and --overwrite"
            )
        line = {name: value for name, value in logs.items() if name not in ("epoch", "num_tokens")}
        self._write("train", state, tokens=int(logs["num_tokens"]), **line)
        if time.perf_counter() - self._said >= _PAUSE:
            accuracy = f", accuracy {logs['accuracy']:.0%}" if "accuracy" in logs else ""
            self._say(
                f"step {state.global_step:,} of {state.max_steps:,}: loss {logs['loss']:.4f}"
                f"{accuracy}{self._left(state)}"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Only a checkpoint with the mark is complete, and on the disk."""
        folder = self.checkpoint()
        if (folder / COMPLETE).exists():
            return
        for file in folder.iterdir():
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())
        resume.write_whole(folder / COMPLETE, {"step": state.global_step})

    def checkpoint(self) -> Path:
        """That of this step, whether it is there or not."""
        return self.folder / "checkpoints" / f"checkpoint-{self.trainer.state.global_step}"

    def evaluate(self) -> dict[str, float]:
        """``rmfast eval``'s figures of the model as it is; training does not notice."""
        args, state = self.trainer.args, self.trainer.state
        if self.summary is None or self.summary["step"] != state.global_step:
            self._measure(args, state)
        return {
            "eval_accuracy": self.summary["rows"]["accuracy"],
            "eval_loss": self.summary["calibration"]["log_loss"],
        }

    def _measure(self, args: Any, state: Any) -> None:
        judged = measures.Judged()
        gpu = [args.device] if args.device.type == "cuda" else []
        autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)
        with torch.random.fork_rng(gpu), autocast:
            for window in self.scorer.windows(self.rows):
                for count, scored in window:
                    if scored.error is not None:
                        raise UserError(f"step {state.global_step:,}: a row cannot be scored: "
                                        f"{scored.error.reason}")  # fmt: skip
                    judged.add(scored.scores, scored.lengths, count)
        self.summary = self._write("eval", state, **measures.summarise(judged))
        rows = self.summary["rows"]
        low, high = rows["interval"]
        log_loss = self.summary["calibration"]["log_loss"]
        self._say(
            f"step {state.global_step:,}: held-out accuracy {rows['accuracy']:.1%} "
            f"[{low:.1%}, {high:.1%}], log loss {log_loss:.4f}"
        )
        self.draw()

    # --- what is shown

    def _write(self, kind: str, state: Any, **figures: Any) -> dict[str, Any]:
        line = {"kind": kind, "step": state.global_step, "epoch": state.epoch or 0.0, **figures}
        self.lines.append(line)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def _say(self, words: str) -> None:
        self._said = time.perf_counter()
        print(f"rmfast train: {words}", file=sys.stderr, flush=True)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._begun
        seconds = (time.perf_counter() - self._start) / max(done, 1)
        left = datetime.timedelta(seconds=round(seconds * (state.max_steps - state.global_step)))
        return f", {seconds:.2f} s a step, {left} left"

    def draw(self) -> None:
        if self._draws:
            title = self.folder.resolve().name
            show.curve(self.lines, title).savefig(self.folder / "training.png")


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError:
        print("! no training.png without matplotlib: pip install 'rmfast[eval]'")
        return False
    return True


def _sides(row: dict[str, Any]) -> tuple[int, list[np.ndarray]]:
    """How many answers are the chosen ones, and all of them, these first.

    Of a group they are the best ones: it is asked whether the best-scored answer is one of them.
    """
    if "ranks" not in row:
        return 1, [row["chosen_ids"], row["rejected_ids"]]
    best = min(row["ranks"])
    order = sorted(range(len(row["ranks"])), key=lambda i: row["ranks"][i] != best)
    return row["ranks"].count(best), [row["responses_ids"][i] for i in order]


def _kept_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """The metrics up to a step; later ones, and half a line, leave the file."""
    lines = []
    if step and path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if line["step"] <= step:
                    lines.append(line)
    beside = path.with_name(path.name + ".tmp")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with saving(path.parent):
        beside.write_text(text, encoding="utf-8")
        resume.put_in_place(beside, path)
    return lines


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint. All others go: none can be told from half a one."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        if path.name[11:].isdecimal():
            found[int(path.name[11:])] = path
    complete = [step for step, path in found.items() if (path / COMPLETE).exists()]
    last = max(complete, default=None)
    for step, path in found.items():
        if step != last:
            shutil.rmtree(path, ignore_errors=True)
    return None if last is None else str(found[last])
