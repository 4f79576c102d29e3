"""Repeated measurements of one quantity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

from hf_parcor.statistics._requirements import fraction, scipy_special


@dataclass(frozen=True)
class MeanAndSpread:
    """Mean and sample standard deviation of n repeated measurements.

    Args:
        mean: Arithmetic mean of the n values.
        standard_deviation: Sample standard deviation, with n − 1 in the denominator, in the units of the mean.
        n: Number of values, at least 2; one value has no spread.

    Raises:
        ValueError: n is below 2, the deviation is negative, or a number is not finite.

    Examples:
        >>> bleu = MeanAndSpread.from_values([35.82, 35.89, 35.93])
        >>> f"{bleu.mean:.2f} ± {bleu.standard_deviation:.3f}"
        '35.88 ± 0.056'
        >>> [round(end, 2) for end in bleu.confidence_interval()]
        [35.74, 36.02]
    """

    mean: float
    standard_deviation: float
    n: int

    def __post_init__(self) -> None:
        _require_two(self.n)
        _require_finite(self.mean, self.standard_deviation)
        if self.standard_deviation < 0:
            raise ValueError(f"expected a standard deviation >= 0, got {self.standard_deviation}; check its sign")

    @classmethod
    def from_values(cls, values: Iterable[float]) -> MeanAndSpread:
        """Summarise values; sums are exact, so equal values have a spread of exactly zero."""
        numbers = [float(value) for value in values]
        _require_two(len(numbers))
        _require_finite(*numbers)
        return cls(mean(numbers), stdev(numbers), len(numbers))

    @property
    def standard_error(self) -> float:
        """Standard deviation of the mean, s/√n."""
        return self.standard_deviation / math.sqrt(self.n)

    def confidence_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return `mean ∓ t_{(1+level)/2, n−1} · s/√n`, the two-sided interval by Student's t distribution.

        Raises:
            ValueError: level is not between 0 and 1.
            ImportError: SciPy is not installed.
        """
        fraction("level", level)
        quantile = scipy_special("confidence intervals").stdtrit(self.n - 1, (1 + level) / 2)
        half_width = float(quantile) * self.standard_error
        return self.mean - half_width, self.mean + half_width


def _require_two(n: int) -> None:
    if n < 2:
        raise ValueError(f"expected at least 2 values, got {n}; repeat the run with another seed")


def _require_finite(*numbers: float) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(
                f"expected finite numbers, got {number}; a run that diverged has no score: leave it out, and say so"
            )
