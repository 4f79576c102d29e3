"""How much worse than a random direction the worst one is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord
from hf_parcor.evaluation.series import Series, short
from hf_parcor.plots.curve import draw_curve
from hf_parcor.plots.style import line_styles, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIRECTIONS = ("gradient", "multi_step", "random")
_COLUMNS = 3


def plot_directions(records: Mapping[str, EvaluationRecord], metric: str = "accuracy") -> Figure:
    """Draw the metric against ε in the directions that were measured, a panel a model, as paper 1, Figure 3.

    Points are means over trials, bars sample standard deviations, the dashed line is the metric without corruption.

    Args:
        records: Records by the name of their panel.
        metric: Which metric to show.

    Returns:
        A figure; `figure.savefig("directions.png")` writes it.

    Raises:
        ValueError: There are no records, one of them has no corruption with a radius ε, or it lacks the metric.
        ImportError: matplotlib is not installed.
    """
    curves = {name: _curves(record) for name, record in records.items()}
    empty = [name for name, of_record in curves.items() if not of_record]
    if empty or not curves:
        raise ValueError(
            f"records: expected corruptions with a radius ε in each, got none in {', '.join(empty) or 'no records'}; "
            "evaluate the model under RandomCorruption and GradientCorruption"
        )
    kinds = list(dict.fromkeys(series.name for of_record in curves.values() for series in of_record))
    styles = dict(zip(kinds, line_styles(), strict=False))
    columns = min(_COLUMNS, len(records))
    rows = math.ceil(len(records) / columns)
    figure = new_figure(0.6 + 3.4 * columns, 0.9 + 2.6 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in grid[len(records) :]:
        axis.remove()
    lines: dict[str, Any] = {}
    for axis, (name, of_record) in zip(grid, curves.items(), strict=False):
        for series, points in of_record.items():
            color, marker = styles[series.name]
            lines[series.name] = draw_curve(axis, points, metric, _radius, color, marker)
        axis.axhline(records[name].clean.mean(metric), color="grey", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
        axis.set_xlabel("radius ε")
        axis.set_title(name, fontsize="medium", parse_math=False)
        axis.grid(alpha=0.25)
    for axis in grid[: len(records) : columns]:
        axis.set_ylabel(metric, parse_math=False)
    legend = figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=min(3, len(lines)))
    legend.set_frame_on(False)
    return figure


def _curves(record: EvaluationRecord) -> dict[Series, list[CorruptionRecord]]:
    """Return the corruptions of each direction and norm; those of radius 0 have no place on a log scale."""
    found: dict[Series, list[CorruptionRecord]] = {}
    for row in record.corruptions:
        if row.corruption in _DIRECTIONS and float(row.settings["epsilon"]) > 0:
            found.setdefault(Series.of(row), []).append(row)
    return found


def _radius(row: CorruptionRecord) -> float:
    return float(row.settings["epsilon"])
