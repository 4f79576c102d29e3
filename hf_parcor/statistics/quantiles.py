"""A quantile of repeated measurements, with an interval that assumes nothing of their distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hf_parcor.statistics._requirements import fraction, scipy_special


@dataclass(frozen=True)
class QuantileWithInterval:
    """A quantile of a sample, and the two values of the sample between which the true one lies.

    The number of values below the true quantile at p is binomial, B(n, p), whatever they are distributed like. So the
    interval reaches from the l-th to the (h+1)-th smallest value, where l and h are the quantiles of B(n, p) at
    (1 ∓ level)/2. With too few values for that an end is the sample's own, and the level is not reached.

    Args:
        p: which quantile, a share.
        value: that of the sample, between two values in a line.
        low: lower end of the interval.
        high: upper end of the interval.

    Example:
        >>> median = QuantileWithInterval.from_values(range(101), 0.5)
        >>> median.value, median.low, median.high
        (50.0, 40.0, 60.0)
    """

    p: float
    value: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Iterable[float], p: float, level: float = 0.95) -> QuantileWithInterval:
        """Return the quantile of values, and its two-sided interval.

        Raises:
            ValueError: there is no value or one that is NaN, or p or the level is not between 0 and 1.
            ImportError: SciPy is not installed.
        """
        fraction("p", p)
        fraction("level", level)
        ordered = sorted(float(value) for value in values)
        if not ordered or any(math.isnan(value) for value in ordered):
            raise ValueError(f"expected one number or more, and no NaN, got {len(ordered)}; leave out what diverged")
        last = len(ordered) - 1
        place = p * last
        below = math.floor(place)
        low, high = (_binomial_quantile(tail, len(ordered), p) for tail in ((1 - level) / 2, (1 + level) / 2))
        return cls(
            p,
            _between(ordered[below], ordered[min(below + 1, last)], place - below),
            ordered[max(low - 1, 0)],
            ordered[min(high, last)],
        )


def _between(left: float, right: float, share: float) -> float:
    """Return the point of a line, reckoned from its nearer end as PyTorch does."""
    if share == 0 or left == right or math.isinf(left):
        return left
    return left + share * (right - left) if share < 0.5 else right - (1 - share) * (right - left)


def _binomial_quantile(probability: float, n: int, p: float) -> int:
    """Return the smallest k with P(B(n, p) <= k) >= probability."""
    special = scipy_special("intervals of quantiles")
    k: int = max(math.ceil(special.bdtrik(probability, n, p)), 0)
    smaller_is_enough = k > 0 and special.bdtr(k - 1, n, p) >= probability
    return k - 1 if smaller_is_enough else k
