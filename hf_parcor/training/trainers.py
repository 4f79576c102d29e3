"""The two Trainers."""

from __future__ import annotations

from transformers import Seq2SeqTrainer, Trainer

from hf_parcor.training.mixin import ParameterDefenseMixin


class ParameterDefenseTrainer(ParameterDefenseMixin, Trainer):
    """`transformers.Trainer` whose training step defends the parameters; see `ParameterDefenseMixin`."""


class Seq2SeqParameterDefenseTrainer(ParameterDefenseMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` whose training step defends the parameters; see `ParameterDefenseMixin`."""
