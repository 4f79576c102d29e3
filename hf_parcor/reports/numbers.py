"""Numbers as a report shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hf_parcor.records.evaluation import EvaluationRecord
from hf_parcor.records.metric_info import POINTS, SHARE, agreed, shown_unit


@dataclass(frozen=True)
class Numbers:
    """How values of a metric are written.

    Args:
        unit: As in `MetricInfo`: shares are shown in percent, their differences in points; "" for a plain number.
    """

    unit: str = ""

    def value(self, value: float) -> str:
        """Return a value of the metric.

        Examples:
            >>> Numbers("share").value(0.8406), Numbers("points").value(0.9), Numbers().value(1.25)
            ('84.1', '0.90', '1.25')
        """
        return self._written(value, "")

    def with_unit(self, value: float) -> str:
        """Return a value with its unit.

        Examples:
            >>> Numbers("share").with_unit(0.5), Numbers("points").with_unit(0.9), Numbers("nats").with_unit(1.25)
            ('50.0 %', '0.90 of 100', '1.25 nats')
        """
        return f"{self.value(value)} {shown_unit(self.unit)[1]}".rstrip()

    def difference(self, value: float, *, sign: bool = False) -> str:
        """Return a difference with its unit.

        Examples:
            >>> Numbers("share").difference(0.117, sign=True), Numbers("points").difference(1.5)
            ('+11.7 points', '1.50 points')
        """
        return f"{self.plain_difference(value, sign=sign)} {self.unit_of_differences}".rstrip()

    def plain_difference(self, value: float, *, sign: bool = False) -> str:
        """Return a difference without its unit, for a table whose head says it."""
        return self._written(value, "+" if sign else "")

    def head(self, metric: str) -> str:
        """Return the name of a metric with the unit of its values, as the head of a table or an axis says it.

        Examples:
            >>> Numbers("share").head("accuracy"), Numbers("points").head("bleu"), Numbers().head("score")
            ('accuracy (%)', 'bleu (of 100)', 'score')
        """
        shown = shown_unit(self.unit)[1]
        return f"{metric} ({shown})" if shown else metric

    @property
    def unit_of_differences(self) -> str:
        """The word after a difference; "" for none."""
        return "points" if self.unit in (SHARE, POINTS) else self.unit

    def _written(self, value: float, sign: str) -> str:
        style = {SHARE: ".1f", POINTS: ".2f"}.get(self.unit, ".4g")
        return _shown(shown_unit(self.unit)[0] * value, sign + style)

    def with_interval(self, mean: float, interval: tuple[float, float] | None) -> str:
        """Return a mean with its confidence interval, where there is one.

        Examples:
            >>> Numbers("share").with_interval(0.8, (0.75, 0.85)), Numbers("share").with_interval(0.8, None)
            ('80.0 [75.0, 85.0]', '80.0')
        """
        shown = self.value(mean)
        return shown if interval is None else f"{shown} [{self.value(interval[0])}, {self.value(interval[1])}]"

    def with_spread(self, mean: float, deviation: float) -> str:
        """Return a mean with its standard deviation, unless that is NaN, as it is of a single value.

        Examples:
            >>> Numbers("share").with_spread(0.8, 0.011), Numbers("share").with_spread(0.8, math.nan)
            ('80.0 ± 1.1', '80.0')
        """
        return self.value(mean) if math.isnan(deviation) else f"{self.value(mean)} ± {self.value(deviation)}"


def numbers_of(records: Iterable[EvaluationRecord], metric: str, unit: str | None = None) -> Numbers:
    """Return how values of a metric of several records are written; None for the unit that these say.

    Raises:
        ValueError: A record lacks the metric, or they state different things of it.
    """
    return Numbers(agreed([record.info(metric).stating(unit=unit) for record in records], metric).unit)


def metric_of(records: Iterable[EvaluationRecord], metric: str | None) -> str:
    """Return the metric to show: the one asked for, or the `usual_metric` of the first record, or else ""."""
    return next((record.usual_metric() for record in records), "") if metric is None else metric


def times(ratio: float) -> str:
    """Return a ratio, rounded as far as one would say it.

    Examples:
        >>> times(2.345), times(26.7), times(99.7)
        ('2.3', '27', '100')
    """
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:,.0f}"


def probability(value: float) -> str:
    """Return a p-value as a sentence says it.

    Examples:
        >>> probability(0.0312), probability(1e-9), probability(0.0496), probability(0.04998)
        ('p = 0.031', 'p < 0.001', 'p = 0.0496', 'p = 0.04998')
    """
    if value < 0.001:
        return "p < 0.001"
    digits = 2
    while f"{value:.{digits}g}" == "0.05" and value != 0.05:  # on which side of the usual level
        digits += 1
    return f"p = {value:.{digits}g}"


def _shown(value: float, style: str) -> str:
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "−∞"}.get(str(value), "nan")
    text = format(value, style).replace("-", "−")
    return text.replace("−", "") if text.strip("+−0.") == "" else text
