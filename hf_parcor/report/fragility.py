"""Fragility: how much more a group loses than the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping
from typing import TypeVar

Group = TypeVar("Group", bound=Hashable)


def fragility(drops: Mapping[Group, float]) -> dict[Group, float]:
    """Return how many times as much each group loses as the median of the other groups.

    ::

        fragility(g) = d(g) / median_{h ≠ g} d(h),    d(g) = mean of the metric drop over the common strengths

    All strengths count alike, and none is picked after the fact. Where the other groups lose nothing it is ∞ for a
    group that loses something, and NaN for one that does not.

    Args:
        drops: d by the name of the group; finite, two or more.

    Raises:
        ValueError: There are fewer than two groups.

    Examples:
        >>> fragility({"layer.0": 0.5, "layer.1": 1.0, "layer.2": 20.0})["layer.2"]
        26.666666666666668
        >>> fragility({"layer.0": 0.0, "layer.1": 0.5})
        {'layer.0': 0.0, 'layer.1': inf}
    """
    if len(drops) < 2:
        raise ValueError(f"drops: expected two or more groups, got {len(drops)}; fragility compares groups")
    return {group: _ratio(drop, others_median(drops, group)) for group, drop in drops.items()}


def others_median(drops: Mapping[Group, float], group: Group) -> float:
    """Return the median over all groups but one.

    Examples:
        >>> others_median({"a": 1.0, "b": 2.0, "c": 9.0}, "c")
        1.5
    """
    return statistics.median(drop for other, drop in drops.items() if other != group)


def _ratio(drop: float, median: float) -> float:
    if median > 0:
        return drop / median
    return math.inf if drop > 0 else math.nan
