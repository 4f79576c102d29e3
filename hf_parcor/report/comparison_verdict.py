"""The verdict on several models: where does one hold better than the first, and at what price?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hf_parcor.measures import metric_drop
from hf_parcor.report.evidence import LEVEL, adjusted_p_values
from hf_parcor.report.numbers import Numbers, probability
from hf_parcor.report.probe_verdict import Finding
from hf_parcor.report.study import Study, common_strengths, mean
from hf_parcor.statistics import Alternative

_NAMED = 6  # as many differences a verdict names


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
    """

    model: str
    group: str
    what: str
    first: tuple[float, ...]
    second: tuple[float, ...]
    gain: float
    p_value: float | None = None
    broken: tuple[str, ...] = ()

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
                    found.append(_difference(study, model, group, what, *levels, tuple(broken)))
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
        findings.append(Finding(f"{model} against {baseline}: {_count(study, corrupted)}"))
        clear = sorted((one for one in corrupted if one.clear), key=lambda one: -abs(one.gain))
        named = clear[:_NAMED] or _largest(corrupted)
        named += [one for one in corrupted if not math.isfinite(one.gain)][:_NAMED]
        findings += [Finding("", _sentence(one, numbers, study.metric, several=several)) for one in named]
        findings.append(Finding("", _sentence(clean, numbers, study.metric, several=False)))
    return findings


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
    if not better and not worse:
        return f"no difference is beyond the {study.spread} in {total}.{untold}"
    others = "" if unknown else "; no such difference in the others"
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
        values = f"{numbers.with_unit(mean(one.second))} instead of {numbers.with_unit(mean(one.first))}"
        return f"{where}: {metric} is not a finite number, so there is no difference to tell ({values})."
    verdict = (
        "no spread is known"
        if one.p_value is None
        else f"{'' if one.clear else 'not '}beyond the spread, {probability(one.p_value)}"
    )
    change = numbers.difference(mean(one.second) - mean(one.first), sign=True)
    return (
        f"{where}: {metric} {numbers.with_unit(mean(one.second))} instead of {numbers.with_unit(mean(one.first))} "
        f"({change}; {verdict})."
    )


def _difference(
    study: Study,
    model: str,
    group: str,
    what: str,
    first: tuple[float, ...],
    second: tuple[float, ...],
    broken: tuple[str, ...] = (),
) -> Difference:
    gain = metric_drop(mean(second), mean(first), greater_is_better=study.greater_is_better)
    return Difference(model, group, what, first, second, math.nan if broken else gain, broken=broken)
