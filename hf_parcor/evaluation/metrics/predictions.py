"""What a classifier predicts, compared with the labels by any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from hf_parcor.evaluation.metrics.over_pairs import OverPairs
from hf_parcor.labels import IGNORED_LABEL


class PredictionMetric(OverPairs):
    """Predicted classes of all batches, of sequences, tokens or images, scored at once.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`; the label −100 does not count.
        score: Called as `score(predictions=..., references=...)` with lists of whole numbers, returns numbers by
            name: `evaluate.load("f1").compute`, of a name or a local folder, or a function around scikit-learn.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Sign(nn.Linear):
        ...     def forward(self, inputs, labels):
        ...         return SimpleNamespace(logits=torch.stack([-inputs, inputs], -1))
        >>> batches = [{"inputs": torch.tensor([-1.0, 2.0, 3.0]), "labels": torch.tensor([0, 1, 0])}]
        >>> def right(predictions, references):
        ...     return {"right": sum(p == r for p, r in zip(predictions, references))}
        >>> PredictionMetric(batches, right)(Sign(1, 1))
        {'right': 2.0}
    """

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return predicted classes and labels of one batch, where the labels count."""
        labels = self._labels(batch).cpu()
        logits = model(**send_to_device(batch, next(model.parameters()).device)).logits
        counts = labels != IGNORED_LABEL
        return logits.argmax(-1).cpu()[counts].tolist(), labels[counts].tolist()
