"""Curves as SVG, one small panel a series, for a phone, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from hf_parcor.records.curves import Series, short
from hf_parcor.reports.markup import element, printable
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.study import Curve, Point

# Okabe and Ito's palette; "currentColor" stands for its black, so that it is seen on a dark page too.
LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")

# Seven colours of cividis (Nuñez, Anderton and Renslow, 2018), from light to dark.
_CIVIDIS = ("#FEE838", "#D2C060", "#A59C74", "#7C7B78", "#575C6D", "#273F6D", "#00224E")


def shade(share: float) -> tuple[str, str]:
    """Return the colour for a share from 0 (light) to 1 (dark), and the colour of text on it.

    Examples:
        >>> shade(0.0), shade(1.0)
        (('#FEE838', '#000'), ('#00224E', '#FFF'))
    """
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    left = min(int(place), len(_CIVIDIS) - 2)
    channels = [
        round(low + (high - low) * (place - left))
        for low, high in zip(_channels(_CIVIDIS[left]), _channels(_CIVIDIS[left + 1]), strict=True)
    ]
    return "#{:02X}{:02X}{:02X}".format(*channels), "#000" if luminance(channels) > 0.179 else "#FFF"


def luminance(channels: list[int]) -> float:
    """Return the relative luminance of WCAG 2; above 0.179 black text has the higher contrast, below it white.

    Examples:
        >>> luminance([255, 255, 255])
        1.0
    """
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (channel / 255 for channel in channels)
    ]
    return round(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2], 6)


def _channels(color: str) -> list[int]:
    return [int(color[place : place + 2], 16) for place in (1, 3, 5)]


_WIDTH, _HEIGHT = 340.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 12.0, 10.0, 44.0
_TICKS = 5
_LETTER = 7.0  # width of a digit of a tick label
_LOG_FROM = 8.0  # strengths that span this ratio stand on a log scale
_TINY, _HUGE = 1e-100, 1e100  # smaller values are drawn as 0, larger ones have no point
_BESIDE = 12.0  # between curves of a single strength, which would hide each other
_MARKERS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4h8v8h-8z", "M0-5L5 4H-5z", "M0-5L5 0L0 5L-5 0z", "M0 5L5-4H-5z")


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(part) if self.logarithmic else part for part in (self.low, self.high, value))
        share = 0.5 if high == low else (at - low) / (high - low)
        return self.start + share * (self.end - self.start)


def panel(series: Series, curves: Mapping[str, Curve], numbers: Numbers, metric: str, title: str) -> Element:
    """Return a panel: the metric against the strength, a line a curve, its 95 % interval as a band.

    Dashed lines are the metric without corruption. A value that is not finite, or huge, has no point. The
    corruption grows to the right.

    Args:
        series: What stands along the horizontal axis.
        curves: By the name of the line; the order chooses colours and markers.
        numbers: How values are written.
        metric: What stands along the vertical axis.
        title: For those who do not see the picture.
    """
    points = [point for curve in curves.values() for point in curve.points]
    across = _across(series, points)
    upwards = _upwards(list(curves.values()))
    described = f"{metric} against {series.unit or 'corruption'}. The same numbers stand in the tables."
    svg = element(
        "svg",
        element("title", printable(title)),
        element("desc", printable(described)),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=title,
    )
    svg.extend(_axes(series, points, across, upwards, numbers, metric))
    styles = zip(itertools.cycle(LINES), itertools.cycle(_MARKERS), strict=False)
    alone = len({point.strength for point in points}) == 1
    for place, ((name, curve), (color, marker)) in enumerate(zip(curves.items(), styles, strict=False)):
        shift = _BESIDE * (place - (len(curves) - 1) / 2) if alone else 0.0
        beside = replace(across, start=across.start + shift, end=across.end + shift)
        svg.append(_line(name, curve, color, marker, beside, upwards, numbers))
    return svg


def swatch(index: int) -> Element:
    """Return the marker of a line for a legend."""
    color, marker = LINES[index % len(LINES)], _MARKERS[index % len(_MARKERS)]
    line = element("path", d="M0 8H24", stroke=color, stroke_width="2")
    shape = element("path", d=marker, fill=color, transform="translate(12 8)")
    return element("svg", line, shape, viewBox="0 0 24 16", width="24", height="16", aria_hidden="true")


def _across(series: Series, points: Sequence[Point]) -> _Scale:
    strengths = [point.strength for point in points]
    low, high = min(strengths), max(strengths)
    if series.strength == "bits":
        low, high = high, low  # the fewer, the stronger
    logarithmic = series.strength not in (None, "bits") and low > 0 and high / low >= _LOG_FROM
    return _Scale(low, high, _LEFT + 14, _WIDTH - _RIGHT - 14, logarithmic)


def _upwards(curves: Sequence[Curve]) -> _Scale:
    values = [
        value
        for curve in curves
        for point in (curve.clean, *curve.points)
        for value in (point.mean, *(point.interval or ()))
        if _drawable(value)
    ]
    means = [point.mean for curve in curves for point in (curve.clean, *curve.points) if _drawable(point.mean)]
    if not means:
        return _Scale(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)
    # A band may be far wider than the data where there are few repetitions: it is cut off, the lines are not.
    largest = max(map(abs, means))
    spread = max(max(means) - min(means), 1e-6 * largest) if largest > _TINY else 1.0
    low = max(min(values), min(means) - 0.5 * spread)
    high = min(max(values), max(means) + 0.5 * spread)
    if min(means) > _TINY and max(means) / min(means) > 100:
        return _Scale(min(means) / 1.2, max(means) * 1.2, _HEIGHT - _BOTTOM, _TOP, logarithmic=True)
    margin = 0.05 * max(high - low, spread)
    return _Scale(low - margin, high + margin, _HEIGHT - _BOTTOM, _TOP)


def _axes(
    series: Series, points: Sequence[Point], across: _Scale, upwards: _Scale, numbers: Numbers, metric: str
) -> list[Element]:
    drawn = []
    for value in _levels(upwards):
        y = f"{upwards(value):.1f}"
        drawn.append(element("path", class_="grid", d=f"M{_LEFT:g} {y}H{_WIDTH - _RIGHT:g}"))
        drawn.append(element("text", numbers.value(value), x=f"{_LEFT - 6:g}", y=y, dy="4", text_anchor="end"))
    base = _HEIGHT - _BOTTOM
    names = {point.strength: short(point.strength) if series.strength else point.name for point in points}
    taken = math.inf
    for strength in sorted(names, key=across, reverse=True):  # the strongest first
        x, label = across(strength), printable(names[strength])
        if series.strength is None:
            label = str(sorted(names).index(strength) + 1)
        half = _LETTER * len(label) / 2
        if x + half < taken:
            drawn.append(element("path", class_="tick", d=f"M{x:.1f} {base:g}v4"))
            drawn.append(element("text", label, x=f"{x:.1f}", y=f"{base + 17:g}", text_anchor="middle"))
            taken = x - half - _LETTER / 2
    unit = series.unit or "corruptions, in the order of the table"
    drawn.append(element("text", unit, x=f"{(_LEFT + _WIDTH) / 2:g}", y=f"{_HEIGHT - 8:g}", text_anchor="middle"))
    label = numbers.head(printable(metric if len(metric) <= 28 else metric[:27] + "…"))
    place = f"translate(11 {(base + _TOP) / 2:g}) rotate(-90)"
    drawn.append(element("text", label, transform=place, text_anchor="middle"))
    return drawn


def _levels(scale: _Scale) -> list[float]:
    """Return round values inside a scale."""
    if scale.logarithmic:
        decades = range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)
        return [10.0**decade for decade in decades][:: max(1, len(decades) // _TICKS)]
    raw = (scale.high - scale.low) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [step * place for place in range(first, last + 1)]


def _line(
    name: str, curve: Curve, color: str, marker: str, across: _Scale, upwards: _Scale, numbers: Numbers
) -> Element:
    group = element("g", stroke=color, fill=color)
    if _drawable(curve.clean.mean):
        y = f"{upwards(curve.clean.mean):.1f}"
        group.append(element("path", class_="clean", d=f"M{_LEFT:g} {y}H{_WIDTH - _RIGHT:g}"))
    finite = [point for point in curve.points if _drawable(point.mean)]
    ends = [(across(point.strength), point.interval) for point in finite]
    band = [(x, interval) for x, interval in ends if interval is not None]
    if len(band) > 1:
        upper = [f"{x:.1f} {_inside(upwards, high):.1f}" for x, (_, high) in band]
        lower = [f"{x:.1f} {_inside(upwards, low):.1f}" for x, (low, _) in reversed(band)]
        group.append(element("path", class_="band", d=f"M{'L'.join(upper + lower)}z"))
    elif band:
        [(x, (low, high))] = band
        group.append(element("path", d=f"M{x:.1f} {_inside(upwards, low):.1f}V{_inside(upwards, high):.1f}"))
    runs = itertools.groupby(curve.points, key=lambda point: _drawable(point.mean))
    for shown, run in runs:
        places = [f"{across(point.strength):.1f} {upwards(point.mean):.1f}" for point in run] if shown else []
        if len(places) > 1:
            group.append(element("path", class_="line", d=f"M{'L'.join(places)}"))
    for point in finite:
        place = f"translate({across(point.strength):.1f} {upwards(point.mean):.1f})"
        text = printable(f"{name}, {point.name}: {numbers.point(point)}")
        group.append(element("path", element("title", text), d=marker, transform=place))
    return group


def _drawable(value: float) -> bool:
    return abs(value) < _HUGE  # NaN is not


def _inside(scale: _Scale, value: float) -> float:
    """Return the place of an end of a band, cut off where the panel ends."""
    return scale(min(max(value, scale.low), scale.high))
