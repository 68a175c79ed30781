"""TRL's reward trainer on packed batches: ``pip install 'rmfast[train]'``.

One import changes: ``from rmfast.integrations.trl import RewardTrainer``. Options, data and logs
are TRL's; :class:`RewardConfig` adds what rmfast can do besides.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import trl
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from trl.data_utils import get_dataset_column_names

from rmfast.data.form import Form
from rmfast.errors import require_transformers
from rmfast.packed import patching, survey
from rmfast.packed import step as packed_step
from rmfast.train import sifting
from rmfast.train.batches import Collator, first_of
from rmfast.train.config import RewardConfig, option_of, refuse
from rmfast.train.metrics import BatchMetrics
from rmfast.train.objective import KINDS, Objective
from rmfast.train.sampler import TokenBudgetSampler
from rmfast.trie import shared_length

# older ones divide accumulated gradients once more, or have no train_sampling_strategy
require_transformers("5.5.4", "the trainer of rmfast")

_log = logging.getLogger(__name__)


class RewardTrainer(trl.RewardTrainer):
    """TRL's ``RewardTrainer``, with the chosen and rejected of a pair packed into one trie.

    The model is patched (:func:`rmfast.patch`) if it is not yet. The loss is the mean over all
    pairs of an optimiser step, on all processes and in all accumulated batches; metrics are fetched
    from the device when they are logged, and where none are, every 1024 batches. With a
    ``data_collator`` of one's own, or a model that cannot be packed, batches are padded and it
    trains as TRL does; :attr:`report` says so.

    Data sets are what TRL takes, or rows with ``responses`` and ``ranks`` (with or without a
    ``prompt``): K responses, lower ranks are better, equal ones tie. Rows that say nothing, or are
    longer than ``max_length``, are dropped and counted in :attr:`dropped` (of streamed data not
    counted).

    Args:
        model: as for TRL's; so are all others.
        args: :class:`RewardConfig`, or TRL's.

    Raises:
        ValueError: an option that cannot be honoured, or a row that cannot be used; the message
            names it.
    """

    def __init__(
        self,
        model: Any,
        args: trl.RewardConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = RewardConfig(f"{_name_of(model)}-Reward")
        refuse(args, train_dataset)
        if data_collator is not None and option_of(args, "max_tokens_per_batch") is not None:
            raise ValueError("max_tokens_per_batch packs batches itself: give no data_collator")
        if args.dataloader_pin_memory and not args.use_cpu:
            # else each batch's copy to the device would wait for it
            args.accelerator_config.non_blocking = True
        self.dropped: dict[str, Counter[str]] = {}
        self._data: dict[str, str] = {}  # a key of KINDS for each data set
        self._filters = False
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        Form.forget(self.model.config)  # that of an earlier training
        budget = option_of(self.args, "max_tokens_per_batch")
        patch = patching.repatch(self.model, max_training_tokens=budget)
        self.report = patch.report()
        self._packs = self._can_pack(patch)
        self._check_head(patch)
        self.objective = self._objective()
        self.batch_metrics = {mode: BatchMetrics(self.accelerator) for mode in ("train", "eval")}
        # the loss is divided by the pairs of the whole step already
        self.loss_is_scaled_for_ga = data_collator is None
        if data_collator is None:
            self.data_collator = self._collator(patch)
            self.model_accepts_loss_kwargs = True  # how older versions of transformers are told

    def _objective(self) -> Objective:
        kinds = set(self._data.values())
        if len(kinds) > 1:
            found = ", ".join(f"{name}: {kind}" for name, kind in self._data.items())
            raise ValueError(f"all data sets must be pairs, or all ranked responses ({found})")
        data = kinds.pop()
        loss = option_of(self.args, "loss_type") or KINDS[data][0]
        if loss not in KINDS[data]:
            fitting = " and ".join(KINDS[data])
            raise ValueError(f"loss_type={loss!r} does not go with {data}: {fitting} do")
        return Objective(
            kind=loss,
            label_smoothing=option_of(self.args, "label_smoothing"),
            center=self.args.center_rewards_coefficient or 0.0,
            gamma=option_of(self.args, "focal_gamma"),
        )

    def _collator(self, patch: patching.Patch) -> Collator:
        share = option_of(self.args, "share_prefixes") and patch.options.share_prefixes
        share = share and not survey.draws_noise(self.model, active=False)
        cuts = patch.level == "trie" and patch.options.pooling == "hf"  # else a head has its rule
        return Collator(self._pad if cuts else None, share)

    @property
    def _pad(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "pad_token_id", None)

    def _can_pack(self, patch: patching.Patch) -> bool:
        configs = getattr(self.model, "peft_config", {})
        prompts = any(getattr(x, "is_prompt_learning", False) for x in configs.values())
        scores = patch.level in ("trie", "head") and patch.classifier is not None
        return scores and not prompts

    def _check_head(self, patch: patching.Patch) -> None:
        """An adapter that leaves the head as it was drawn learns next to nothing."""
        head = getattr(patch.classifier, "score", None)
        adapted = hasattr(self.model, "peft_config") and head is not None
        if adapted and not any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                "the reward head is frozen: give the adapter modules_to_save=['score'], or "
                "task_type='SEQ_CLS', so that it is trained and saved"
            )

    # --- data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: trl.RewardConfig, dataset_name: str
    ) -> Any:
        """Token ids of a data set, without the rows that say nothing or are too long."""
        if dataset_name == "train" and self.dropped:  # TRL prepares the one to train on first
            dataset_name = "eval train"
        if hasattr(dataset, "with_format"):  # Python's values, where it gives tensors
            dataset = dataset.with_format(None)
        columns = get_dataset_column_names(dataset)
        ranked = self._is_ranked(columns, dataset_name)
        dropped = self.dropped[dataset_name] = Counter()
        why_not = sifting.why_not_group if ranked else sifting.why_not_pair
        why_not = functools.partial(why_not, processing_class=processing_class)
        dataset = sifting.sift(dataset, why_not, dataset_name, args, dropped)
        if not {"responses_ids", "chosen_ids"}.intersection(columns):
            dataset = dataset.map(
                sifting.tokenize_row,
                fn_kwargs={"processing_class": processing_class},
                **sifting.map_options(dataset, args, f"Tokenizing {dataset_name} dataset"),
            )
        why_not = functools.partial(sifting.why_not_tokens, max_length=args.max_length)
        dataset = sifting.sift(dataset, why_not, dataset_name, args, dropped)
        if dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            _log.warning("%s data set: %d rows dropped: %s", dataset_name, dropped.total(), reasons)
        return dataset

    def _is_ranked(self, columns: list[str], dataset_name: str) -> bool:
        """Whether a data set has ranked responses, and not pairs."""
        ranked = "ranks" in columns and ("responses" in columns or "responses_ids" in columns)
        pairs = all(x in columns or f"{x}_ids" in columns for x in ("chosen", "rejected"))
        if not ranked and not pairs:
            raise ValueError(
                f"the {dataset_name} data set has the columns {', '.join(columns)}; needed are "
                "chosen and rejected (with prompt or without), or responses and ranks"
            )
        data = self._data[dataset_name] = "ranked responses" if ranked else "pairs"
        objective = getattr(self, "objective", None)  # there is none before the training starts
        if objective is not None and ranked == objective.of_pairs:
            raise ValueError(f"the {dataset_name} data set has {data}, the training data has not")
        return ranked

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in ("responses_ids", "ranks"):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """TRL's; with ``max_tokens_per_batch``, batches filled by trie nodes."""
        if option_of(self.args, "max_tokens_per_batch") is None:
            return super().get_train_dataloader()
        args = self.args
        loader = torch.utils.data.DataLoader(
            self._remove_unused_columns(self.train_dataset, "training"),
            batch_sampler=self._budget_sampler(),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=getattr(args, "dataloader_in_order", True),
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )
        return prepare_data_loader(  # the sampler knows of the processes itself
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            even_batches=False, non_blocking=bool(args.accelerator_config.non_blocking),
        )  # fmt: skip

    def _budget_sampler(self) -> TokenBudgetSampler:
        args, collator, dataset = self.args, self.data_collator, self.train_dataset
        # processes that share a model would cut unlike, but those of FSDP2, which agree
        whole = patching.attached(self.model).classifier is self.model
        agree = whole and getattr(self.accelerator, "is_fsdp2", False)
        shared = self.is_deepspeed_enabled or (self.is_fsdp_enabled and not agree)
        counted = dataset.map(
            _count,
            fn_kwargs={"collator": collator, "first": collator.rows(dataset[0])[0]},
            remove_columns=dataset.column_names,
            **sifting.map_options(dataset, args, "Counting trie nodes"),
        )
        options = {
            "nodes": counted["nodes"],
            "max_tokens": args.max_tokens_per_batch,
            "cuts": self.report.level == "trie" and not shared,
            "common": min(counted["common"]) if collator.share_prefixes else 0,
            "ranks": (self.accelerator.num_processes, self.accelerator.process_index),
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
        epochs = math.ceil(args.num_train_epochs)
        if args.max_steps > 0:
            batches = len(TokenBudgetSampler(**options))
            epochs = 1 + args.max_steps * args.gradient_accumulation_steps // batches
        return TokenBudgetSampler(epochs=epochs, **options)

    # --- the step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # transformers looks at every loss for NaN, and the host waits; training_step does it
        self._filters = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = self._filters

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # forget an attempt that auto_find_batch_size gave up
        self.batch_metrics["train"] = BatchMetrics(self.accelerator)
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self._filters:
            return loss
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(torch.isfinite(loss), loss, mean)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """An optimiser step's batches, and the pairs that a process has in it on average."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "pool_index" in batches[0]:
            count = sum(batch["count"] for batch in batches)
            world = self.accelerator.num_processes
            if world > 1:
                # filled there: no copy to wait for
                whole = torch.full((), float(count), device=device)
                count = self.accelerator.reduce(whole, "sum") / world
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean over the pairs of the optimiser step; when evaluating, over those of the batch."""
        if "pool_index" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = inputs["count"] if num_items_in_batch is None else num_items_in_batch
        run = self._run_packed if self._packs else self._run_padded
        loss, scores, metrics = run(model, inputs, count)
        mode = "train" if self.model.training else "eval"
        new = inputs["count"] if mode == "train" else self._not_seen(inputs["count"])
        batch, logits = inputs, scores[:, None]
        if new < inputs["count"]:
            batch, scores = first_of(inputs, scores, new)
            metrics = metrics.new_tensor([0, 0, 0, 0, math.inf, -math.inf])  # of no pair
            if new:
                loss, _, metrics = self.objective.of_scores(scores, batch)
                loss = loss / new
        pairs = len(batch["pairs"]) if "pairs" in batch else new
        self.batch_metrics[mode].add(metrics, pairs, len(scores), inputs["tokens"])
        return (loss, {"loss": loss, "logits": logits.detach()}) if return_outputs else loss

    def _run_packed(
        self, model: torch.nn.Module, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Tensor, Tensor]:  # [], [B], [6]
        step = packed_step.Step(batch, self.objective, count)
        loss = model(input_ids=batch["input_ids"][None], rmfast_step=step).loss
        exact = step.loss  # first: an error where the model was unpatched since
        if loss.dtype != exact.dtype:  # rounded on its way through FSDP2: not in the logs
            loss = loss + (exact - loss.detach())
        return loss, step.scores, step.metrics

    def _run_padded(
        self, model: torch.nn.Module, batch: dict[str, Any], count: Any
    ) -> tuple[Tensor, Tensor, Tensor]:  # [], [B], [6]
        scores = model(**packed_step.padded(batch, self._pad), use_cache=False).logits[:, 0]
        loss, _, metrics = self.objective.of_scores(scores, batch)
        return loss / count, scores, metrics

    def _not_seen(self, count: int) -> int:
        """How many of an evaluated batch count: accelerate fills the last ones up to equal size."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader:
            return count
        before = self.accelerator.process_index * self.args.eval_batch_size
        return min(max(state.remainder - before, 0), count) if state.remainder > 0 else count

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, **kwargs: Any):
        if "sizes" in inputs and not prediction_loss_only and self.accelerator.num_processes > 1:
            raise ValueError(
                "scores of ranked responses cannot be gathered from several processes: evaluate "
                "without compute_metrics, or use one process"
            )
        return super().prediction_step(model, inputs, prediction_loss_only, **kwargs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "pool_index" in inputs:  # there is no padding to tell apart
            tokens = torch.ones((), dtype=torch.int64).expand(inputs["tokens"])
            inputs = {"input_ids": tokens, "attention_mask": tokens}
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics of all batches since the last log."""
        mode = "train" if self.model.training else "eval"
        found = self.batch_metrics[mode].take()
        if found:
            if mode == "train":
                self._total_train_tokens += int(found["tokens"])
            found["num_tokens"] = self._total_train_tokens
            del found["tokens"]
            self._metrics[mode].update({name: [float(x)] for name, x in found.items()})
        super().log(logs, start_time)


def _count(row: dict[str, Any], collator: Collator, first: np.ndarray) -> dict[str, int]:
    """Trie nodes of an example, and how many tokens all its sequences share with ``first``."""
    return {"nodes": collator.nodes(row), "common": shared_length([first, *collator.rows(row)])}


def _name_of(model: Any) -> str:
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return name.rstrip("/").split("/")[-1]
