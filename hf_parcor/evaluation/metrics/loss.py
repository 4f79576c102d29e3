"""The mean loss alone, for data without any other metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from hf_parcor.evaluation.losses import Batch, Loss, item_counter, model_loss
from hf_parcor.evaluation.metrics.over_batches import OverBatches
from hf_parcor.evaluation.outputs import own_batch
from hf_parcor.records.metric_info import MetricInfo


class LossMetric(OverBatches):
    """The mean loss over all items of the batches, the one that gradients are taken of.

    Args:
        batches: Whatever the loss takes, a list or a `DataLoader`.
        loss: `loss(model, batch)` returns the mean loss of a batch; the default takes the model's own.

    Raises:
        ValueError: There are no batches, or they can be walked through only once.

    Examples:
        >>> square = LossMetric(
        ...     [torch.ones(3, 1), torch.zeros(1, 1)], lambda model, batch: model(batch).square().mean()
        ... )
        >>> square(nn.Identity())
        {'loss': 0.75}
    """

    _infos: ClassVar[Mapping[str, MetricInfo]] = {"loss": MetricInfo(False)}

    def __init__(self, batches: Iterable[Batch], loss: Loss = model_loss) -> None:
        super().__init__(batches)
        self._loss = loss

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Batch) -> tuple[float, int]:
        """Return the sum of the loss over one batch, and how many items it has."""
        items = item_counter(model, self._loss)(batch)
        if not items:  # the mean over none is NaN
            return 0.0, 0
        return items * float(self._loss(model, own_batch(batch, model))), items

    def combine(self, parts: Sequence[tuple[float, int]]) -> dict[str, float]:
        """Return `loss` from what all batches add.

        Raises:
            ValueError: No item counts.
        """
        items = sum(count for _, count in parts)
        if not items:
            raise ValueError("batches: expected at least one item with a label, got none; is the data set empty?")
        return {"loss": sum(loss for loss, _ in parts) / items}
