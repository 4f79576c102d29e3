"""One curve of a metric against the strength of a corruption."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hf_parcor.evaluation.records import CorruptionRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer


def draw_curve(
    axis: Axes,
    rows: Iterable[CorruptionRecord],
    metric: str,
    strength: Callable[[CorruptionRecord], float],
    color: str,
    marker: str,
) -> ErrorbarContainer:
    """Draw means over trials, with bars of one sample standard deviation, in the order of their strengths."""
    ordered = sorted(rows, key=strength)
    return axis.errorbar(
        [strength(row) for row in ordered],
        [row.mean(metric) for row in ordered],
        yerr=[row.deviation(metric) for row in ordered],
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.5,
        elinewidth=1,
        capsize=3,
    )
