"""Student's and Welch's two-sample t-tests, from values or from their summaries."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from hf_parcor.statistics._requirements import fraction, scipy_special
from hf_parcor.statistics.summary import MeanAndSpread


class Alternative(str, Enum):
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
        return -float(scipy_special("critical values").stdtrit(self.df, tail))


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
    special = scipy_special("t-tests")
    tail = (1.0 if extreme > 0 else 0.0) if math.isinf(extreme) else float(special.stdtr(df, extreme))
    p_value = 2 * tail if alternative is Alternative.TWO_SIDED else tail
    return TTest(t, df, p_value, difference, standard_error, alternative)
