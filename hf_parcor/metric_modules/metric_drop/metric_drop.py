"""How much worse a metric is under corruption.

A script that `evaluate.load` reads: only that library imports it.
"""

from __future__ import annotations

import evaluate

from hf_parcor.metric_modules import information
from hf_parcor.records.curves import metric_drop
from hf_parcor.statistics import sample_mean

_DESCRIPTION = "How much worse a metric is under parameter corruption, mean over trials."
_INPUTS = """
Args:
    clean (`list[float]`): The metric without corruption, for each trial.
    corrupted (`list[float]`): The metric under corruption, for each trial.
    greater_is_better (`bool`): Whether a large metric is good; False for a loss. Defaults to `True`.

Returns:
    `metric_drop`: the mean over trials of clean − corrupted, or of corrupted − clean for a loss.
"""


class MetricDrop(evaluate.Metric):  # type: ignore[misc] # the library has no types
    """How much worse a metric is under corruption."""

    def _info(self) -> evaluate.MetricInfo:
        return information(_DESCRIPTION, _INPUTS, "clean", "corrupted")

    def _compute(
        self, *, clean: list[float], corrupted: list[float], greater_is_better: bool = True
    ) -> dict[str, float]:
        drops = [
            metric_drop(*pair, greater_is_better=greater_is_better) for pair in zip(clean, corrupted, strict=True)
        ]
        return {"metric_drop": sample_mean(drops)}
