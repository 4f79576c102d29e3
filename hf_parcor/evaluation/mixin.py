"""A Trainer that says how robust its model is, as it says how good it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from hf_parcor.arguments import check_count
from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import Corruption, GaussianNoise, GradientCorruption, Quantization
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.distributed.processes import TrainingProcesses
from hf_parcor.evaluation.evaluator import CorruptionEvaluator, several
from hf_parcor.evaluation.identity.repeated_batches import drawn_once
from hf_parcor.evaluation.losses import TrainerLoss, model_loss
from hf_parcor.evaluation.metrics.trainer import TrainerMetric, evaluated_data
from hf_parcor.evaluation.trials import DEFAULT_TRIALS
from hf_parcor.model_state import BufferSnapshot
from hf_parcor.records import EvaluationRecord
from hf_parcor.records.curves import plain_name
from hf_parcor.records.data import evaluation_data_of
from hf_parcor.records.metric_info import MetricInfo
from hf_parcor.statistics import sample_mean

DEFAULT_CORRUPTIONS: tuple[Corruption, ...] = (
    GradientCorruption(CorruptionConstraint(p=2.0, epsilon=0.1)),
    GaussianNoise(0.02),
    Quantization(4),
)


_OTHER_DATA = "Gradients are those of the loss over other data than what was evaluated."


@dataclass
class RobustnessArguments:
    """Flags of how a program measures robustness, for `transformers.HfArgumentParser`.

    Examples:
        >>> from transformers import HfArgumentParser
        >>> parser = HfArgumentParser(RobustnessArguments)
        >>> (robustness,) = parser.parse_args_into_dataclasses(["--corruptions", "gradient=0.1,0.2", "quantization=4"])
        >>> print(*robustness.read(), sep=", ")
        gradient-based L2 ε=0.1, gradient-based L2 ε=0.2, 4-bit quantization
    """

    corruptions: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to corrupt the weights by, as in `hf-parcor evaluate`: gradient=0.1,0.2 quantization=4. Not "
            "set: what this program measures by default."
        },
    )
    watched_corruptions: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to corrupt them by at every evaluation in training too: with quantization=4 here and "
            "--metric_for_best_model eval_robustness_4_bit_quantization_loss the best checkpoint is that for 4 bits. "
            "Not set: nothing."
        },
    )
    corruption_trials: int = field(default=DEFAULT_TRIALS, metadata={"help": "Trials of each random corruption."})
    corruption_seed: int = field(default=0, metadata={"help": "Seed of the first trial."})
    skip_corruptions: bool = field(default=False, metadata={"help": "Measure the clean model only."})

    def read(self, default: Sequence[Corruption] = DEFAULT_CORRUPTIONS) -> list[Corruption]:
        """Return the corruptions that the flags name, or the default if there are none.

        Raises:
            InputError: As in `read_corruptions`.
            ValueError: There are to be no trials.
        """
        check_count("corruption_trials", self.corruption_trials)
        words: Any = self.corruptions
        if words is None:
            return list(default)
        return read_corruptions([words] if isinstance(words, str) else words)  # of a file, one may stand alone


def measure_robustness(
    trainer: Trainer,
    corruptions: Sequence[Corruption] = DEFAULT_CORRUPTIONS,
    *,
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    eval_dataset: Any = None,
    gradient_dataset: Any = None,
    metric_key_prefix: str = "eval",
    target_modules: str | Collection[str] | None = None,
    metric_info: Mapping[str, MetricInfo] | None = None,
) -> EvaluationRecord:
    """Measure a Trainer's model as it is and under each corruption.

    Each measurement runs the Trainer's own `evaluate`, without logging or callbacks; see `TrainerMetric`. The Trainer,
    its model and the random generators are unchanged afterwards. With several processes, call it in all of them.

    Args:
        trainer: Any `transformers.Trainer`.
        corruptions: What to measure. If the collator draws random numbers, for example for masks, corruptions that
            need gradients use the batches that it drew first, which are kept in memory.
        trials: Trials of each stochastic corruption. Default 3.
        seed: First seed.
        eval_dataset: One data set, or the name of one of the Trainer's. By default, the Trainer's own.
        gradient_dataset: Data for corruptions that need gradients, which climb along the Trainer's loss over it. By
            default, what is evaluated. Pass rows with labels if that has none, as in question answering, where answers
            are compared as texts. The record notes it.
        metric_key_prefix: As in `Trainer.evaluate`.
        target_modules: Which modules are corrupted, as in `CorruptionEvaluator`. By default, what is trained: only the
            adapters of a PEFT model. "all" for all weights.
        metric_info: What the metrics' numbers mean, as in `CorruptionEvaluator`, by their names without prefix. By
            default, what `greater_is_better` says of `metric_for_best_model`, and what the names of the others say.

    Raises:
        ValueError: The Trainer has no evaluation data, or several data sets, or as in `CorruptionEvaluator`.
        TypeError: As in `CorruptionEvaluator`.
    """
    model = trainer.model
    if model is None:
        raise ValueError("model: expected a Trainer with a model, got None; pass model=, or train first")
    data = evaluated_data(trainer, eval_dataset)
    if isinstance(data, dict):
        raise ValueError(
            f"eval_dataset: expected one data set, got {', '.join(map(str, data))}; name one of them, or call "
            "evaluate_robustness of a RobustnessMixin, which evaluates each"
        )
    if isinstance(gradient_dataset, dict):
        raise ValueError(
            f"gradient_dataset: expected one data set, got {', '.join(map(str, gradient_dataset))}; name one of them"
        )
    needs_gradients = any(getattr(corruption, "uses_gradients", False) for corruption in corruptions)
    for_gradients = eval_dataset if gradient_dataset is None else gradient_dataset
    evaluator = CorruptionEvaluator(
        model,
        TrainerMetric(trainer, eval_dataset, metric_key_prefix=metric_key_prefix),
        drawn_once(trainer.get_eval_dataloader(for_gradients)) if needs_gradients else None,
        loss=_loss_of(trainer),
        target_modules=target_modules,
        metric_info=metric_info,
        progress=not trainer.args.disable_tqdm,
        evaluated_on=evaluation_data_of(data),
    )
    with _buffers_of_first_process(trainer, model):
        record = evaluator.evaluate(corruptions, trials, seed)
    if needs_gradients and evaluated_data(trainer, for_gradients) is not data:
        record = replace(record, notes=(*record.notes, _OTHER_DATA))
    return record


@contextmanager
def _buffers_of_first_process(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Give each process the running statistics of the first one, which are saved: in training each has its own."""
    if trainer.accelerator.num_processes == 1:
        yield
        return
    buffers = BufferSnapshot(model.modules())
    with buffers.undone():
        TrainingProcesses().agree_(buffers.kept)
        yield


def _loss_of(trainer: Trainer) -> Any:
    """Return the model's own loss where the Trainer takes that."""
    stock = type(trainer).compute_loss is Trainer.compute_loss
    own = stock and trainer.label_smoother is None and trainer.compute_loss_func is None
    return model_loss if own else TrainerLoss(trainer)


Corruptions = Corruption | Sequence[Corruption] | Mapping[str, Corruption]


def by_name(corruptions: Corruptions) -> dict[str, Corruption]:
    """Return corruptions by the names that were given to them, or by their labels in plain letters.

    Raises:
        ValueError: There is none, or two have the same name.
        TypeError: Something is not a `Corruption`.
    """
    named = list(
        corruptions.items()
        if isinstance(corruptions, Mapping)
        else ((plain_name(str(corruption)), corruption) for corruption in several(corruptions))
    )
    if not named:
        raise ValueError("corruptions: expected at least one, got none; pass [GaussianNoise(0.02)], say")
    for name, corruption in named:
        if not isinstance(corruption, Corruption):
            raise TypeError(f"corruptions: expected Corruption objects, got {corruption!r}; pass GaussianNoise(0.02)")
        if sum(name == other for other, _ in named) > 1:
            raise ValueError(
                f"corruptions: expected different ones, got two with the name {name!r}; pass a dict that names them"
            )
    return dict(named)


def robustness_metrics(record: EvaluationRecord, names: Sequence[str], prefix: str = "eval") -> dict[str, float]:
    """Return the means over trials of a record as a flat dictionary, as a Trainer logs them.

    Args:
        record: What was measured.
        names: A name for each corruption of the record.
        prefix: The prefix of all keys.

    Returns:
        `{prefix}_robustness_{name}_{metric}` for each corruption, and `{prefix}_robustness_{metric}`, the mean over
        all corruptions, for each metric of the clean model; NaN if it was not returned under a corruption, as the F1
        of a class that is not predicted any more.
    """
    metrics: dict[str, float] = {}
    for metric in record.clean.metrics:
        values = {
            name: row.mean(metric) if metric in row.metrics else math.nan
            for name, row in zip(names, record.corruptions, strict=True)
        }
        metrics |= {f"{prefix}_robustness_{name}_{metric}": value for name, value in values.items()}
        metrics[f"{prefix}_robustness_{metric}"] = sample_mean(list(values.values()))
    return metrics


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RobustnessMixin(_Base):
    """Gives any Trainer `evaluate_robustness`: put it before the Trainer's class among the bases.

    Attributes:
        robustness_records: The full records of the last `evaluate_robustness` or `RobustnessCallback`, by the prefix
            of their metrics: "eval", or one prefix for each data set if there are several. Empty before.
    """

    @cached_property
    def robustness_records(self) -> dict[str, EvaluationRecord]:
        """The records by prefix; empty until something is measured."""
        return {}

    def evaluate_robustness(
        self,
        corruptions: Corruptions | None = None,
        *,
        trials: int = DEFAULT_TRIALS,
        seed: int = 0,
        eval_dataset: Any = None,
        gradient_dataset: Any = None,
        metric_key_prefix: str = "eval",
        target_modules: str | Collection[str] | None = None,
        metric_info: Mapping[str, MetricInfo] | None = None,
    ) -> dict[str, float]:
        """Evaluate the model as `evaluate` does, as it is and under corruptions, and log the metrics.

        Args:
            corruptions: What to measure: one, a sequence, or a mapping from names of your own. By default,
                `DEFAULT_CORRUPTIONS`: ε = 0.1 along the gradient (L2), noise of σ = 0.02, and 4-bit quantization.
                Which strength breaks a model depends on the model.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            eval_dataset: As in `evaluate`. If it is a dictionary, each data set is evaluated separately.
            gradient_dataset: Data for corruptions that need gradients, as in `measure_robustness`. By default, what is
                evaluated.
            metric_key_prefix: As in `evaluate`.
            target_modules: Which modules are corrupted, as in `CorruptionEvaluator`. By default, all parameters that
                can be trained, even if fewer are defended.
            metric_info: What the metrics' numbers mean, as in `CorruptionEvaluator`, by their names without prefix. By
                default, what `greater_is_better` says of `metric_for_best_model`, and what the names of the others
                say.

        Returns:
            Means over trials: `eval_{metric}` of the uncorrupted model; `eval_robustness_{corruption}_{metric}` for
            each corruption, named by your name or its label in plain letters; and `eval_robustness_{metric}`, the mean
            over all corruptions. All trials are in `robustness_records`.

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
                gradient_dataset=gradient_dataset,
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
        """Store the record of a `RobustnessCallback` in `robustness_records`; a subclass may do more.

        Args:
            prefix: The prefix of its metrics.
            record: What was measured.
        """
        self.robustness_records[prefix] = record
