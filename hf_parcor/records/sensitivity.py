"""What each format costs each part of a model: plain data, JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from hf_parcor.records.curves import metric_drop
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.metric_info import MetricInfo, info_by_name, read_infos
from hf_parcor.records.stored import StoredRecord
from hf_parcor.statistics import rank_correlation

FORMAT = 1
FISHER = "fisher"
"""The score that stands in for what was not measured."""

DIVERGENCE = "divergence"
"""The metric that recipes are chosen by: how far the answers are from those of the model as it is."""


@dataclass(frozen=True)
class WeightGroup:
    """Weights that get one format together.

    Attributes:
        weights: Their names, each with how many entries it has.
        bits: How many bits one of these takes as it is, mean over the group.
        holders: By weight which modules hold it, several where it is tied, each with its class, such as "Linear"; a
            class that is derived from a linear layer or an embedding names that too: "Mine(Linear)". Empty in records
            from before it was kept.
    """

    weights: Mapping[str, int]
    bits: float
    holders: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many entries they have together."""
        return sum(self.weights.values())

    @property
    def modules(self) -> list[str]:
        """The modules that hold them, as tools name them; a weight that is none's `weight` stands for itself."""
        return list(dict.fromkeys(name.removesuffix(".weight") for name in self.weights))


@dataclass(frozen=True)
class FormatScore:
    """One group in one format, all other weights as they are.

    Attributes:
        group: The group.
        format: The format.
        bits: Average bits a weight, with scales as they are stored.
        scores: Estimates of the change of the loss, by their names, some of which have a sign; see `sensitivity`.
        measured: Metrics by name; empty where nothing was measured.
    """

    group: str
    format: str
    bits: float
    scores: Mapping[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SensitivityRecord(StoredRecord):
    """What `sensitivity` found: every group of weights in every format, estimated, and measured as far as asked for.

    Attributes:
        model: Name or path of the model.
        groups: The groups by name; no weight is in two.
        formats: By their labels, the name in the catalogue of corruptions and the settings.
        cells: Each group in each format that fits it.
        clean: The metrics of the model as it is.
        metric: Which of them is the one to look at.
        metric_info: What their numbers mean.
        parameters: How many weights the model has, with those that are in no group.
        outside: The linear modules that are in no group, and so stay as they are.
        kinds: By the class of what holds matrices: how many of these modules are in a group, and how many there are;
            empty in records from before it was kept.
        data: Fingerprint of the data, as in `EvaluationRecord`.
        weights: SHA-256 of all parameters and buffers of the model.
        evaluated_on: The data; None where nobody said.
        task: The Hub's name of the task.
        versions: Versions of the libraries.
        notes: What was noticed, in sentences.
        flags: As in `EvaluationRecord`.
        format: Version of this layout.

    Examples:
        >>> from hf_parcor.records import FormatScore, WeightGroup
        >>> four = {"corruption": "quantization", "settings": {"bits": 4}}
        >>> record = SensitivityRecord(
        ...     "m",
        ...     groups={"a": WeightGroup({"a.weight": 8}, 32.0), "b": WeightGroup({"b.weight": 8}, 32.0)},
        ...     formats={"4-bit quantization": four},
        ...     cells=(
        ...         FormatScore("a", "4-bit quantization", 4.0, {"fisher": 0.5}, {"loss": 1.75}),
        ...         FormatScore("b", "4-bit quantization", 4.0, {"fisher": 0.1}),
        ...     ),
        ...     clean={"loss": 1.25},
        ...     metric="loss",
        ... )
        >>> record.costs("loss")
        {('a', '4-bit quantization'): 0.5, ('b', '4-bit quantization'): 0.1}
        >>> SensitivityRecord.from_json(record.to_json()) == record
        True
    """

    model: str
    groups: Mapping[str, WeightGroup]
    formats: Mapping[str, Mapping[str, Any]]
    cells: tuple[FormatScore, ...]
    clean: Mapping[str, float]
    metric: str
    metric_info: Mapping[str, MetricInfo] = field(default_factory=dict)
    parameters: int = 0
    outside: tuple[str, ...] = ()
    kinds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    data: str = ""
    weights: str = ""
    evaluated_on: EvaluationData | None = None
    task: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    kind: ClassVar[str] = "sensitivity record"

    @property
    def scores(self) -> list[str]:
        """The names of the scores."""
        return list(self.cells[0].scores) if self.cells else []

    @cached_property
    def by_place(self) -> dict[tuple[str, str], FormatScore]:
        """The cells by group and format."""
        return {(cell.group, cell.format): cell for cell in self.cells}

    def info(self, metric: str) -> MetricInfo:
        """Return what the numbers of a metric mean, as `EvaluationRecord.info`."""
        values = [cell.measured[metric] for cell in self.cells if metric in cell.measured]
        return self.metric_info.get(metric) or info_by_name(metric, values)

    def stating(
        self, metric: str, *, greater_is_better: bool | None = None, unit: str | None = None
    ) -> SensitivityRecord:
        """Return the record with a metric to look at, and what somebody states of it; None leaves it as it is."""
        info = self.info(metric).stating(greater_is_better=greater_is_better, unit=unit)
        return replace(self, metric=metric, metric_info={**self.metric_info, metric: info})

    def drop(self, cell: FormatScore, metric: str) -> float | None:
        """Return how much worse a metric is in a cell, as `metric_drop`; None where it was not measured."""
        if metric not in cell.measured:
            return None
        greater = self.info(metric).greater_is_better
        return metric_drop(self.clean[metric], cell.measured[metric], greater_is_better=greater)

    def breaks(self, cell: FormatScore) -> list[str]:
        """Return the metrics that are not finite in a cell, though they are for the model as it is."""
        return [
            name
            for name, value in cell.measured.items()
            if math.isfinite(self.clean.get(name, math.nan)) and not math.isfinite(value)
        ]

    def costs(self, by: str) -> dict[tuple[str, str], float]:
        """Return what each cell costs.

        Of a score it is the score. Of a metric it is the measured drop; where that is missing, the Fisher score times
        the ratio of drops and scores over what was measured.

        Raises:
            ValueError: There is no such score or metric, it is not finite for the model as it is, or nothing was
                measured.
        """
        if by in self.scores:
            return {place: cell.scores[by] for place, cell in self.by_place.items()}
        if by not in self.clean:
            known = ", ".join([*self.clean, *self.scores])
            raise ValueError(f"by: expected one of {known}, got {by!r}; name a metric or a score of the record")
        if not math.isfinite(self.clean[by]):
            raise ValueError(
                f"by: expected a metric that is finite for the model as it is, got {by!r}, which is "
                f"{self.clean[by]:g}; choose by one of {', '.join(self.scores)}"
            )
        drops = {place: self.drop(cell, by) for place, cell in self.by_place.items()}
        sure = {place: drop for place, drop in drops.items() if drop is not None}
        if not sure:
            raise ValueError(
                f"by: expected a metric that was measured, got {by!r}, which no cell has; measure some (budget=1 or "
                f"more), or choose by one of {', '.join(self.scores)}"
            )
        ratio = self._ratio(sure)
        return {
            place: ratio * self.by_place[place].scores[FISHER] if drop is None else drop
            for place, drop in drops.items()
        }

    def _ratio(self, drops: Mapping[tuple[str, str], float]) -> float:
        finite = {
            place: drop
            for place, drop in drops.items()
            if math.isfinite(drop) and math.isfinite(self.by_place[place].scores[FISHER])
        }
        scored = sum(self.by_place[place].scores[FISHER] for place in finite)
        return max(0.0, sum(finite.values())) / scored if scored else 0.0

    def correlations(self, metric: str) -> dict[str, float]:
        """Return Spearman's rank correlation of each score with the measured drop of a metric.

        Raises:
            ImportError: SciPy is not installed.
        """
        known = [(cell, drop) for cell in self.cells if (drop := self.drop(cell, metric)) is not None]
        drops = [drop for _, drop in known]
        return {score: rank_correlation([cell.scores[score] for cell, _ in known], drops) for score in self.scores}

    @classmethod
    def _read(cls, data: dict[str, Any]) -> SensitivityRecord:
        data["groups"] = read_groups(data["groups"])
        data["cells"] = tuple(
            FormatScore(
                cell["group"],
                cell["format"],
                float(cell["bits"]),
                read_numbers(cell["scores"]),
                read_numbers(cell["measured"]),
            )
            for cell in data["cells"]
        )
        data["clean"] = read_numbers(data["clean"])
        data["metric_info"] = read_infos(data["metric_info"])
        data["outside"], data["notes"] = tuple(data["outside"]), tuple(data["notes"])
        data["kinds"] = {kind: (within, of) for kind, (within, of) in data.get("kinds", {}).items()}
        data["evaluated_on"] = None if data["evaluated_on"] is None else EvaluationData(**data["evaluated_on"])
        return cls(**data)


def read_groups(data: Mapping[str, Any]) -> dict[str, WeightGroup]:
    """Return groups from plain values."""
    return {
        name: WeightGroup(one["weights"], float(one["bits"]), one.get("holders", {})) for name, one in data.items()
    }


def read_numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by name from plain values, where infinities are strings."""
    return {name: float(value) for name, value in data.items()}
