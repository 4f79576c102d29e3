"""Whether what the papers observe holds in a probe, in words."""

from __future__ import annotations

import statistics
from itertools import groupby

from hf_parcor import SweepRecord
from observations.strength import WORST, Setting, accuracies, settings_of


def weakest_kind(sweep: SweepRecord, kind: str = "layer-norm") -> str:
    """Return whether a kind of module is the weakest of all."""
    settings = settings_of(sweep)
    holding = [setting.name for setting in settings if setting.order[0] == kind]
    details = []
    for setting in settings:
        detail = f"with {setting.name} the weakest is {setting.shown(setting.order[0])}"
        if setting.order[0] != kind:
            place = setting.order.index(kind) + 1
            detail += f", and {setting.shown(kind)} is {place} of {len(setting.order)}"
        details.append(detail)
    listed = "; ".join(details)
    return f"{verdict(holding, settings)} {listed[0].upper()}{listed[1:]}."


def robust_kinds(sweep: SweepRecord, kind: str) -> str:
    """Return whether a kind is at least as robust as the median kind."""
    settings = settings_of(sweep)
    holding = [setting.name for setting in settings if setting.strength[kind] >= setting.median]
    places = [f"{setting.order.index(kind) + 1} of {len(setting.order)} with {setting.name}" for setting in settings]
    return f"{verdict(holding, settings)} From the weakest it is {', '.join(places)}."


def weak_upper_layers(sweep: SweepRecord) -> str:
    """Return whether the upper half of the layers is weaker than the lower half."""
    settings = settings_of(sweep)
    layers = list(sweep.records)
    holding, details = [], []
    for setting in settings:
        places = [setting.order.index(layer) for layer in layers]
        half = len(layers) // 2
        if statistics.fmean(places[half:]) < statistics.fmean(places[:half]) and places.index(0) >= half:
            holding.append(setting.name)
        order = ", ".join(
            " = ".join(layer.rpartition(".")[2] for layer in alike)
            for _, alike in groupby(setting.order, key=lambda layer: setting.strength[layer])
        )
        details.append(f"{setting.name}: {order}")
    return f"{verdict(holding, settings)} Layers from the weakest to the strongest with {'; '.join(details)}."


def gains(plain: SweepRecord, defended: SweepRecord) -> str:
    """Return for how many groups the defended model is the more accurate one in the worst direction."""
    changes = {}
    for group, record in plain.records.items():
        before, after = accuracies(record, WORST), accuracies(defended.records[group], WORST)
        changes[group] = 100 * statistics.fmean(after[epsilon] - before[epsilon] for epsilon in before)
    better = sum(change > 0 for change in changes.values())
    listed = ", ".join(f"{group.rpartition('encoder.')[2]} {change:+.1f}" for group, change in changes.items())
    return f"{better} of {len(changes)} groups are harder to break (points, mean over ε: {listed})."


def verdict(holding: list[str], settings: list[Setting]) -> str:
    """Return in which settings an observation holds."""
    if len(holding) == len(settings):
        return "Holds in every setting."
    return f"Holds with {' and '.join(holding)} alone." if holding else "Does not hold in any setting."
