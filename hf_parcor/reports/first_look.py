"""What a first look says: the weakest part of a model in one format, and how sure that is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hf_parcor.records.metric_info import POINTS, SHARE
from hf_parcor.records.sensitivity import DIVERGENCE, FISHER, FormatScore, SensitivityRecord, targets_of
from hf_parcor.reports.command_line import flag_words
from hf_parcor.reports.content import answer_as_markdown, tables_as_markdown
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.recipe import short_formats
from hf_parcor.reports.tables import Table, short_names
from hf_parcor.reports.verdict import Finding, negligible, nothing_to_lose, one_row, remedy


class FirstLookContent(NamedTuple):
    """The parts of the page, in the order of reading."""

    title: str
    findings: list[Finding]
    notes: list[str]
    parts: Table


class _Told:
    """A record of one format, its parts in the order of what was found.

    Args:
        scores: What `sensitivity` found.

    Raises:
        ValueError: It has more than one format, or no part was measured.
    """

    def __init__(self, scores: SensitivityRecord) -> None:
        measured = [cell for cell in scores.cells if cell.measured]
        if len(scores.formats) != 1 or not measured:
            raise ValueError(
                f"scores: expected one format and at least one part that was measured in it, got "
                f"{len(scores.formats)} and {len(measured)}; call sensitivity with formats=[Quantization(4, "
                "'channel')] and budget=5, say"
            )
        self.scores, self.metric = scores, scores.metric
        self.numbers, self.clean = Numbers(scores.info(self.metric).unit), scores.clean[self.metric]
        self.format = next(iter(short_formats(scores.formats).values()))
        self.moved = DIVERGENCE if DIVERGENCE in scores.clean else self.metric
        # An accuracy changes in steps of a row: which of two is weaker, answers that move tell better.
        by = self.moved if self.numbers.unit in (SHARE, POINTS) else self.metric
        self.measured = sorted(measured, key=lambda cell: (self.is_negligible(cell), -_finite(self.drop(cell, by))))
        self.names = short_names(scores.groups)

    def drop(self, cell: FormatScore, metric: str) -> float:
        """Return how much worse a metric is, of a part that was measured."""
        found = self.scores.drop(cell, metric)
        return math.nan if found is None else found

    def change(self, cell: FormatScore) -> str:
        """Return how the metric changes, with its sign and unit."""
        return self.numbers.difference(cell.measured[self.metric] - self.clean, sign=True)

    def is_negligible(self, cell: FormatScore) -> bool:
        """Return whether the metric is worse by less than a hundredth of its clean value."""
        return _finite(self.drop(cell, self.metric)) <= negligible(self.clean)


def _finite(drop: float) -> float:
    return math.inf if math.isnan(drop) else drop  # of a model that is destroyed


def content_of_first_look(scores: SensitivityRecord, title: str | None = None) -> FirstLookContent:
    """Return what is to be said about parts in one format.

    Raises:
        ValueError: The record has more than one format, or nothing was measured.
        ImportError: SciPy is not installed.
    """
    told = _Told(scores)
    return FirstLookContent(
        title=title or f"Which part of {scores.model} is the weakest in {told.format}?",
        findings=list(_findings(told)),
        notes=list(_notes(told)),
        parts=_parts(told),
    )


def _findings(told: _Told) -> Iterator[Finding]:
    weakest, *others = told.measured
    name, metric, count = told.names[weakest.group], told.metric, len(told.scores.groups)
    clean = told.numbers.with_unit(told.clean)
    worth = f" {one_row([told.scores], metric, told.numbers)}".rstrip()
    nothing = nothing_to_lose(metric, told.scores.info(metric), [told.clean])
    if nothing:
        yield Finding(nothing)
    elif told.is_negligible(weakest):
        worst = max(told.measured, key=lambda cell: _finite(told.drop(cell, metric)))
        with_worst = "none of them makes it worse at all"
        if _finite(told.drop(worst, metric)) > 0:
            with_worst = f"with the worst, {told.names[worst.group]}, it changes by {told.change(worst)}"
        yield Finding(
            f"No part alone is weak in {told.format}: of those measured none makes {metric} worse by 1 %.",
            f"It is {clean} without; {with_worst}.{worth}",
        )
    else:
        seconds = ""
        if others:
            seconds = f"; the next, {told.names[others[0].group]}, by {told.change(others[0])}"
        if others and told.is_negligible(others[0]):
            seconds = "; no other that was measured makes it worse by 1 %"
        modules = told.scores.groups[weakest.group].modules
        few = modules if len(modules) <= 3 else [weakest.group]
        spared = targets_of(few, told.scores.groups, told.scores.outside)
        of_how_many = f"weakest of {count} parts" if count > 1 else "only part"
        (described,) = told.scores.formats.values()
        yield Finding(
            f"{name} is the {of_how_many} in {told.format}: by itself it changes {metric} from {clean} by "
            f"{told.change(weakest)}{seconds}.",
            f"Keep it in more bits{' than the others' if count > 1 else ''}.{worth}",
            remedy(spared, described.get("corruption", ""), described.get("settings", {})),
        )
    yield Finding("", _what_was_rounded(told))
    known = len(told.measured)
    every_one = f"All {count} parts were measured." if count > 1 else "It was measured."
    of_all = every_one if known == count else _of_the_others(told)
    ranks = told.scores.correlations(told.moved) if known > 2 else {}
    shown = ", ".join(
        f"{score} {value:.2f}".replace("-", "−") for score, value in ranks.items() if not math.isnan(value)
    )
    sure = f" The scores order these {known} as {told.moved} does to {shown} (Spearman)." if shown else ""
    yield Finding("", f"{of_all}{sure}")


def _what_was_rounded(told: _Told) -> str:
    """Return what shares a scale, and which modules are in the parts."""
    (described,) = told.scores.formats.values()
    settings = described.get("settings")
    per = settings.get("per", "tensor") if isinstance(settings, Mapping) else "tensor"
    scales = {"tensor": "one scale for each tensor", "channel": "a scale for each channel"}
    counted = [f"{within} of {of} {kind}" for kind, (within, of) in told.scores.kinds.items()]
    modules = f", in these modules: {', '.join(counted)}" if counted else ""
    parameters = sum(group.parameters for group in told.scores.groups.values())
    share = f" of {told.scores.parameters:,}" if told.scores.parameters else ""
    return (
        f"{told.format} are with {scales.get(per, f'a scale for each {per} weights')}. The parts have "
        f"{parameters:,}{share} weights{modules}; all others stay as they are. {told.scores.said_of_unused}".rstrip()
    )


def _of_the_others(told: _Told) -> str:
    """Return what is known of the parts that were not measured: scores alone."""
    others = [cell for cell in told.scores.cells if not cell.measured]
    if not others:
        return f"Measured were {len(told.measured)} parts."
    next_one = max(others, key=lambda cell: cell.scores[FISHER])
    least = min(told.measured, key=lambda cell: cell.scores[FISHER])
    of_others = f"the largest of the other {len(others)} is" if len(others) > 1 else "the other one is"
    return (
        f"Measured were the {len(told.measured)} parts with the largest Fisher scores, {least.scores[FISHER]:.2g} or "
        f"more; {of_others} {next_one.scores[FISHER]:.2g}, of {told.names[next_one.group]}."
    )


def _notes(told: _Told) -> Iterator[str]:
    scores = told.scores
    yield (
        "Scores are from one backward pass over the data; each part was then measured with all others as they are. "
        "What several parts lose together may be more than their sum."
    )
    if scores.evaluated_on is not None:
        yield f"Measured on {scores.evaluated_on}."
    if scores.flags:
        yield f"Measured with the flags {shlex.join(flag_words(scores.flags))}."
    yield from scores.notes
    yield from scores.info(told.metric).guesses(told.metric)


def _parts(told: _Told) -> Table:
    """Return every part with its scores, those that were measured first."""
    others = sorted((cell for cell in told.scores.cells if not cell.measured), key=lambda cell: -cell.scores[FISHER])
    diverges = told.moved == DIVERGENCE
    rows = []
    for cell in [*told.measured, *others]:
        found = "–" if not cell.measured else told.numbers.value(cell.measured[told.metric])
        moved = [f"{cell.measured[DIVERGENCE]:.2g}" if cell.measured else "–"] if diverges else []
        scored = [f"{value:.2g}".replace("-", "−") for value in cell.scores.values()]
        weights = f"{told.scores.groups[cell.group].parameters:,}"
        rows.append((told.names[cell.group], weights, found, *moved, *scored))
    header = ("part", "weights", told.numbers.head(told.metric), *(["divergence (nats)"] * diverges))
    return Table(
        f"Each part in {told.format}; without, {told.metric} is {told.numbers.with_unit(told.clean)}",
        (*header, *told.scores.scores),
        tuple(rows),
    )


def first_look_markdown(content: FirstLookContent) -> str:
    """Return the page as GitHub's Markdown, each name escaped."""
    head = answer_as_markdown(content.title, content.findings, content.notes)
    return "\n\n".join([*head, *tables_as_markdown([content.parts])]) + "\n"
