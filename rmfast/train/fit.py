"""The trainer of ``rmfast train``: made of the options, run from a checkpoint, and saved."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerState

from rmfast.errors import UserError
from rmfast.packed import patching
from rmfast.train.begin import Started
from rmfast.train.options import TrainOptions
from rmfast.train.rows import Rows
from rmfast.train.trainer import RewardConfig, RewardTrainer
from rmfast.train.watch import COMPLETE, Watch

_SCHEDULES = {  # transformers' names; its "constant" has no warm-up
    "cosine": "cosine_with_min_lr",
    "linear": "linear",
    "constant": "constant_with_warmup",
}
_POINTS = 0.01  # of the run, from one line of metrics.jsonl to the next
_PART = 0.1  # of the run, from one evaluation or checkpoint to the next


class Trainer(RewardTrainer):
    """Evaluates as ``rmfast eval`` does."""

    watch: Watch
    use_cache: bool | None  # of the model, before transformers turned it off
    begun: dict[str, int]  # what tells its weights from later ones
    dtypes: dict[str, torch.dtype]  # of its weights

    @property
    def best_step(self) -> int:
        """Of the weights that are written."""
        best = self.args.metric_for_best_model and self.state.best_global_step
        return best or self.state.global_step

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


def make_trainer(
    options: TrainOptions, folder: Path, started: Started, rows: Rows, is_new: bool
) -> Trainer:
    """The trainer of a run that begins, or goes on from a checkpoint."""
    use_cache = getattr(started.model.config, "use_cache", None)
    begun = _weights(started.model)
    dtypes = {name: parameter.dtype for name, parameter in started.model.named_parameters()}
    if options.gradient_checkpointing and not started.model.supports_gradient_checkpointing:
        print(f"! no gradient checkpointing: {type(started.model).__name__} has none")
        options = dataclasses.replace(options, gradient_checkpointing=False)
    args = _config(options, folder, rows.held_out is not None, is_new)
    adapter = None if options.lora_rank is None else _adapter(options, started.model)
    trainer = _of_rows(started, rows, args, adapter)
    trainer.use_cache = use_cache
    if options.lora_rank is not None:  # small updates would be rounded away
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.begun, trainer.dtypes = begun, dtypes
    return trainer


def _of_rows(started: Started, rows: Rows, args: RewardConfig, adapter: Any) -> Trainer:
    """A trainer of tokenised rows, quiet, on one device; UserError: it does not take the model."""
    args._n_gpu = min(1, args.n_gpu)
    sets = (None if x is None else Dataset.from_list(x) for x in (rows.train, rows.held_out))
    try:
        trainer = Trainer(started.model, args, None, *sets, started.tokenizer, peft_config=adapter)
    except ValueError as error:
        raise UserError(str(error)) from None
    rows.form.record(started.model.config)
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def _weights(model: torch.nn.Module) -> dict[str, int]:
    """For each parameter the sum of its bits, read as fp32."""
    return {
        name: int(parameter.float().view(torch.int32).sum(dtype=torch.int64))
        for name, parameter in model.named_parameters()
    }


def _config(options: TrainOptions, folder: Path, measures: bool, is_new: bool) -> RewardConfig:
    evaluates = options.eval_every or _PART
    saves = evaluates if options.keep_best else options.save_every or _PART
    return RewardConfig(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_pairs,
        gradient_accumulation_steps=options.grad_accum,
        max_tokens_per_batch=options.max_tokens_per_batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if options.schedule == "cosine" else None,
        warmup_steps=options.warm_up,
        weight_decay=options.weight_decay,
        loss_type=options.loss,
        focal_gamma=options.focal_gamma,
        label_smoothing=options.label_smoothing,
        center_rewards_coefficient=options.center or None,
        gradient_checkpointing=options.gradient_checkpointing,
        max_length=None,  # longer pairs were dropped already
        bf16=options.dtype != "float32",
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device != "cpu",
        seed=options.seed,
        logging_steps=_POINTS,
        eval_strategy="steps" if measures else "no",
        eval_on_start=measures and is_new,
        eval_steps=evaluates if measures else None,
        save_strategy="steps",
        save_steps=saves,
        metric_for_best_model="eval_accuracy" if options.keep_best else None,
        greater_is_better=True if options.keep_best else None,
        disable_tqdm=True,
        report_to=options.report_to.split(",") if options.report_to else "none",
        run_name=folder.resolve().name,
    )


def _adapter(options: TrainOptions, model: Any) -> Any:
    """LoRA on all linear layers; what is outside of the backbone is trained and saved whole."""
    import peft

    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
    return peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=heads,
        task_type="SEQ_CLS",
    )


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train from a checkpoint to the end; from None, from the start."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:  # transformers would take one more
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def rehearse(trainer: Trainer, folder: Path) -> None:
    """Save and merge once before the first step, so that nothing fails after the work."""
    at = folder / "checkpoints" / "rehearsal"
    try:
        if not keeps_adapter(trainer.model) and hasattr(trainer.model, "merge_adapter"):
            trainer.model.merge_adapter()  # new adapters are 0: no weight changes
            trainer.model.unmerge_adapter()
        trainer.save_model(str(at))
    except OSError:
        raise
    except Exception as error:
        reason, *_ = str(error).strip().split("\n")
        raise UserError(
            f"nothing is trained, for this model could not be saved at the end: {reason}"
        ) from error
    finally:
        shutil.rmtree(at, ignore_errors=True)


def keeps_adapter(model: torch.nn.Module) -> bool:
    """Whether adapters stay beside the model: merged, its weights would be quantised anew."""
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def finish(trainer: Trainer) -> Any:
    """The model as it is to be written: the best or the last one, with its adapter merged.

    Adapters of quantised models stay beside them.
    """
    if trainer.args.metric_for_best_model and trainer.best_step != trainer.state.global_step:
        trainer._load_from_checkpoint(f"{trainer.args.output_dir}/checkpoint-{trainer.best_step}")
    model = patching.unpatch(trainer.accelerator.unwrap_model(trainer.model, False))
    if hasattr(model, "merge_and_unload") and not keeps_adapter(model):
        model = model.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(trainer.dtypes.get(name))
    return model


def save(trainer: Trainer, model: Any, started: Started, folder: Path) -> bool:
    """Write the model and its tokenizer; whether any weight changed."""
    patching.unpatch(model)
    if trainer.use_cache is not None:
        started.model.config.use_cache = trainer.use_cache
    started.model.config.save_pretrained(folder)  # an adapter's own has no form of conversations
    model.save_pretrained(folder)
    started.tokenizer.save_pretrained(folder)
    return _weights(model) != trainer.begun
