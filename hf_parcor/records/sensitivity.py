"""What each format costs each part of a model: plain data, JSON in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from hf_parcor.records.curves import metric_drop
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.metric_info import MetricInfo, info_by_name
from hf_parcor.records.stored import StoredRecord
from hf_parcor.statistics import rank_correlation

FORMAT = 1
FISHER = "fisher"
"""The score that estimates what was not measured."""

DIVERGENCE = "divergence"
"""The metric that recipes are chosen by: how far the answers are from those of the unchanged model."""


@dataclass(frozen=True)
class WeightGroup:
    """Weights that get one format together.

    Attributes:
        weights: Their names, each with its number of entries.
        bits: Current bits of an entry, mean over the group.
        holders: For each weight, the modules that hold it (several if it is tied), each with its class, such as
            "Linear". A class derived from a linear layer or an embedding names its base too: "Mine(Linear)". Empty in
            older records.
    """

    weights: Mapping[str, int]
    bits: float
    holders: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The number of entries of all weights."""
        return sum(self.weights.values())

    @property
    def modules(self) -> list[str]:
        """The names of the modules that hold them, without `.weight`; a weight of another name stands for itself."""
        return list(dict.fromkeys(name.removesuffix(".weight") for name in self.weights))


def some_of(names: Sequence[str], what: str = "groups") -> str:
    """Return names for a sentence: up to three, or how many there are and the first.

    Examples:
        >>> some_of(["a", "b"]), some_of(["a", "b", "c", "d"])
        ('a, b', '4 groups such as a')
    """
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} {what} such as {names[0]}"


def targets_of(modules: Iterable[str], groups: Mapping[str, WeightGroup], outside: Iterable[str]) -> list[str]:
    r"""Return what selects these modules and no others as `target_modules`.

    That is their names or, since a name stands for all that ends with it, expressions, which match names in full.

    Args:
        modules: Names of modules, or of what holds several.
        groups: The record's groups.
        outside: Its modules in no group.

    Examples:
        >>> groups = {"first": WeightGroup({"fc.weight": 4}, 32), "second": WeightGroup({"inner.fc.weight": 4}, 32)}
        >>> targets_of(["fc", "inner.fc"], groups, ())
        ['(?:fc)', 'inner.fc']
    """
    every = [*outside, *(module for group in groups.values() for module in group.modules)]
    return [
        f"(?:{re.escape(name)})" if any(f".{name}." in f"{other}." for other in every) else name for name in modules
    ]


@dataclass(frozen=True)
class FormatScore:
    """One group in one format, with all other weights unchanged.

    Attributes:
        group: The group.
        format: The format.
        bits: Average bits a weight, with scales as they are stored.
        scores: Estimates of the change of the loss, by name; some can be negative. See `sensitivity`.
        measured: Metrics by name; empty if nothing was measured.
    """

    group: str
    format: str
    bits: float
    scores: Mapping[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SensitivityRecord(StoredRecord):
    """What `sensitivity` found: estimates for every group of weights in every format, and measurements of some.

    Attributes:
        model: Name or path of the model.
        groups: The groups by name; no weight is in two.
        formats: For each format, by its label: its name in the catalogue of corruptions, and its settings.
        cells: Each group in each format that fits it.
        clean: The metrics of the unchanged model.
        metric: The metric to look at.
        metric_info: What the numbers of the metrics mean.
        parameters: Number of weights of the model, including those in no group.
        outside: The linear modules that are in no group, and so stay as they are.
        loaded_part: The name of the part of the model that Transformers loads by itself, such as "0.model" of one of
            sentence-transformers; "" for all of it.
        kept_in_float: Modules of that part, or patterns of names, that Transformers leaves as they are where it loads
            and quantizes a model: the `wo` of T5.
        unused: Groups that are left out, since the data do not use them: the loss does not depend on them, and nothing
            that was measured changes with them.
        kinds: For each class of modules that hold matrices: how many are in a group, and how many there are; empty in
            older records.
        data: Fingerprint of the data, as in `EvaluationRecord`.
        weights: SHA-256 of all parameters and buffers of the model.
        evaluated_on: The data; None if not stated.
        task: The Hub's name of the task.
        versions: Versions of the libraries.
        notes: Remarks in sentences.
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
    loaded_part: str = ""
    kept_in_float: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
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
    def said_of_unused(self) -> str:
        """A sentence on the groups that the data do not use; "" where there are none."""
        if not self.unused:
            return ""
        return (
            f"These data do not use {some_of(self.unused, 'parts')}: what rounding costs there was not found out, and "
            "it stays as it is. Other data may use it."
        )

    @property
    def scores(self) -> list[str]:
        """The names of the scores."""
        return list(self.cells[0].scores) if self.cells else []

    @cached_property
    def by_place(self) -> dict[tuple[str, str], FormatScore]:
        """The cells by group and format."""
        return {(cell.group, cell.format): cell for cell in self.cells}

    def info(self, metric: str) -> MetricInfo:
        """Return what the numbers of a metric mean, as in `EvaluationRecord.info`.

        Raises:
            ValueError: There is no such metric.
        """
        if metric not in self.clean:
            known = ", ".join(self.clean)
            raise ValueError(f"metric: expected one of {known}, got {metric!r}; name a metric of the record")
        values = [cell.measured[metric] for cell in self.cells if metric in cell.measured]
        return self.metric_info.get(metric) or info_by_name(metric, values)

    def stating(
        self, metric: str, *, greater_is_better: bool | None = None, unit: str | None = None
    ) -> SensitivityRecord:
        """Return the record with another metric to look at, and its meaning as you state it; None changes nothing."""
        info = self.info(metric).stating(greater_is_better=greater_is_better, unit=unit)
        return replace(self, metric=metric, metric_info={**self.metric_info, metric: info})

    def drop(self, cell: FormatScore, metric: str) -> float | None:
        """Return how much worse a metric is in a cell (see `metric_drop`); None if it was not measured."""
        if metric not in cell.measured:
            return None
        greater = self.info(metric).greater_is_better
        return metric_drop(self.clean[metric], cell.measured[metric], greater_is_better=greater)

    def breaks(self, cell: FormatScore) -> list[str]:
        """Return the metrics that are finite for the unchanged model, but not in a cell."""
        return [
            name
            for name, value in cell.measured.items()
            if math.isfinite(self.clean.get(name, math.nan)) and not math.isfinite(value)
        ]

    def costs(self, by: str) -> dict[tuple[str, str], float]:
        """Return the cost of each cell, by group and format.

        For a score, the cost is the score. For a metric, it is the measured drop; if that is missing, it is the Fisher
        score times the ratio of drops to scores over all measured cells.

        Args:
            by: A score or a metric.

        Raises:
            ValueError: There is no such score or metric, it is not finite for the unchanged model, or nothing was
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
