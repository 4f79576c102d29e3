"""What a report is about: records of groups, of models, over repetitions, in one shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations
from typing import Any, TypeAlias

from hf_parcor.records.comparable import asked_for, by_identity, check_comparable, check_repetitions, in_one_alone
from hf_parcor.records.curves import Series, metric_drop
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord, SweepRecord, values_of_repetitions
from hf_parcor.records.metric_info import MetricInfo, agreed
from hf_parcor.reports.numbers import metric_of
from hf_parcor.statistics import MeanAndSpread, sample_mean

_MOVES_WITH_ANSWERS = ("loss", "perplexity", "mse")  # however little these change

Records: TypeAlias = (
    EvaluationRecord
    | SweepRecord
    | Sequence[EvaluationRecord]
    | Sequence[SweepRecord]
    | Mapping[str, EvaluationRecord]
    | Mapping[str, Sequence[EvaluationRecord]]
    | Sequence[Mapping[str, EvaluationRecord]]
)


@dataclass(frozen=True)
class Point:
    """A metric under one strength.

    Attributes:
        strength: The setting; of a corruption outside the catalogue its place in the record.
        name: The strength as tables say it.
        values: One a repetition.
        counted_wrong: Whether some predictions were not finite, and counted as wrong: the values can be relied on.
        broken: Other metrics that were finite without corruption and are not here, as the loss is where a model
            returns NaN: the values may come from what is no answer, such as the place of the first NaN.
        changed_nothing: Whether no weight changed, as along a gradient that is not finite.
    """

    strength: float
    name: str
    values: tuple[float, ...]
    counted_wrong: bool = False
    broken: tuple[str, ...] = ()
    changed_nothing: bool = False

    @property
    def mean(self) -> float:
        """The mean over repetitions; NaN if one is."""
        return sample_mean(self.values)

    @property
    def reliable(self) -> bool:
        """Whether the mean is a finite number that was made from answers."""
        return math.isfinite(self.mean) and (self.counted_wrong or not self.broken)

    @property
    def all_finite(self) -> bool:
        """Whether nothing that the model returned was seen not to be finite."""
        return self.reliable and not self.counted_wrong

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean; None where there are no two finite values."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return None
        return MeanAndSpread.from_values(self.values).confidence_interval()


@dataclass(frozen=True)
class Curve:
    """A metric against the strength of one series of corruptions, for one group of one model."""

    clean: Point
    points: tuple[Point, ...]
    greater_is_better: bool

    @property
    def all_points(self) -> tuple[Point, ...]:
        """No corruption, and each strength."""
        return (self.clean, *self.points)

    def drops(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the mean metric drop over these strengths in each repetition.

        One number, made from means, where strengths were repeated a different number of times.
        """
        levels = self.levels(names)
        clean = self.clean.values if len(self.clean.values) == len(levels) else (self.clean.mean,) * len(levels)
        return tuple(
            metric_drop(*pair, greater_is_better=self.greater_is_better) for pair in zip(clean, levels, strict=True)
        )

    def levels(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the mean metric over these strengths in each repetition, as `drops` does."""
        points = [point for point in self.points if point.name in names]
        if len({len(point.values) for point in points}) > 1:
            return (sample_mean([point.mean for point in points]),)
        return tuple(map(sample_mean, zip(*(point.values for point in points), strict=True)))

    def reliable(self, names: Sequence[str]) -> bool:
        """Whether all of these strengths are."""
        return all(point.reliable for point in self.points if point.name in names)

    def all_finite(self, names: Sequence[str]) -> bool:
        """Whether at all of these strengths nothing was seen not to be finite."""
        return all(point.all_finite for point in self.points if point.name in names)


@dataclass(frozen=True)
class Study:
    """All curves of a report.

    Attributes:
        metric: What was measured.
        info: What its numbers mean.
        models: The records: by the name of the model, then of the group, one a repetition.
        curves: By the series, then by model and group; those that were not measured are missing.
        groupings: What the groups are, such as "kinds", by the name of the model, where a probe says so.
        in_one_alone: The labels of what no other model was measured under, by the name of the model; empty for one.
        left_out: The labels of what not all repetitions of a group have, by the name of the model; where other groups
            have it, with the names of those that do not.
    """

    metric: str
    info: MetricInfo
    models: Mapping[str, Mapping[str, tuple[EvaluationRecord, ...]]]
    curves: Mapping[Series, Mapping[tuple[str, str], Curve]]
    groupings: Mapping[str, str]
    in_one_alone: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        models: Mapping[str, Records],
        metric: str | None = None,
        *,
        greater_is_better: bool | None = None,
        unit: str | None = None,
    ) -> Study:
        """Gather records.

        Args:
            models: Records by the name of the model.
            metric: What was measured; None for the `usual_metric` of the first record.
            greater_is_better: Whether a large metric is good; None for what the records say.
            unit: Its unit; None for what the records say.

        Raises:
            ValueError: There are no records or no corruptions; repetitions of one model have no corruption in common,
                or other groups; no two models have a group, or a corruption, in common; one stands in a record twice;
                the metric is missing, or records state different things of it; records do not belong together (see
                `check_comparable` and `check_repetitions`); or two models are one and the same record.
        """
        gathered = {name: _groups(records) for name, records in models.items()}
        _check(gathered)
        every = [record for groups in gathered.values() for records in groups.values() for record in records]
        metric = metric_of(every, metric)
        infos = [record.info(metric).stating(greater_is_better=greater_is_better, unit=unit) for record in every]
        info = agreed(infos, metric)
        shared = {
            name: {group: _shared(records) for group, records in groups.items()} for name, groups in gathered.items()
        }
        curves: dict[Series, dict[tuple[str, str], Curve]] = {}
        for name, groups in gathered.items():
            for group, records in groups.items():
                found = _curves(group, records, shared[name][group], metric, info.greater_is_better)
                for series, curve in found.items():
                    curves.setdefault(series, {})[name, group] = curve
        if not curves:
            raise ValueError("records: expected at least one with a corruption, got none; evaluate a model first")
        _check_groups(gathered)
        alone = in_one_alone({name: _measured_under(rows.values()) for name, rows in shared.items()})
        left_out = {name: left for name, groups in gathered.items() if (left := _left_out(groups, shared[name]))}
        groupings = {name: _grouping(records) for name, records in models.items()}
        return cls(metric, info, gathered, curves, groupings, alone if len(gathered) > 1 else {}, left_out)

    @property
    def greater_is_better(self) -> bool:
        """Whether a large metric is good."""
        return self.info.greater_is_better

    @property
    def loss(self) -> str:
        """What is bad for this metric, in a word."""
        return "drop" if self.greater_is_better else "rise"

    @property
    def groups(self) -> list[str]:
        """All groups of all models, in their order."""
        return list(dict.fromkeys(group for groups in self.models.values() for group in groups))

    @cached_property
    def unmoved(self) -> frozenset[tuple[str, str]]:
        """The groups, by model, whose corruption moves nothing, where that of other groups does.

        The data do not use them, as texts do not use a decoder's layers for images. A share of rows stays as it is
        where answers move a little, so a loss must have been measured beside it, and no metric may have moved, under
        any corruption and in any repetition.
        """
        unmoved = {
            (name, group)
            for name, groups in self.models.items()
            for group, records in groups.items()
            if all(map(_moves_nothing, records))
        }
        every = {(name, group) for name, groups in self.models.items() for group in groups}
        return frozenset(unmoved if unmoved != every else ())

    @property
    def spread(self) -> str:
        """What differs between repetitions, in words."""
        if not self.has_seeds:
            return "spread over trials"
        return "spread over records, and over trials of a single one" if self.mixes_trials else "spread over records"

    @property
    def has_seeds(self) -> bool:
        """Whether repetitions are records, of some group at least."""
        return any(len(records) > 1 for groups in self.models.values() for records in groups.values())

    @property
    def mixes_trials(self) -> bool:
        """Whether a group has one record, whose trials are then its repetitions."""
        return any(
            len(records) == 1 and any(len(row.seeds) > 1 for row in records[0].rows())
            for groups in self.models.values()
            for records in groups.values()
        )

    @property
    def records(self) -> list[EvaluationRecord]:
        """All records."""
        return [record for groups in self.models.values() for records in groups.values() for record in records]


def common_strengths(curves: Iterable[Curve]) -> list[str]:
    """Return the names of the strengths that all curves have, in the order of the first."""
    first, *others = curves
    shared = [{point.name for point in curve.points} for curve in others]
    return [point.name for point in first.points if all(point.name in names for names in shared)]


def _grouping(records: Records) -> str:
    """Return what the groups of all these probes are; "" where they do not say, or differ."""
    found = {probe.grouping if isinstance(probe, SweepRecord) else "" for probe in _listed(records)}
    return found.pop() if len(found) == 1 else ""


def _listed(records: Any) -> Sequence[Any]:
    return records if isinstance(records, Sequence) else [records]


def _moves_nothing(record: EvaluationRecord) -> bool:
    clean = record.clean.metrics
    return any(name.split("_")[-1] in _MOVES_WITH_ANSWERS for name in clean) and all(
        {*row.metrics.get(name, ())} == {*values} for row in record.corruptions for name, values in clean.items()
    )


def _groups(records: Records) -> dict[str, tuple[EvaluationRecord, ...]]:
    given: Any = records  # checked below
    if not isinstance(given, Mapping):
        alone = next(
            (asked_for(one, in_short=True) for one in _listed(given) if isinstance(one, EvaluationRecord)), ""
        )
        probes = [
            one.records if isinstance(one, SweepRecord) else one if isinstance(one, Mapping) else {alone: one}
            for one in _listed(given)
        ]
        if any(probe.keys() != probes[0].keys() for probe in probes):
            raise ValueError("records: expected the same groups in each repetition; probe the models alike")
        given = {label: [probe[label] for probe in probes] for label in (probes[0] if probes else ())}
    groups = {
        label: (entry,) if isinstance(entry, EvaluationRecord) else tuple(entry) for label, entry in given.items()
    }
    if not groups or not all(
        entry and all(isinstance(record, EvaluationRecord) for record in entry) for entry in groups.values()
    ):
        raise ValueError(
            "records: expected an EvaluationRecord, a SweepRecord, a mapping from labels to records, or a list of "
            f"these, one a seed, got {type(records).__name__} without records; pass what an evaluator or a probe "
            "returned"
        )
    return groups


def _check(models: Mapping[str, Mapping[str, tuple[EvaluationRecord, ...]]]) -> None:
    """Refuse what does not belong together."""
    for name, groups in models.items():
        check_repetitions(groups, name)
    placed = [(name, group, record) for name, groups in models.items() for group in groups for record in groups[group]]
    check_comparable({" ".join(filter(None, [name, group])): record for name, group, record in placed})
    for (name, group, first), (other, of_other, second) in combinations(placed, 2):
        alike = name != other and group == of_other and first.weights == second.weights != ""
        if alike and first.to_json() == second.to_json():
            raise ValueError(
                f"models: expected a record of its own for each, got the same for {name!r} and {other!r}, of the "
                "same weights; name one of them"
            )


def _check_groups(models: Mapping[str, Collection[str]]) -> None:
    """Refuse models of which no two had the same corrupted: none can be compared with another."""
    if len(models) > 1 and max(Counter(chain(*models.values())).values()) == 1:
        told = "; ".join(
            f"{name!r}: {', '.join(list(groups)[:3])}{', ...' * (len(groups) > 3)}" for name, groups in models.items()
        )
        raise ValueError(
            f"records: expected weights that were corrupted in two of them, got none in common ({told}); corrupt the "
            "same in each, or report each by itself"
        )


_Shared: TypeAlias = list[tuple[CorruptionRecord, ...]]


def _curves(
    group: str, records: tuple[EvaluationRecord, ...], shared: _Shared, metric: str, greater_is_better: bool
) -> dict[Series, Curve]:
    if not shared and any(record.corruptions for record in records):
        raise ValueError(
            f"records of {group!r}: expected the same corruptions in each, got none that all have; evaluate them alike"
        )
    cleans = [record.clean for record in records]
    counted_wrong = any(any(row.not_finite) for row in cleans)
    clean = Point(0.0, "no corruption", values_of_repetitions(cleans, metric), counted_wrong)
    points: dict[Series, list[Point]] = {}
    for place, rows in enumerate(shared):
        series = Series.of(rows[0])
        points.setdefault(series, []).append(_point(series, place, rows, metric, cleans))
    curves = {}
    for series, of_series in points.items():
        ordered = sorted(of_series, key=lambda point: -point.strength if series.strength == "bits" else point.strength)
        if len({point.name for point in ordered}) < len(ordered):
            raise ValueError(
                f"records of {group!r}: expected each corruption once, got "
                f"{[row.label for row in records[0].corruptions]}; leave out the others"
            )
        curves[series] = Curve(clean, tuple(ordered), greater_is_better)
    return curves


def _shared(records: Sequence[EvaluationRecord]) -> _Shared:
    """Return the rows of what all of some records were measured under, in the order of the first."""
    first, *others = (by_identity(record.corruptions) for record in records)
    return [
        (row, *(rows[key] for rows in others)) for key, row in first.items() if all(key in rows for rows in others)
    ]


def _measured_under(groups: Iterable[_Shared]) -> list[CorruptionRecord]:
    """Return one row for each corruption that all repetitions of some group have."""
    return list({(row.corruption, row.label): row for shared in groups for row, *_ in shared}.values())


def _left_out(groups: Mapping[str, Sequence[EvaluationRecord]], shared: Mapping[str, _Shared]) -> list[str]:
    """Return the labels of what not all repetitions of a group have, with the groups if others have it."""
    without: dict[str, list[str]] = {}
    kept: set[str] = set()
    for group, records in groups.items():
        common = {(row.corruption, row.label) for row, *_ in shared[group]}
        rows = (row for record in records for row in record.corruptions)
        for label in dict.fromkeys(row.label for row in rows if (row.corruption, row.label) not in common):
            without.setdefault(label, []).append(group)
        kept |= {label for _, label in common}
    return [f"{label} with {', '.join(some)} corrupted" if label in kept else label for label, some in without.items()]


def _point(
    series: Series,
    place: int,
    rows: tuple[CorruptionRecord, ...],
    metric: str,
    cleans: Sequence[CorruptionRecord],
) -> Point:
    strength = place if series.strength is None else series.place(rows[0])
    broken = [name for row, clean in zip(rows, cleans, strict=True) for name in _broken(row, clean, metric)]
    return Point(
        strength=float(strength),
        name=series.level(rows[0]),
        values=values_of_repetitions(rows, metric),
        counted_wrong=any(any(row.not_finite) for row in rows),
        broken=tuple(dict.fromkeys(broken)),
        changed_nothing=all(row.changed_nothing for row in rows),
    )


def _broken(row: CorruptionRecord, clean: CorruptionRecord, metric: str) -> list[str]:
    """Return which other metrics corruption has made NaN or infinite."""
    return [
        name
        for name, values in row.metrics.items()
        if name != metric
        and not all(map(math.isfinite, values))
        and all(map(math.isfinite, clean.metrics.get(name, (math.nan,))))
    ]
