"""What a report says, before it becomes HTML or Markdown."""

from __future__ import annotations

from typing import NamedTuple

from hf_parcor.report.comparison_verdict import comparison_verdict
from hf_parcor.report.notes import notes
from hf_parcor.report.numbers import Numbers
from hf_parcor.report.panels import Panel, panels
from hf_parcor.report.probe_verdict import Finding, probe_verdict
from hf_parcor.report.study import Study
from hf_parcor.report.tables import Table, all_values, difference_table, heat_map, largest_drop, settings, summary


class Content(NamedTuple):
    """The parts of a report, in the order of reading."""

    title: str
    metric: str
    numbers: Numbers
    findings: list[Finding]
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
    summaries = [summary(study, series, numbers) for series in study.curves]
    return Content(
        title=title,
        metric=study.metric,
        numbers=numbers,
        findings=(comparison_verdict if compared else probe_verdict)(study, numbers),
        notes=notes(study),
        heat_maps=[heat_map(study, series, numbers) for series in study.curves],
        darkest=f"The darker, the more is lost; the darkest is a drop of {numbers.difference(largest_drop(study))}.",
        panels=panels(study),
        summaries=[difference_table(study, numbers), *summaries] if compared else summaries,
        values=all_values(study, numbers),
        settings=settings(study),
    )
