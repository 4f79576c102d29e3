"""One evaluation of a Trainer's model under corruptions, with the Trainer's data, loss and metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import Corruption, GaussianNoise, GradientCorruption, Quantization
from hf_parcor.evaluation import DEFAULT_TRIALS, CorruptionEvaluator, EvaluationRecord, TrainerMetric, model_loss
from hf_parcor.evaluation.data import evaluation_data_of
from hf_parcor.evaluation.walks import drawn_once
from hf_parcor.metric_info import MetricInfo

DEFAULT_CORRUPTIONS: tuple[Corruption, ...] = (
    GradientCorruption(CorruptionConstraint(p=2.0, epsilon=0.1)),
    GaussianNoise(0.02),
    Quantization(4),
)


def measure_robustness(
    trainer: Trainer,
    corruptions: Sequence[Corruption] = DEFAULT_CORRUPTIONS,
    *,
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    eval_dataset: Any = None,
    metric_key_prefix: str = "eval",
    target_modules: str | Collection[str] | None = None,
    metric_info: Mapping[str, MetricInfo] | None = None,
) -> EvaluationRecord:
    """Measure a Trainer's model with its weights as they are, and under each corruption.

    The Trainer's own `evaluate` runs each time, in silence; see `TrainerMetric`. Nothing of the Trainer, its model or
    the random numbers is different afterwards. On several processes all of them call it.

    Args:
        trainer: Any `transformers.Trainer`.
        corruptions: What to measure. Those that need gradients climb along the Trainer's loss over the evaluation
            data. If its collator draws random numbers, such as masks, what it draws first is kept in memory for them.
        trials: Trials of each stochastic corruption. Default 3.
        seed: First seed.
        eval_dataset: One data set, or the name of one of the Trainer's; None for the Trainer's own.
        metric_key_prefix: As in `Trainer.evaluate`.
        target_modules: Which modules are corrupted, as in `CorruptionEvaluator`.
        metric_info: What the metrics' numbers mean, as in `CorruptionEvaluator`, by their names without prefix. None
            for what `greater_is_better` says of `metric_for_best_model`, and the names of the others.

    Raises:
        ValueError: The Trainer has no evaluation data, or as in `CorruptionEvaluator`.
        TypeError: As in `CorruptionEvaluator`.
    """
    model = trainer.model
    if model is None:
        raise ValueError("model: expected a Trainer with a model, got None; pass model=, or train first")
    needs_gradients = any(getattr(corruption, "uses_gradients", False) for corruption in corruptions)
    evaluator = CorruptionEvaluator(
        model,
        TrainerMetric(trainer, eval_dataset, metric_key_prefix=metric_key_prefix),
        drawn_once(trainer.get_eval_dataloader(eval_dataset)) if needs_gradients else None,
        loss=_loss_of(trainer),
        target_modules=target_modules,
        metric_info=metric_info,
        progress=not trainer.args.disable_tqdm,
        evaluated_on=evaluation_data_of(_dataset(trainer, eval_dataset)),
    )
    return evaluator.evaluate(corruptions, trials, seed)


def _dataset(trainer: Trainer, asked: Any) -> Any:
    """Return the data set that a Trainer means: its own, one of its own by name, or the one that is passed."""
    own: Any = trainer.eval_dataset
    return own if asked is None else own[asked] if isinstance(asked, str) else asked


def _loss_of(trainer: Trainer) -> Any:
    """Return the model's own loss where the Trainer takes that, since labels are then counted as the model does."""
    stock = type(trainer).compute_loss is Trainer.compute_loss
    if stock and trainer.label_smoother is None and trainer.compute_loss_func is None:
        return model_loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs = trainer._prepare_inputs(dict(batch))  # a copy: labels are popped
        with trainer.compute_loss_context_manager():
            return torch.as_tensor(trainer.compute_loss(model, inputs))

    return loss
