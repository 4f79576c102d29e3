"""Which labels of a batch count in its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


def count_labels(batch: Mapping[str, Any], *, shifted: bool = False) -> Tensor | None:
    """Return how many labels of a batch count in its loss, without waiting for the device; None if it has none.

    Of labels that are numbers, of a regression say, all count: −100.0 is one of them.

    Args:
        batch: With `labels`, or `shift_labels`, which are shifted already.
        shifted: Whether the loss leaves out the first label of every row, as that of a causal language model does.

    Examples:
        >>> import torch
        >>> batch = {"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}
        >>> int(count_labels(batch)), int(count_labels(batch, shifted=True))
        (3, 1)
        >>> int(count_labels({"labels": torch.tensor([-100.0, 20.5])}))
        2
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor):
        return None
    if shifted and "shift_labels" not in batch:
        labels = labels[..., 1:]
    counts = torch.ones_like(labels) if labels.is_floating_point() else labels != IGNORED_LABEL
    return counts.sum(dtype=torch.long)
