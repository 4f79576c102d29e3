"""The verdict on one model: which group is fragile, in plain words made from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hf_parcor.evaluation.records import EvaluationRecord
from hf_parcor.metric_info import POINTS, SHARE
from hf_parcor.report.evidence import LEVEL, adjusted_p_values
from hf_parcor.report.fragility import fragility, others_median
from hf_parcor.report.numbers import Numbers, probability, times
from hf_parcor.report.study import Curve, Point, Study, common_strengths, mean
from hf_parcor.statistics import Alternative

NEGLIGIBLE = 0.01  # a drop of this share of the clean metric is none
STANDS_OUT = 2.0  # the fragility from which on a single measurement is worth a word
_NAMED = 5  # as many groups a sentence names


class Finding(NamedTuple):
    """What was found, and what to do about it.

    Attributes:
        headline: A sentence.
        detail: The numbers behind it, in sentences.
        remedy: Python code, or "".
        clear: Whether it is beyond the spread.
    """

    headline: str
    detail: str = ""
    remedy: str = ""
    clear: bool = False

    @property
    def text(self) -> str:
        """All that is to be said, in one line."""
        advice = f"{self.advice} {self.remedy}" if self.remedy else ""
        return " ".join(filter(None, [self.headline, self.detail, advice]))

    @property
    def advice(self) -> str:
        """What stands before the remedy."""
        return "Defend it with" if self.clear else "If that holds, defend it with"


def probe_verdict(study: Study, numbers: Numbers) -> list[Finding]:
    """Return a finding for each series of corruptions, those beyond the spread first."""
    [groups] = study.models.values()
    findings = []
    for series, by_key in study.curves.items():
        curves = {group: curve for (_, group), curve in by_key.items()}
        of_one = len(curves) == 1
        finding = _of_one_group(study, numbers, curves) if of_one else _of_groups(study, numbers, curves, groups)
        findings.append(finding._replace(headline=f"{series.name}: {finding.headline}"))
    return sorted(findings, key=lambda finding: (not finding.clear, not finding.remedy))


def _nothing_to_lose(study: Study, curves: Mapping[str, Curve]) -> str:
    """Return why these curves say nothing, or ""."""
    clean = [curve.clean.mean for curve in curves.values()]
    if not all(map(math.isfinite, clean)):
        return f"{study.metric} is not a finite number without corruption, so a drop cannot be told."
    if study.greater_is_better and study.info.unit in (SHARE, POINTS) and min(clean) <= 0:  # others go below 0
        return f"{study.metric} is not above 0 without corruption: there is nothing to lose."
    return ""


def _of_one_group(study: Study, numbers: Numbers, curves: Mapping[str, Curve]) -> Finding:
    [(group, curve)] = curves.items()
    nothing = _nothing_to_lose(study, curves)
    if nothing:
        return Finding(nothing)
    broken = [point.name for point in curve.points if not math.isfinite(point.mean)]
    if broken:
        return Finding(f"with {group} corrupted, {study.metric} is not a finite number at {_listed(broken)}.")
    unreliable = [point for point in curve.points if not point.reliable]
    if unreliable:
        return Finding(
            f"with {group} corrupted, the model breaks at {_listed([point.name for point in unreliable])}: "
            f"{_broken(unreliable)} is not a finite number there, so {study.metric} says nothing."
        )
    drops = {point.name: mean(curve.drops([point.name])) for point in curve.points}
    worst, best = (of(curve.points, key=lambda point: drops[point.name]) for of in (max, min))
    clean = numbers.with_unit(curve.clean.mean)
    counted = [point.name for point in curve.points if point.counted_wrong]
    lost = f"Not all predictions are finite at {_listed(counted)}; these count as wrong." if counted else ""
    limit = NEGLIGIBLE * abs(curve.clean.mean)
    gain = f"from {clean} to {numbers.with_unit(best.mean)} at {best.name}"
    if drops[worst.name] > limit:
        better = drops[best.name] < -limit
        return Finding(
            f"with {group} corrupted, {study.metric} {_moves(study)} from {clean} to {numbers.with_unit(worst.mean)} "
            f"at {worst.name}.",
            _joined(f"It gets better, too: it {_moves(study, better=True)} {gain}." if better else "", lost),
        )
    if drops[best.name] < -limit:
        return Finding(
            f"with {group} corrupted, {study.metric} gets better: it {_moves(study, better=True)} {gain}, and at no "
            "strength is it worse by more than 1 % of its value without corruption.",
            lost,
        )
    if counted:
        return Finding(
            f"with {group} corrupted, not all predictions are finite at {_listed(counted)}, though {study.metric} "
            f"is within 1 % of its value without corruption, {clean}."
        )
    return Finding(
        f"with {group} corrupted, {study.metric} stays within 1 % of its value without corruption, {clean}, at every "
        "strength."
    )


def _of_groups(
    study: Study,
    numbers: Numbers,
    curves: Mapping[str, Curve],
    groups: Mapping[str, tuple[EvaluationRecord, ...]],
) -> Finding:
    names = common_strengths(curves.values())
    if not names:
        return Finding("the groups have no strength in common, so they cannot be compared.")
    nothing = _nothing_to_lose(study, curves)
    if nothing:
        return Finding(nothing)
    repeated = {group: curve.drops(names) for group, curve in curves.items()}
    drops = {group: mean(values) for group, values in repeated.items()}
    broken = [group for group, drop in drops.items() if not math.isfinite(drop)]
    unreliable = [group for group, curve in curves.items() if group not in broken and not curve.reliable(names)]
    counted = [
        group for group, curve in curves.items() if group not in broken + unreliable and not curve.all_finite(names)
    ]
    lost = [point for group in unreliable for point in curves[group].points if not point.reliable]
    unranked = _joined(
        f"Not ranked, since {study.metric} is not a finite number: {_listed(broken)}." if broken else "",
        f"Not ranked, since {_broken(lost)} is not a finite number: {_listed(unreliable)}." if unreliable else "",
        f"Not all predictions are finite with {_listed(counted)} corrupted; these count as wrong." if counted else "",
    )
    drops = {group: drop for group, drop in drops.items() if group not in broken + unreliable}
    if len(drops) < 2:
        return Finding("fewer than two groups can be ranked.", unranked)
    top = max(drops, key=lambda group: drops[group])
    clean = curves[top].clean.mean
    limit = NEGLIGIBLE * abs(clean)
    at_each = {group: [mean(curves[group].drops([name])) for name in names] for group in drops}
    better = [group for group, found in at_each.items() if min(found) < -limit]
    improved = f"{study.metric} gets better by more than that with {_listed(better)} corrupted." if better else ""
    if all(max(found) <= limit for found in at_each.values()):  # at the worst strength, not on average
        which = "no group" if len(drops) == len(curves) else "no group that can be ranked"
        loses = "loses" if study.greater_is_better else "adds"
        of_it = f"{'of' if study.greater_is_better else 'to'} the {study.metric} without corruption"
        text = f"{which} {loses} more than 1 % {of_it}, {numbers.with_unit(clean)}"
        if unranked:
            finding = Finding(f"{text}, but not all that the model returns is finite.")
        else:
            finding = Finding(f"{text}: none is fragile {_over(names)}.")
        return finding._replace(detail=_joined(improved, unranked))
    p_values = _beyond_the_others({group: repeated[group] for group in drops})
    return _ranked(study, numbers, names, drops, p_values, top, clean, unranked, _remedy(groups[top]))


def _ranked(
    study: Study,
    numbers: Numbers,
    names: Sequence[str],
    drops: Mapping[str, float],
    p_values: Mapping[str, float],
    top: str,
    clean: float,
    unranked: str,
    remedy: str,
) -> Finding:
    ratio, median = fragility(drops)[top], others_median(drops, top)
    limit = NEGLIGIBLE * abs(clean)
    size = (
        f"With {top} corrupted, {study.metric} {_moved(study, numbers, drops[top])} {_over(names)}; with the others, "
        f"at the median, it {_moved(study, numbers, median)}."
    )
    if drops[top] <= limit:
        return Finding(
            f"no group makes {study.metric} worse by more than 1 % {_over(names)}, though one does at one of these.",
            _joined(size, unranked),
        )
    if top not in p_values and ratio < STANDS_OUT:
        return Finding("no group stands out.", _joined(size, unranked))
    if top in p_values and p_values[top] >= LEVEL:
        judged = f"no difference between the groups is beyond the {study.spread} ({probability(p_values[top])})."
        return Finding(judged, _joined(size, unranked))
    others = "gets better" if median < -limit else "loses next to nothing"
    headline = (
        f"{top} is {times(ratio)} times as fragile as the median of the others."
        if median > limit
        else f"{top} is the most fragile, while the median of the others {others}."
    )
    if top not in p_values:
        single = (
            "There is no spread to judge that by, since it was measured once or came out the same each time: repeat "
            "it with models of other seeds before you rely on it."
        )
        return Finding(headline, _joined(size, single, unranked), remedy)
    also = [group for group, value in p_values.items() if value < LEVEL and group != top and drops[group] > limit]
    judged = f"That is beyond the {study.spread} ({probability(p_values[top])})."
    more = f"So is the {study.loss} of {_listed(also)}." if also else ""
    return Finding(headline, _joined(size, judged, more, unranked), remedy, clear=True)


def _beyond_the_others(repeated: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Test each group's drops against the medians of the others, repetition by repetition."""
    if len({len(values) for values in repeated.values()}) > 1:
        return {}
    pairs = {}
    for group, values in repeated.items():
        others = [drops for other, drops in repeated.items() if other != group]
        pairs[group] = (values, [statistics.median(drops) for drops in zip(*others, strict=True)])
    return adjusted_p_values(pairs, Alternative.GREATER)


def _remedy(records: Sequence[EvaluationRecord]) -> str:
    """Return how to defend what was corrupted; "" where more than `target_modules` chose it."""
    target = records[0].target
    if set(target) != {"target_modules"}:
        return ""
    return f"ParameterDefenseTrainer(..., target_modules={target['target_modules']!r})"


def _moves(study: Study, *, better: bool = False) -> str:
    """Return where a metric goes that gets worse, or better."""
    return "rises" if study.greater_is_better is better else "falls"


def _moved(study: Study, numbers: Numbers, drop: float) -> str:
    """Return how far a metric went, and where to; a drop below 0 is for the better."""
    if drop == 0:
        return "stays as it is"
    better = drop < 0
    told = ", which is better" if better else ""
    return f"{_moves(study, better=better)} by {numbers.difference(abs(drop))}{told}"


def _broken(points: Sequence[Point]) -> str:
    return " or ".join(dict.fromkeys(name for point in points for name in point.broken))


def _over(names: Sequence[str]) -> str:
    return f"at {names[0]}" if len(names) == 1 else f"on average over {names[0]} … {names[-1]}"


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
