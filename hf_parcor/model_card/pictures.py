"""The pictures beside a card: the metric against the strength of each corruption, and which part is weak."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from hf_parcor.evaluation.records import EvaluationRecord
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.plots import plot_comparison, plot_heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = "robustness.png"
HEAT_MAP = "robustness_heat_map.png"
_LONGEST_NAME = 40  # as many letters as have room below the smallest picture


def pictures_of(facts: ModelFacts) -> dict[str, bytes]:
    """Return the pictures as PNG, by path: the same bytes for the same facts and version of Matplotlib.

    Where nothing was corrupted there is no curve, and where nothing was probed no heat map.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    pictures = {}
    if facts.corruptions:
        pictures[CURVES] = _png(_curves(facts))
    if facts.probe is not None:
        sweeps, info = {"": facts.probe.record}, facts.info
        heat_map = plot_heat_map(sweeps, facts.metric, greater_is_better=info.greater_is_better, unit=info.unit)
        pictures[HEAT_MAP] = _png(heat_map)
    return pictures


def _curves(facts: ModelFacts) -> Figure:
    record = EvaluationRecord(
        facts.name,
        facts.target,
        facts.parameters,
        facts.clean.as_record(),
        tuple(row.as_record() for row in facts.corruptions),
        metric_info={facts.metric: facts.info},
    )
    name = facts.name if len(facts.name) <= _LONGEST_NAME else f"{facts.name[:_LONGEST_NAME]}…"
    return plot_comparison({name: record}, facts.metric)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
    return buffer.getvalue()
