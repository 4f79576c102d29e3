"""Golden-section search for the maximum of a unimodal function."""

from __future__ import annotations

import math
from collections.abc import Callable

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def golden_section_maximum(
    function: Callable[[float], float], low: float, high: float, evaluations: int
) -> list[tuple[float, float]]:
    r"""Return the points where a function was evaluated on its way to its maximum, with their values.

    .. math:: \arg\max_x \; f(x) \quad \text{such that} \quad l \le x \le h

    Of two inner points the worse one becomes the interval's new end, and one new point is evaluated: each evaluation
    after the second leaves 0.618 of the interval. For f that rises and then falls, the maximum stays inside. NaN
    counts as worse than any number. The same function takes the same path, however often it is called.

    Args:
        function: f; a noisy one can lead astray.
        low: l.
        high: h, above l.
        evaluations: How often f may be evaluated, at least 2.

    Raises:
        ValueError: The interval is empty or not finite, or there are less than two evaluations.

    Examples:
        >>> points = golden_section_maximum(lambda x: -((x - 2) ** 2), 0.0, 5.0, evaluations=12)
        >>> x, value = max(points, key=lambda point: point[1])
        >>> round(x, 1)
        2.0
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"interval: expected finite low < high, got {low} and {high}; give a range to search")
    if evaluations < 2:
        raise ValueError(f"evaluations: expected 2 or more, got {evaluations}; one point says nothing about a maximum")
    visited = []

    def evaluate(x: float) -> float:
        value = function(x)
        visited.append((x, value))
        return -math.inf if math.isnan(value) else value

    left, right = high - GOLDEN_RATIO * (high - low), low + GOLDEN_RATIO * (high - low)
    left_value, right_value = evaluate(left), evaluate(right)
    while len(visited) < evaluations:
        if left_value >= right_value:
            high, right, right_value = right, left, left_value
            left = high - GOLDEN_RATIO * (high - low)
            left_value = evaluate(left)
        else:
            low, left, left_value = left, right, right_value
            right = low + GOLDEN_RATIO * (high - low)
            right_value = evaluate(right)
    return visited
