"""The two Trainers: the only place where defending, measuring and publishing meet."""

from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from hf_parcor.cards.mixin import PublishingMixin
from hf_parcor.training.mixin import ParameterDefenseMixin


class ParameterDefenseTrainer(ParameterDefenseMixin, PublishingMixin, Trainer):
    """A `transformers.Trainer` that defends parameters, measures robustness, and writes the result on the model card.

    It combines `ParameterDefenseMixin`, which says what arguments it takes, `RobustnessMixin` and `PublishingMixin`.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from hf_parcor import SAM, CorruptionConstraint
        >>> config = BertConfig(
        ...     vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        ... )
        >>> trainer = ParameterDefenseTrainer(
        ...     model=BertForSequenceClassification(config),
        ...     args=TrainingArguments(
        ...         tempfile.mkdtemp(), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none"
        ...     ),
        ...     train_dataset=[{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4, 5, 6], "labels": 1}],
        ...     defense=SAM(CorruptionConstraint(epsilon=0.1)),
        ...     target_modules="last-encoder-layer",
        ... )
        >>> output = trainer.train()
        {...}
        >>> trainer.defense_config.defended_steps
        2
    """


class Seq2SeqParameterDefenseTrainer(ParameterDefenseMixin, PublishingMixin, Seq2SeqTrainer):
    """A `transformers.Seq2SeqTrainer` with the additions of `ParameterDefenseTrainer`.

    Evaluation and prediction count each row once, as a `Trainer` does. In the loss of `Seq2SeqTrainer`, a last batch
    of fewer rows counts as a full one; and on several processes its metrics count the rows that fill it up, too.

    Examples:
        >>> import tempfile
        >>> from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration
        >>> config = T5Config(vocab_size=9, d_model=4, d_kv=4, d_ff=4, num_layers=1, num_heads=1)
        >>> arguments = Seq2SeqTrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> trainer = Seq2SeqParameterDefenseTrainer(
        ...     model=T5ForConditionalGeneration(config), args=arguments, target_modules="last-decoder-layer"
        ... )
        >>> next(iter(trainer.defended_parameters()))
        'decoder.block.0.layer.0.SelfAttention.q.weight'
        >>> print(trainer.defense.constraint)
        L2 ε=0.1
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, or predict, each row once."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)
