"""One pass of a defended step: the Trainer's own training step, with another objective."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_parcor.defenses import Defense, Objective
from hf_parcor.sharding import is_sharded
from hf_parcor.training.batch_part import first_examples, items_of_part
from hf_parcor.training.books import books_closed
from hf_parcor.training.data_parallel import unfinished_forward
from hf_parcor.training.loss_scale import scaled
from hf_parcor.training.overriding import overriding
from hf_parcor.training.running_statistics import frozen_running_statistics


def passes_of(
    trainer: Trainer,
    stock_step: Callable[..., Tensor],
    defense: Defense,
    model: nn.Module,
    inputs: dict[str, Tensor | Any],
    num_items_in_batch: Tensor | int | None = None,
    *,
    reduced_later: bool = False,
) -> Callable[[Objective, int], Tensor]:
    """Return `run_pass(objective, index)`, which runs the stock step on one batch with this objective of its loss.

    All passes see the same prepared batch, or the part of it that the defense asks for. Only the pass of index 0 moves
    BatchNorm's running statistics, and only the first one over the whole batch the numbers that the Trainer counts
    itself; index −1 is a run that is not finished. Under DDP the last pass alone reduces gradients, if the Trainer's
    loop reduces any after this batch: those of all passes, which `.grad` holds.

    Args:
        trainer: The Trainer.
        stock_step: Its `training_step`, forward and backward, which returns the detached loss.
        defense: It says how many passes there are, and which share of the batch each sees.
        model: The model as the Trainer wrapped it.
        inputs: The batch, which is not changed.
        num_items_in_batch: As `training_step` got it.
        reduced_later: Not even the last pass reduces gradients: more are to come.
    """
    compute_loss, prepare_inputs = trainer.compute_loss, trainer._prepare_inputs
    counting = next(index for index in range(defense.passes) if defense.share_of_batch(index) == 1)
    shifted = getattr(trainer, "_loss_shifts_labels", False)  # as Transformers counts, since 5.20
    prepared: list[Any] = []

    def run_pass(objective: Objective, index: int) -> Tensor:
        share = 1.0 if index < 0 else defense.share_of_batch(index)

        def compute_objective(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            if isinstance(result, tuple):
                return (scaled(trainer.accelerator, objective, result[0]), *result[1:])
            return scaled(trainer.accelerator, objective, result)

        def prepare_once(batch: Any) -> Any:
            # A Trainer may augment or generate here: all passes are to see the same batch.
            if not prepared:
                prepared.append(prepare_inputs(batch))
            return copy.copy(first_examples(prepared[0], share))  # compute_loss pops the labels

        with ExitStack() as stack:
            if not is_sharded(model) and (reduced_later or index < defense.passes - 1):
                stack.enter_context(trainer.accelerator.no_sync(model))
            if index < 0:
                stack.enter_context(unfinished_forward(model))
            stack.enter_context(overriding(trainer, compute_loss=compute_objective, _prepare_inputs=prepare_once))
            if index > 0:
                stack.enter_context(frozen_running_statistics(model))
            if index != counting:
                stack.enter_context(books_closed(trainer))
            items = items_of_part(num_items_in_batch, inputs, share, shifted)
            return stock_step(model, copy.copy(inputs), items)

    return run_pass
