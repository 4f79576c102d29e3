"""What a Trainer's own evaluation finds, as a metric."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainerMemoryTracker

from hf_parcor.evaluation.identity.fingerprint import fingerprint
from hf_parcor.evaluation.metrics.scores import without_shape
from hf_parcor.evaluation.placement.replicas import measurable_model
from hf_parcor.model_state import card_notes_kept
from hf_parcor.overriding import overriding
from hf_parcor.randomness import generator_kept, random_states_kept, seed_the_cpu
from hf_parcor.records.metric_info import MetricInfo, direction_by_name, stated_by

# What of a Trainer's arguments decides what an evaluation finds.
_ARGUMENTS = (
    *("per_device_eval_batch_size", "dataloader_drop_last", "group_by_length", "remove_unused_columns", "label_names"),
    *("prediction_loss_only", "label_smoothing_factor", "include_for_metrics", "batch_eval_metrics"),
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "past_index"),
    *("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config"),
)
_OF_THE_CLOCK = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),  # Trainer.evaluate
    *("total_time_in_seconds", "latency_in_seconds"),  # the evaluators of evaluate
)
_REACHED = "epoch"  # where a training is, which Trainer.evaluate logs beside what it finds
_TRAINED_ON = "num_tokens"  # which TRL's Trainers log so
_EVALUATOR = "evaluator"  # which the Trainers of sentence-transformers have
_PARTS = (
    *("data_collator", "compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "processing_class"),
    _EVALUATOR,
)


class TrainerMetric:
    """The numbers of `Trainer.evaluate`, without the prefix, and without times and speeds.

    The Trainer's own `evaluate` runs, with its data loader, collator, `compute_metrics` and generation settings, and
    with the overrides of a subclass. No callback is called, nothing is logged or written, by an `evaluator` of
    sentence-transformers neither, and the Trainer's state is restored.
    Each call begins with the same random numbers, so that a collator that masks at random does the same for every
    corruption; the caller's random generators are restored.

    Args:
        trainer: Any `transformers.Trainer`.
        eval_dataset: As in `Trainer.evaluate`. By default, the Trainer's own.
        metric_key_prefix: As in `Trainer.evaluate`.
    """

    def __init__(self, trainer: Trainer, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> None:
        self._trainer, self._eval_dataset, self._prefix = trainer, eval_dataset, metric_key_prefix

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the Trainer's arguments, its `compute_metrics` or its `evaluator` state of a number, or None.

        `greater_is_better` applies to `metric_for_best_model`, also if that is measured on corrupted weights. If it is
        not set, Transformers sets it to True for everything but a loss; this is ignored for a name of an error.
        """
        if name == "loss":
            return MetricInfo(False)
        sources = (self._trainer.compute_metrics, getattr(self._trainer, _EVALUATOR, None))
        stated = next((info for one in sources if (info := stated_by(one, name)) is not None), None)
        arguments = self._trainer.args
        best, greater = arguments.metric_for_best_model, arguments.greater_is_better
        if best is None or greater is None or not _is_of(best.removeprefix(f"{self._prefix}_"), name):
            return stated
        if greater and direction_by_name(name) is False:
            return stated
        return MetricInfo(greater) if stated is None else stated.stating(greater_is_better=greater)

    def identity(self) -> dict[str, Any]:
        """Return the Trainer's class, its settings of an evaluation, and the fingerprint of its evaluation data."""
        trainer = self._trainer
        return {
            "trainer": type(trainer),
            "arguments": {name: getattr(trainer.args, name, None) for name in _ARGUMENTS},
            **{name: getattr(trainer, name, None) for name in _PARTS},
            "data": self._fingerprint(),
        }

    def _fingerprint(self) -> Any:
        """Return the fingerprint of each data set, as one walk finds it that begins with fixed random numbers."""
        data = evaluated_data(self._trainer, self._eval_dataset)
        sets = data if isinstance(data, dict) else {"": data}
        with random_states_kept([self._trainer.args.device]):
            seed_the_cpu(0)
            return {name: fingerprint(_items(one)) for name, one in sets.items() if one is not None}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` and what `compute_metrics` returns.

        Raises:
            ValueError: The model is not the Trainer's, or its evaluation returned no number.
        """
        trainer, prefix = self._trainer, f"{self._prefix}_"
        own = trainer.model
        if own is None or measurable_model(own) is not measurable_model(model):
            raise ValueError(
                f"model: expected the one that the Trainer evaluates, got another {type(model).__name__}; "
                "pass trainer.model to the evaluator"
            )
        with (
            _in_silence(trainer, model),
            random_states_kept([trainer.args.device]),
            generator_kept(trainer.data_collator),
        ):
            found: dict[str, Any] = trainer.evaluate(self._eval_dataset, metric_key_prefix=self._prefix)
        values = {
            name.removeprefix(prefix): without_shape(value) for name, value in found.items() if name.startswith(prefix)
        }
        metrics = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, Real) and not _tells_of_the_run(name)
        }
        if not metrics:
            raise ValueError(
                "eval_dataset: expected an evaluation that finds numbers, got none; put labels into the data set, or "
                "give the Trainer compute_metrics="
            )
        return metrics


def evaluated_data(trainer: Trainer, asked: Any) -> Any:
    """Return the data that a Trainer evaluates: its own, one of its own by name, or what is passed."""
    own: Any = trainer.eval_dataset
    return own if asked is None else own[asked] if isinstance(asked, str) else asked


def is_beside_the_point(name: str) -> bool:
    """Return whether a metric is a time, a speed or the epoch, as `Trainer.evaluate` and others name them.

    Examples:
        >>> [name for name in ("eval_loss", "eval_runtime", "epoch") if is_beside_the_point(name)]
        ['eval_runtime', 'epoch']
    """
    return name == _REACHED or name.endswith(_OF_THE_CLOCK)


def _tells_of_the_run(name: str) -> bool:
    """Return whether a number is none of the model's: how long it took, or how much was trained before."""
    return is_beside_the_point(name) or name == _TRAINED_ON


def _is_of(best: str, name: str) -> bool:
    """Return whether a `metric_for_best_model` without prefix is a metric, or the same of corrupted weights."""
    best = best.removeprefix("eval_")
    return best == name or (best.startswith("robustness_") and best.endswith(f"_{name}"))


def _items(data: Any) -> Iterable[Any]:
    """Return what is in a data set, which need not be iterable by itself."""
    return data if hasattr(data, "__iter__") else (data[index] for index in range(len(data)))


@contextmanager
def _in_silence(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Hide a Trainer's callbacks, and let it write into copies of its state, and no table of an evaluator's."""
    copies: dict[str, Any] = {
        name: copy.copy(getattr(trainer, name)) for name in ("callback_handler", "state", "control")
    }
    copies["callback_handler"].callbacks = []
    copies["state"].log_history = list(trainer.state.log_history)
    no_tracker = TrainerMemoryTracker(skip_memory_metrics=True)  # type: ignore[no-untyped-call]
    evaluator = getattr(trainer, _EVALUATOR, None)
    if callable(evaluator):

        def without_table(model: Any, output_path: str | None = None, **reached: Any) -> Any:
            return evaluator(model, **reached)

        copies[_EVALUATOR] = without_table
    with overriding(trainer, **copies, _memory_tracker=no_tracker), card_notes_kept(model):
        yield
