"""Our measures as metrics of the library `evaluate`: folders that `evaluate.load` reads, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

__all__ = ["metric_module"]

_FOLDER = Path(__file__).parent


def metric_module(name: str) -> str:
    """Return the folder of a measure, for `evaluate.load(metric_module("metric_drop"))`, or to be pushed to the Hub.

    Args:
        name: "metric_drop", "area_under_robustness_curve" or "epsilon_at_half".

    Raises:
        ValueError: There is no such measure.

    Examples:
        >>> Path(metric_module("metric_drop")).name
        'metric_drop'
    """
    names = sorted(path.parent.name for path in _FOLDER.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"name: expected one of {', '.join(names)}, got {name!r}; name one of them")
    return str(_FOLDER / name)


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
