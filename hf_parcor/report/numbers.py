"""Numbers as a report shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_parcor.report.study import Point


@dataclass(frozen=True)
class Numbers:
    """How values of a metric are written.

    Args:
        percent: Whether the metric is a share, shown in percent, its differences in points.
    """

    percent: bool

    def value(self, value: float) -> str:
        """Return a value of the metric.

        Examples:
            >>> Numbers(percent=True).value(0.8406), Numbers(percent=False).value(1.25)
            ('84.1', '1.25')
        """
        return _shown(100 * value, ".1f") if self.percent else _shown(value, ".4g")

    def with_unit(self, value: float) -> str:
        """Return a value with its unit."""
        return self.value(value) + (" %" if self.percent else "")

    def difference(self, value: float, *, sign: bool = False) -> str:
        """Return a difference with its unit.

        Examples:
            >>> Numbers(percent=True).difference(0.117, sign=True)
            '+11.7 points'
        """
        shown = (
            _shown(100 * value, "+.1f" if sign else ".1f")
            if self.percent
            else _shown(value, "+.4g" if sign else ".4g")
        )
        return shown + (" points" if self.percent else "")

    def point(self, point: Point) -> str:
        """Return a mean with its confidence interval, where there is one."""
        ends = point.interval
        shown = self.value(point.mean)
        return shown if ends is None else f"{shown} [{self.value(ends[0])}, {self.value(ends[1])}]"


def times(ratio: float) -> str:
    """Return a ratio, rounded as far as one would say it.

    Examples:
        >>> times(2.345), times(26.7)
        ('2.3', '27')
    """
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}"


def probability(value: float) -> str:
    """Return a p-value as a sentence says it.

    Examples:
        >>> probability(0.0312), probability(1e-9)
        ('p = 0.031', 'p < 0.001')
    """
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _shown(value: float, style: str) -> str:
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "−∞"}.get(str(value), "nan")
    text = format(value, style).replace("-", "−")
    return text.replace("−", "") if text.strip("+−0.") == "" else text
