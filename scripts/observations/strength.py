"""How strong the groups of a probe are: four ways to say which one is weaker."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from hf_parcor import EvaluationRecord, SweepRecord
from hf_parcor.records.curves import Series, epsilon_at_half

CHANCE = 0.5
WORST, FEW, RANDOM = "gradient-based, L2", "gradient-based, L∞", "random, L2"


@dataclass(frozen=True)
class Setting:
    """One way to say which group is weaker.

    Attributes:
        name: In words.
        strength: Of each group, the smaller the weaker.
        unit: How a strength is written.
    """

    name: str
    strength: Mapping[str, float]
    unit: str

    @property
    def order(self) -> list[str]:
        """The groups, the weakest first."""
        return sorted(self.strength, key=lambda group: self.strength[group])

    @property
    def median(self) -> float:
        """The median strength."""
        return statistics.median(self.strength.values())

    def shown(self, group: str) -> str:
        """Return a group with its strength."""
        value = self.strength[group]
        number = f"{100 * value:.1f} %" if self.unit == "%" else radius(value)
        return f"{group} ({number})"


def settings_of(sweep: SweepRecord) -> list[Setting]:
    """Return all ways to compare the groups of a probe."""

    def of_groups(name: str, unit: str, title: str) -> Setting:
        means = {group: statistics.fmean(accuracies(one, title).values()) for group, one in sweep.records.items()}
        return Setting(name, means, unit)

    few = next(row for _, row in sweep.rows() if Series.of(row).name.startswith(FEW)).settings["top_n"]
    return [
        Setting("the same ε", {group: radius_at_half(one) for group, one in sweep.records.items()}, "ε"),
        Setting("the same ε/‖w‖", {group: relative_radius(one) for group, one in sweep.records.items()}, "ε"),
        of_groups(f"{few} weights as in paper 1", "%", FEW),
        of_groups("random directions", "%", RANDOM),
    ]


def accuracies(record: EvaluationRecord, title: str) -> dict[float, float]:
    """Return the accuracy at each ε of the corruptions whose title begins so."""
    rows = [row for row in record.corruptions if Series.of(row).name.startswith(title)]
    return {float(row.settings["epsilon"]): row.mean("accuracy") for row in rows}


def radius_at_half(record: EvaluationRecord) -> float:
    """Return the ε at which half of the accuracy above chance is lost in the worst direction; ∞ beyond the range."""
    curve = accuracies(record, WORST)
    above = [value - CHANCE for value in curve.values()]
    return epsilon_at_half(list(curve), above, clean=record.clean.mean("accuracy") - CHANCE)


def relative_radius(record: EvaluationRecord) -> float:
    """Return the same in units of the norm of the group's weights."""
    if record.weights_norm is None:
        raise ValueError(f"records: expected the norm of the weights, got none for {record.target}; probe again")
    return radius_at_half(record) / record.weights_norm


def radius(value: float) -> str:
    """Return a radius; what was not reached has none."""
    return "–" if math.isinf(value) else f"{value:.2g}"
