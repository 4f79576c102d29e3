"""What `evaluate` wants to know of a metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate


def information(description: str, inputs: str, *columns: str) -> evaluate.MetricInfo:
    """Return what a metric says of itself: in words, and which of its inputs are columns of numbers."""
    import datasets
    import evaluate

    number = datasets.Value("float64")
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=inputs,
        features=datasets.Features(dict.fromkeys(columns, number)),
    )
