"""Which curves stand in which panel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from hf_parcor.evaluation.series import Series
from hf_parcor.report.study import Curve, Study, mean

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
