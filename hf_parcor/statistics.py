"""Is one training method better than another? Mean and spread of repeated runs, t-tests, Holm's correction.

Paper 2 ("Adversarial Parameter Defense by Multi-Step Risk Minimization", Appendix C) runs every method three times and
tests "Proposed ≤ Baseline" with Student's one-sided t-test: `student_t_test(proposed, baseline)` here.

SciPy is needed for probabilities and quantiles: `pip install "hf-parcor[statistics]"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from statistics import fmean, mean, stdev
from types import ModuleType


def exact_sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; where `math.fsum` refuses it, beyond the largest float or ∞ − ∞, as Python adds.

    Examples:
        >>> exact_sum([0.1] * 10), exact_sum([1e308, 1e308]), exact_sum([math.inf, -math.inf])
        (1.0, inf, nan)
    """
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


def sample_mean(values: Sequence[float]) -> float:
    """Return the mean, also of runs that broke: NaN without values, beside NaN, and where ∞ and −∞ meet.

    Examples:
        >>> sample_mean([0.25, 0.75]), sample_mean([1e308, 1e308]), sample_mean([1.0, math.inf])
        (0.5, 1e+308, inf)
    """
    if not values:
        return math.nan
    try:
        return fmean(values)
    except (OverflowError, ValueError):  # a sum beyond the largest float, or ∞ − ∞
        return sum(value / len(values) for value in values)


def sample_deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (n − 1); NaN for fewer than two values, and beside NaN or ∞.

    Examples:
        >>> sample_deviation([1.0, 3.0]), sample_deviation([1.0])
        (1.4142135623730951, nan)
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    try:
        return stdev(values)
    except OverflowError:  # larger than the largest float
        return math.inf


def scipy_module(name: str, purpose: str) -> ModuleType:
    """Return a module of SciPy, such as `special`, or say for what it is needed and how to get it.

    Raises:
        ImportError: SciPy is not installed.
    """
    try:
        import_module("scipy")
    except ImportError as error:
        raise ImportError(
            f"SciPy is needed for {purpose}; install it with: pip install 'hf-parcor[statistics]'"
        ) from error
    return import_module(f"scipy.{name}")


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN for fewer than three pairs, and where all values of one are alike.

    What is infinite is the largest; pairs with a NaN do not count.

    Raises:
        ImportError: SciPy is not installed.

    Examples:
        >>> rank_correlation([1.0, 2.0, 3.0], [0.1, 0.5, math.inf]), rank_correlation([1.0, 2.0], [1.0, 2.0])
        (1.0, nan)
    """
    pairs = [pair for pair in zip(first, second, strict=True) if not any(map(math.isnan, pair))]
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return math.nan
    stats = scipy_module("stats", "rank correlations")
    return float(stats.spearmanr([one for one, _ in pairs], [other for _, other in pairs]).statistic)


def fraction(name: str, value: float) -> float:
    """Return `value` if it lies strictly between 0 and 1, else raise `ValueError`."""
    if not 0 < value < 1:
        raise ValueError(f"expected 0 < {name} < 1, got {value}; pass a fraction, not percent")
    return value


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
        quantile = scipy_module("special", "confidence intervals").stdtrit(self.n - 1, (1 + level) / 2)
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


class Alternative(StrEnum):
    """What a test claims about the means of the first and the second sample."""

    GREATER = "greater"
    LESS = "less"
    TWO_SIDED = "two-sided"


@dataclass(frozen=True)
class TTest:
    """Result of a two-sample t-test.

    If neither sample has any spread, t is ±inf, or 0 for equal means, as in the limit of a vanishing spread: p is 0 or
    1 for unequal means, 0.5 (two-sided 1) for equal ones, and never NaN. `standard_error == 0` marks such a
    result; it says that the runs did not differ (one seed? a coarse metric?) rather than that the evidence is perfect.

    Attributes:
        t: Difference of the means (first − second) over its standard error.
        df: Degrees of freedom; not a whole number for Welch's test.
        p_value: Probability of a t at least as extreme if the null hypothesis holds.
        mean_difference: First mean − second mean, in the units of the metric.
        standard_error: Standard error of that difference, same units.
        alternative: The claim tested.
    """

    t: float
    df: float
    p_value: float
    mean_difference: float
    standard_error: float
    alternative: Alternative

    def is_significant(self, level: float = 0.05) -> bool:
        """Return whether the null hypothesis is rejected at `level`: `p_value < level`."""
        return self.p_value < fraction("level", level)

    def critical_value(self, level: float = 0.05) -> float:
        """Return the |t| from which on the result is significant at `level`, in the direction claimed."""
        tail = fraction("level", level) / (2 if self.alternative is Alternative.TWO_SIDED else 1)
        return -float(scipy_module("special", "critical values").stdtrit(self.df, tail))


def student_t_test(
    first: MeanAndSpread | Iterable[float],
    second: MeanAndSpread | Iterable[float],
    alternative: Alternative = Alternative.GREATER,
) -> TTest:
    """Test two means by Student's t-test with pooled variance; by default the null hypothesis is first ≤ second.

    ::

        t = (m₁ − m₂) / (s √(1/n₁ + 1/n₂)),   s² = ((n₁−1)s₁² + (n₂−1)s₂²) / df,   df = n₁ + n₂ − 2

    It assumes equal variances. With n₁ = n₂ = 3 this is the test of paper 2, Appendix C: df = 2(n−1) = 4, critical
    value 2.132 at level 0.05. Of the 21 finite t-values in its Table C.7, 8 follow from the printed means and
    deviations, 10 follow from those of the other method (the rows of ACRT and AWP are exchanged), and 3 from neither.

    Args:
        first: Values of repeated runs, or their summary.
        second: The same for what it is compared with.
        alternative: The claim; GREATER is the paper's.

    Raises:
        ValueError: Fewer than 2 values on a side, or a value that is not finite.
        ImportError: SciPy is not installed.

    Examples:
        >>> test = student_t_test(MeanAndSpread(96.34, 0.076, n=3), MeanAndSpread(94.46, 0.164, n=3))
        >>> round(test.t, 2), test.df, round(test.critical_value(), 3), test.is_significant()
        (18.01, 4.0, 2.132, True)
    """
    one, two = _summary(first), _summary(second)
    df = one.n + two.n - 2
    pooled = math.hypot(
        one.standard_deviation * math.sqrt((one.n - 1) / df), two.standard_deviation * math.sqrt((two.n - 1) / df)
    )
    return _t_test(one, two, pooled * math.sqrt(1 / one.n + 1 / two.n), float(df), alternative)


def welch_t_test(
    first: MeanAndSpread | Iterable[float],
    second: MeanAndSpread | Iterable[float],
    alternative: Alternative = Alternative.GREATER,
) -> TTest:
    """Test two means by Welch's t-test, which allows unequal variances; the safer choice for methods that differ.

    ::

        t = (m₁ − m₂) / √(v₁ + v₂),   v = s²/n,   df = (v₁ + v₂)² / (v₁²/(n₁−1) + v₂²/(n₂−1))

    With no spread at all df is 0/0 and is set to its lower bound, min(n₁, n₂) − 1; p does not depend on it then.
    Arguments and errors are those of `student_t_test`.

    Examples:
        >>> test = welch_t_test(MeanAndSpread(92.78, 0.18, n=3), MeanAndSpread(92.03, 0.55, n=3))  # paper 2, SST-2
        >>> round(test.t, 2), round(test.df, 2), test.is_significant()
        (2.24, 2.42, False)
    """
    one, two = _summary(first), _summary(second)
    error = math.hypot(one.standard_error, two.standard_error)
    df = float(min(one.n, two.n) - 1)
    if error > 0:
        df = 1 / ((one.standard_error / error) ** 4 / (one.n - 1) + (two.standard_error / error) ** 4 / (two.n - 1))
    return _t_test(one, two, error, df, alternative)


def _summary(sample: MeanAndSpread | Iterable[float]) -> MeanAndSpread:
    return sample if isinstance(sample, MeanAndSpread) else MeanAndSpread.from_values(sample)


def _t_test(
    one: MeanAndSpread, two: MeanAndSpread, standard_error: float, df: float, alternative: Alternative
) -> TTest:
    """Put the pieces together; a standard error of zero is the limit from above."""
    alternative = Alternative(alternative)
    difference = one.mean - two.mean
    if difference == 0:
        t = 0.0
    else:
        t = difference / standard_error if standard_error > 0 else math.copysign(math.inf, difference)
    extreme = {Alternative.GREATER: -t, Alternative.LESS: t, Alternative.TWO_SIDED: -abs(t)}[alternative]
    special = scipy_module("special", "t-tests")
    tail = (1.0 if extreme > 0 else 0.0) if math.isinf(extreme) else float(special.stdtr(df, extreme))
    p_value = 2 * tail if alternative is Alternative.TWO_SIDED else tail
    return TTest(t, df, p_value, difference, standard_error, alternative)


def holm_correction(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p-values adjusted for multiple comparisons by Holm's step-down method, in the order given.

    ::

        adjusted_(i) = max_{j <= i} min(1, (m − j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    Rejecting where the adjusted value is below a level keeps the chance of *any* false rejection below that level,
    however the tests depend on each other. (`scipy.stats.false_discovery_control` bounds another, weaker quantity.)

    Raises:
        ValueError: A p-value is not between 0 and 1.

    Examples:
        >>> [round(p, 3) for p in holm_correction([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"expected p-values in [0, 1], got {p}; pass TTest.p_value, not t")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)
