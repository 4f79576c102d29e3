"""Metrics that need no other library: callables from a model to numbers by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from hf_parcor.evaluation.gradients import check_repeatable, count_items


class ClassificationMetric:
    """Accuracy and mean loss of a classifier, of sequences or of tokens, over batches with labels.

    The model is measured in the mode that it is in; `CorruptionEvaluator` puts it into evaluation mode.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`; the label −100 does not count.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or no label counts.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, progress: bool = False) -> None:
        check_repeatable(batches)
        if not any(True for _ in batches):
            raise ValueError("batches: expected at least one batch of data, got none; is the data set empty?")
        self._batches, self._progress = batches, progress

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return `accuracy` in [0, 1] and `loss`, both means over all items."""
        device = next(model.parameters()).device
        correct, items = 0, 0
        loss = torch.zeros((), dtype=torch.float64)
        for batch in tqdm(self._batches, desc="accuracy", leave=False, disable=not self._progress):
            output = model(**send_to_device(batch, device))
            labels = batch["labels"].to(device)
            correct += int((output.logits.argmax(-1) == labels).sum())
            counted = count_items(batch)
            if counted:  # the mean over no item is NaN
                loss += output.loss.double().cpu() * counted
            items += counted
        if not items:
            raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
        return {"accuracy": correct / items, "loss": float(loss) / items}
