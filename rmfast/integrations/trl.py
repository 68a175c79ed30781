"""Trainers for TRL; they live in :mod:`rmfast.train.trainer`."""

try:
    from rmfast.train.trainer import RewardConfig, RewardTrainer
except ImportError as error:
    raise ImportError("rmfast.integrations.trl needs TRL: pip install 'rmfast[train]'") from error

__all__ = ["RewardConfig", "RewardTrainer"]
