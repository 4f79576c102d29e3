"""What all metrics that are made batch by batch share: the data, and the walk through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_parcor.evaluation.attributes import fixed_attributes
from hf_parcor.evaluation.walks import check_repeatable
from hf_parcor.metric_info import MetricInfo


class OverBatches(ABC):
    """A `BatchMetric` over data that can be walked through again and again.

    The model is measured in the mode that it is in; `CorruptionEvaluator` puts it into evaluation mode.

    Args:
        batches: Mappings of tensors, a list or a `DataLoader`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, or they can be walked through only once.
    """

    _infos: ClassVar[Mapping[str, MetricInfo]] = {}

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, progress: bool = False) -> None:
        check_repeatable(batches)
        if not any(True for _ in batches):
            raise ValueError("batches: expected at least one batch of data, got none; is the data set empty?")
        self._batches, self._progress = batches, progress

    @property
    def batches(self) -> Iterable[Mapping[str, Any]]:
        """The data."""
        return self._batches

    def identity(self) -> dict[str, Any]:
        """Return what decides the numbers beside data and class: all attributes that are set once."""
        apart = ("_batches", "_progress")
        return {name.lstrip("_"): value for name, value in fixed_attributes(self).items() if name not in apart}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean; None for one that this metric does not know."""
        return self._infos.get(name)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics over all batches."""
        walk = tqdm(self._batches, desc="metric", leave=False, disable=not self._progress)
        return self.combine([self.of_batch(model, batch) for batch in walk])

    @staticmethod
    def _labels(batch: Mapping[str, Any]) -> Tensor:
        """Return the labels of a batch.

        Raises:
            ValueError: It has none.
        """
        if "labels" not in batch:
            raise ValueError(f"batches: expected labels in each, got {', '.join(batch)}; put 'labels' into them")
        return torch.as_tensor(batch["labels"])

    @abstractmethod
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return what one batch adds."""

    @abstractmethod
    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return the metrics from what all batches add, in their order."""
