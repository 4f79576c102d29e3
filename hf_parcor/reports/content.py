"""What a report says, before it becomes HTML, and as Markdown: the same words and numbers, without pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hf_parcor.records.curves import Series
from hf_parcor.reports.markup import code_of, markdown_table, text_of
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.study import Curve, Study, mean
from hf_parcor.reports.tables import Table, all_values, difference_table, heat_map, largest_drop, settings, summary
from hf_parcor.reports.verdict import Finding, comparison_verdict, data_caveat, notes, probe_verdict

_LINES = 6  # as many lines as one tells apart in a small panel
_GROUPS = 4  # as many groups as are drawn where models are compared


class Panel(NamedTuple):
    """Curves that are drawn into the same panel, by the name of their line."""

    title: str
    series: Series
    curves: Mapping[str, Curve]


def panels(study: Study) -> list[Panel]:
    """Return the panels: a line a group, those that lose most; or a line a model, a panel a group."""
    found = []
    for series, curves in study.curves.items():
        if len(study.models) == 1:
            of_group = {group: curve for (_, group), curve in curves.items()}
            shown = dict(sorted(of_group.items(), key=lambda item: -_loss(item[1]))[:_LINES])
            rest = f", the {_LINES} groups that lose most of {len(of_group)}" if len(of_group) > _LINES else ""
            found.append(Panel(series.name + rest, series, shown))
            continue
        first = next(iter(study.models))
        groups = [group for group in study.groups if any((model, group) in curves for model in study.models)]
        worst = sorted(groups, key=lambda group: -_loss(curves.get((first, group))))[:_GROUPS]
        for group in worst:
            of_model = {model: curves[model, group] for model in study.models if (model, group) in curves}
            name = series.name if len(groups) == 1 else f"{series.name}, {group} corrupted"
            found.append(Panel(name, series, of_model))
    return found


def _loss(curve: Curve | None) -> float:
    """Return the mean drop; what is broken lost all."""
    if curve is None:
        return -math.inf
    names = [point.name for point in curve.points]
    drop = mean(curve.drops(names))
    return math.inf if math.isnan(drop) or not curve.reliable(names) else drop


class Content(NamedTuple):
    """The parts of a report, in the order of reading."""

    title: str
    metric: str
    numbers: Numbers
    findings: list[Finding]
    guesses: tuple[str, ...]
    notes: list[str]
    heat_maps: list[Table]
    darkest: str
    panels: list[Panel]
    summaries: list[Table]
    values: Table
    settings: Table


def content_of(study: Study, numbers: Numbers, title: str) -> Content:
    """Return what is to be said about a study."""
    compared = len(study.models) > 1
    darkest = numbers.difference(largest_drop(study))
    verdict = comparison_verdict if compared else probe_verdict
    summaries = [summary(study, series, numbers) for series in study.curves]
    return Content(
        title=title,
        metric=study.metric,
        numbers=numbers,
        findings=[*map(Finding, data_caveat(study) * compared), *verdict(study, numbers), *_guess(study)],
        guesses=study.info.guesses(study.metric),
        notes=notes(study),
        heat_maps=[heat_map(study, series, numbers) for series in study.curves],
        darkest=f"The darker, the more is lost; the darkest is a {study.loss} of {darkest}.",
        panels=panels(study),
        summaries=[difference_table(study, numbers), *summaries] if compared else summaries,
        values=all_values(study, numbers),
        settings=settings(study),
    )


def _guess(study: Study) -> list[Finding]:
    """Return that the direction of the metric is a guess, on which every other finding depends, if it is one."""
    return [Finding(study.info.guesses(study.metric)[0])] if study.info.direction_guessed else []


def markdown_page(content: Content) -> str:
    """Return the report as GitHub's Markdown, each name escaped."""
    parts = [f"# {text_of(content.title)}", "## Verdict"]
    shown = set()
    for finding in content.findings:
        headline = [f"**{text_of(finding.headline)}**"] if finding.headline else []
        parts.append(" ".join([*headline, text_of(finding.detail)]).strip())
        if finding.remedy and finding.remedy not in shown:
            parts.append(f"{finding.advice} {code_of(finding.remedy)}")
            shown.add(finding.remedy)
    parts.append("\n".join(f"- {text_of(note)}" for note in content.notes))
    parts += _section("Metric by strength", content.heat_maps)
    parts += _section("Table", [*content.summaries, content.values])
    parts += _section("Settings to reproduce", [content.settings])
    return "\n\n".join(parts) + "\n"


def _section(title: str, tables: Iterable[Table]) -> list[str]:
    parts = [f"## {title}"]
    for table in tables:
        parts += [f"{text_of(table.caption)}:", markdown_table(table.header, table.rows)]
    return parts
