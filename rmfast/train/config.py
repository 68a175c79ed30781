"""Options of :class:`rmfast.train.trainer.RewardTrainer`, and those of TRL's that it refuses."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import datasets
import trl
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class RewardConfig(trl.RewardConfig):
    """TRL's options, and rmfast's.

    Two of TRL's differ. Without a word on ``bf16``, it is on only if the device has it. Where
    ``warmup_steps`` is a share, it is a tenth of the steps at most, and none of fewer than ten: the
    first step of a warm-up learns nothing.

    Attributes:
        max_tokens_per_batch: trie nodes (distinct prefixes) a micro-batch, in place of
            ``per_device_train_batch_size``; see :class:`rmfast.train.sampler.TokenBudgetSampler`.
            An example with more runs in pieces of that size (``max_training_tokens`` of
            :func:`rmfast.patch`), but under FSDP1 and DeepSpeed, and under FSDP2 with an adapter,
            where it raises an error.
        loss_type: ``"bradley_terry"`` or ``"focal"`` for pairs, ``"all_pairs"`` or
            ``"plackett_luce"`` for ranked groups; None: the first that fits the data.
        label_smoothing: probability that a label is wrong, of ``"bradley_terry"``.
        focal_gamma: exponent of ``"focal"``.
        share_prefixes: False packs without sharing.
    """

    max_tokens_per_batch: int | None = None
    loss_type: str | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    share_prefixes: bool = True

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.use_cpu:
            has_it = is_torch_bf16_gpu_available() or is_torch_xla_available()
            self.bf16 = has_it and not self.fp16
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up; a share of the steps is never the whole run."""
        wanted, most = super().get_warmup_steps(num_training_steps), num_training_steps // 10
        if self.warmup_steps >= 1 or wanted <= most:
            return wanted
        if self.warmup_steps > 0.1:
            _log.warning("warm-up: %d of %d steps, at most a tenth", most, num_training_steps)
        return most


def option_of(args: trl.RewardConfig, name: str) -> Any:
    """An option of :class:`RewardConfig`; of TRL's own config its default."""
    return getattr(args, name, getattr(RewardConfig, name))


def refuse(args: trl.RewardConfig, dataset: Any) -> None:
    """Raise ValueError for an option that would silently train on something else."""
    budget, accelerator = option_of(args, "max_tokens_per_batch"), args.accelerator_config
    parallel = args.parallelism_config
    splits = any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("cp", "sp", "tp"))
    refused = [
        ("use_liger_kernel", args.use_liger_kernel, "Liger puts the causal-LM forward on a reward "
         "model; rmfast puts kernels of its own on the backbone"),
        ("label_smoothing_factor", args.label_smoothing_factor, "a reward model has no class "
         "labels; label_smoothing of rmfast's RewardConfig smooths preferences"),
        ("include_for_metrics", "inputs" in args.include_for_metrics, "packed batches have no rows "
         "of tokens to give to compute_metrics"),
        ("accelerator_config.dispatch_batches", accelerator.dispatch_batches, "packed batches "
         "cannot be cut up for other processes"),
        ("accelerator_config.split_batches", accelerator.split_batches, "packed batches cannot be "
         "cut up; set per_device_train_batch_size to the pairs of one process"),
        ("parallelism_config", splits, "of all kinds of parallelism only data parallelism is "
         "supported"),
    ]  # fmt: skip
    if budget is not None:
        no_length = not isinstance(dataset, datasets.Dataset)
        refused += [
            ("max_tokens_per_batch", budget < 1 or no_length, "it must be a positive integer, and "
             "the data set's length known"),
            ("train_sampling_strategy", args.train_sampling_strategy != "random",
             "max_tokens_per_batch draws the order of batches itself"),
            ("dataloader_drop_last", args.dataloader_drop_last, "batches of max_tokens_per_batch "
             "have no size to fall short of"),
            ("auto_find_batch_size", args.auto_find_batch_size, "it changes "
             "per_device_train_batch_size; lower max_tokens_per_batch"),
        ]  # fmt: skip
    for name, is_set, reason in refused:
        if is_set:
            raise ValueError(f"{name} cannot be used with rmfast's RewardTrainer: {reason}")
