"""What a Trainer's own evaluation finds, as a metric."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainerMemoryTracker

from hf_parcor.evaluation.metrics.clock import is_of_the_clock
from hf_parcor.evaluation.randomness import random_states_kept
from hf_parcor.evaluation.replicas import measurable_model


class TrainerMetric:
    """The numbers of `Trainer.evaluate`, without the prefix, and without what tells how long it took.

    The Trainer's own `evaluate` runs, with its data loader, collator, `compute_metrics` and generation settings, and
    with what a subclass overrides. It runs in silence: no callback is called, nothing is logged, and the Trainer's
    state is as it was. Each call begins with the same random numbers, so that a collator that masks at random does the
    same for every corruption; those of the caller are put back.

    Args:
        trainer: Any `transformers.Trainer`.
        eval_dataset: As in `Trainer.evaluate`; None for the Trainer's own.
        metric_key_prefix: As in `Trainer.evaluate`.
    """

    def __init__(self, trainer: Trainer, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> None:
        self._trainer, self._eval_dataset, self._prefix = trainer, eval_dataset, metric_key_prefix

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` and what `compute_metrics` returns.

        Raises:
            ValueError: The model is not the Trainer's, or its evaluation found no number.
        """
        trainer, prefix = self._trainer, f"{self._prefix}_"
        own = trainer.model
        if own is None or measurable_model(own) is not measurable_model(model):
            raise ValueError(
                f"model: expected the one that the Trainer evaluates, got another {type(model).__name__}; "
                "pass trainer.model to the evaluator"
            )
        with _in_silence(trainer), random_states_kept(trainer.args.device):
            found: dict[str, Any] = trainer.evaluate(self._eval_dataset, metric_key_prefix=self._prefix)
        metrics = {
            name.removeprefix(prefix): float(value)
            for name, value in found.items()
            if name.startswith(prefix) and isinstance(value, Real) and not is_of_the_clock(name)
        }
        if not metrics:
            raise ValueError(
                "eval_dataset: expected an evaluation that finds numbers, got none; put labels into the data set, or "
                "give the Trainer compute_metrics="
            )
        return metrics


@contextmanager
def _in_silence(trainer: Trainer) -> Iterator[None]:
    """Hide a Trainer's callbacks, and let it write into copies of its state."""
    names = ("callback_handler", "state", "control", "_memory_tracker")
    kept = {name: getattr(trainer, name) for name in names}
    for name in names[:3]:
        setattr(trainer, name, copy.copy(kept[name]))
    trainer.callback_handler.callbacks = []
    trainer.state.log_history = list(trainer.state.log_history)
    trainer._memory_tracker = TrainerMemoryTracker(skip_memory_metrics=True)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
