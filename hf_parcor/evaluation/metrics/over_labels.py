"""Accuracy and loss over all labels, of whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from hf_parcor.evaluation.gradients import count_items
from hf_parcor.evaluation.metrics.over_batches import OverBatches


class OverLabels(OverBatches):
    """How often the likeliest class is the label, and the mean loss of a label; the label −100 does not count."""

    def _shifts(self, model: nn.Module) -> bool:
        """Return whether a model predicts the label of the next place; here none does."""
        return False

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return the sums over the labels of one batch."""
        device = next(model.parameters()).device
        labels = self._labels(batch).to(device)
        output = model(**send_to_device(batch, device))
        predicted = output.logits.argmax(-1)
        shifted = self._shifts(model)
        if shifted:
            labels, predicted = labels[:, 1:], predicted[:, :-1]
        count = count_items(batch, shifted=shifted)
        return {
            "correct": int((predicted == labels).sum()),  # no class is −100
            "loss": float(output.loss) * count if count else 0.0,  # the mean over no label is NaN
            "labels": count,
        }

    def combine(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return `accuracy` and `loss` from the sums of all batches.

        Raises:
            ValueError: No label counts.
        """
        correct, loss, count = (sum(part[name] for part in parts) for name in ("correct", "loss", "labels"))
        if not count:
            raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
        return {"accuracy": correct / count, "loss": loss / count}
