"""Metrics against the strength of each kind of corruption."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_parcor.evaluation.comparable import check_comparable
from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord
from hf_parcor.evaluation.series import Series, short
from hf_parcor.plots.curve import draw_curve
from hf_parcor.plots.style import line_styles, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

_TITLE_WIDTH = 28
_CHARACTER = 0.05  # room that a character of a tick label takes, in units of the distance of the outermost ticks


def plot_comparison(
    records: Mapping[str, EvaluationRecord], metric: str = "accuracy", title: str = "", chance: float | None = None
) -> Figure:
    """Draw the metric against the strength of each kind of corruption, a panel a kind, a line a record.

    Points are means over trials, bars sample standard deviations, dashed lines the metric without corruption. In
    every panel the corruption grows to the right.

    Args:
        records: Records by the name of their line.
        metric: Which metric to show.
        title: Above all panels.
        chance: The metric of a guess, drawn as a dotted line; None for no line.

    Returns:
        A figure; `figure.savefig("robustness.png")` writes it.

    Raises:
        ValueError: There are no records, they have no corruptions, or they lack the metric, or are of other data or
            tasks; see `check_comparable`.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.lines import Line2D

    check_comparable(records)

    panels = list(dict.fromkeys(Series.of(row) for record in records.values() for row in record.corruptions))
    if not panels:
        raise ValueError(
            f"records: expected at least one with a corruption, got {len(records)} without any; evaluate a model first"
        )
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(0.6 + 2.7 * columns, 0.8 + 2.3 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in grid[len(panels) :]:
        axis.remove()
    for axis, panel in zip(grid, panels, strict=False):
        lines = _draw(axis, panel, list(records.values()), metric)
        if chance is not None:
            axis.axhline(chance, color="grey", linestyle=":", linewidth=1)
    for axis in grid[: len(panels) : columns]:
        axis.set_ylabel(metric, parse_math=False)
    reference = [("no corruption", Line2D([], [], color="grey", linestyle="--", linewidth=1))]
    if chance is not None:
        reference.append(("chance", Line2D([], [], color="grey", linestyle=":", linewidth=1)))
    names = [*records, *(name for name, _ in reference)]
    handles: list[Any] = [*lines, *(line for _, line in reference)]
    # A name is shown as it is: Matplotlib before 3.10 hides one that begins with "_", and reads mathematics in "$".
    labels = ["" for _ in names]
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 2 * columns))
    legend.set_frame_on(False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _columns(panels: int) -> int:
    """Return how many panels stand side by side, so that few places stay empty."""
    return panels if panels < 3 else min((3, 4), key=lambda columns: -panels % columns)


def _draw(axis: Axes, panel: Series, records: Sequence[EvaluationRecord], metric: str) -> list[ErrorbarContainer]:
    """Draw a panel and return its lines, one a record."""
    of_panel = [[row for row in record.corruptions if Series.of(row) == panel] for record in records]
    labels = list(dict.fromkeys(row.label for rows in of_panel for row in rows))

    def strength(row: CorruptionRecord) -> float:
        return labels.index(row.label) if panel.strength is None else float(row.settings[panel.strength])

    lines = []
    for record, rows, (color, marker) in zip(records, of_panel, line_styles(), strict=False):
        lines.append(draw_curve(axis, rows, metric, strength, color, marker))
        axis.axhline(record.clean.mean(metric), color=color, linestyle="--", linewidth=1, alpha=0.7)
    if panel.strength is None:
        axis.set_xticks(range(len(labels)), labels, rotation=20, horizontalalignment="right", parse_math=False)
    else:
        _set_strength_axis(axis, panel.strength, sorted({strength(row) for rows in of_panel for row in rows}))
    axis.margins(x=0.12)
    axis.set_xlabel(panel.unit)
    axis.set_title(textwrap.fill(panel.title, _TITLE_WIDTH), fontsize="medium", parse_math=False)
    axis.grid(alpha=0.25)
    return lines


def _set_strength_axis(axis: Axes, strength: str, strengths: Sequence[float]) -> None:
    """Set scale, direction and ticks: at the strengths themselves, as many as have room, the largest first."""
    from matplotlib.ticker import NullLocator

    places = list(strengths)
    if strength == "bits":
        axis.invert_xaxis()  # the fewer, the stronger
    elif strengths[0] > 0 and (strength == "rate" or _largest_gap(map(math.log, strengths)) < _largest_gap(strengths)):
        axis.set_xscale("log")
        places = [math.log(value) for value in strengths]
    labels = [short(value) for value in strengths]
    room = _CHARACTER * (max(map(len, labels)) + 0.5) * (places[-1] - places[0])
    ticks: list[int] = []
    for index in reversed(range(len(places))):
        if not ticks or places[ticks[-1]] - places[index] >= room:
            ticks.append(index)
    axis.set_xticks([strengths[index] for index in ticks], [labels[index] for index in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _largest_gap(values: Iterable[float]) -> float:
    """Return the largest gap between neighbours of a rising sequence, in units of its whole length."""
    gaps = [after - before for before, after in itertools.pairwise(values)]
    return max(gaps) / sum(gaps) if gaps else 1.0
