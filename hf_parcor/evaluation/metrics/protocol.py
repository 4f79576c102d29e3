"""What a metric is that is made batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from hf_parcor.metric_info import MetricInfo


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


@runtime_checkable
class Identified(Protocol):
    """A metric, a loss or a score that says what decides its numbers, beside the data of a `BatchMetric`.

    A checkpoint goes on only where that is the same. Without this method, public attributes and code count.
    """

    def identity(self) -> Mapping[str, Any]:
        """Return the settings by name: plain values, and what is called, such as a score or a tokenizer."""
        ...


@runtime_checkable
class Informed(Protocol):
    """A metric or a score that says what its numbers mean.

    In place of the method, attributes `primary_metric`, `greater_is_better` and `unit` say it of one number.
    """

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean; None if that is not known."""
        ...
