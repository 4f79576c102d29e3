"""Verdicts in plain words on several models: each against the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_parcor.records.curves import metric_drop
from hf_parcor.reports.numbers import Numbers, probability
from hf_parcor.reports.study import Study, common_strengths
from hf_parcor.reports.verdict import LEVEL, Finding, adjusted_p_values, with_one_row
from hf_parcor.statistics import Alternative, sample_mean

_MODELS_NAMED = 6  # as many differences a verdict names


@dataclass(frozen=True)
class Difference:
    """A model against the first one.

    Attributes:
        model: Its name.
        group: What was corrupted.
        what: The corruptions, or "no corruption".
        first: The metric of the first model in each repetition.
        second: That of this model.
        gain: How much better this model is; NaN where that cannot be told.
        p_value: Welch's, two-sided, with Holm's correction; None where there is no spread to judge by.
        broken: Other metrics that are not finite where this one is: it may come from what is no answer.
        family: What a reader calls such corruptions.
    """

    model: str
    group: str
    what: str
    first: tuple[float, ...]
    second: tuple[float, ...]
    gain: float
    p_value: float | None = None
    broken: tuple[str, ...] = ()
    family: str = ""

    @property
    def clear(self) -> bool:
        """Whether it is beyond the spread."""
        return self.p_value is not None and self.p_value < LEVEL


def differences(study: Study, *, by_strength: bool) -> list[Difference]:
    """Return all differences to the first model, corrected for as many tests as there are.

    Args:
        study: Several models.
        by_strength: Whether each strength stands alone, or a series is one number: the mean over the strengths.
    """
    baseline, *others = study.models
    found = []
    for model in others:
        seen = False
        for series, curves in study.curves.items():
            for group in study.groups:
                if (baseline, group) not in curves or (model, group) not in curves:
                    continue
                first, second = curves[baseline, group], curves[model, group]
                if not seen:
                    found.append(
                        _difference(study, model, "", "no corruption", first.clean.values, second.clean.values)
                    )
                    seen = True
                names = common_strengths([first, second])
                for chosen in [[name] for name in names] if by_strength else [names] * bool(names):
                    what = f"{series.name}, {', '.join(chosen)}"
                    levels = first.levels(chosen), second.levels(chosen)
                    points = [point for curve in (first, second) for point in curve.points if point.name in chosen]
                    broken = dict.fromkeys(name for point in points if not point.reliable for name in point.broken)
                    family = FAMILIES.get(series.corruption, f"under {series.name}")
                    found.append(_difference(study, model, group, what, *levels, tuple(broken), family))
    pairs = {index: (one.first, one.second) for index, one in enumerate(found) if not one.broken}
    p_values = adjusted_p_values(pairs, Alternative.TWO_SIDED)
    return [replace(one, p_value=p_values.get(index)) for index, one in enumerate(found)]


def comparison_verdict(study: Study, numbers: Numbers) -> list[Finding]:
    """Return the findings on each model against the first: the count, what is beyond the spread, the price."""
    baseline = next(iter(study.models))
    of_all = differences(study, by_strength=False)
    findings = []
    for model in list(study.models)[1:]:
        of_model = [one for one in of_all if one.model == model]
        if len(of_model) < 2:
            findings.append(Finding(f"{model} and {baseline} have no corruption of the same group in common."))
            continue
        clean, *corrupted = of_model
        several = len(study.groups) > 1
        counted = _count(study, corrupted)
        averages = _averages(study, numbers, clean, corrupted)
        findings.append(Finding(f"{model} against {baseline}: {averages}", counted[0].upper() + counted[1:]))
        clear = sorted((one for one in corrupted if one.clear), key=lambda one: -abs(one.gain))
        named = clear[:_MODELS_NAMED] or _largest(corrupted)
        named += [one for one in corrupted if not math.isfinite(one.gain)][:_MODELS_NAMED]
        findings += [Finding("", _sentence(one, numbers, study.metric, several=several)) for one in named]
        findings.append(Finding("", _sentence(clean, numbers, study.metric, several=False)))
    return with_one_row(findings, study, numbers)


FAMILIES = {  # what a reader calls the corruptions of the catalogue; others go by their own title
    "gradient": "in the worst direction",
    "multi_step": "in the worst direction",
    "random": "under noise",
    "gaussian": "under noise",
    "uniform": "under noise",
    "quantization": "when quantized",
    "float_quantization": "when quantized",
    "bit_flips": "with flipped bits",
    "worst_bit_flips": "with flipped bits",
}


def _averages(study: Study, numbers: Numbers, clean: Difference, corrupted: Sequence[Difference]) -> str:
    """Return how the metric differs on average over each family of corruptions, and without corruption."""
    changes: dict[str, list[float]] = {family: [] for family in FAMILIES.values()}
    for one in corrupted:
        if math.isfinite(one.gain):
            changes.setdefault(one.family, []).append(sample_mean(one.second) - sample_mean(one.first))
    told = [
        f"{numbers.difference(sample_mean(found), sign=True)} {family}" for family, found in changes.items() if found
    ]
    without = sample_mean(clean.second) - sample_mean(clean.first)
    if math.isfinite(without):
        told.append(f"{numbers.difference(without, sign=True)} without corruption")
    if not told:
        return f"{study.metric} is not a finite number."
    less = "" if study.greater_is_better else " (less is better)"
    return f"{study.metric}{less}, on average, {', '.join(told)}."


def _count(study: Study, corrupted: list[Difference]) -> str:
    total = f"{len(corrupted)} comparison" + "s" * (len(corrupted) != 1)
    tested = [one for one in corrupted if one.p_value is not None]
    better = sum(0 < one.gain < math.inf for one in corrupted)
    worse = sum(-math.inf < one.gain < 0 for one in corrupted)
    unknown = sum(not math.isfinite(one.gain) for one in corrupted)
    untold = f" It cannot be told in {unknown}, where not all is finite." if unknown else ""
    if unknown == len(corrupted):
        return f"it cannot be told in any of {total}, since not all is finite."
    if not tested:
        return (
            f"its mean is better in {better} of {total}, worse in {worse}.{untold} There is no spread to judge that "
            "by: repeat training with other seeds before you conclude."
        )
    better = sum(one.clear and one.gain > 0 for one in corrupted)
    worse = sum(one.clear and one.gain < 0 for one in corrupted)
    all_judged = len(tested) == len(corrupted)
    if len(tested) + unknown < len(corrupted):
        untold += " There is no spread to judge the rest by."
    if not better and not worse:
        among = total if all_judged else f"{len(tested)} of {total}"
        return f"no difference is beyond the {study.spread} in {among}.{untold}"
    others = "; no such difference in the others" if all_judged and better + worse < len(corrupted) else ""
    return f"better beyond the {study.spread} in {better} of {total}, worse in {worse}{others}.{untold}"


def _largest(corrupted: list[Difference]) -> list[Difference]:
    """Return the largest difference, as an example of what was seen."""
    finite = [one for one in corrupted if math.isfinite(one.gain) and one.gain != 0]
    return [max(finite, key=lambda one: abs(one.gain))] if finite else []


def _sentence(one: Difference, numbers: Numbers, metric: str, *, several: bool) -> str:
    where = f"{one.what}, {one.group} corrupted" if several else one.what
    if one.broken:
        return f"{where}: {' or '.join(one.broken)} is not a finite number, so {metric} says nothing."
    if not math.isfinite(one.gain):
        values = f"{numbers.with_unit(sample_mean(one.second))} instead of {numbers.with_unit(sample_mean(one.first))}"
        return f"{where}: {metric} is not a finite number, so there is no difference to tell ({values})."
    verdict = (
        "no spread is known"
        if one.p_value is None
        else f"{'' if one.clear else 'not '}beyond the spread, {probability(one.p_value)}"
    )
    first, second = sample_mean(one.first), sample_mean(one.second)
    change = numbers.difference(second - first, sign=True)
    return (
        f"{where}: {metric} {numbers.with_unit(second)} instead of {numbers.with_unit(first)} ({change}; {verdict})."
    )


def _difference(
    study: Study,
    model: str,
    group: str,
    what: str,
    first: tuple[float, ...],
    second: tuple[float, ...],
    broken: tuple[str, ...] = (),
    family: str = "",
) -> Difference:
    gain = metric_drop(sample_mean(second), sample_mean(first), greater_is_better=study.greater_is_better)
    told = math.nan if broken else gain
    return Difference(model, group, what, first, second, told, broken=broken, family=family)
