"""The smallest ε at which half of a metric is lost.

A script that `evaluate.load` reads: only that library imports it.
"""

from __future__ import annotations

import evaluate

from hf_parcor.metric_modules import information
from hf_parcor.records.curves import epsilon_at_half

_DESCRIPTION = "The smallest strength of parameter corruption at which half of the clean metric is lost."
_INPUTS = """
Args:
    epsilons (`list[float]`): Where the metric was measured, each > 0 and once.
    values (`list[float]`): The metric at each of them.
    clean (`float`): The metric without corruption.
    greater_is_better (`bool`): Whether a large metric is good; False for a loss, which has doubled then. Defaults to
        `True`.

Returns:
    `epsilon_at_half`: infinite where no measured ε is enough.
"""


class EpsilonAtHalf(evaluate.Metric):  # type: ignore[misc] # the library has no types
    """The smallest ε at which half of a metric is lost."""

    def _info(self) -> evaluate.MetricInfo:
        return information(_DESCRIPTION, _INPUTS, "epsilons", "values")

    def _compute(
        self, *, epsilons: list[float], values: list[float], clean: float, greater_is_better: bool = True
    ) -> dict[str, float]:
        found = epsilon_at_half(epsilons, values, clean=clean, greater_is_better=greater_is_better)
        return {"epsilon_at_half": found}
