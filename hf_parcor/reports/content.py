"""What a report says, in the order of reading, before it becomes a page; and that page as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hf_parcor.records.curves import Series, area_under_curve, epsilon_at_half, short
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord
from hf_parcor.reports.caveats import data_caveat, notes
from hf_parcor.reports.command_line import commands
from hf_parcor.reports.comparison import comparison_verdict, differences
from hf_parcor.reports.markup import code_of, printable, text_of
from hf_parcor.reports.numbers import Numbers, probability, times
from hf_parcor.reports.panels import Line, Panel
from hf_parcor.reports.panels import Point as PanelPoint
from hf_parcor.reports.study import Curve, Point, Study, common_strengths
from hf_parcor.reports.tables import Table, markdown_table, short_names
from hf_parcor.reports.verdict import Finding, fragility, negligible, others_median, probe_verdict
from hf_parcor.statistics import sample_mean

_LINES = 6  # as many lines as one tells apart in a small panel
_GROUPS = 4  # as many groups as are drawn where models are compared


def panels(study: Study) -> list[Panel]:
    """Return the panels: a line a group, those that lose most; or a line a model, a panel a group.

    Points are means over repetitions, bars their 95 % confidence intervals.
    """
    found = []
    for series, curves in study.curves.items():
        if len(study.models) == 1:
            of_group = {group: curve for (_, group), curve in curves.items()}
            shown = dict(sorted(of_group.items(), key=lambda item: -_loss(item[1]))[:_LINES])
            many = f", the {_LINES} of {len(of_group)} groups with the largest mean {study.loss}"
            names = short_names(study.groups)
            named = {names[group]: curve for group, curve in shown.items()}
            found.append(_panel(series.name + many * (len(of_group) > _LINES), series, named))
            continue
        first = next(iter(study.models))
        groups = [group for group in study.groups if any((model, group) in curves for model in study.models)]
        worst = sorted(groups, key=lambda group: -_loss(curves.get((first, group))))[:_GROUPS]
        for group in worst:
            of_model = {model: curves[model, group] for model in study.models if (model, group) in curves}
            name = series.name if len(groups) == 1 else f"{series.name}, {group} corrupted"
            found.append(_panel(name, series, of_model))
    return found


def _panel(title: str, series: Series, curves: Mapping[str, Curve]) -> Panel:
    places = sorted({point.strength for curve in curves.values() for point in curve.points})
    lines = {}
    for name, curve in curves.items():
        points = []
        for point in curve.points:
            place = point.strength if series.strength else float(places.index(point.strength) + 1)
            points.append(PanelPoint(place, short(place), point.mean, *(point.interval or (math.nan, math.nan))))
        lines[name] = Line(curve.clean.mean, tuple(points))
    axis = printable(series.unit) or "corruptions, in the order of the table"
    return Panel(title, axis, series.strength, lines)


def _loss(curve: Curve | None) -> float:
    """Return the mean drop; what is broken lost all."""
    if curve is None:
        return -math.inf
    names = [point.name for point in curve.points]
    drop = sample_mean(curve.drops(names))
    return math.inf if math.isnan(drop) or not curve.reliable(names) else drop


def row_name(study: Study, model: str, group: str) -> str:
    """Return the name of a curve: what tells it from the others."""
    if len(study.models) == 1:
        return group
    return model if len(study.groups) == 1 else f"{group}: {model}"


def _shared(study: Study) -> str:
    """Return what short names leave out, in words for a caption; "" for nothing."""
    group, shown = next(iter(short_names(study.groups).items()))
    left_out = group.removesuffix(shown)
    return f"; each group is in {left_out.removesuffix('.')}" if left_out and len(study.groups) > 1 else ""


def heat_map(study: Study, series: Series, numbers: Numbers) -> Table:
    """Return the metric by curve and strength, with how much of the largest drop of the whole study each cell has.

    Names of rows and columns are short, and the caption says what all of them share: the last column, of the strongest
    corruption, is to be seen on a phone.
    """
    curves = _ordered(study, series)
    found = {point.name: point.strength for curve in curves.values() for point in curve.points}
    ordered = sorted(found.items(), key=lambda item: item[1], reverse=series.strength == "bits")
    columns = {name: name if series.strength is None else short(strength) for name, strength in ordered}
    drops = {
        key: {point.name: sample_mean(curve.drops([point.name])) for point in curve.points}
        for key, curve in curves.items()
    }
    largest, names = _largest_drop(study), short_names(study.groups)
    rows, shares = [], []
    for (model, group), curve in curves.items():
        means = {point.name: point.mean for point in curve.points}
        cells = [numbers.value(means[name]) if name in means else "–" for name in columns]
        rows.append((row_name(study, model, names[group]), numbers.value(curve.clean.mean), *cells))
        shares.append((0.0, *(share_of_largest(drops[model, group].get(name), largest) for name in columns)))
    axis = f", by {series.unit}" if series.strength is not None and series.unit else ""
    caption = f"{numbers.head(study.metric)} under {series.name}{axis}{_shared(study)}"
    header = (_row_header(study), "clean", *columns.values())
    return Table(caption, header, tuple(rows), tuple(shares))


def summary(study: Study, series: Series, numbers: Numbers) -> Table:
    """Return each curve as a few numbers: mean drop or rise, fragility, and the measures of a curve against ε."""
    curves = _ordered(study, series)
    names = common_strengths(curves.values())
    drops = {key: sample_mean(curve.drops(names)) if names else math.nan for key, curve in curves.items()}
    finite = {
        key: drop
        for key, drop in drops.items()
        if math.isfinite(drop) and curves[key].reliable(names) and key not in study.unmoved
    }
    ratios = fragility(finite) if len(study.models) == 1 and len(finite) > 1 else {}
    from_zero = series.strength not in (None, "bits") and all(
        point.strength > 0 for curve in curves.values() for point in curve.points
    )
    norms = {key: _weights_norm(study.models[key[0]][key[1]]) for key in curves}
    known = not any(map(math.isnan, norms.values()))
    rows, names_of = [], short_names(study.groups)
    for (model, group), curve in curves.items():
        key = model, group
        parameters = study.models[model][group][0].parameters
        row = [row_name(study, model, names_of[group]), f"{parameters:,}", *[f"{norms[key]:.3g}"] * known]
        row.append(numbers.difference(drops[key]))
        if ratios:
            limit = negligible(curve.clean.mean)
            said = finite.get(key, -1.0) >= 0 and others_median(finite, key) > limit
            row.append(times(ratios[key]) if said else "–")
        if from_zero:
            points = [point.strength for point in curve.points], [point.mean for point in curve.points]
            half = epsilon_at_half(*points, clean=curve.clean.mean, greater_is_better=study.greater_is_better)
            beyond = f"> {short(max(points[0]))}"
            row.append(numbers.value(area_under_curve(*points, clean=curve.clean.mean)))
            row.append(beyond if math.isinf(half) else "–" if math.isnan(half) else f"{half:.3g}")
        rows.append(tuple(row))
    half_name = f"{series.unit} at half" if study.greater_is_better else f"{series.unit} at twice"
    header = [
        _row_header(study),
        "weights",
        *["their norm"] * known,
        f"mean {study.loss}",
        *["fragility"] * bool(ratios),
    ]
    header += ["mean from 0 on", half_name] * from_zero
    return Table(f"{series.name}: each curve in a few numbers{_shared(study)}", tuple(header), tuple(rows))


def all_values(study: Study, numbers: Numbers) -> Table:
    """Return every mean, with its confidence interval where it was repeated."""
    rows = []
    seen = set()
    for series, curves in study.curves.items():
        for (model, group), curve in curves.items():
            name = row_name(study, model, group)
            if name not in seen:
                rows.append(_value_row(name, "", curve.clean, numbers))
                seen.add(name)
            rows += [_value_row(name, series.name, point, numbers) for point in curve.points]
    header = (_row_header(study), "corruption", numbers.head(study.metric), "repetitions")
    points = [point for curves in study.curves.values() for curve in curves.values() for point in curve.all_points]
    repeated = any(point.interval for point in points)
    caption = "Every mean" + ", with its 95 % confidence interval in brackets" * repeated
    return Table(caption, header, tuple(rows))


def means(study: Study) -> dict[str, Any]:
    """Return every mean as plain values, without corruption first, with what the metric means."""
    found = []
    for model, groups in study.models.items():
        for group, records in groups.items():
            mine = {
                series: curves[model, group] for series, curves in study.curves.items() if (model, group) in curves
            }
            clean = [("none", curve.clean) for curve in list(mine.values())[:1]]
            points = [*clean, *((series.name, point) for series, curve in mine.items() for point in curve.points)]
            found += [
                {
                    **{"model": model or records[0].model, "group": group, "corruption": name, "strength": point.name},
                    **{"mean": point.mean, "interval": point.interval, "values": point.values},
                }
                for name, point in points
            ]
    stated = {"metric": study.metric, "greater_is_better": study.greater_is_better, "unit": study.info.unit}
    alone = {"in_one_alone": {model: labels for model, labels in study.in_one_alone.items() if labels}}
    return {**stated, **alone, "means": found}


def difference_table(study: Study, numbers: Numbers) -> Table:
    """Return every difference to the first model, with its test."""
    baseline = next(iter(study.models))
    several = len(study.groups) > 1
    rows = []
    for one in differences(study, by_strength=True):
        change = sample_mean(one.second) - sample_mean(one.first)
        p_value = "–" if one.p_value is None else probability(one.p_value).removeprefix("p ").removeprefix("= ")
        where = f"{one.what}, {one.group}" if several and one.group else one.what
        rows.append(
            (
                where,
                one.model,
                numbers.value(sample_mean(one.first)),
                numbers.value(sample_mean(one.second)),
                numbers.difference(change, sign=True),
                p_value,
            )
        )
    header = ("corruption", "model", baseline, "model's", "change", "p")
    return Table(f"{numbers.head(study.metric)} against {baseline}", header, tuple(rows))


_IN_A_COMMAND = ("task", "targets", "seeds of trials", "corruptions")


def settings(study: Study) -> Table:
    """Return what is needed to measure again; what the command says is not said once more."""
    rows = []
    for model, groups in study.models.items():
        name = f"{model}: " if len(study.models) > 1 else ""
        records = [record for entry in groups.values() for record in entry]
        measured_on = {
            f"{name}data": _distinct(str(record.evaluated_on) for record in records if record.evaluated_on),
            f"{name}task": _distinct(record.task for record in records if record.task),
        }
        rows += [
            *((what, value) for what, value in measured_on.items() if value),
            (f"{name}model", _distinct(record.model for record in records)),
            (f"{name}targets", _distinct(str(dict(record.target)) for record in records)),
            (f"{name}records per group", _distinct(str(len(entry)) for entry in groups.values())),
            (f"{name}data (SHA-256)", _distinct(record.data or "not given" for record in records)),
            (f"{name}seeds of trials", _distinct(_seeds(record.rows()) for record in records)),
        ]
    better = "greater is better" if study.greater_is_better else "smaller is better"
    said = [better, *[f"unit: {study.info.unit}"] * bool(study.info.unit)]
    said += ["guessed: " + " and ".join(study.info.guessed)] * bool(study.info.guessed)
    rows.append((study.metric, "; ".join(said)))
    versions = [f"{library} {version}" for record in study.records for library, version in record.versions.items()]
    rows.append(("versions", _distinct(versions)))
    labels = [row.label for record in study.records for row in record.corruptions]
    rows.append(("corruptions", _distinct(labels)))
    if commands(study):
        rows = [row for row in rows if row[0].rpartition(": ")[2] not in _IN_A_COMMAND]
    return Table("Settings to reproduce", ("setting", "value"), tuple(rows))


def measured_on(study: Study) -> str:
    """Return the data and their number of rows, in a sentence; "" where records do not say."""
    named = _distinct(str(record.evaluated_on) for record in study.records if record.evaluated_on)
    tasks = _distinct(record.task for record in study.records if record.task)
    return f"Measured on {named}{f', {tasks}' * bool(tasks)}." if named else ""


def _ordered(study: Study, series: Series) -> dict[tuple[str, str], Curve]:
    """Return curves group by group, the models of a group beside each other."""
    curves = study.curves[series]
    keys = [(model, group) for group in study.groups for model in study.models]
    return {key: curves[key] for key in keys if key in curves}


def largest_drop(drops: Iterable[float]) -> float:
    """Return the largest finite drop, which has the strongest colour; ∞ if all that are drops are infinite, or else 0.

    Examples:
        >>> largest_drop([0.5, math.inf]), largest_drop([-0.5, math.inf]), largest_drop([-0.5, math.nan])
        (0.5, inf, 0.0)
    """
    worse = [drop for drop in drops if drop > 0]
    return max(filter(math.isfinite, worse), default=max(worse, default=0.0))


def _largest_drop(study: Study) -> float:
    """Return the largest drop of all curves, which is that of all heat maps."""
    return largest_drop(
        sample_mean(curve.drops([point.name]))
        for curves in study.curves.values()
        for curve in curves.values()
        for point in curve.points
    )


def _strongest(study: Study, numbers: Numbers) -> str:
    """Return what the colours of heat maps mean."""
    largest = _largest_drop(study)
    if largest == 0:
        return "No cell has a colour, since no mean is worse than without corruption."
    return (
        f"The stronger the colour, the worse it is; the strongest is a {study.loss} of {numbers.difference(largest)}."
    )


def share_of_largest(drop: float | None, largest: float) -> float | None:
    """Return how much of the largest drop a cell of a heat map has; None for a cell without.

    Examples:
        >>> share_of_largest(1.0, 4.0), share_of_largest(math.inf, 4.0), share_of_largest(math.inf, math.inf)
        (0.25, 1.0, 1.0)
        >>> share_of_largest(-1.0, 4.0), share_of_largest(-1.0, math.inf), share_of_largest(0.0, 0.0)
        (0.0, 0.0, 0.0)
    """
    if drop is None or math.isnan(drop):
        return None
    if drop <= 0:
        return 0.0
    return 1.0 if drop >= largest else drop / largest


def _weights_norm(records: tuple[EvaluationRecord, ...]) -> float:
    """Return the norm of a group's weights, mean over repetitions; NaN if a record lacks it."""
    return sample_mean([math.nan if record.weights_norm is None else record.weights_norm for record in records])


def _value_row(name: str, title: str, point: Point, numbers: Numbers) -> tuple[str, ...]:
    what = f"{title}, {point.name}" if title else point.name
    return name, what, numbers.with_interval(point.mean, point.interval), str(len(point.values))


def _row_header(study: Study) -> str:
    return "group" if len(study.groups) > 1 else "model"


def _seeds(rows: Iterable[CorruptionRecord]) -> str:
    seeds = sorted({seed for row in rows for seed in row.seeds})
    return ", ".join(map(str, seeds))


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


class Content(NamedTuple):
    """The parts of a report, in the order of reading."""

    title: str
    metric: str
    numbers: Numbers
    findings: list[Finding]
    guesses: tuple[str, ...]
    notes: list[str]
    heat_maps: list[Table]
    strongest: str
    panels: list[Panel]
    no_curves: str
    summaries: list[Table]
    values: Table
    settings: Table
    plain: dict[str, Any]
    measured_on: str
    commands: list[str]


def content_of(study: Study, numbers: Numbers, title: str) -> Content:
    """Return what is to be said about a study."""
    compared = len(study.models) > 1
    verdict = comparison_verdict if compared else probe_verdict
    summaries = [summary(study, series, numbers) for series in study.curves]
    possible = panels(study)
    drawn = [panel for panel in possible if panel.shows_a_curve(numbers)]
    rest = dict.fromkeys(panel.title for panel in possible if panel not in drawn)
    return Content(
        title=title,
        metric=study.metric,
        numbers=numbers,
        findings=[
            *map(Finding, data_caveat(study) * compared),
            *verdict(study, numbers),
            *_alone(study),
            *_guess(study),
        ],
        guesses=study.info.guesses(study.metric),
        notes=notes(study),
        heat_maps=[heat_map(study, series, numbers) for series in study.curves],
        strongest=_strongest(study, numbers),
        panels=drawn,
        no_curves=f"No curve, since one strength was measured or nothing changes: {'; '.join(rest)}." if rest else "",
        summaries=[difference_table(study, numbers), *summaries] if compared else summaries,
        values=all_values(study, numbers),
        settings=settings(study),
        plain=means(study),
        measured_on=measured_on(study),
        commands=commands(study),
    )


def _alone(study: Study) -> list[Finding]:
    """Return what was not compared, since one model alone was measured under it, if there is any."""
    told = [f"{model}: {'; '.join(labels)}" for model, labels in study.in_one_alone.items() if labels]
    return [Finding("Not compared, since no other model was measured under it:", ". ".join(told))] if told else []


def _guess(study: Study) -> list[Finding]:
    """Return that the direction of the metric is a guess, on which every other finding depends, if it is one."""
    return [Finding(study.info.guesses(study.metric)[0])] if study.info.direction_guessed else []


def markdown_page(content: Content) -> str:
    """Return the report as GitHub's Markdown, each name escaped."""
    parts = [f"# {text_of(content.title)}", *[text_of(content.measured_on)] * bool(content.measured_on), "## Verdict"]
    shown = set()
    for finding in content.findings:
        headline = [f"**{text_of(finding.headline)}**"] if finding.headline else []
        parts.append(" ".join([*headline, text_of(finding.detail)]).strip())
        if finding.remedy and finding.remedy not in shown:
            parts.append(f"{finding.advice} {code_of(finding.remedy)}")
            shown.add(finding.remedy)
    parts.append("\n".join(f"- {text_of(note)}" for note in content.notes))
    parts += ["## Metric by strength", *tables_as_markdown(content.heat_maps)]
    parts += ["## Table", *tables_as_markdown([*content.summaries, content.values])]
    parts.append(f"## {content.settings.caption}")
    parts += [code_of(command) for command in content.commands]
    parts.append(markdown_table(content.settings.header, content.settings.rows))
    return "\n\n".join(parts) + "\n"


def answer_as_markdown(title: str, findings: Sequence[Finding], notes: Iterable[str]) -> list[str]:
    """Return how a page begins that leads with one answer: its title, the answer, what is behind it, and the notes."""
    first, *others = findings
    said = [f"# {text_of(title)}", f"**{text_of(first.text)}**", *(text_of(one.text) for one in others)]
    return [*said, "\n".join(f"- {text_of(note)}" for note in notes)]


def tables_as_markdown(tables: Iterable[Table]) -> list[str]:
    """Return each table below its caption."""
    parts = []
    for table in tables:
        parts += [f"{text_of(table.caption)}:", markdown_table(table.header, table.rows)]
    return parts
