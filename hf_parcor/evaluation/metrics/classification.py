"""Accuracy and loss of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from hf_parcor.evaluation.gradients import count_items
from hf_parcor.evaluation.metrics.over_batches import OverBatches


class ClassificationMetric(OverBatches):
    """Accuracy in [0, 1] and mean loss of a classifier, of sequences, tokens or images, over batches with labels.

    `accuracy` and `loss` are means over all items; the label −100 does not count.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or no label counts.
    """

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return the sums over the items of one batch."""
        device = next(model.parameters()).device
        labels = self._labels(batch).to(device)
        output = model(**send_to_device(batch, device))
        correct = int((output.logits.argmax(-1) == labels).sum())
        items = count_items(batch)
        # The mean over no item is NaN.
        return {"correct": correct, "loss": float(output.loss) * items if items else 0.0, "items": items}

    def combine(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the means from the sums of all batches.

        Raises:
            ValueError: No label counts.
        """
        accuracy, loss = self._accuracy_and_loss(parts, "items")
        return {"accuracy": accuracy, "loss": loss}
