"""The two Trainers: the only place where defending, measuring and publishing meet."""

from transformers import Seq2SeqTrainer, Trainer

from hf_parcor.cards.trainer import PublishingMixin
from hf_parcor.training.mixin import ParameterDefenseMixin


class ParameterDefenseTrainer(ParameterDefenseMixin, PublishingMixin, Trainer):
    """`transformers.Trainer` with a defense; see `ParameterDefenseMixin`, `RobustnessMixin` and `PublishingMixin`."""


class Seq2SeqParameterDefenseTrainer(ParameterDefenseMixin, PublishingMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with a defense, as in `ParameterDefenseTrainer`."""
