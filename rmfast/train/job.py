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
import safetensors
import torch
from transformers import PrinterCallback, TrainerState

from rmfast import data, loading
from rmfast.arguments import flag
from rmfast.data.encoding import Encoder, read_template
from rmfast.data.records import Group, Pair, Preferences
from rmfast.errors import DataError, RowError, UserError
from rmfast.evaluate import show
from rmfast.packed import patching
from rmfast.resume import (
    digest,
    model_identity,
    same_run,
    saving,
    stored,
    versions,
    write_whole,
)
from rmfast.train import begin, card, objective
from rmfast.train.options import TrainOptions
from rmfast.train.watch import COMPLETE, Watch, last_checkpoint

try:
    from rmfast.train.trainer import RewardConfig, RewardTrainer
except ImportError as _error:
    raise UserError(f"rmfast train needs TRL: pip install 'rmfast[train]' ({_error})") from None


_MOST_HELD_OUT = 1000  # pairs, where nobody says how many: an interval of 3 points each way
_CHUNK = 1024  # records tokenised together
_POINTS = 0.01  # of the run, from one line of metrics.jsonl to the next
_PART = 0.1  # of the run, from one evaluation or checkpoint to the next
# Options that may differ when a run goes on: its data is told by digest, its model by its files.
_MAY_DIFFER = {"output", "model", "data", "eval_data", "resume", "overwrite"}
_OURS = ("checkpoints", "metrics.jsonl", "training.png", "config.yaml", "README.md")
_EARLY = ("checkpoints", "metrics.jsonl", "training.png", "metrics.jsonl.tmp", "probe.tmp")


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
    template = _check(options)
    folder = _folder(options)
    train, held_out = _preferences(options)
    state = _begin(folder, _settings(options, template, train, held_out), options.resume)
    if state.done:
        print(f"already complete: {folder}")
        return 0
    options = dataclasses.replace(options, **state.resolved)
    job = _Job(options, folder, state, template, options.resume)
    job.load()
    job.prepare(train, held_out)
    return job.run()


def _check(options: TrainOptions) -> str | None:
    """What can be found wrong before data is read. Returns the chat template, if one is named."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "it runs in one process; for several, give accelerate a script with "
            "rmfast.integrations.trl.RewardTrainer"
        )
    if options.label_smoothing >= 0.5:
        raise UserError("--label-smoothing must be below 0.5: from there on labels mean nothing")
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
    return read_template(options.chat_template)


# --- where it begins


def _folder(options: TrainOptions) -> Path:
    """The output, which is there now, and may be written to."""
    folder, model = Path(options.output), options.model
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    if os.path.isdir(model) and folder.is_dir() and folder.samefile(model):
        raise UserError(f"--output {folder} is the --model: give it another name")
    there = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else []
    before = (folder / "checkpoints" / "run.json").exists()
    # a run that was stopped before its first checkpoint is no loss
    early = set(_EARLY) | ({"config.yaml"} if before else set())
    nothing = set(there) <= early and not any(folder.glob(f"checkpoints/*/{COMPLETE}"))
    if options.resume and not (before or nothing):
        raise UserError(
            f"--resume: {folder} has no run to go on with; name an empty folder, or --overwrite"
        )
    if not (nothing or options.resume or options.overwrite):
        go_on = "--resume goes on with it, " if before else ""
        raise UserError(
            f"--output {folder} is not empty ({', '.join(there[:3])}): {go_on}--overwrite replaces"
            " what a run writes"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "probe.tmp"
        probe.touch()
        probe.unlink()
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
    out = {flag(name): value for name, value in values if name not in _MAY_DIFFER}
    out |= model_identity(options.model)
    out["the text of --chat-template"] = None if template is None else digest(template)
    out["the preferences of --data"] = _digest(train)
    if options.eval_data is not None:
        out["the preferences of --eval-data"] = _digest(held_out)
    return json.loads(json.dumps(out))


def _digest(records: Preferences) -> str:
    return digest([digest([x for name, x in vars(y).items() if name != "where"]) for y in records])


def _begin(folder: Path, settings: dict[str, Any], resume: bool) -> State:
    """The state to start from: a new one, or that of the run that is to go on."""
    before = stored(folder / "checkpoints" / "run.json", State) if resume else None
    if before is None:
        return State(settings)
    same_run(before.settings, settings)
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
        return _split(train, options.eval_split, options.seed)
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


def _split(
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
    out = {id(record) for question in held for record in question}
    sides = ([x for x in found if id(x) not in out], [x for x in found if id(x) in out])
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


# --- training


class _Trainer(RewardTrainer):
    """Evaluates as ``rmfast eval`` does."""

    watch: Watch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        return self.watch.evaluate()

    def _save_checkpoint(self, *args: Any) -> None:
        # transformers asks for the last step of an epoch twice: what is complete is not touched
        if not (self.watch.checkpoint() / COMPLETE).exists():
            super()._save_checkpoint(*args)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """There is one when training is over."""

    def get_train_dataloader(self) -> Any:
        try:
            return super().get_train_dataloader()
        except ValueError as error:  # a pair that is larger than the budget
            raise UserError(
                f"--max-tokens-per-batch {self.args.max_tokens_per_batch}: {error}"
            ) from None


class _Job:
    """One run, from options to the folder."""

    def __init__(
        self,
        options: TrainOptions,
        folder: Path,
        state: State,
        template: str | None,
        resume: bool,
    ) -> None:
        self.options, self.folder, self.state, self.template = options, folder, state, template
        self.resume = resume
        self.checkpoint = last_checkpoint(folder / "checkpoints") if resume else None
        self._resolve()

    def _resolve(self) -> None:
        options = self.options
        if options.device is None:
            options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.dtype is None:
            options.dtype = "mixed" if loading.bf16_is_fast(options.device) else "float32"
        self.state.resolved = {name: getattr(options, name) for name in ("device", "dtype")}
        if options.lora_rank is not None and options.lora_alpha is None:
            options.lora_alpha = 2.0 * options.lora_rank
        if options.learning_rate is None:
            options.learning_rate = 1e-5 if options.lora_rank is None else 1e-4

    def load(self) -> None:
        options = self.options
        _refuse_lost_head(options.model)
        started = begin.begin(
            options.model,
            dtype="bfloat16" if options.dtype == "bfloat16" else "float32",
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            tokenizer=options.tokenizer,
            seed=options.seed,
        )
        self.model, self.tokenizer, self.start = started
        self.use_cache = self.model.config.use_cache
        if self.template is not None:
            self.tokenizer.chat_template = self.template
        print(self.start)

    def prepare(self, train: Preferences, held_out: Preferences | None) -> None:
        """Tokens, trainer and scorer."""
        import datasets

        self.kind, self.conversational = train.kind, train.conversational
        if self.conversational and not self.tokenizer.chat_template:
            raise UserError(
                f"{self.options.data} has messages, and the tokenizer has no chat template to "
                "make text of them: --chat-template FILE names one"
            )
        text = self.model.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or self.options.max_length
        encoder = Encoder(
            self.tokenizer,
            max_length=min(limit, self.options.max_length),
            vocabulary=self.model.get_input_embeddings().num_embeddings,
        )
        rows = {}
        for name, records in (("data", train), ("eval-data", held_out)):
            if records is None:
                continue
            rows[name], dropped = tokens(records, encoder, self.tokenizer.eos_token)
            what = "" if name == "data" else "held out: "
            for reason, count in dropped.items():
                print(f"{what}dropped: {count:,} × {reason}")
            if not rows[name]:
                raise DataError(
                    f"{records.source}: no {records.kind} left to "
                    f"{'train on' if name == 'data' else 'hold out'}"
                )
        self.example = _example(train, self.tokenizer.eos_token)
        self.begins_with_bos = encoder.adds_bos
        sets = [datasets.Dataset.from_list(rows[name]) for name in rows]
        self.counts = [len(one) for one in sets]
        self.trainer = self._trainer(sets)
        if not self.resume:
            _clear(self.folder)  # not before it is known that there is something to replace it
        self.watch = Watch(self, rows.get("eval-data"))
        self.trainer.watch = self.watch
        self.trainer.add_callback(self.watch)

    def _trainer(self, sets: list[Any]) -> _Trainer:
        options, held_out = self.options, len(sets) > 1
        schedule = {"cosine": "cosine_with_min_lr"}.get(options.schedule, options.schedule)
        more = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}} if "min" in schedule else {}
        args = RewardConfig(
            output_dir=str(self.folder / "checkpoints"),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            per_device_train_batch_size=options.batch_pairs,
            gradient_accumulation_steps=options.grad_accum,
            max_tokens_per_batch=options.max_tokens_per_batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=options.warm_up,
            weight_decay=options.weight_decay,
            loss_type=options.loss,
            focal_gamma=options.focal_gamma,
            label_smoothing=options.label_smoothing,
            center_rewards_coefficient=options.center or None,
            gradient_checkpointing=options.gradient_checkpointing,
            max_length=None,  # tokens are cut to size already
            bf16=options.dtype != "float32",
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device != "cpu",
            seed=options.seed,
            logging_steps=_POINTS,
            eval_strategy="steps" if held_out else "no",
            eval_on_start=held_out and self.checkpoint is None,
            eval_steps=(options.eval_every or _PART) if held_out else None,
            save_strategy="steps",
            save_steps=options.save_every or _PART,
            save_total_limit=2,
            disable_tqdm=True,
            report_to="none",
            **more,
        )
        args._n_gpu = min(1, args.n_gpu)  # one process trains on one GPU
        try:
            out = _Trainer(
                self.model,
                args,
                train_dataset=sets[0],
                eval_dataset=sets[1] if held_out else None,
                processing_class=self.tokenizer,
                peft_config=self._adapter(),
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        out.remove_callback(PrinterCallback)
        if options.lora_rank is not None:  # small updates would be rounded away
            for parameter in out.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        return out

    def _adapter(self) -> Any:
        """LoRA on all linear layers; what is outside of the backbone is trained and saved whole."""
        if self.options.lora_rank is None:
            return None
        import peft

        heads = [
            name
            for name, child in self.model.named_children()
            if name != self.model.base_model_prefix and next(child.parameters(), None) is not None
        ]
        return peft.LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=self.options.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            modules_to_save=heads,
            task_type="SEQ_CLS",
        )

    def run(self) -> int:
        state, folder = self.state, self.folder
        now = versions("trl", "accelerate")
        for name, then in state.versions.items():
            if self.checkpoint is not None and now.get(name) != then:
                print(f"! {name} was {then}, now it is {now.get(name)}: weights may differ")
        state.versions = now
        with saving(folder):
            (folder / "checkpoints").mkdir(exist_ok=True)
            write_whole(folder / "checkpoints" / "run.json", dataclasses.asdict(state))
            (folder / "config.yaml").write_text(self.options.as_yaml(), encoding="utf-8")
        try:
            with self.watch, saving(folder):
                self._train()
        except KeyboardInterrupt:
            self._tell_how_to_go_on()
            return 130
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UserError(
                f"out of memory: {str(error).splitlines()[0] if str(error) else ''} Lower "
                "--batch-pairs (and raise --grad-accum as much), or --max-length, and --overwrite"
            ) from None
        if self.watch.stopped and self.trainer.state.global_step < self.trainer.state.max_steps:
            self._tell_how_to_go_on()
            return 130
        with saving(folder):
            self.finish()
            state.done = True
            write_whole(folder / "checkpoints" / "run.json", dataclasses.asdict(state))
        return 0

    def _train(self) -> None:
        if self.checkpoint is not None:
            state = TrainerState.load_from_json(f"{self.checkpoint}/trainer_state.json")
            if state.global_step >= state.max_steps:  # transformers would take one more
                self.trainer._load_from_checkpoint(self.checkpoint)
                self.trainer.state = state
                return
        self.trainer.train(resume_from_checkpoint=self.checkpoint)

    def _tell_how_to_go_on(self) -> None:
        found = last_checkpoint(self.folder / "checkpoints")
        step = 0 if found is None else int(found.rpartition("-")[2])
        print(
            f"\nrmfast train: interrupted, saved up to step {step:,}; the same command with "
            "--resume goes on",
            file=sys.stderr,
        )

    def finish(self) -> None:
        """Model, tokenizer and card into the folder."""
        self.model.config.use_cache = self.use_cache  # which transformers turns off
        model = patching.unpatch(self.trainer.accelerator.unwrap_model(self.trainer.model, False))
        if self.options.lora_rank is not None:
            model = model.merge_and_unload()
        model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        self.watch.draw()
        (self.folder / "README.md").write_text(card.write(self), encoding="utf-8")
        if self.watch.summary is not None:
            print(f"\n{show.table(self.watch.summary)}\n")
        print(f"written: {self.folder}")


def _refuse_lost_head(name: str) -> None:
    """An adapter of a reward model without the head that it was trained with."""
    about, weights = (Path(name) / f"adapter_{x}" for x in ("config.json", "model.safetensors"))
    if not (about.is_file() and weights.is_file()):
        return
    settings = json.loads(about.read_text(encoding="utf-8"))
    with safetensors.safe_open(weights, "pt") as file:
        parts = {part for key in file.keys() for part in key.split(".")}  # noqa: SIM118 (no dict)
    head = settings.get("modules_to_save") or ["score", "classifier"]
    if settings.get("task_type") == "SEQ_CLS" and not parts.intersection(head):
        raise UserError(
            f"{name} is the adapter of a reward model, and the head that it was trained with is not"
            f" in it: it was not saved; begin with {settings['base_model_name_or_path']}"
        )


def _example(records: Preferences, eos: str | None) -> Any:
    return _ended(records.records[0].whole()[0], eos)
