"""TRL's reward trainer on packed batches: ``pip install 'rmfast[train]'``.

One import changes: ``from rmfast.integrations.trl import RewardTrainer``. Options, data and logs
are TRL's; :class:`RewardConfig` adds what rmfast can do besides.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor

from rmfast.data.records import is_blank, useless_group, useless_pair
from rmfast.data.values import check_number
from rmfast.packed import models, patching
from rmfast.packed import step as packed_step
from rmfast.train.batches import Collator, common, first_of
from rmfast.train.objective import KINDS, LARGEST_GROUP, Objective
from rmfast.train.sampler import TokenBudgetSampler

try:
    import trl
    from trl.data_utils import _tokenize, get_dataset_column_names
except ImportError as error:
    raise ImportError("rmfast.integrations.trl needs TRL: pip install 'rmfast[train]'") from error


_log = logging.getLogger(__name__)
_WAITING = 1024  # batches whose metrics stay on the device, where none are logged before


@dataclasses.dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's options, and rmfast's.

    Attributes:
        max_tokens_per_batch: trie nodes (distinct prefixes) a micro-batch, in place of
            ``per_device_train_batch_size``; see :class:`rmfast.train.sampler.TokenBudgetSampler`.
        loss_type: ``"bradley_terry"`` or ``"focal"`` for pairs, ``"all_pairs"`` or
            ``"plackett_luce"`` for ranked groups; None: the first that fits the data.
        label_smoothing: probability that a label is wrong, of ``"bradley_terry"``.
        focal_gamma: of ``"focal"``.
        share_prefixes: False packs without sharing.
    """

    max_tokens_per_batch: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Distinct-prefix tokens a micro-batch, in place of per_device_train_batch_size."
        },
    )
    loss_type: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "bradley_terry or focal for pairs, all_pairs or plackett_luce for ranked "
            "responses."
        },
    )
    label_smoothing: float = dataclasses.field(
        default=0.0, metadata={"help": "Probability that a label is wrong."}
    )
    focal_gamma: float = dataclasses.field(default=2.0, metadata={"help": "Of loss_type focal."})
    share_prefixes: bool = dataclasses.field(
        default=True, metadata={"help": "Run what sequences begin with once."}
    )


def _refuse(args: trl.RewardConfig, dataset: Any) -> None:
    """Options that would do nothing here, or would break packed batches."""
    strategy = getattr(args, "train_sampling_strategy", "random")
    accelerator = args.accelerator_config
    budget = getattr(args, "max_tokens_per_batch", None)
    parallel = getattr(args, "parallelism_config", None)
    shards = any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("cp", "sp", "tp"))
    loss, kinds = getattr(args, "loss_type", None), sum(KINDS.values(), ())
    no_list = not isinstance(dataset, datasets.Dataset)
    reasons = {
        "pad_to_multiple_of": (args.pad_to_multiple_of, "packed batches are not padded"),
        "use_liger_kernel": (
            args.use_liger_kernel,
            "Liger puts the causal-LM forward on a reward model; give the trainer "
            "rmfast.patch(model, backbone_kernels='liger') instead",
        ),
        "label_smoothing_factor": (
            args.label_smoothing_factor,
            "a reward model has no labels to smooth; label_smoothing of rmfast's RewardConfig "
            "smooths preferences",
        ),
        "train_sampling_strategy": (
            strategy in ("group_by_length", "batch_rebalance")
            or (budget is not None and strategy != "random"),
            "packed batches have no padding to save; max_tokens_per_batch evens out batches, and "
            "draws their order",
        ),
        "dataloader_drop_last": (
            budget is not None and args.dataloader_drop_last,
            "batches of max_tokens_per_batch have no size to fall short of",
        ),
        "auto_find_batch_size": (
            budget is not None and args.auto_find_batch_size,
            "it changes per_device_train_batch_size; lower max_tokens_per_batch",
        ),
        "activation_offloading": (
            args.activation_offloading and not torch.accelerator.is_available(),
            "there is no accelerator to take activations from",
        ),
        "include_for_metrics": (
            "inputs" in args.include_for_metrics,
            "packed batches have no rows of tokens that compute_metrics could be given",
        ),
        "accelerator_config.dispatch_batches": (
            accelerator.dispatch_batches,
            "packed batches cannot be cut up and sent to other processes",
        ),
        "accelerator_config.split_batches": (
            accelerator.split_batches,
            "packed batches cannot be cut up; set per_device_train_batch_size to what one "
            "process shall take",
        ),
        "parallelism_config": (
            shards,
            "context, sequence and tensor parallelism are not supported; data parallelism is",
        ),
        "max_tokens_per_batch": (
            budget is not None and (budget < 1 or no_list),
            "it must be positive, and needs a data set of known length",
        ),
        "loss_type": (
            loss not in (None, *kinds),
            f"it must be one of {', '.join(kinds)}",
        ),
    }
    for name, (is_set, why) in reasons.items():
        if is_set:
            raise ValueError(f"{name} cannot be used with rmfast's RewardTrainer: {why}")


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
        _refuse(args, train_dataset)
        if args.dataloader_pin_memory and not args.use_cpu:
            # else each batch's copy to the device would wait for it
            args.accelerator_config.non_blocking = True
        self.dropped: dict[str, Counter[str]] = {}
        self._ranked: dict[str, bool] = {}
        super().__init__(model, args, data_collator, train_dataset, *rest, **kwargs)
        patching.repatch(self.model)
        self.report = patching.report(self.model)
        self._packs = self._can_pack()
        self._check_head()
        ranked = any(self._ranked.values())
        if ranked and not all(self._ranked.values()):
            kinds = {True: "ranked responses", False: "pairs"}
            found = ", ".join(f"{name}: {kinds[x]}" for name, x in self._ranked.items())
            raise ValueError(f"all data sets must be pairs, or all ranked responses ({found})")
        data = "ranked responses" if ranked else "pairs"
        kind = getattr(args, "loss_type", None) or KINDS[data][0]
        if kind not in KINDS[data]:
            raise ValueError(f"loss_type={kind!r} does not go with {data}")
        self.objective = Objective(
            kind=kind,
            label_smoothing=getattr(args, "label_smoothing", 0.0),
            center=args.center_rewards_coefficient or 0.0,
            gamma=getattr(args, "focal_gamma", 2.0),
        )
        if data_collator is None:
            self.data_collator = self._collator()
        elif getattr(args, "max_tokens_per_batch", None) is not None:
            raise ValueError("max_tokens_per_batch packs batches itself: give no data_collator")
        self._logged: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {"train": [], "eval": []}
        self._sums: dict[str, Counter[str]] = {"train": Counter(), "eval": Counter()}
        self._filters = False
        # the loss is divided by the pairs of the whole step already
        self.loss_is_scaled_for_ga = data_collator is None
        if data_collator is None:
            self.model_accepts_loss_kwargs = True  # how older versions of transformers are told

    # --- data

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: trl.RewardConfig, dataset_name: str
    ) -> Any:
        if dataset_name == "train" and self.dropped:  # TRL prepares the one to train on first
            dataset_name = "eval train"
        columns = get_dataset_column_names(dataset)
        ranked = "ranks" in columns and ("responses" in columns or "responses_ids" in columns)
        pairs = all(x in columns or f"{x}_ids" in columns for x in ("chosen", "rejected"))
        if not ranked and not pairs:
            raise ValueError(
                f"the {dataset_name} data set has the columns {', '.join(columns)}; needed are "
                "chosen and rejected (with prompt or without), or responses and ranks"
            )
        self._ranked[dataset_name] = ranked
        objective = getattr(self, "objective", None)
        if objective is not None and ranked == objective.of_pairs:
            data = "ranked responses" if ranked else "preference pairs"
            raise ValueError(f"the {dataset_name} data set has {data}, the training data has not")
        dropped = self.dropped[dataset_name] = Counter()
        with_progress = isinstance(dataset, datasets.Dataset)
        options = {"num_proc": args.dataset_num_proc} if with_progress else {}

        def sift(dataset: Any, why: Callable[[dict, int], str]) -> Any:
            """Without the rows for which there is a reason."""
            if not with_progress:
                return dataset.filter(lambda row, i: not why(row, i), with_indices=True)
            found = dataset.map(
                lambda row, i: {"why": why(row, i)}, with_indices=True,
                remove_columns=dataset.column_names, desc=f"Checking {dataset_name}", **options,
            )["why"]  # fmt: skip
            dropped.update(reason for reason in found if reason)
            kept = dataset.select([i for i, reason in enumerate(found) if not reason])
            if not len(kept):
                raise ValueError(f"the {dataset_name} data set has no row left: {dict(dropped)}")
            return kept

        dataset = sift(dataset, _why_not_group if ranked else _why_not_pair)
        if ranked:
            if "responses_ids" not in columns:
                about = {"desc": f"Tokenizing {dataset_name} dataset"} if with_progress else {}
                dataset = dataset.map(
                    _tokenize_group, fn_kwargs={"processing_class": processing_class},
                    **about, **options,
                )  # fmt: skip
            if args.max_length is not None:
                dataset = sift(
                    dataset,
                    lambda row, _: (
                        "longer than max_length"
                        if max(map(len, row["responses_ids"])) > args.max_length
                        else ""
                    ),
                )
        else:
            before = len(dataset) if with_progress else 0
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            if with_progress and len(dataset) < before:
                dropped["longer than max_length"] += before - len(dataset)
            dataset = sift(
                dataset,
                lambda row, _: (
                    "identical tokens" if row["chosen_ids"] == row["rejected_ids"] else ""
                ),
            )
        if dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            _log.warning("%s data set: %d rows dropped: %s", dataset_name, dropped.total(), reasons)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        more = [x for x in ("responses_ids", "ranks") if x not in self._signature_columns]
        self._signature_columns += more

    def _collator(self) -> Collator:
        patch = patching.attached(self.model)
        share = getattr(self.args, "share_prefixes", True)
        if patch is not None:
            share = share and patch.options.share_prefixes
        noise = models.draws_noise(self.model, active=False)
        by_mask = patch is not None and patch.options.pooling == "mask"
        pad = self.model.config.get_text_config().pad_token_id
        return Collator(None if by_mask else pad, share and not noise)

    def _can_pack(self) -> bool:
        patch = patching.attached(self.model)
        configs = getattr(self.model, "peft_config", {})
        prompts = any(getattr(x, "is_prompt_learning", False) for x in configs.values())
        return patch is not None and patch.level == "trie" and not prompts

    def _check_head(self) -> None:
        """An adapter that leaves the head as it was drawn learns next to nothing."""
        patch = patching.attached(self.model)
        head = getattr(patch.classifier, "score", None) if patch is not None else None
        adapted = hasattr(self.model, "peft_config") and head is not None
        if adapted and not any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                "the reward head is frozen: give the adapter modules_to_save=['score'], or "
                "task_type='SEQ_CLS', so that it is trained and saved"
            )

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """TRL's; with ``max_tokens_per_batch``, batches filled by trie nodes."""
        args, budget = self.args, getattr(self.args, "max_tokens_per_batch", None)
        if budget is None:
            return super().get_train_dataloader()
        collator, dataset = self.data_collator, self.train_dataset
        first = collator.rows(dataset[0])[0]
        counted = dataset.map(
            _count, fn_kwargs={"collator": collator, "first": first},
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc="Counting trie nodes",
        )  # fmt: skip
        options = {
            "common": min(counted["common"]) if collator.share_prefixes else 0,
            "ranks": (self.accelerator.num_processes, self.accelerator.process_index),
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
        sampler = TokenBudgetSampler(counted["nodes"], budget, **options)
        epochs = math.ceil(args.num_train_epochs)
        if args.max_steps > 0:
            epochs = 1 + args.max_steps * args.gradient_accumulation_steps // len(sampler)
        sampler = TokenBudgetSampler(counted["nodes"], budget, epochs=epochs, **options)
        loader = torch.utils.data.DataLoader(
            self._remove_unused_columns(dataset, "training"),
            batch_sampler=sampler,
            collate_fn=collator,
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
        self._logged["train"] = []  # of an attempt that auto_find_batch_size gave up
        self._sums["train"] = Counter()
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
        if self._packs:
            step = packed_step.Step(inputs, self.objective, count)
            loss = model(input_ids=inputs["input_ids"][None], rmfast_step=step).loss
            logits, metrics = step.scores[:, None], step.metrics
            if loss.dtype != step.loss.dtype:  # rounded on its way through FSDP2: not in the logs
                loss = loss + (step.loss - loss.detach())
        else:
            pad = self.model.config.get_text_config().pad_token_id
            logits = model(**packed_step.padded(inputs, pad), use_cache=False).logits
            loss, _, metrics = self.objective.of_scores(logits[:, 0], inputs)
            loss = loss / count
        mode = "train" if self.model.training else "eval"
        new = inputs["count"] if mode == "train" else self._not_seen(inputs["count"])
        seen, scores = inputs, logits[:, 0]
        if new < inputs["count"]:
            seen, scores = first_of(inputs, scores, new)
            metrics = metrics.new_tensor([0, 0, 0, 0, math.inf, -math.inf])  # of no pair
            if new:
                loss, _, metrics = self.objective.of_scores(scores, seen)
                loss = loss / new
        pairs = len(seen["pairs"]) if "pairs" in seen else new
        self._logged[mode].append((metrics.detach(), (pairs, len(scores), inputs["tokens"])))
        if len(self._logged[mode]) == _WAITING:
            self._fetch(mode)
        return (loss, {"loss": loss, "logits": logits.detach()}) if return_outputs else loss

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
        if self._logged[mode]:
            self._fetch(mode)
        if self._sums[mode]:
            self._metrics[mode].update(self._averages(self._sums[mode], mode))
            self._sums[mode] = Counter()
        super().log(logs, start_time)

    def _fetch(self, mode: str) -> None:
        """Add what waits on the device to the sums; all processes do so after as many batches."""
        metrics, numbers = zip(*self._logged[mode], strict=True)
        self._logged[mode] = []
        metrics = torch.stack(metrics)
        rows = torch.cat([metrics, metrics.new_tensor(numbers)], 1)  # [batches, 9]
        rows = self.accelerator.gather(rows[None]).cpu().double().numpy()  # [W, batches, 9]
        accuracy, _, margin, mean, least, greatest, pairs, scores, tokens = np.moveaxis(rows, -1, 0)
        ranked = pairs > 0
        weights = pairs[ranked]
        found = {
            "batches": rows.shape[1],
            "tokens": tokens.sum(),
            "scores": scores.sum(),
            "pairs": weights.sum(),
            "min_reward": least.min(0).sum(),
            "mean_reward": (mean * scores).sum(),
            "max_reward": greatest.max(0).sum(),
            "accuracy": (accuracy[ranked] * weights).sum(),
            "margin": (margin[ranked] * weights).sum(),
        }
        self._sums[mode].update(found)

    def _averages(self, sums: Counter[str], mode: str) -> dict[str, list[float]]:
        if mode == "train":
            self._total_train_tokens += int(sums["tokens"])
        out = {
            "num_tokens": self._total_train_tokens,
            "min_reward": sums["min_reward"] / sums["batches"],
            "mean_reward": sums["mean_reward"] / sums["scores"],
            "max_reward": sums["max_reward"] / sums["batches"],
        }
        if sums["pairs"]:
            out["accuracy"] = sums["accuracy"] / sums["pairs"]
            out["margin"] = sums["margin"] / sums["pairs"]
        return {name: [float(value)] for name, value in out.items()}


def _count(row: dict[str, Any], collator: Collator, first: np.ndarray) -> dict[str, int]:
    """Trie nodes of an example, and how many tokens all its sequences share with ``first``."""
    shared = min(common(first, x) for x in collator.rows(row))
    return {"nodes": collator.nodes(row), "common": shared}


def _name_of(model: Any) -> str:
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return name.rstrip("/").split("/")[-1]


def _why_not_pair(row: dict[str, Any], place: int) -> str:
    """Why a pair is dropped; nothing where it is not."""
    if "margin" in row:
        check_number(f"row {place}: margin", row["margin"])
    chosen, rejected = (row.get(f"{name}_ids", row.get(name)) for name in ("chosen", "rejected"))
    return useless_pair(chosen, rejected, row.get("prompt"))


def _why_not_group(row: dict[str, Any], place: int) -> str:
    responses, ranks = row.get("responses_ids", row.get("responses")), row["ranks"]
    if ranks is None or len(ranks) != len(responses):
        count = "no" if ranks is None else len(ranks)
        raise ValueError(f"row {place}: {len(responses)} responses and {count} ranks")
    for rank in ranks:
        check_number(f"row {place}: each of ranks", rank)
    if len(responses) > LARGEST_GROUP:
        raise ValueError(
            f"row {place}: {len(responses)} responses, more than {LARGEST_GROUP}: split it"
        )
    if len(responses) > 1 and any(is_blank(x, row.get("prompt")) for x in responses):
        return "empty response"
    return useless_group(responses, ranks)


def _tokenize_group(row: dict[str, Any], processing_class: Any) -> dict[str, Any]:
    """A group's token lists, each as TRL makes them of chosen and rejected."""
    prompt, eos = row.get("prompt"), processing_class.eos_token
    options = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools"):
        tools = row["tools"]
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    out = []
    for response in row["responses"]:
        if isinstance(prompt, list) and isinstance(response, str):
            response = [{"role": "assistant", "content": response}]
        whole = response if prompt is None else prompt + response
        if isinstance(whole, str):
            whole = whole if whole.endswith(eos) else whole + eos
            out.append(_tokenize(processing_class, whole)["input_ids"])
        else:
            out.append(_tokenize(processing_class, whole, **options)["input_ids"])
    return {"responses_ids": out}
