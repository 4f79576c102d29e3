"""Verdicts in plain words made from the numbers: on one model, and on its groups."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from hf_parcor.records.curves import Series
from hf_parcor.records.evaluation import EvaluationRecord
from hf_parcor.records.metric_info import POINTS, SHARE, MetricInfo
from hf_parcor.records.sensitivity import SensitivityRecord
from hf_parcor.reports.numbers import Numbers, probability, times
from hf_parcor.reports.study import Curve, Point, Study, common_strengths
from hf_parcor.statistics import Alternative, holm_correction, sample_mean, welch_t_test

LEVEL = 0.05
_COUNTS_ANSWERS = ("accuracy", "acc")
_SEVERAL_ANSWERS_A_ROW = ("token-classification", "text-generation", "fill-mask")
Key = TypeVar("Key", bound=Hashable)


def adjusted_p_values(
    pairs: Mapping[Key, tuple[Sequence[float], Sequence[float]]], alternative: Alternative
) -> dict[Key, float]:
    """Return Holm's adjusted p-values of Welch's test of first against second, of those that can be tested.

    Left out are those with fewer than two values on a side, with a value that is not finite, and those whose values
    do not differ between repetitions at all: that says nothing about the spread.

    Examples:
        >>> pairs = {"a": ([3.0, 3.1, 2.9], [1.0, 1.1, 0.9]), "b": ([1.0], [2.0]), "c": ([1.0, 1.0], [2.0, 2.0])}
        >>> {key: p < LEVEL for key, p in adjusted_p_values(pairs, Alternative.GREATER).items()}
        {'a': True}
    """
    found = {}
    for key, (first, second) in pairs.items():
        if min(len(first), len(second)) > 1 and all(map(math.isfinite, [*first, *second])):
            test = welch_t_test(first, second, alternative)
            if test.standard_error > 0:
                found[key] = test.p_value
    return dict(zip(found, holm_correction(list(found.values())), strict=True))


def fragility(drops: Mapping[Key, float]) -> dict[Key, float]:
    """Return how many times as much each group loses as the median of the other groups.

    ::

        fragility(g) = d(g) / median_{h ≠ g} d(h),    d(g) = mean of the metric drop over the common strengths

    All strengths count alike, and none is picked after the fact. Where the other groups lose nothing it is ∞ for a
    group that loses something, and NaN for one that does not.

    Args:
        drops: d by the name of the group; finite, two or more.

    Raises:
        ValueError: There are fewer than two groups.

    Examples:
        >>> fragility({"layer.0": 0.5, "layer.1": 1.0, "layer.2": 20.0})["layer.2"]
        26.666666666666668
        >>> fragility({"layer.0": 0.0, "layer.1": 0.5})
        {'layer.0': 0.0, 'layer.1': inf}
    """
    if len(drops) < 2:
        raise ValueError(f"drops: expected two or more groups, got {len(drops)}; fragility compares groups")
    return {group: _ratio(drop, others_median(drops, group)) for group, drop in drops.items()}


def others_median(drops: Mapping[Key, float], group: Key) -> float:
    """Return the median over all groups but one.

    Examples:
        >>> others_median({"a": 1.0, "b": 2.0, "c": 9.0}, "c")
        1.5
    """
    return statistics.median(drop for other, drop in drops.items() if other != group)


def negligible(clean: float) -> float:
    """Return up to which drop a metric of this value without corruption has lost nothing: 1 % of it."""
    return 0.01 * abs(clean)


def _ratio(drop: float, median: float) -> float:
    if median > 0:
        return drop / median
    return math.inf if drop > 0 else math.nan


STANDS_OUT = 2.0  # the fragility from which on a single measurement is worth a word
_NAMED = 5  # as many groups a sentence names


class Finding(NamedTuple):
    """What was found, and what to do about it.

    Attributes:
        headline: A sentence.
        detail: The numbers behind it, in sentences.
        remedy: Python code, or "".
        clear: Whether it is beyond the spread, and large enough to do something about it.
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
    """Return a finding for each series of corruptions, those beyond the spread first; then on what moves nothing.

    Series of which the same is found share one.
    """
    [(model, groups)] = study.models.items()
    names: dict[Finding, list[str]] = {}  # what holds for several is said once
    for series, by_key in study.curves.items():
        curves = {key[1]: curve for key, curve in by_key.items() if key not in study.unmoved}
        if not curves:
            continue
        of_one = len(curves) == 1
        finding = (
            _of_one_group(study, numbers, curves) if of_one else _of_groups(study, numbers, curves, groups, series)
        )
        names.setdefault(finding, []).append(series.name)
    findings = [one._replace(headline=f"{'; '.join(several)}: {one.headline}") for one, several in names.items()]
    findings.sort(key=lambda finding: (not finding.clear, not finding.remedy))
    if study.unmoved:
        unmoved = [group for group in groups if (model, group) in study.unmoved]
        few = _listed(unmoved) if len(unmoved) <= _NAMED else f"any of {len(unmoved)} groups such as {unmoved[0]}"
        said = (
            f"No metric moves at all with {few} corrupted, as with what the data do not use. What that costs on other "
            "data is not known, and it is not compared with the others."
        )
        findings.append(Finding("", said))
    return with_one_row([*_worst_of_all(study, numbers), *findings], study, numbers)


def with_one_row(findings: list[Finding], study: Study, numbers: Numbers) -> list[Finding]:
    """Return findings of which the first says what one row of the data is worth, where that is known."""
    worth = one_row(study.records, study.metric, numbers)
    if not worth or not findings:
        return findings
    first = findings[0]
    return [first._replace(detail=_joined(first.detail, worth)), *findings[1:]]


def rows_counted(records: Iterable[EvaluationRecord | SensitivityRecord], metric: str, numbers: Numbers) -> int:
    """Return of how many rows a metric is a share; 0 where it is none, or that is unknown.

    Only an accuracy counts rows, and where a row has one answer: average precision and F1 have no such step, and a
    text has many words.
    """
    if numbers.unit != SHARE or re.split(r"[^a-z]", metric.lower())[-1] not in _COUNTS_ANSWERS:
        return 0
    counts = {
        0 if data is None or task in _SEVERAL_ANSWERS_A_ROW else data.rows or 0
        for data, task in ((record.evaluated_on, record.task) for record in records)
    }
    return counts.pop() if len(counts) == 1 else 0


def one_row(records: Iterable[EvaluationRecord | SensitivityRecord], metric: str, numbers: Numbers) -> str:
    """Return what one row of the data is worth, in a sentence; "" where the metric is no share of rows."""
    count = rows_counted(records, metric, numbers)
    return f"One of {count:,} rows is {numbers.difference(1 / count)}." if count else ""


def _worst_of_all(study: Study, numbers: Numbers) -> list[Finding]:
    """Return what harms most, of one group under several series of corruptions; nothing where not all is finite."""
    [groups] = study.models.values()
    curves = {series: curve for series, by_key in study.curves.items() for curve in by_key.values()}
    points = [(series, curve, point) for series, curve in curves.items() for point in curve.points]
    all_finite = all(point.reliable for curve in curves.values() for point in curve.all_points)
    if len(groups) > 1 or len(curves) < 2 or not all_finite or _nothing_to_lose(study, {"": points[0][1]}):
        return []
    series, curve, worst = max(points, key=lambda one: sample_mean(one[1].drops([one[2].name])))
    limit = negligible(curve.clean.mean)
    if sample_mean(curve.drops([worst.name])) <= limit:
        return []
    held = [
        other.name
        for other, of_other in curves.items()
        if all(abs(sample_mean(of_other.drops([point.name]))) <= limit for point in of_other.points)
        and not all(point.changed_nothing for point in of_other.points)
    ]
    clean = numbers.with_unit(curve.clean.mean)
    return [
        Finding(
            f"{study.metric} {_moves(study)} most under {series.name} at {worst.name}: from {clean} to "
            f"{numbers.with_unit(worst.mean)}.",
            f"Under {_listed(held)} it stays within 1 % of its value without corruption." if held else "",
        )
    ]


def nothing_to_lose(metric: str, info: MetricInfo, clean: Sequence[float]) -> str:
    """Return why nothing can be said of a metric with these values without corruption, or "".

    Examples:
        >>> nothing_to_lose("bleu", MetricInfo(True, "points"), [0.0])
        'bleu is not above 0 without corruption: there is nothing to lose.'
    """
    if not all(map(math.isfinite, clean)):
        return f"{metric} is not a finite number without corruption, so a drop cannot be told."
    if info.greater_is_better and info.unit in (SHARE, POINTS) and min(clean) <= 0:  # others go below 0
        return f"{metric} is not above 0 without corruption: there is nothing to lose."
    return ""


def _nothing_to_lose(study: Study, curves: Mapping[str, Curve]) -> str:
    return nothing_to_lose(study.metric, study.info, [curve.clean.mean for curve in curves.values()])


def _of_one_group(study: Study, numbers: Numbers, curves: Mapping[str, Curve]) -> Finding:
    [(group, curve)] = curves.items()
    nothing = _nothing_to_lose(study, curves)
    if nothing:
        return Finding(nothing)
    unchanged = [point.name for point in curve.points if point.changed_nothing]
    if len(unchanged) == len(curve.points):
        return Finding(f"no weight of {group} changed at {_listed(unchanged)}: {study.metric} says nothing of it.")
    finding = _of_one_that_changed(study, numbers, group, curve)
    said = f"No weight changed at {_listed(unchanged)}." if unchanged else ""
    return finding._replace(detail=_joined(finding.detail, said))


def _of_one_that_changed(study: Study, numbers: Numbers, group: str, curve: Curve) -> Finding:
    broken = [point.name for point in curve.points if not math.isfinite(point.mean)]
    if broken:
        return Finding(f"with {group} corrupted, {study.metric} is not a finite number at {_listed(broken)}.")
    unreliable = [point for point in curve.points if not point.reliable]
    if unreliable:
        return Finding(
            f"with {group} corrupted, the model breaks at {_listed([point.name for point in unreliable])}: "
            f"{_broken(unreliable)} is not a finite number there, so {study.metric} says nothing."
        )
    drops = {point.name: sample_mean(curve.drops([point.name])) for point in curve.points}
    worst, best = (of(curve.points, key=lambda point: drops[point.name]) for of in (max, min))
    clean = numbers.with_unit(curve.clean.mean)
    counted = [point.name for point in curve.points if point.counted_wrong]
    lost = f"Not all predictions are finite at {_listed(counted)}; these count as wrong." if counted else ""
    limit = negligible(curve.clean.mean)
    mean = _in_the_mean([curve])
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
            f"strength is it worse by more than 1 % of its value without corruption{mean}.",
            lost,
        )
    if counted:
        return Finding(
            f"with {group} corrupted, not all predictions are finite at {_listed(counted)}, though {study.metric} "
            f"is within 1 % of its value without corruption, {clean}{mean}."
        )
    return Finding(
        f"with {group} corrupted, {study.metric} stays within 1 % of its value without corruption, {clean}, at every "
        f"strength{mean}."
    )


def _of_groups(
    study: Study,
    numbers: Numbers,
    curves: Mapping[str, Curve],
    groups: Mapping[str, tuple[EvaluationRecord, ...]],
    series: Series,
) -> Finding:
    names = common_strengths(curves.values())
    if not names:
        return Finding("the groups have no strength in common, so they cannot be compared.")
    nothing = _nothing_to_lose(study, curves)
    if nothing:
        return Finding(nothing)
    repeated = {group: curve.drops(names) for group, curve in curves.items()}
    drops = {group: sample_mean(values) for group, values in repeated.items()}
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
    which = "" if len(drops) == len(curves) else " that can be ranked"  # what is broken may be the worst
    limit = negligible(clean)
    at_each = {group: [sample_mean(curves[group].drops([name])) for name in names] for group in drops}
    better = [group for group, found in at_each.items() if min(found) < -limit]
    improved = f"{study.metric} gets better by more than that with {_listed(better)} corrupted." if better else ""
    if all(max(found) <= limit for found in at_each.values()):  # at the worst strength, not on average
        loses = "loses" if study.greater_is_better else "adds"
        of_it = f"{'of' if study.greater_is_better else 'to'} the {study.metric} without corruption"
        text = (
            f"no group{which} {loses} more than 1 % {of_it}, {numbers.with_unit(clean)}{_in_the_mean(curves.values())}"
        )
        if unranked:
            finding = Finding(f"{text}, but not all that the model returns is finite.")
        else:
            finding = Finding(f"{text}: none is fragile {_over(names)}.")
        return finding._replace(detail=_joined(improved, unranked))
    ranked = {group: repeated[group] for group in drops}
    finding = _ranked(study, numbers, names, ranked, drops, top, clean, which, _remedy(groups[top][0], series, study))
    return finding._replace(detail=_joined(finding.detail, unranked))


def least_worth_defending(
    records: Iterable[EvaluationRecord], metric: str, numbers: Numbers, clean: float
) -> tuple[float, str]:
    """Return from which difference on a part is worth defending, and why, in words.

    Enough trials find any difference. It is the larger of two: 1 % of the metric without corruption, below which no
    drop counts here either; and where the metric is a share p of n rows its standard error, √(p (1 − p) / n), by which
    it moves on other rows of the same kind, with nothing corrupted.
    """
    of_clean, rows = negligible(clean), rows_counted(records, metric, numbers)
    error = math.sqrt(max(0.0, clean * (1 - clean)) / rows) if rows else 0.0
    if error > of_clean:
        return error, f"the standard error of {metric} over {rows:,} rows"
    return of_clean, f"1 % of {metric} without corruption"


def _ranked(
    study: Study,
    numbers: Numbers,
    names: Sequence[str],
    repeated: Mapping[str, tuple[float, ...]],
    drops: Mapping[str, float],
    top: str,
    clean: float,
    which: str,
    remedy: str,
) -> Finding:
    p_values = _beyond_the_others(repeated)
    ratio, median = fragility(drops)[top], others_median(drops, top)
    limit = negligible(clean)
    as_far = [group for group, drop in drops.items() if math.isclose(drop, drops[top])]
    also_with = f", as with {_listed([group for group in as_far if group != top])}" if len(as_far) > 1 else ""
    moved = f"{study.metric} {_moved(study, numbers, drops[top])} {_over(names)}"
    at_median = f"with the others, at the median, it {_moved(study, numbers, median)}"
    size = f"With {top} corrupted{also_with}, {moved}; {at_median}."
    if drops[top] <= limit:
        return Finding(
            f"no group{which} makes {study.metric} worse by more than 1 % {_over(names)}, though one does at one of "
            "these.",
            size,
        )
    if len(as_far) == len(drops):
        return Finding(f"no group{which} is weaker than another: with any one corrupted, {moved}.")
    weakest = f"{_listed(as_far)} {'are' if len(as_far) > 1 else 'is'} the weakest{which}"
    if top not in p_values and ratio < STANDS_OUT:
        rounded = math.floor(10 * ratio) / 10  # never up to what would stand out
        rule = f"measured once, a group stands out from {STANDS_OUT:g} times on"
        said = f"{weakest}, {times(rounded)} times as fragile as the median of the others; {rule}."
        return Finding(said, size)
    if top in p_values and p_values[top] >= LEVEL:
        by = f", {times(ratio)} times as fragile as the median of the others" if median > limit else ""
        judged = f"no difference between the groups{which} is beyond the {study.spread} ({probability(p_values[top])})"
        return Finding(f"{weakest}{by}; {judged}.", size)
    least, why = least_worth_defending(study.records, study.metric, numbers, clean)
    enough = f"the {numbers.difference(least)} from which on a part is worth defending ({why})"
    if drops[top] - median < least:
        beyond = f"is beyond the {study.spread} ({probability(p_values[top])}), but " if top in p_values else "is "
        more = numbers.difference(drops[top] - median)
        said = f"{weakest}, by {more} more than the median of the others; that {beyond}less than {enough}."
        return Finding(said, size)
    others = "gets better" if median < -limit else "loses next to nothing"
    headline = (
        f"{top} is {times(ratio)} times as fragile as the median of the others."
        if median > limit
        else f"{top} is the most fragile, while the median of the others {others}."
    )
    if top not in p_values:
        alike = len({len(values) for values in repeated.values()}) == 1
        why = (
            "it was measured once or came out the same each time" if alike else "not all groups were measured as often"
        )
        single = (
            f"There is no spread to judge that by, since {why}: repeat it with models of other seeds before you rely "
            "on it."
        )
        return Finding(headline, _joined(size, single), remedy)
    also = [
        group
        for group, value in p_values.items()
        if value < LEVEL and group != top and drops[group] - others_median(drops, group) >= max(least, limit)
    ]
    judged = f"That is beyond the {study.spread} ({probability(p_values[top])}), and more than {enough}."
    more = f"So is the {study.loss} of {_listed(also)}." if also else ""
    return Finding(headline, _joined(size, judged, more), remedy, clear=True)


def _beyond_the_others(repeated: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Test each group's drops against the medians of the others, repetition by repetition."""
    if len({len(values) for values in repeated.values()}) > 1:
        return {}
    pairs = {}
    for group, values in repeated.items():
        others = [drops for other, drops in repeated.items() if other != group]
        pairs[group] = (values, [statistics.median(drops) for drops in zip(*others, strict=True)])
    return adjusted_p_values(pairs, Alternative.GREATER)


def _in_the_mean(curves: Iterable[Curve]) -> str:
    """Return that single repetitions may say otherwise, where there are several."""
    return " in the mean over repetitions" if are_repeated(curves) else ""


def are_repeated(curves: Iterable[Curve]) -> bool:
    """Return whether some point was measured several times."""
    return any(len(point.values) > 1 for curve in curves for point in curve.all_points)


_QUANTIZATION = {"quantization": "Quantization", "float_quantization": "FloatQuantization"}


def _remedy(record: EvaluationRecord, series: Series, study: Study) -> str:
    """Return how to defend what was corrupted, at the worst strength; "" where more than `target_modules` chose it."""
    if set(record.target) != {"target_modules"}:
        return ""
    rows = [row for row in record.corruptions if Series.of(row) == series]
    worst = (min if study.greater_is_better else max)(rows, key=lambda row: row.mean(study.metric))
    return remedy(record.target["target_modules"], worst.corruption, worst.settings)


def remedy(target_modules: object, corruption: str, settings: Mapping[str, Any]) -> str:
    """Return the Trainer that defends modules against a corruption; of rounding the usual defense moves nothing.

    Examples:
        >>> remedy(["a"], "quantization", {"bits": 4})
        "ParameterDefenseTrainer(..., defense=CorruptionRisk(Quantization(bits=4)), target_modules=['a'])"
        >>> remedy(["a"], "gradient", {"p": 2.0, "epsilon": 0.1})
        "ParameterDefenseTrainer(..., target_modules=['a'])"
    """
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    rounds = _QUANTIZATION.get(corruption)
    defense = f"defense=CorruptionRisk({rounds}({given})), " if rounds else ""
    return f"ParameterDefenseTrainer(..., {defense}target_modules={target_modules!r})"


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
