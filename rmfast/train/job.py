"""``rmfast train``: preferences in, a reward model out, safe to kill.

``OUTPUT/checkpoints/run.json`` says what decides the weights: options, model, and digests of the
data. A run that goes on begins from the same checkpoint of the model as the first one did, with the
state of the last complete checkpoint of its own: its weights are the same, to the last bit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import torch

from rmfast import loading, resume
from rmfast.arguments import flag
from rmfast.data.encoding import read_template
from rmfast.data.records import Preferences
from rmfast.errors import UserError
from rmfast.evaluate import show
from rmfast.train import begin, card, rows
from rmfast.train.options import TrainOptions
from rmfast.train.watch import COMPLETE, Watch, last_checkpoint, step_of

try:
    import datasets
    from transformers.integrations import get_available_reporting_integrations

    from rmfast.train import fit
except ImportError as _error:
    raise UserError(f"training needs TRL: pip install 'rmfast[train]' ({_error})") from None


# Options that may differ when a run goes on: its data is told by digest, its model by its files.
_MAY_DIFFER = {"output", "model", "data", "eval_data", "report_to", "resume", "overwrite"}
# what a run writes, beside its checkpoints
_OURS = ("metrics.jsonl", "metrics.jsonl.tmp", "training.png", "config.yaml", "README.md")
_WEIGHTS = ("model*.safetensors*", "adapter_*", "chat_template.jinja", "additional_chat_templates")


@dataclasses.dataclass
class State:
    """What ``--resume`` needs, beside the checkpoints."""

    settings: dict[str, Any]  # what decides the weights, by names that users know
    # dtype and device, where nobody gave them: what is fast is found by timing
    resolved: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # of the libraries
    warnings: list[str] = dataclasses.field(default_factory=list)  # of the model that came out
    done: bool = False

    def save(self, folder: Path) -> None:
        with resume.saving(folder):
            (folder / "checkpoints").mkdir(exist_ok=True)
            resume.write_whole(folder / "checkpoints" / "run.json", dataclasses.asdict(self))


def run(options: TrainOptions) -> int:
    """``rmfast train``; returns the exit code."""
    with warnings.catch_warnings(), resume.told_to_stop():
        warnings.simplefilter("ignore", FutureWarning)  # names that only newer libraries have
        return _run(options)


def _run(options: TrainOptions) -> int:
    loading.silence_transformers()
    datasets.disable_progress_bars()
    _check(options)
    template = read_template(options.chat_template)
    folder, inputs = Path(options.output), ("model", "tokenizer", "data", "eval_data")
    resume.make_folder(folder, {flag(name): getattr(options, name) for name in inputs})
    with resume.locked(folder):
        _check_folder(folder, options)
        return _run_in(folder, options, template)


def _run_in(folder: Path, options: TrainOptions, template: str | None) -> int:
    train, held_out = rows.read(options)
    settings = _settings(options, template, train, held_out)
    before = resume.stored(folder / "checkpoints" / "run.json", State) if options.resume else None
    if before is not None:
        resume.same_run(before.settings, settings)
    state = before or State(settings)
    if state.done:
        print(f"already complete: {folder}")
        return 0
    options = _resolved(dataclasses.replace(options, **state.resolved))
    state.resolved = {name: getattr(options, name) for name in ("device", "dtype")}
    started = _start(options, template)
    found = rows.tokenised(started, train, held_out, options.max_length, options.special_tokens)
    checkpoint = last_checkpoint(folder / "checkpoints") if options.resume else None
    trainer = fit.make_trainer(options, folder, started, found, is_new=checkpoint is None)
    if checkpoint is None:
        with resume.saving(folder):
            fit.rehearse(trainer, folder)
        _clear(folder, state)  # not before it is known that there is something to replace it
    watch = Watch(folder, trainer, found.held_out, step_of(checkpoint))
    state.versions = _versions(None if checkpoint is None else state.versions)
    state.save(folder)
    with resume.saving(folder):
        (folder / "config.yaml").write_text(options.as_yaml(), encoding="utf-8")
    try:
        if _train(trainer, watch, folder, checkpoint):
            _finish(folder, trainer, watch, state, options, started, found)
            return 0
    except KeyboardInterrupt:
        pass
    step = step_of(last_checkpoint(folder / "checkpoints"))
    kept = f", saved up to step {step:,}; the same command with --resume goes on"
    return resume.interrupted("train", kept)


def _finish(
    folder: Path,
    trainer: fit.Trainer,
    watch: Watch,
    state: State,
    options: TrainOptions,
    started: begin.Started,
    found: rows.Rows,
) -> None:
    """Measure the model as it is written, and write it and what belongs to it."""
    model = fit.finish(trainer)
    watch.measure_written(model, trainer.best_step)
    finished = card.Finished(
        options,
        started,
        found,
        loss=trainer.objective.kind,
        steps=trainer.state.global_step,
        best=trainer.best_step,
        is_adapter=fit.keeps_adapter(trainer.model),
        summary=watch.summary,
        versions=state.versions,
        warnings=state.warnings,
    )
    with resume.saving(folder):
        if not fit.save(trainer, model, started, folder):
            state.warnings.append(
                f"no weight changed in {finished.steps:,} steps, this is the model that the run "
                "began with: raise --learning-rate"
            )
        watch.draw()
        card.write(finished, folder)
    if watch.summary is not None:
        print(f"\n{show.table(watch.summary)}\n")
    for warning in state.warnings:
        print(f"! {warning}")
    print(f"written: {folder}")
    state.done = True
    state.save(folder)


def _check(options: TrainOptions) -> None:
    """Raise UserError for what can be found wrong before data is read."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "it runs in one process; for several, give accelerate a script with "
            "rmfast.integrations.trl.RewardTrainer"
        )
    if options.lora_rank is None and options.lora_alpha is not None:
        raise UserError("--lora-alpha goes with --lora-rank")
    if options.eval_data is not None and options.eval_split:
        raise UserError("--eval-data and --eval-split: give one of them")
    for name in ("eval_every", "keep_best"):
        if options.eval_data is None and options.eval_split == 0 and getattr(options, name):
            raise UserError(f"{flag(name)} goes with held-out data, and --eval-split is 0")
    if options.keep_best and options.save_every not in (None, options.eval_every):
        raise UserError("--keep-best saves where it measures: give --eval-every alone")
    if options.report_to is not None:
        there = get_available_reporting_integrations()
        if missing := set(options.report_to.split(",")) - {"none", "all", *there}:
            raise UserError(
                f"--report-to {', '.join(sorted(missing))}: it is not installed, or unknown to "
                f"transformers (there is: {', '.join(there) or 'nothing'})"
            )
    if options.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs PEFT: pip install peft")


def _resolved(options: TrainOptions) -> TrainOptions:
    """The options with a value for each default that depends on others, or on the machine."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lora = options.lora_rank is not None
    return dataclasses.replace(
        options,
        device=device,
        dtype=options.dtype or ("mixed" if loading.bf16_is_fast(device) else "float32"),
        lora_alpha=options.lora_alpha or (2.0 * options.lora_rank if lora else None),
        learning_rate=options.learning_rate or (1e-4 if lora else 1e-5),
    )


def _check_folder(folder: Path, options: TrainOptions) -> None:
    """Raise UserError where something would be lost in the folder."""
    names = sorted(x.name for x in folder.iterdir() if not x.name.startswith("."))
    if not (folder / "checkpoints" / "run.json").exists():
        inside = {x.name for x in folder.glob("checkpoints/*")}
        if names in ([], ["checkpoints"]) and inside <= {"run.json.tmp", "rehearsal"}:
            return  # a run was stopped before it began
        if options.resume:
            raise UserError(f"--resume: {folder} has no run to go on with; name an empty folder")
        raise UserError(
            f"--output {folder} is not empty ({', '.join(names[:3])}), and no run of rmfast train "
            "wrote it: name another folder"
        )
    # a run that was stopped before its first checkpoint is no loss
    is_free = {*names} <= {"checkpoints", *_OURS} and not any(
        folder.glob(f"checkpoints/*/{COMPLETE}")
    )
    if not (is_free or options.resume or options.overwrite):
        raise UserError(
            f"--output {folder} is not empty ({', '.join(names[:3])}): --resume goes on with it, "
            "--overwrite replaces what a run writes"
        )


def _clear(folder: Path, state: State) -> None:
    """Begin a run where an earlier one may have written."""
    with resume.saving(folder):
        for path in folder.glob("checkpoints/checkpoint-*"):
            shutil.rmtree(path)  # before the new state, which could go on from none of these
        state.save(folder)
        for path in (path for name in (*_OURS, *_WEIGHTS) for path in folder.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _settings(
    options: TrainOptions, template: str | None, train: Preferences, held_out: Preferences | None
) -> dict[str, Any]:
    """What decides the weights and the figures. A run with others cannot go on with this one's."""
    values = dataclasses.asdict(options).items()
    settings = {flag(name): value for name, value in values if name not in _MAY_DIFFER}
    for name in ("model", "tokenizer"):
        settings |= resume.model_identity(flag(name), getattr(options, name))
    settings["the text of --chat-template"] = None if template is None else resume.digest(template)
    settings["the preferences of --data"] = _digest(train)
    if options.eval_data is not None:
        settings["the preferences of --eval-data"] = _digest(held_out)
    return json.loads(json.dumps(settings))


def _digest(records: Preferences) -> str:
    rows = ([x for name, x in vars(y).items() if name != "where"] for y in records)
    return resume.digest([resume.digest(row) for row in rows])


def _start(options: TrainOptions, template: str | None) -> begin.Started:
    started = begin.load_to_train(
        options.model,
        dtype="bfloat16" if options.dtype == "bfloat16" else "float32",
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        tokenizer=options.tokenizer,
        seed=options.seed,
        lora=options.lora_rank is not None,
        chat_template=template,
    )
    print(started.start)
    return started


def _versions(before: dict[str, str] | None) -> dict[str, str]:
    """Those of the libraries; warns where they changed since ``before``."""
    now = resume.versions("trl", "accelerate")
    for name, then in (before or {}).items():
        if now.get(name) != then:
            print(f"! {name} was {then}, now it is {now.get(name)}: weights may differ")
    return now


def _train(trainer: fit.Trainer, watch: Watch, folder: Path, checkpoint: str | None) -> bool:
    """Whether the training came to its end, and was not interrupted."""
    try:
        with resume.handling(watch.stop, signal.SIGINT, signal.SIGTERM), resume.saving(folder):
            fit.train(trainer, checkpoint)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else ''} Lower "
            "--batch-pairs (and raise --grad-accum as much), or --max-length, and --overwrite"
        ) from None
    return not watch.stopped or trainer.state.global_step >= trainer.state.max_steps
