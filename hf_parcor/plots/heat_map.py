"""Which part breaks at which strength: groups of weights against ε."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_parcor.evaluation.records import CorruptionRecord
from hf_parcor.evaluation.series import Series, short
from hf_parcor.evaluation.sweep_record import SweepRecord
from hf_parcor.metric_info import POINTS, SHARE, agreed, shown_unit
from hf_parcor.plots.style import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_SMALLEST = (4.4, 2.4)  # inches: room for the headings and the scale beside a single cell
_DARK = 0.5  # from this share of the largest drop on, white text is easier to read


def plot_heat_map(
    sweeps: Mapping[str, SweepRecord],
    metric: str = "accuracy",
    *,
    greater_is_better: bool | None = None,
    unit: str | None = None,
    title: str = "",
) -> Figure:
    """Draw the metric of each group at each strength, a row of panels a kind of corruption, a column a model.

    The darker a cell, the more of the metric without corruption is lost; the scale is the same in all panels. Numbers
    are means over trials. In every panel the corruption grows to the right.

    Args:
        sweeps: Records of probes by the name of their model.
        metric: Which metric to show.
        greater_is_better: Whether a large metric is good; None, the default, for what the records say.
        unit: As in `MetricInfo`; None, the default, for what the records say. Shares are shown in percent.
        title: Above all panels.

    Returns:
        A figure; `figure.savefig("heat_map.png")` writes it.

    Raises:
        ValueError: There are no records, they have no corruptions, they lack the metric, or state different things of
            it.
        ImportError: matplotlib is not installed.
    """
    panels = list(dict.fromkeys(Series.of(row) for sweep in sweeps.values() for _, row in sweep.rows()))
    if not panels:
        raise ValueError(
            f"sweeps: expected at least one with a corruption, got {len(sweeps)} without any; probe a model first"
        )
    infos = [sweep.info(metric).stating(greater_is_better=greater_is_better, unit=unit) for sweep in sweeps.values()]
    info = agreed(infos, metric)
    losses = {name: _losses(sweep, metric, info.greater_is_better) for name, sweep in sweeps.items()}
    finite = [loss for of_model in losses.values() for loss in of_model.values() if 0 < loss < math.inf]
    largest = max(finite, default=1.0)
    groups = list(dict.fromkeys(group for sweep in sweeps.values() for group in sweep.records))
    columns = {panel: _columns(panel, sweeps) for panel in panels}
    width = 1.8 + len(sweeps) * 0.62 * max(len(names) for names in columns.values())
    height = 0.6 + len(panels) * (0.7 + 0.3 * len(groups))
    figure = new_figure(*map(max, (width + 0.8, height), _SMALLEST))
    grid = figure.subplots(len(panels), len(sweeps), squeeze=False)
    for axes, panel in zip(grid, panels, strict=True):
        for axis, (name, sweep) in zip(axes, sweeps.items(), strict=True):
            image = _draw(axis, panel, columns[panel], groups, sweep, losses[name], largest, metric, info.unit)
            heading = f"{panel.name}: {name}" if name else panel.name
            axis.set_title(heading, fontsize="medium", parse_math=False)
            axis.set_xlabel(panel.unit)
        for axis in axes[1:]:
            axis.set_yticklabels([])
    scale = figure.colorbar(image, ax=grid, shrink=0.6)
    loss, points = "drop" if info.greater_is_better else "rise", "points" if info.unit == SHARE else info.unit
    scale.set_label(f"{loss} of the {metric}" + (f" ({points})" if points else ""), parse_math=False)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _losses(sweep: SweepRecord, metric: str, greater_is_better: bool) -> dict[tuple[str, str], float]:
    """Return how much worse than the clean metric each corruption is, by group and label."""
    sign = 1 if greater_is_better else -1
    clean = sweep.clean.mean(metric)
    return {(group, row.label): sign * (clean - row.mean(metric)) for group, row in sweep.rows()}


def _columns(panel: Series, sweeps: Mapping[str, SweepRecord]) -> dict[str, str]:
    """Return what stands below each column, by the label of its corruption, the weakest first."""
    rows = {row.label: row for sweep in sweeps.values() for _, row in sweep.rows() if Series.of(row) == panel}
    if panel.strength is None:
        return {label: label for label in rows}
    strength = panel.strength

    def size(row: CorruptionRecord) -> float:
        return float(row.settings[strength])

    ordered = sorted(rows.values(), key=size, reverse=strength == "bits")
    return {row.label: short(size(row)) for row in ordered}


def _draw(
    axis: Axes,
    panel: Series,
    columns: Mapping[str, str],
    groups: Sequence[str],
    sweep: SweepRecord,
    losses: Mapping[tuple[str, str], float],
    largest: float,
    metric: str,
    unit: str,
) -> AxesImage:
    """Draw a panel and return its image."""
    factor, style = shown_unit(unit)[0], {SHARE: ".1f", POINTS: ".2f"}.get(unit, ".3g")
    shown = {(group, row.label): row.mean(metric) for group, row in sweep.rows()}
    places = [[(group, label) for label in columns] for group in groups]
    # An infinite drop is as dark as the largest: no colour at all would look like none.
    drops = [[factor * min(losses.get(place, math.nan), largest) for place in line] for line in places]
    image = axis.imshow(drops, cmap="cividis_r", vmin=0, vmax=factor * largest, aspect="auto")
    for y, line in enumerate(places):
        for x, place in enumerate(line):
            dark = losses.get(place, 0.0) > _DARK * largest
            text = f"{factor * shown[place]:{style}}" if place in shown else "–"
            axis.text(x, y, text, color="white" if dark else "black", fontsize="small", ha="center", va="center")
    axis.set_xticks(range(len(columns)), list(columns.values()), parse_math=False)
    axis.set_yticks(range(len(groups)), _short_names(groups), parse_math=False)
    axis.tick_params(length=0)
    return image


def _short_names(groups: Sequence[str]) -> list[str]:
    """Return names without the modules that all of them are in, but for the last.

    Examples:
        >>> _short_names(["bert.encoder.layer.0", "bert.encoder.layer.10"])
        ['layer.0', 'layer.10']
        >>> _short_names(["attention", "linear"])
        ['attention', 'linear']
    """
    paths = [group.split(".") for group in groups]
    shared = 0
    while all(len(path) > shared + 2 and path[: shared + 1] == paths[0][: shared + 1] for path in paths):
        shared += 1
    return [".".join(path[shared:]) for path in paths]
