"""``rmfast train``: preferences in, a reward model out, safe to kill.

``OUTPUT/checkpoints/run.json`` says what decides the weights: options, model, and digests of the
data. A run that goes on begins from the same checkpoint of the model as the first one did, with the
state of the last complete checkpoint of its own: its weights are the same, to the last bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmfast import data, loading
from rmfast.arguments import flag
from rmfast.data.encoding import Encoder, read_template
from rmfast.data.records import Group, Pair, Preferences
from rmfast.errors import DataError, RowError, UserError
from rmfast.evaluate import show
from rmfast.resume import digest, model_identity, saving, short, versions, write_whole
from rmfast.train import begin, card, objective
from rmfast.train.options import TrainOptions
from rmfast.train.watch import COMPLETE, Watch, last_checkpoint, step_of

try:
    from rmfast.train import fit
except ImportError as _error:
    raise UserError(f"training needs TRL: pip install 'rmfast[train]' ({_error})") from None


_MOST_HELD_OUT = 1000  # pairs, where nobody says how many: an interval of 3 points each way
_CHUNK = 1024  # records tokenised together
# Options that may differ when a run goes on: its data is told by digest, its model by its files.
_MAY_DIFFER = {"output", "model", "data", "eval_data", "resume", "overwrite"}
_NO_WORDS = ("the preferences of", "a file of", "the text of")
_OURS = ("checkpoints", "metrics.jsonl", "training.png", "config.yaml", "README.md")
_EARLY = {"checkpoints", "metrics.jsonl", "training.png", "metrics.jsonl.tmp"}


@dataclasses.dataclass
class State:
    """What ``--resume`` needs, beside the checkpoints.

    Attributes:
        settings: what decides the weights, by names that users know.
        resolved: dtype and device, where nobody gave them: what is fast is found by timing.
        versions: of the libraries.
        done: nothing is left to do.
    """

    settings: dict[str, Any]
    resolved: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    done: bool = False

    def save(self, folder: Path) -> None:
        with saving(folder):
            (folder / "checkpoints").mkdir(exist_ok=True)
            write_whole(folder / "checkpoints" / "run.json", dataclasses.asdict(self))


def run(options: TrainOptions) -> int:
    """``rmfast train``; returns the exit code.

    Raises:
        UserError, DataError: it cannot run; the message is for the user.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that only newer libraries have
        return _run(options)


def _run(options: TrainOptions) -> int:
    import datasets

    loading.silence_transformers()
    datasets.disable_progress_bars()
    _check(options)
    template = read_template(options.chat_template)
    folder = _folder(options)
    train, held_out = _preferences(options)
    state = _begin(folder, _settings(options, template, train, held_out), options.resume)
    if state.done:
        print(f"already complete: {folder}")
        return 0
    options = _resolved(dataclasses.replace(options, **state.resolved))
    state.resolved = {name: getattr(options, name) for name in ("device", "dtype")}
    started = _start(options, template)
    rows = tokenised(started, train, held_out, options.max_length)
    checkpoint = last_checkpoint(folder / "checkpoints") if options.resume else None
    trainer = fit.make_trainer(options, folder, started, rows, is_new=checkpoint is None)
    if not options.resume:
        _clear(folder)  # not before it is known that there is something to replace it
    watch = Watch(folder, trainer, rows.held_out, step_of(checkpoint))
    state.versions = _versions(None if checkpoint is None else state.versions)
    state.save(folder)
    with saving(folder):
        (folder / "config.yaml").write_text(options.as_yaml(), encoding="utf-8")
    if not _train(trainer, watch, folder, checkpoint):
        return 130
    with saving(folder):
        fit.save(trainer, started, folder)
        watch.draw()
        loss, steps = trainer.objective.kind, trainer.state.global_step
        finished = card.Finished(options, started, rows, loss, steps, watch.summary, state.versions)
        card.write(finished, folder)
    if watch.summary is not None:
        print(f"\n{show.table(watch.summary)}\n")
    print(f"written: {folder}")
    state.done = True
    state.save(folder)
    return 0


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
    if options.eval_data is None and options.eval_split == 0 and options.eval_every:
        raise UserError("--eval-every goes with held-out data, and --eval-split is 0")
    if options.lora_rank is not None:
        try:
            import peft  # noqa: F401 (found now, not after the data)
        except ImportError:
            raise UserError("--lora-rank needs PEFT: pip install peft") from None


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


# --- where it begins


def _folder(options: TrainOptions) -> Path:
    """Make the output's folder; raise UserError where something would be lost in it."""
    folder, model = Path(options.output), options.model
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    if os.path.isdir(model) and folder.is_dir() and folder.samefile(model):
        raise UserError(f"--output {folder} is the --model: give it another name")
    names = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else []
    has_run = (folder / "checkpoints" / "run.json").exists()
    # a run that was stopped before its first checkpoint is no loss
    early = _EARLY | ({"config.yaml"} if has_run else set())
    is_free = set(names) <= early and not any(folder.glob(f"checkpoints/*/{COMPLETE}"))
    if options.resume and not (has_run or is_free):
        raise UserError(
            f"--resume: {folder} has no run to go on with; name an empty folder, or --overwrite"
        )
    if not (is_free or options.resume or options.overwrite):
        resume = "--resume goes on with it, " if has_run else ""
        raise UserError(
            f"--output {folder} is not empty ({', '.join(names[:3])}): {resume}--overwrite replaces"
            " what a run writes"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from None
    return folder


def _clear(folder: Path) -> None:
    """What a run before this one wrote."""
    with saving(folder):
        for path in [*(folder / name for name in _OURS), *folder.glob("model*.safetensors*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _settings(
    options: TrainOptions, template: str | None, train: Preferences, held_out: Preferences | None
) -> dict[str, Any]:
    """What decides the weights and the figures. A run with others cannot go on with this one's."""
    values = dataclasses.asdict(options).items()
    settings = {flag(name): value for name, value in values if name not in _MAY_DIFFER}
    settings |= model_identity(options.model)
    settings["the text of --chat-template"] = None if template is None else digest(template)
    settings["the preferences of --data"] = _digest(train)
    if options.eval_data is not None:
        settings["the preferences of --eval-data"] = _digest(held_out)
    return json.loads(json.dumps(settings))


def _digest(records: Preferences) -> str:
    return digest([digest([x for name, x in vars(y).items() if name != "where"]) for y in records])


def _begin(folder: Path, settings: dict[str, Any], resume: bool) -> State:
    """The state to start from: a new one, or that of the run that is to go on."""
    file = folder / "checkpoints" / "run.json"
    if not resume or not file.exists():
        return State(settings)
    try:
        before = State(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): --overwrite starts again") from None
    for name in {**settings, **before.settings}:
        then, now = before.settings.get(name), settings.get(name)
        if then != now:
            known = None not in (then, now) and name.startswith(_NO_WORDS)
            how = "changed" if known else f"was {short(then)}, now it is {short(now)}"
            raise UserError(
                f"--resume goes on with the same run only, and {name} {how}; --overwrite starts "
                "again"
            )
    return before


# --- data


def _preferences(options: TrainOptions) -> tuple[Preferences, Preferences | None]:
    """What to train on, and what is held out."""
    how = {
        "name": options.name,
        "limit": options.limit,
        "chat": options.chat,
        "ratings": options.ratings,
        "ranks": options.ranks,
        "margins": options.margin == "ratings",
    }
    train = data.preferences(options.data, split=options.split, **how)
    print(train)
    if options.margin == "none" and train.kind == "pairs":
        bare = [dataclasses.replace(pair, margin=None) for pair in train]
        train = dataclasses.replace(train, records=bare)
    if options.eval_data is None:
        return hold_out(train, options.eval_split, options.seed)
    how["limit"] = None
    held_out = data.preferences(options.eval_data, split=options.eval_data_split, **how)
    print(f"held out: {held_out}")
    for mine, other in ((train.kind, held_out.kind), (_form(train), _form(held_out))):
        if mine != other:
            raise DataError(
                f"{options.eval_data}: it has {other}, and {options.data} has {mine}: both "
                "must be of one kind"
            )
    both = len({x.question() for x in train} & {x.question() for x in held_out})
    if both:
        print(f"! {both:,} questions of --eval-data are in --data, too: figures will flatter")
    return train, held_out


def _form(records: Preferences) -> str:
    return "messages" if records.conversational else "text"


def hold_out(
    found: Preferences, share: float | None, seed: int
) -> tuple[Preferences, Preferences | None]:
    """Hold out a share, so that no question is on both sides."""
    if share == 0:
        return found, None
    wanted = round(len(found) * (0.05 if share is None else share)) or 1
    wanted = min(wanted, _MOST_HELD_OUT) if share is None else wanted
    questions = data.by_question(found)
    if len(questions) < 2:
        raise DataError(
            f"{found.source}: all {len(found):,} {found.kind} have one question, or begin alike: "
            "nothing can be held out; --eval-data names another file, --eval-split 0 goes without"
        )
    held: list[list[Any]] = []
    for question in random.Random(seed).sample(questions, len(questions)):
        if sum(map(len, held)) + len(question) <= wanted:
            held.append(question)
    held = held or [min(questions, key=len)]
    chosen = {id(record) for question in held for record in question}
    sides = ([x for x in found if id(x) not in chosen], [x for x in found if id(x) in chosen])
    print(f"held out: {len(sides[1]):,} {found.kind} of {len(held):,} questions")
    return tuple(dataclasses.replace(found, records=side) for side in sides)


def tokens(
    records: Preferences, encoder: Encoder, eos: str | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows as trainers take them, and why others were dropped.

    Texts end with ``eos``, as TRL has it; messages as their template ends them.

    Raises:
        DataError: a record cannot be tokenised; the message begins with its place.
    """
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for at in range(0, len(records), _CHUNK):
        chunk = records.records[at : at + _CHUNK]
        whole = [[_ended(side, eos) for side in record.whole()] for record in chunk]
        ids = iter(encoder([side for sides in whole for side in sides]))
        for record, sides in zip(chunk, whole, strict=True):
            row = _row(record, [next(ids) for _ in sides])
            if isinstance(row, str):
                dropped[row] += 1
            else:
                rows.append(row)
    return rows, dropped


def _ended(side: Any, eos: str | None) -> Any:
    if not isinstance(side, str) or eos is None or side.endswith(eos):
        return side
    return side + eos


def _row(record: Pair | Group, ids: list[np.ndarray | RowError]) -> dict[str, Any] | str:
    """A row, or why there is none."""
    for one in ids:
        if isinstance(one, RowError):
            if one.kind == "overlong":
                return "longer than --max-length"
            raise DataError(f"{record.where}: {one.reason}")
    if all(np.array_equal(ids[0], one) for one in ids[1:]):
        return "identical tokens"
    if isinstance(record, Group):
        if len(ids) > objective.LARGEST_GROUP:
            raise DataError(
                f"{record.where}: {len(ids)} answers, more than {objective.LARGEST_GROUP}: "
                "--ratings pairs or --ranks pairs trains on the best and the worst"
            )
        return {"responses_ids": ids, "ranks": [float(rank) for rank in record.ranks]}
    row = {"chosen_ids": ids[0], "rejected_ids": ids[1]}
    return row if record.margin is None else {**row, "margin": float(record.margin)}


def tokenised(
    started: begin.Started, train: Preferences, held_out: Preferences | None, max_length: int
) -> fit.Rows:
    """Preferences as token ids; prints what was dropped.

    Raises:
        UserError, DataError: they cannot be tokenised, or none is short enough.
    """
    tokenizer, model = started.tokenizer, started.model
    if train.conversational and not tokenizer.chat_template:
        raise UserError(
            f"{train.source} has messages, and the tokenizer has no chat template to make text of "
            "them: --chat-template FILE names one"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoder = Encoder(
        tokenizer,
        max_length=min(positions or max_length, max_length),
        vocabulary=model.get_input_embeddings().num_embeddings,
    )
    found = []
    for records, prefix, purpose in ((train, "", "train on"), (held_out, "held out: ", "hold out")):
        if records is None:
            found.append(None)
            continue
        rows, dropped = tokens(records, encoder, tokenizer.eos_token)
        for reason, count in dropped.items():
            print(f"{prefix}dropped: {count:,} × {reason}")
        if not rows:
            raise DataError(f"{records.source}: no {records.kind} left to {purpose}")
        found.append(rows)
    example = _ended(train.records[0].whole()[0], tokenizer.eos_token)
    return fit.Rows(*found, train, encoder.adds_bos, example)


# --- training


def _start(options: TrainOptions, template: str | None) -> begin.Started:
    started = begin.load_to_train(
        options.model,
        dtype="bfloat16" if options.dtype == "bfloat16" else "float32",
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        tokenizer=options.tokenizer,
        seed=options.seed,
    )
    if template is not None:
        started.tokenizer.chat_template = template
    print(started.start)
    return started


def _versions(before: dict[str, str] | None) -> dict[str, str]:
    """Those of the libraries; warns where they changed since ``before``."""
    now = versions("trl", "accelerate")
    for name, then in (before or {}).items():
        if now.get(name) != then:
            print(f"! {name} was {then}, now it is {now.get(name)}: weights may differ")
    return now


def _train(trainer: fit.Trainer, watch: Watch, folder: Path, checkpoint: str | None) -> bool:
    """Whether the training came to its end, and was not interrupted."""
    try:
        with watch, saving(folder):
            fit.train(trainer, checkpoint)
        done = not watch.stopped or trainer.state.global_step >= trainer.state.max_steps
    except KeyboardInterrupt:
        done = False
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else ''} Lower "
            "--batch-pairs (and raise --grad-accum as much), or --max-length, and --overwrite"
        ) from None
    if not done:
        step = step_of(last_checkpoint(folder / "checkpoints"))
        print(
            f"\nrmfast train: interrupted, saved up to step {step:,}; the same command with "
            "--resume goes on",
            file=sys.stderr,
        )
    return done
