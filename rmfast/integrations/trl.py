"""Trainers for TRL; they live in :mod:`rmfast.train.trainer`."""

from rmfast.train.trainer import RewardConfig, RewardTrainer

__all__ = ["RewardConfig", "RewardTrainer"]
