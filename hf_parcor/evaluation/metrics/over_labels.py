"""Accuracy and loss over all labels, of whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.evaluation.metrics.answers import Answer, aligned
from hf_parcor.evaluation.metrics.finite import chosen_class, share_not_finite
from hf_parcor.evaluation.metrics.over_batches import OverBatches
from hf_parcor.labels import IGNORED_LABEL


class OverLabels(OverBatches):
    """How often the likeliest class is the label, and the mean loss of a label; the label −100 does not count."""

    def _shifts(self, model: nn.Module) -> bool:
        """Return whether a model predicts the label of the next place; here none does."""
        return False

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the sums over the labels of one batch.

        Raises:
            ValueError: There are no labels, the model returns no loss or no logits, or the labels have not the shape
                of what it predicts.
        """
        answer = Answer.of(model, batch)
        return self._classes(model, answer, answer.checked_logits(), self._labels(batch), batch)

    def _classes(
        self, model: nn.Module, answer: Answer, logits: Tensor, labels: Tensor, batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        predicted, finite = chosen_class(logits)
        shifts = self._shifts(model)
        if shifts and "shift_labels" in batch:  # shifted already, and what the loss is taken of
            shifts, labels = False, torch.as_tensor(batch["shift_labels"])
        labels = aligned(labels.to(logits.device), predicted, "a class for each")
        if shifts:
            labels, predicted, finite = labels[..., 1:], predicted[..., :-1], finite[..., :-1]
        counts = labels != IGNORED_LABEL
        count = int(counts.sum())
        return {
            "correct": int(((predicted == labels) & finite & counts).sum()),
            "loss": answer.mean_loss() * count if count else 0.0,  # the mean over no label is NaN
            "labels": count,
            "not_finite": int((counts & ~finite).sum()),
        }

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return `accuracy` and `loss` from the sums of all batches, and the share that was not finite if any was.

        Raises:
            ValueError: No label counts.
        """
        correct, not_finite = sum_of(parts, "correct"), sum_of(parts, "not_finite")
        return {"accuracy": correct / label_count(parts), **mean_loss(parts), **share(not_finite, parts)}


def sum_of(parts: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the sum over batches."""
    return sum(part[name] for part in parts)


def label_count(parts: Sequence[Mapping[str, Any]]) -> int:
    """Return how many labels count.

    Raises:
        ValueError: None does.
    """
    count = int(sum_of(parts, "labels"))
    if not count:
        raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
    return count


def mean_loss(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over all labels, as `loss`."""
    return {"loss": sum_of(parts, "loss") / label_count(parts)}


def share(count: int, parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return which share of the labels that is, as a metric names what was not finite."""
    return share_not_finite(count, label_count(parts))
