"""Figures drawn from records by Matplotlib; they compute nothing but the means and deviations that records know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_parcor.records.comparable import check_comparable
from hf_parcor.records.curves import Series, metric_drop, short
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.records.metric_info import agreed, shown_unit
from hf_parcor.records.search import SearchRecord
from hf_parcor.reports.numbers import Numbers, metric_of, numbers_of
from hf_parcor.reports.panels import (
    Line,
    Panel,
    Point,
    draw_panel,
    heights_of,
    line_styles,
    new_figure,
    set_heights,
    turning,
)
from hf_parcor.reports.tables import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def plot_comparison(
    records: Mapping[str, EvaluationRecord], metric: str | None = None, title: str = "", chance: float | None = None
) -> Figure:
    """Draw the metric against the strength of each kind of corruption, a panel a kind, a line a record.

    Points are means over trials, bars sample standard deviations, dashed lines the metric without corruption. In
    every panel with a scale of strengths the corruption grows to the right; others are in the order of the records. A
    kind of which one strength was measured, or under which no record changes, has no panel, unless there are no
    others; tables show all.

    Args:
        records: Records by the name of their line.
        metric: Which metric to show. By default, the `usual_metric` of the first record.
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
    metric = metric_of(records.values(), metric)
    panels, numbers = _panels(records, metric)
    panels = [panel for panel in panels if panel.shows_a_curve(numbers)] or panels
    columns = _curve_columns(len(panels))
    figure, grid = _grid(len(panels), columns, (2.7, 2.3))
    heights = heights_of(panels, numbers, [] if chance is None else [chance])
    for axis, panel in zip(grid, panels, strict=True):
        lines = draw_panel(axis, panel, heights)
        if chance is not None:
            axis.axhline(chance, color="grey", linestyle=":", linewidth=1)
    set_heights(grid, heights, numbers, metric)
    reference = [("no corruption", Line2D([], [], color="grey", linestyle="--", linewidth=1))]
    if chance is not None:
        reference.append(("chance", Line2D([], [], color="grey", linestyle=":", linewidth=1)))
    names = [*records, *(name for name, _ in reference)]
    _add_legend(figure, names, [*lines, *(line for _, line in reference)], 2 * columns)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def shows_curves(record: EvaluationRecord, metric: str) -> bool:
    """Return whether `plot_comparison` of this record has a panel with something to see."""
    if not record.corruptions:
        return False
    panels, numbers = _panels({"": record}, metric)
    return any(panel.shows_a_curve(numbers) for panel in panels)


def _panels(records: Mapping[str, EvaluationRecord], metric: str) -> tuple[list[Panel], Numbers]:
    """Return a panel for each kind of corruption, with a line for each record, and how numbers are written."""
    kinds = list(dict.fromkeys(Series.of(row) for record in records.values() for row in record.corruptions))
    if not kinds:
        raise ValueError(
            f"records: expected at least one with a corruption, got {len(records)} without any; evaluate a model first"
        )
    panels = []
    for series in kinds:
        of_series = {name: _of_series(record, series) for name, record in records.items()}
        labels = list(dict.fromkeys(row.label for rows in of_series.values() for row in rows))
        lines = {
            name: _line(rows, records[name].clean.mean(metric), metric, _strength_of(series, labels))
            for name, rows in of_series.items()
        }
        panels.append(Panel(series.title, series.unit, series.strength, lines))
    return panels, numbers_of(records.values(), metric)


def _of_series(record: EvaluationRecord, series: Series) -> list[CorruptionRecord]:
    return [row for row in record.corruptions if Series.of(row) == series]


def _strength_of(series: Series, labels: Sequence[str]) -> Callable[[CorruptionRecord], tuple[float, str]]:
    """Return what tells the place of a corruption on the axis, and its label there."""

    def of(row: CorruptionRecord) -> tuple[float, str]:
        if series.strength is None:
            return float(labels.index(row.label)), row.label
        strength = series.place(row)
        return strength, short(strength)

    return of


def _line(
    rows: Iterable[CorruptionRecord],
    clean: float,
    metric: str,
    strength: Callable[[CorruptionRecord], tuple[float, str]],
) -> Line:
    """Return the means over trials, with bars of one sample standard deviation."""
    points = []
    for row in rows:
        mean, deviation = row.mean(metric), row.deviation(metric)
        points.append(Point(*strength(row), mean, mean - deviation, mean + deviation))
    return Line(clean, tuple(points))


def _curve_columns(panels: int) -> int:
    """Return how many panels stand side by side, so that few places stay empty."""
    return panels if panels < 3 else min((3, 4), key=lambda columns: -panels % columns)


def _grid(panels: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many axes of one height, each of a size in inches."""
    rows = math.ceil(panels / columns)
    figure = new_figure(0.6 + size[0] * columns, 0.8 + size[1] * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in grid[panels:]:
        axis.remove()
    return figure, grid[:panels]


def _add_legend(figure: Figure, names: Sequence[str], handles: Sequence[Any], columns: int) -> None:
    # A name is shown as it is: Matplotlib before 3.10 hides one that begins with "_", and reads mathematics in "$".
    labels = ["" for _ in names]
    legend = figure.legend(list(handles), labels, loc="outside lower center", ncols=min(len(names), columns))
    legend.set_frame_on(False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


_DIRECTIONS = ("gradient", "multi_step", "random")
_COLUMNS = 3


def plot_directions(records: Mapping[str, EvaluationRecord], metric: str | None = None) -> Figure:
    """Draw the metric against ε in the directions that were measured, a panel a model, as paper 1, Figure 3.

    Points are means over trials, bars sample standard deviations, the dashed line is the metric without corruption.

    Args:
        records: Records by the name of their panel.
        metric: Which metric to show. By default, the `usual_metric` of the first record.

    Returns:
        A figure; `figure.savefig("directions.png")` writes it.

    Raises:
        ValueError: There are no records, one of them has no corruption with a radius ε, or it lacks the metric.
        ImportError: matplotlib is not installed.
    """
    directions = {name: _directions(record) for name, record in records.items()}
    empty = [name for name, kinds in directions.items() if not kinds]
    if empty or not directions:
        raise ValueError(
            f"records: expected corruptions with a radius ε in each, got none in {', '.join(empty) or 'no records'}; "
            "evaluate the model under RandomCorruption and GradientCorruption"
        )
    kinds_of_all = dict.fromkeys(series.name for kinds in directions.values() for series in kinds)
    styles = dict(zip(kinds_of_all, line_styles(), strict=False))
    panels, metric = [], metric_of(records.values(), metric)
    for name, kinds in directions.items():
        clean = records[name].clean.mean(metric)
        lines = {one.name: _line(rows, clean, metric, _strength_of(one, ())) for one, rows in kinds.items()}
        panels.append(Panel(name, "radius ε", "epsilon", lines))
    columns = min(_COLUMNS, len(panels))
    figure, grid = _grid(len(panels), columns, (3.4, 2.6))
    shown: dict[str, ErrorbarContainer] = {}
    numbers = numbers_of(records.values(), metric)
    heights = heights_of(panels, numbers)
    for axis, panel in zip(grid, panels, strict=True):
        shown |= dict(zip(panel.lines, draw_panel(axis, panel, heights, styles), strict=True))
    set_heights(grid, heights, numbers, metric)
    _add_legend(figure, list(shown), list(shown.values()), 3)
    return figure


def _directions(record: EvaluationRecord) -> dict[Series, list[CorruptionRecord]]:
    """Return the corruptions of each direction and norm; those of radius 0 would forbid a log scale."""
    found: dict[Series, list[CorruptionRecord]] = {}
    for row in record.corruptions:
        if row.corruption in _DIRECTIONS and float(row.settings["epsilon"]) > 0:
            found.setdefault(Series.of(row), []).append(row)
    return found


_SMALLEST = (4.4, 2.4)  # inches: room for the headings and the scale beside a single cell
_DARK = 0.5  # from this share of the largest drop on, white text is easier to read


def plot_heat_map(
    sweeps: Mapping[str, SweepRecord],
    metric: str | None = None,
    *,
    greater_is_better: bool | None = None,
    unit: str | None = None,
    title: str = "",
) -> Figure:
    """Draw the metric of each group at each strength, a row of panels a kind of corruption, a column a model.

    The darker a cell, the more of the metric without corruption is lost; the scale is the same in all panels. Numbers
    are means over trials. In every panel with strengths the corruption grows to the right; others are in the order of
    the records. A kind of corruption under which no group of any model changes has no panels, unless there are no
    others.

    Args:
        sweeps: Records of probes by the name of their model.
        metric: Which metric to show. By default, the `usual_metric` of the first record.
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
    metric = metric_of((record for sweep in sweeps.values() for record in sweep.records.values()), metric)
    infos = [sweep.info(metric).stating(greater_is_better=greater_is_better, unit=unit) for sweep in sweeps.values()]
    info = agreed(infos, metric)
    numbers = Numbers(info.unit)
    panels = [panel for panel in panels if _changes(panel, sweeps.values(), metric, numbers)] or panels
    losses = {name: _losses(sweep, metric, info.greater_is_better) for name, sweep in sweeps.items()}
    finite = [loss for of_model in losses.values() for loss in of_model.values() if 0 < loss < math.inf]
    largest = max(finite, default=1.0)
    groups = list(dict.fromkeys(group for sweep in sweeps.values() for group in sweep.records))
    columns = {panel: _map_columns(panel, sweeps) for panel in panels}
    width = 1.8 + len(sweeps) * 0.62 * max(len(names) for names in columns.values())
    height = 0.6 + len(panels) * (0.7 + 0.3 * len(groups))
    figure = new_figure(*map(max, (width + 0.8, height), _SMALLEST))
    grid = figure.subplots(len(panels), len(sweeps), squeeze=False)
    for axes, panel in zip(grid, panels, strict=True):
        for axis, (name, sweep) in zip(axes, sweeps.items(), strict=True):
            image = _draw_map(axis, panel, columns[panel], groups, sweep, losses[name], largest, metric, numbers)
            heading = f"{panel.name}: {name}" if name else panel.name
            axis.set_title(heading, fontsize="medium", parse_math=False)
            axis.set_xlabel(panel.unit, parse_math=False)
        for axis in axes[1:]:
            axis.set_yticklabels([])
    scale = figure.colorbar(image, ax=grid, shrink=0.6)
    loss, unit = "drop" if info.greater_is_better else "rise", numbers.unit_of_differences
    scale.set_label(f"{loss} of the {metric}" + (f" ({unit})" if unit else ""), parse_math=False)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _losses(sweep: SweepRecord, metric: str, greater_is_better: bool) -> dict[tuple[str, str], float]:
    """Return how much worse than the clean metric each corruption is, by group and label."""
    clean = sweep.clean.mean(metric)
    return {
        (group, row.label): metric_drop(clean, row.mean(metric), greater_is_better=greater_is_better)
        for group, row in sweep.rows()
    }


def _changes(panel: Series, sweeps: Iterable[SweepRecord], metric: str, numbers: Numbers) -> bool:
    """Return whether a group has another metric under these corruptions than without, as far as it is written."""
    return any(
        numbers.value(row.mean(metric)) != numbers.value(sweep.clean.mean(metric))
        for sweep in sweeps
        for _, row in sweep.rows()
        if Series.of(row) == panel
    )


def _map_columns(panel: Series, sweeps: Mapping[str, SweepRecord]) -> dict[str, str]:
    """Return what stands below each column, by the label of its corruption; where strengths are, the weakest first."""
    rows = {row.label: row for sweep in sweeps.values() for _, row in sweep.rows() if Series.of(row) == panel}
    if panel.strength is None:
        return {label: label for label in rows}
    ordered = sorted(rows.values(), key=panel.place, reverse=panel.strength == "bits")
    return {row.label: short(panel.place(row)) for row in ordered}


def _draw_map(
    axis: Axes,
    panel: Series,
    columns: Mapping[str, str],
    groups: Sequence[str],
    sweep: SweepRecord,
    losses: Mapping[tuple[str, str], float],
    largest: float,
    metric: str,
    numbers: Numbers,
) -> AxesImage:
    """Draw a panel and return its image."""
    factor = shown_unit(numbers.unit)[0]
    shown = {(group, row.label): row.mean(metric) for group, row in sweep.rows()}
    places = [[(group, label) for label in columns] for group in groups]
    # An infinite drop is as dark as the largest: no colour at all would look like none.
    drops = [[factor * min(losses.get(place, math.nan), largest) for place in line] for line in places]
    image = axis.imshow(drops, cmap="cividis_r", vmin=0, vmax=factor * largest, aspect="auto")
    for y, line in enumerate(places):
        for x, place in enumerate(line):
            dark = losses.get(place, 0.0) > _DARK * largest
            text = numbers.value(shown[place]) if place in shown else "–"
            axis.text(x, y, text, color="white" if dark else "black", fontsize="small", ha="center", va="center")
    turned = turning(columns) if panel.strength is None else {}
    axis.set_xticks(range(len(columns)), list(columns.values()), parse_math=False, **turned)
    axis.set_yticks(range(len(groups)), list(short_names(groups).values()), parse_math=False)
    axis.tick_params(length=0)
    return image


def plot_search(record: SearchRecord, objective: str = "objective") -> Figure:
    """Draw the objective of a search against the strength, on a log scale: a line for each K, a ring around the best.

    Args:
        record: What `search_epsilon` or `search_strength` returned.
        objective: What the vertical axis is called.

    Raises:
        ValueError: The record has no trials.
        ImportError: matplotlib is not installed.
    """
    best = record.best
    figure = new_figure(4.8, 3.4)
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = figure.subplots()
    counts = dict.fromkeys(trial.steps for trial in record.trials)
    for steps, (color, marker) in zip(counts, line_styles(), strict=False):
        curve = record.curve(steps)
        label = "" if steps is None else f"K = {steps}"
        radii, values = [trial.strength for trial in curve], [trial.objective for trial in curve]
        axis.plot(radii, values, color=color, marker=marker, markersize=5, linewidth=1.5, label=label)
    axis.plot(
        [best.strength], [best.objective], linestyle="", marker="o", markersize=13, fillstyle="none", color="black"
    )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("radius ε" if record.setting == "epsilon" else record.setting)
    axis.set_ylabel(objective, parse_math=False)
    axis.set_title(
        f"best: {record.symbol} = {best.strength:g}" + ("" if best.steps is None else f", K = {best.steps}")
    )
    axis.grid(alpha=0.25)
    if None not in counts:
        axis.legend(frameon=False)
    return figure
