"""A Trainer that says how robust its model is, as it says how good it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_parcor.evaluation import DEFAULT_TRIALS, EvaluationRecord
from hf_parcor.metric_info import MetricInfo
from hf_parcor.monitoring.evaluation import DEFAULT_CORRUPTIONS, measure_robustness
from hf_parcor.monitoring.names import Corruptions, by_name, robustness_metrics

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RobustnessMixin(_Base):
    """Gives any Trainer `evaluate_robustness`: put it before the Trainer's class among the bases.

    Attributes:
        robustness_records: What the last `evaluate_robustness` measured, in full, by the prefix of its metrics:
            "eval", or one for each data set where there are several.
    """

    robustness_records: dict[str, EvaluationRecord]

    def evaluate_robustness(
        self,
        corruptions: Corruptions | None = None,
        *,
        trials: int = DEFAULT_TRIALS,
        seed: int = 0,
        eval_dataset: Any = None,
        metric_key_prefix: str = "eval",
        target_modules: str | Collection[str] | None = None,
        metric_info: Mapping[str, MetricInfo] | None = None,
    ) -> dict[str, float]:
        """Evaluate the model as `evaluate` does, with its weights as they are and under corruptions, and log it.

        Args:
            corruptions: What to measure, in a sequence, or by names of your own. None for `DEFAULT_CORRUPTIONS`:
                ε = 0.1 along the gradient (L2), noise of σ = 0.02, and 4 bits. What breaks a model depends on it.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            eval_dataset: As in `evaluate`; where it is a dictionary, each data set is evaluated by itself.
            metric_key_prefix: As in `evaluate`.
            target_modules: Which modules are corrupted, as in `CorruptionEvaluator`. None for all parameters that can
                be trained, also if fewer are defended.
            metric_info: What the metrics' numbers mean, as in `CorruptionEvaluator`, by their names without prefix.
                None for what `greater_is_better` says of `metric_for_best_model`, and the names of the others.

        Returns:
            Means over trials: `eval_{metric}` of the weights as they are; `eval_robustness_{corruption}_{metric}`, the
            corruption's name being its label in plain letters; and `eval_robustness_{metric}`, the mean over all
            corruptions. All trials are in `robustness_records`.

        Raises:
            ValueError: Two corruptions have the same name, or as in `CorruptionEvaluator`.
            TypeError: As in `CorruptionEvaluator`.
        """
        named = by_name(DEFAULT_CORRUPTIONS if corruptions is None else corruptions)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        parts = (
            {f"{metric_key_prefix}_{name}": one for name, one in data.items()}
            if isinstance(data, dict)
            else {metric_key_prefix: eval_dataset}
        )
        self.robustness_records = {}
        metrics: dict[str, float] = {}
        for prefix, part in parts.items():
            record = measure_robustness(
                self,
                list(named.values()),
                trials=trials,
                seed=seed,
                eval_dataset=part,
                metric_key_prefix=prefix,
                target_modules=target_modules,
                metric_info=metric_info,
            )
            self.robustness_records[prefix] = record
            metrics |= {f"{prefix}_{name}": record.clean.mean(name) for name in record.clean.metrics}
            metrics |= robustness_metrics(record, list(named), prefix)
        self.log(dict(metrics))
        return metrics

    def robustness_was_measured(self, prefix: str, record: EvaluationRecord) -> None:
        """Hear of a measurement that a `RobustnessCallback` made beside an evaluation; by itself this does nothing.

        Args:
            prefix: What the names of its metrics begin with.
            record: What was measured.
        """
