"""What a report says, before it becomes HTML or Markdown."""

from __future__ import annotations

from typing import NamedTuple

from hf_parcor.report.comparison_verdict import comparison_verdict
from hf_parcor.report.notes import data_caveat, notes
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
