"""One pass of a defended step: the Trainer's own training step, with another objective."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_parcor.defenses import Objective
from hf_parcor.training.books import books_closed
from hf_parcor.training.overriding import overriding
from hf_parcor.training.running_statistics import frozen_running_statistics


def passes_of(
    trainer: Trainer, stock_step: Callable[[Any], Tensor], model: nn.Module, inputs: dict[str, Tensor | Any]
) -> Callable[[Objective, int], Tensor]:
    """Return `run_pass(objective, index)`, which runs the stock step on one batch with this objective of its loss.

    All passes see the same prepared batch. Only the pass of index 0 moves BatchNorm's running statistics and the
    numbers that the Trainer counts itself; index −1 is a run that is not finished.

    Args:
        trainer: The Trainer.
        stock_step: From a batch to the detached loss: forward and backward.
        model: The model as the Trainer wrapped it.
        inputs: The batch, which is not changed.
    """
    compute_loss, prepare_inputs = trainer.compute_loss, trainer._prepare_inputs
    prepared: list[Any] = []

    def prepare_once(batch: Any) -> Any:
        # A Trainer may augment or generate here: all passes are to see the same batch.
        if not prepared:
            prepared.append(prepare_inputs(batch))
        return copy.copy(prepared[0])  # compute_loss pops the labels

    def run_pass(objective: Objective, index: int) -> Tensor:
        def compute_objective(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            if isinstance(result, tuple):
                return (_scaled(trainer, objective, result[0]), *result[1:])
            return _scaled(trainer, objective, result)

        with ExitStack() as stack:
            stack.enter_context(overriding(trainer, compute_loss=compute_objective, _prepare_inputs=prepare_once))
            if index > 0:
                stack.enter_context(frozen_running_statistics(model))
            if index != 0:
                stack.enter_context(books_closed(trainer))
            return stock_step(copy.copy(inputs))

    return run_pass


def _scaled(trainer: Trainer, objective: Objective, loss: Tensor) -> Tensor:
    scaler = trainer.accelerator.scaler
    if scaler is None:
        return objective(loss)
    # An objective may differentiate the loss itself, and in float16 that inner gradient needs the scale too:
    # without it a penalty's gradient was off by 90 %. Objectives are homogeneous, so the scale comes out again.
    scale: Tensor = scaler.scale(loss.new_ones(()))
    return objective(loss * scale) / scale
