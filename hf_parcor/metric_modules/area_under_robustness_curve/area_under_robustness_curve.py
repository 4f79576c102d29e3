"""Area under a metric as a function of ε.

A script that `evaluate.load` reads: only that library imports it.
"""

from __future__ import annotations

import evaluate

from hf_parcor.metric_modules import information
from hf_parcor.records.curves import area_under_curve

_DESCRIPTION = "Area under a metric as a function of the strength of parameter corruption, as a share of its range."
_INPUTS = """
Args:
    epsilons (`list[float]`): Where the metric was measured, each > 0 and once.
    values (`list[float]`): The metric at each of them.
    clean (`float`): The metric without corruption.

Returns:
    `area_under_robustness_curve`: the mean metric from 0 to the largest ε, by straight lines between the points.
"""


class AreaUnderRobustnessCurve(evaluate.Metric):  # type: ignore[misc] # the library has no types
    """Area under a metric as a function of ε."""

    def _info(self) -> evaluate.MetricInfo:
        return information(_DESCRIPTION, _INPUTS, "epsilons", "values")

    def _compute(self, *, epsilons: list[float], values: list[float], clean: float) -> dict[str, float]:
        return {"area_under_robustness_curve": area_under_curve(epsilons, values, clean=clean)}
