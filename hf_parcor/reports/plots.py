"""Plots drawn from records; they compute nothing but the means and deviations that records know themselves."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_parcor.records.comparable import check_comparable
from hf_parcor.records.curves import Series, short
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.records.metric_info import POINTS, SHARE, agreed, shown_unit
from hf_parcor.records.search import SearchRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


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


# Okabe and Ito's palette, safe for colour-blind readers; markers differ too.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, whose parts make room for each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'hf-parcor[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def line_styles() -> Iterator[tuple[str, str]]:
    """Yield a colour and a marker for each line, without end."""
    return zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=False)


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
    columns = _curve_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(0.6 + 2.7 * columns, 0.8 + 2.3 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in grid[len(panels) :]:
        axis.remove()
    for axis, panel in zip(grid, panels, strict=False):
        lines = _draw_one(axis, panel, list(records.values()), metric)
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


def _curve_columns(panels: int) -> int:
    """Return how many panels stand side by side, so that few places stay empty."""
    return panels if panels < 3 else min((3, 4), key=lambda columns: -panels % columns)


def _draw_one(axis: Axes, panel: Series, records: Sequence[EvaluationRecord], metric: str) -> list[ErrorbarContainer]:
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
    columns = {panel: _map_columns(panel, sweeps) for panel in panels}
    width = 1.8 + len(sweeps) * 0.62 * max(len(names) for names in columns.values())
    height = 0.6 + len(panels) * (0.7 + 0.3 * len(groups))
    figure = new_figure(*map(max, (width + 0.8, height), _SMALLEST))
    grid = figure.subplots(len(panels), len(sweeps), squeeze=False)
    for axes, panel in zip(grid, panels, strict=True):
        for axis, (name, sweep) in zip(axes, sweeps.items(), strict=True):
            image = _draw_map(axis, panel, columns[panel], groups, sweep, losses[name], largest, metric, info.unit)
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


def _map_columns(panel: Series, sweeps: Mapping[str, SweepRecord]) -> dict[str, str]:
    """Return what stands below each column, by the label of its corruption, the weakest first."""
    rows = {row.label: row for sweep in sweeps.values() for _, row in sweep.rows() if Series.of(row) == panel}
    if panel.strength is None:
        return {label: label for label in rows}
    strength = panel.strength

    def size(row: CorruptionRecord) -> float:
        return float(row.settings[strength])

    ordered = sorted(rows.values(), key=size, reverse=strength == "bits")
    return {row.label: short(size(row)) for row in ordered}


def _draw_map(
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


def plot_search(record: SearchRecord, objective: str = "objective") -> Figure:
    """Draw the objective of a search against ε on a log scale, a line for each K, a ring around the best training.

    Args:
        record: What `search_epsilon` returned.
        objective: What the vertical axis is called.

    Raises:
        ValueError: The record has no trials.
        ImportError: matplotlib is not installed.
    """
    best = record.best
    figure = new_figure(4.8, 3.4)
    axis = figure.subplots()
    counts = dict.fromkeys(trial.steps for trial in record.trials)
    for steps, (color, marker) in zip(counts, line_styles(), strict=False):
        curve = record.curve(steps)
        label = "" if steps is None else f"K = {steps}"
        radii, values = [trial.epsilon for trial in curve], [trial.objective for trial in curve]
        axis.plot(radii, values, color=color, marker=marker, markersize=5, linewidth=1.5, label=label)
    axis.plot(
        [best.epsilon], [best.objective], linestyle="", marker="o", markersize=13, fillstyle="none", color="black"
    )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.set_xlabel("radius ε")
    axis.set_ylabel(objective, parse_math=False)
    axis.set_title(f"best: ε = {best.epsilon:g}" + ("" if best.steps is None else f", K = {best.steps}"))
    axis.grid(alpha=0.25)
    if None not in counts:
        axis.legend(frameon=False)
    return figure
