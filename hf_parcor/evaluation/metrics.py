"""Metrics that need no other library: callables from a model to numbers by name, and those made batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from hf_parcor.evaluation.gradients import check_repeatable, count_items


@runtime_checkable
class BatchMetric(Protocol):
    """A metric that is made from what it finds on single batches, so that many models can be measured on each.

    `CorruptionEvaluator` runs what does not depend on the corrupted weights once a batch for all corruptions, and
    several processes each take every n-th batch; what a batch adds is pickled then.
    """

    @property
    def batches(self) -> Iterable[Mapping[str, Any]]:
        """The data."""
        ...

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """Return the metrics over all batches."""
        ...

    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return what one batch adds."""
        ...

    def combine(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return the metrics from what all batches add, in their order."""
        ...


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

    @property
    def batches(self) -> Iterable[Mapping[str, Any]]:
        """The data."""
        return self._batches

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return `accuracy` in [0, 1] and `loss`, both means over all items."""
        walk = tqdm(self._batches, desc="accuracy", leave=False, disable=not self._progress)
        return self.combine([self.of_batch(model, batch) for batch in walk])

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return the sums over the items of one batch."""
        device = next(model.parameters()).device
        output = model(**send_to_device(batch, device))
        correct = int((output.logits.argmax(-1) == batch["labels"].to(device)).sum())
        items = count_items(batch)
        # The mean over no item is NaN.
        return {"correct": correct, "loss": float(output.loss) * items if items else 0.0, "items": items}

    def combine(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the means from the sums of all batches.

        Raises:
            ValueError: No label counts.
        """
        correct, loss, items = (sum(part[key] for part in parts) for key in ("correct", "loss", "items"))
        if not items:
            raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
        return {"accuracy": correct / items, "loss": loss / items}
