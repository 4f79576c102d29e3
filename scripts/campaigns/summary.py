"""Repeated measurements as tables of campaigns show them."""

from __future__ import annotations

from collections.abc import Sequence

from hf_parcor.statistics import MeanAndSpread


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return mean ± sample standard deviation, or the single value.

    Examples:
        >>> mean_and_deviation([1.0, 2.0], 2), mean_and_deviation([1.5], 1)
        ('1.50 ± 0.71', '1.5')
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    spread = MeanAndSpread.from_values(values)
    return f"{spread.mean:.{digits}f} ± {spread.standard_deviation:.{digits}f}"
