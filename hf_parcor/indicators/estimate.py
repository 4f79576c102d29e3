"""A number known from random samples, with its error."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from hf_parcor.statistics import MeanAndSpread


@dataclass(frozen=True)
class Estimate:
    """The mean of independent samples, and how far it may be off.

    Attributes:
        values: The samples; NaN is kept.

    Examples:
        >>> trace = Estimate((2.0, 4.0, 3.0))
        >>> trace.mean, round(trace.standard_error, 3)
        (3.0, 0.577)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean; NaN without samples, or beside NaN."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def standard_deviation(self) -> float:
        """Sample standard deviation of the values (n − 1); NaN for fewer than two, and beside NaN or ∞."""
        finite = all(math.isfinite(value) for value in self.values)
        return statistics.stdev(self.values) if finite and len(self.values) > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """Standard deviation of the mean, s/√n; NaN where there is no s."""
        return self.standard_deviation / math.sqrt(max(len(self.values), 1))

    def confidence_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided interval of the mean by Student's t distribution.

        Raises:
            ValueError: There are fewer than two samples, one is not finite, or the level is not between 0 and 1.
            ImportError: SciPy is not installed.
        """
        return MeanAndSpread.from_values(self.values).confidence_interval(level)

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate of a multiple."""
        return Estimate(tuple(factor * value for value in self.values))
