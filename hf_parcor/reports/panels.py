"""Curves on shared axes: what a panel shows, and how it is drawn, in a figure or on a page."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_parcor.records.curves import short
from hf_parcor.records.metric_info import shown_unit
from hf_parcor.reports.numbers import Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; markers differ too.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}


def line_styles() -> Iterator[tuple[str, str]]:
    """Yield a colour and a marker for each line, without end."""
    return zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=False)


def line_signs() -> Iterator[tuple[str, str]]:
    """Yield a colour and a letter that looks like the marker of each line, for a legend in text."""
    return ((color, _MARKERS[marker]) for color, marker in line_styles())


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, whose parts make room for each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return _figure(width, height, layout="constrained")


def _figure(width: float, height: float, **options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'hf-parcor[plots]'") from error
    return Figure(figsize=(width, height), **options)


class Point(NamedTuple):
    """A metric under one strength of a corruption.

    Attributes:
        strength: Its place on the axis.
        label: What stands below it.
        value: The metric.
        low: The lower end of the bar; NaN for no bar.
        high: The upper end.
    """

    strength: float
    label: str
    value: float
    low: float = math.nan
    high: float = math.nan


class Line(NamedTuple):
    """A curve, and the metric without corruption, which is a dashed line; NaN for none."""

    clean: float
    points: tuple[Point, ...]


class Panel(NamedTuple):
    """Curves on the same axes.

    Attributes:
        title: What stands above.
        axis: What the horizontal axis is called.
        strength: The setting along it; None where the places are numbered.
        lines: The curves by their names; their order chooses colours and markers.
    """

    title: str
    axis: str
    strength: str | None
    lines: Mapping[str, Line]

    def shows_a_curve(self, numbers: Numbers) -> bool:
        """Return whether there is something to see: two strengths or more, and a value that is not the clean one."""
        strengths = {point.strength for line in self.lines.values() for point in line.points}
        return len(strengths) > 1 and any(
            numbers.value(point.value) != numbers.value(line.clean)
            for line in self.lines.values()
            for point in line.points
        )


_TITLE_WIDTH = 28
_CHARACTER = 0.05  # room that a character of a tick label takes, in units of the distance of the outermost ticks
_NUMBERED = 3  # so many letters of a label have room without turning it


def draw_panel(
    axis: Axes,
    panel: Panel,
    heights: Heights | None,
    styles: Mapping[str, tuple[str, str]] | None = None,
    *,
    title: bool = True,
) -> list[ErrorbarContainer]:
    """Draw a panel and return its lines; where a bar is too long for the frame, it ends there in an arrow."""
    styles = dict(zip(panel.lines, line_styles(), strict=False)) if styles is None else styles
    lines = []
    for name, line in panel.lines.items():
        color, marker = styles[name]
        points = sorted(line.points, key=lambda point: point.strength)
        values = [_drawable(point.value) for point in points]
        lows, highs = [_drawable(point.low) for point in points], [_drawable(point.high) for point in points]
        if heights is not None:
            for ends, end, arrow in ((lows, heights.low, "v"), (highs, heights.high, "^")):
                beyond = [place for place, value in enumerate(ends) if heights.goes_on(value)]
                places = [points[place].strength for place in beyond]
                axis.plot(places, [end] * len(places), color=color, marker=arrow, markersize=4, linestyle="none")
            lows, highs = ([heights.within(end) for end in ends] for ends in (lows, highs))
        bars = [[abs(value - end) for value, end in zip(values, ends, strict=True)] for ends in (lows, highs)]
        style: Any = {
            "color": color,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.5,
            "linestyle": "none" if panel.strength is None else "-",  # nothing lies between two labels
            "elinewidth": 1,
            "capsize": 3,
        }
        lines.append(axis.errorbar([point.strength for point in points], values, yerr=bars, **style))
    cleans = [_drawable(line.clean) for line in panel.lines.values()]
    one_for_all = len(cleans) > 1 and len(set(cleans)) == 1
    for clean, name in zip(cleans[:1] if one_for_all else cleans, panel.lines, strict=False):
        if not math.isnan(clean):
            color = "grey" if one_for_all else styles[name][0]
            axis.axhline(clean, color=color, linestyle="--", linewidth=1, alpha=0.7)
    labels = {point.strength: point.label for line in panel.lines.values() for point in line.points}
    if panel.strength is None:
        axis.set_xticks(list(labels), list(labels.values()), parse_math=False, **turning(labels.values()))
    elif labels:
        _set_strength_axis(axis, panel.strength, sorted(labels))
    axis.margins(x=0.12)
    axis.set_xlabel(panel.axis, parse_math=False)
    if title:
        axis.set_title(textwrap.fill(panel.title, _TITLE_WIDTH), fontsize="medium", parse_math=False)
    axis.grid(alpha=0.25)
    return lines


def turning(labels: Iterable[str]) -> dict[str, Any]:
    """Return how labels below an axis are turned so that they do not run into each other."""
    turned = any(len(label) > _NUMBERED for label in labels)
    return {"rotation": 20, "horizontalalignment": "right"} if turned else {}


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


_TINY, _HUGE = 1e-100, 1e100  # smaller values are drawn as 0, larger ones have no point
_DECADES = 100.0  # values that span this ratio stand on a log scale
_LONGEST_METRIC = 28


def _drawable(value: float) -> float:
    """Return a value as far as it has a place on an axis; NaN where it has none."""
    if not abs(value) < _HUGE:
        return math.nan
    return value if abs(value) > _TINY else 0.0


class Heights(NamedTuple):
    """Where the values and bars of some panels lie.

    Attributes:
        low: Where the lowest ends that has a place.
        high: And the highest.
        spread: How far values lie apart, for a margin; 0 on a log scale.
        bounds: What the metric cannot leave: a bar that does ends there.
    """

    low: float
    high: float
    spread: float
    bounds: tuple[float, float]

    def within(self, end: float) -> float:
        """Return where a bar ends in the frame; NaN for none."""
        return min(max(end, self.low), self.high) if not math.isnan(end) else end

    def goes_on(self, end: float) -> bool:
        """Return whether a bar ends outside of the frame, where the metric might be."""
        possible = min(max(end, self.bounds[0]), self.bounds[1])
        return not math.isnan(end) and not self.low <= possible <= self.high


_BOUNDS = {"share": (0.0, 1.0), "points": (0.0, 100.0)}


def heights_of(panels: Sequence[Panel], numbers: Numbers, others: Sequence[float] = ()) -> Heights | None:
    """Return the heights that the axes of all of these share; None where there is nothing to draw."""
    lines = [line for panel in panels for line in panel.lines.values()]
    points = [point for line in lines for point in line.points]
    values = _only_drawable([*others, *(line.clean for line in lines), *(point.value for point in points)])
    if not values:
        return None
    lowest, highest = min(values), max(values)
    bounds = _BOUNDS.get(numbers.unit, (-math.inf, math.inf))
    if lowest < bounds[0] or highest > bounds[1]:  # a share that is none
        bounds = -math.inf, math.inf
    if lowest > 0 and highest / lowest > _DECADES:
        return Heights(lowest / 1.2, highest * 1.2, 0.0, bounds)
    # A bar may be far longer than the data where there are few repetitions: then the data are worth more room.
    spread = max(highest - lowest, 1e-6 * max(map(abs, values))) or 1.0
    ends = values + _only_drawable(end for point in points for end in (point.low, point.high))
    low = max(min(ends), lowest - spread, bounds[0])
    return Heights(low, min(max(ends), highest + spread, bounds[1]), spread, bounds)


def set_heights(axes: Sequence[Axes], heights: Heights | None, numbers: Numbers, metric: str) -> None:
    """Set the vertical axis that all of these share: its ends and scale such that all that is drawn is inside."""
    first, factor = axes[0], shown_unit(numbers.unit)[0]
    if heights is not None and heights.spread == 0:
        first.set_yscale("log")
        first.set_ylim(heights.low / 1.1, heights.high * 1.1)
    elif heights is not None:
        margin = 0.05 * max(heights.high - heights.low, heights.spread)
        first.set_ylim(heights.low - margin, heights.high + margin)
    first.yaxis.set_major_formatter(lambda value, _: short(factor * value))
    name = metric if len(metric) <= _LONGEST_METRIC else metric[: _LONGEST_METRIC - 1] + "…"
    for axis in axes:
        place = axis.get_subplotspec()
        if place is not None and place.is_first_col():
            axis.set_ylabel(numbers.head(name), parse_math=False)


def _only_drawable(values: Iterable[float]) -> list[float]:
    return [value for value in map(_drawable, values) if not math.isnan(value)]


_PICTURE = (3.6, 2.6)  # inches of a panel on a page: its letters are large enough on a phone
_BORDERS = {"left": 0.17, "right": 0.97, "bottom": 0.18, "top": 0.96}


def panel_as_svg(panel: Panel, metric: str, numbers: Numbers, name: str) -> str:
    """Return a panel as SVG, without its title: the same letters for the same panel and version of Matplotlib.

    Texts are texts, and everything that is no line of the panel is black.

    Args:
        panel: What to draw.
        metric: What stands along the vertical axis.
        numbers: How values are written.
        name: Of the panel; the names inside are made from it, so that several can stand on one page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(*_PICTURE)
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has it
        mpl.rcdefaults()  # a page does not depend on a person's settings
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name})
        axis = figure.subplots(gridspec_kw=_BORDERS)
        heights = heights_of([panel], numbers)
        draw_panel(axis, panel, heights, title=False)
        set_heights([axis], heights, numbers, metric)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return picture.getvalue()
