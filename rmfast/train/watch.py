"""What goes with the steps of ``rmfast train``: metrics, checkpoints, progress and signals."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from rmfast.errors import UserError
from rmfast.evaluate import measures, show
from rmfast.resume import saving, write_whole
from rmfast.score.scorer import Scorer

_PAUSE = 10.0  # seconds between lines of progress
_KEPT = 2  # checkpoints, and the best one
COMPLETE = "complete.json"  # in a checkpoint of which nothing is missing


class Watch(TrainerCallback):
    """Metrics, checkpoints and progress of a run: a callback of ``trainer``.

    Metrics after ``step``, where the run goes on, are forgotten.
    """

    def __init__(
        self, folder: Path, trainer: Any, held_out: list[dict[str, Any]] | None, step: int
    ) -> None:
        self.folder, self.trainer = folder, trainer
        self.stopped, self.summary = False, None  # by a signal; the last held-out figures
        self.rows = [_sides(row) for row in held_out or ()]
        # made before accelerate wraps the model: after that only its backbone could run packed
        self.scorer = Scorer(trainer.model, trainer.processing_class) if self.rows else None
        self.lines = _kept_lines(folder / "metrics.jsonl", step)
        for line in self.lines:
            if line["kind"] == "eval":
                self.summary = line
            else:
                trainer._total_train_tokens = line["tokens"]
        self._draws = _can_draw()
        trainer.watch = self
        trainer.add_callback(self)

    def stop(self, *_: object) -> None:
        """Stop after this step: the handler of a signal."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        self._say("stopping after this step; a second signal stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start, self._begun = time.perf_counter(), state.global_step
        going_on = f", going on after step {self._begun:,}" if self._begun else ""
        self._say(f"{state.max_steps:,} steps{going_on}")

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
        self._write("train", state.global_step, tokens=int(logs["num_tokens"]), **line)
        if time.perf_counter() - self._said >= _PAUSE:
            accuracy = f", accuracy {logs['accuracy']:.0%}" if "accuracy" in logs else ""
            step, steps = state.global_step, state.max_steps
            seconds = (time.perf_counter() - self._start) / max(step - self._begun, 1)
            left = datetime.timedelta(seconds=round(seconds * (steps - step)))
            self._say(
                f"step {step:,} of {steps:,}: loss {logs['loss']:.4f}{accuracy}, {seconds:.2f} s a "
                f"step, {left} left"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as complete, and on the disk; older ones are deleted."""
        folder = self.checkpoint()
        if (folder / COMPLETE).exists():
            return
        for file in filter(Path.is_file, folder.rglob("*")):
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())
        write_whole(folder / COMPLETE, {"step": state.global_step})
        # the others go when this one is whole, not before, as transformers has it
        found = _checkpoints(folder.parent)
        for step in found.keys() - {state.best_global_step, *sorted(found)[-_KEPT:]}:
            shutil.rmtree(found[step], ignore_errors=True)

    def checkpoint(self) -> Path:
        """That of this step, whether it is there or not."""
        return self.folder / "checkpoints" / f"checkpoint-{self.trainer.state.global_step}"

    def evaluate(self) -> dict[str, float]:
        """``rmfast eval``'s figures of the model as it is; training does not notice."""
        args, state = self.trainer.args, self.trainer.state
        wanted = args.metric_for_best_model or args.report_to
        if state.global_step >= state.max_steps and not wanted:
            return {}  # measured as it is written
        is_new = self.summary is None or self.summary["step"] != state.global_step
        if is_new:
            self._measure(self.scorer, state.global_step, args.bf16)
        figures = {
            "eval_accuracy": self.summary["rows"]["accuracy"],
            "eval_loss": self.summary["calibration"]["log_loss"],
        }
        if is_new and args.report_to:
            handler = self.trainer.callback_handler
            handler.on_log(args, state, self.trainer.control, dict(figures))
        return figures

    def measure_written(self, model: Any, step: int) -> None:
        """The figures of the model as it is to be written, with the weights of a step."""
        if self.rows and not (self.summary or {}).get("written"):
            scorer = Scorer(model, self.trainer.processing_class)
            self._measure(scorer, step, autocast=False, written=True)

    def _measure(self, scorer: Scorer, step: int, autocast: bool, **more: Any) -> None:
        figures = measures.summarise(self._judged(scorer, step, autocast))
        self.summary = self._write("eval", step, **more, **figures)
        self.draw()
        rows = figures["rows"]
        low, high = rows["interval"]
        self._say(
            f"step {step:,}: held-out accuracy {rows['accuracy']:.1%} [{low:.1%}, {high:.1%}], "
            f"log loss {figures['calibration']['log_loss']:.4f}"
        )

    def _judged(self, scorer: Scorer, step: int, autocast: bool) -> measures.Judged:
        """The held-out rows with their scores."""
        device = self.trainer.args.device
        gpu = [device] if device.type == "cuda" else []
        judged = measures.Judged()
        with (
            torch.random.fork_rng(gpu),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        ):
            for window in scorer.windows(self.rows):
                for chosen, scored in window:
                    if scored.error is not None:
                        reason = scored.error.reason
                        raise UserError(f"step {step:,}: a row cannot be scored: {reason}")
                    judged.add(scored.scores, scored.lengths, chosen)
        return judged

    def _write(self, kind: str, step: int, **figures: Any) -> dict[str, Any]:
        epoch = self.trainer.state.epoch or 0.0
        line = {"kind": kind, "step": step, "epoch": epoch, **figures}
        self.lines.append(line)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def _say(self, words: str) -> None:
        self._said = time.perf_counter()
        print(f"rmfast train: {words}", file=sys.stderr, flush=True)

    def draw(self) -> None:
        """Draw the lines so far; a picture that cannot be drawn does not stop the training."""
        if not self._draws:
            return
        picture = self.folder / "training.png"
        lines = {(line["kind"], line["step"]): line for line in self.lines}  # the last of each
        try:
            show.curve([*lines.values()], self.folder.resolve().name).savefig(picture)
        except OSError:
            raise
        except Exception as error:  # of fonts, of names that look like mathematics
            self._draws = False
            picture.unlink(missing_ok=True)
            reason, *_ = str(error).strip().split("\n")
            self._say(f"no training.png: {reason}")


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError:
        print("! no training.png without matplotlib: pip install 'rmfast[eval]'")
        return False
    return True


def _sides(row: dict[str, Any]) -> tuple[int, list[np.ndarray]]:
    """How many answers are chosen, and the token ids of all answers, chosen ones first.

    Of a group the best-ranked ones are chosen.
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
    with saving(path.parent):
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def step_of(checkpoint: str | None) -> int:
    """The step of a checkpoint's folder; of none, 0."""
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint. Those that may be half saved are deleted."""
    found = _checkpoints(folder)
    for step, path in [*found.items()]:
        if not (path / COMPLETE).exists():
            shutil.rmtree(found.pop(step), ignore_errors=True)
    return str(found[max(found)]) if found else None


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints by their steps."""
    paths = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal())
    return {step_of(str(path)): path for path in paths}
