"""Accuracy and loss of a classifier."""

from __future__ import annotations

from hf_parcor.evaluation.metrics.over_labels import OverLabels


class ClassificationMetric(OverLabels):
    """Accuracy in [0, 1] and mean loss of a classifier, of sequences, tokens or images, over batches with labels.

    `accuracy` and `loss` are means over all items; the label −100 does not count.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or no label counts.
    """
