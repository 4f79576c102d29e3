"""The picture beside a card: the metric against the strength of each corruption."""

from __future__ import annotations

import io

from hf_parcor.evaluation.records import EvaluationRecord
from hf_parcor.model_card.facts import ModelFacts
from hf_parcor.plots import plot_comparison


def picture_of(facts: ModelFacts) -> bytes:
    """Return the picture as PNG, the same bytes for the same facts and version of Matplotlib.

    Raises:
        ValueError: There is no corruption to draw.
        ImportError: Matplotlib is not installed.
    """
    record = EvaluationRecord(
        facts.name,
        facts.target,
        facts.parameters,
        facts.clean.as_record(),
        tuple(row.as_record() for row in facts.corruptions),
    )
    buffer = io.BytesIO()
    figure = plot_comparison({facts.name: record}, facts.metric)
    figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
    return buffer.getvalue()
