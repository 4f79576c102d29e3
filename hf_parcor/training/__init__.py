"""Defended training with Transformers' Trainers and in Accelerate loops."""

from hf_parcor.defense_file import DEFENSE_CONFIG_NAME
from hf_parcor.training.accelerate import DefendedBackward, DefendedLoss, defended_backward
from hf_parcor.training.callbacks import CollapseCallback, IdleDefenseCallback, signs_of_collapse
from hf_parcor.training.checkpoints import checkpoint_to_resume
from hf_parcor.training.config import DefenseConfig
from hf_parcor.training.mixin import ParameterDefenseMixin
from hf_parcor.training.training_args import (
    DEFAULT_DEFENSE,
    DefenseArguments,
    ParameterDefenseTrainingArguments,
    Seq2SeqParameterDefenseTrainingArguments,
    build_defense,
)

__all__ = [
    "DEFAULT_DEFENSE",
    "DEFENSE_CONFIG_NAME",
    "CollapseCallback",
    "DefendedBackward",
    "DefendedLoss",
    "DefenseArguments",
    "DefenseConfig",
    "IdleDefenseCallback",
    "ParameterDefenseMixin",
    "ParameterDefenseTrainingArguments",
    "Seq2SeqParameterDefenseTrainingArguments",
    "build_defense",
    "checkpoint_to_resume",
    "defended_backward",
    "signs_of_collapse",
]
