"""What a model card says, as one frozen record made from records: every number on the card stands here first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_parcor.records.comparable import check_repetitions
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.evaluation import (
    CorruptionRecord,
    EvaluationRecord,
    SweepRecord,
    all_notes,
    values_of_repetitions,
)
from hf_parcor.records.metric_info import MetricInfo, agreed
from hf_parcor.records.recipe import RecipeRecord
from hf_parcor.records.sensitivity import SensitivityRecord
from hf_parcor.records.stored import StoredRecord
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.recipe import recipe_in_short
from hf_parcor.reports.study import Study
from hf_parcor.reports.verdict import probe_verdict
from hf_parcor.statistics import sample_deviation, sample_mean
from hf_parcor.strict_json import to_plain

FORMAT = 1
Repetitions = Literal["trials", "trainings"]


@dataclass(frozen=True)
class MetricFacts:
    """One metric over repetitions.

    Attributes:
        values: The value of each repetition; NaN is kept.
        n: The number of values.
        mean: Their mean.
        deviation: Their sample standard deviation (n − 1); NaN for a single value, or if one is NaN or ∞.
        change: The mean minus the mean without corruption.
    """

    values: tuple[float, ...]
    n: int
    mean: float
    deviation: float
    change: float


@dataclass(frozen=True)
class CorruptionFacts:
    """What one corruption did.

    Attributes:
        corruption: Its name in the catalogue, or "none".
        label: Its name for readers.
        settings: Its settings as plain values.
        metrics: Each metric by its name.
    """

    corruption: str
    label: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, MetricFacts]

    def as_record(self) -> CorruptionRecord:
        """Return a record whose trials are the repetitions, for plots and tables."""
        first = next(iter(self.metrics.values()), None)
        seeds = tuple(range(0 if first is None else first.n))
        metrics = {name: entry.values for name, entry in self.metrics.items()}
        return CorruptionRecord(self.corruption, self.label, self.settings, seeds, metrics)


@dataclass(frozen=True)
class ProbeFacts:
    """What a probe of the same weights found: which part is weak.

    Attributes:
        record: The record of the probe.
        clean: The metric that the card shows, without corruption, on the data of the probe.
        verdict: The first finding of its report, in words.
        notes: Remarks on the measurement, in sentences.
    """

    record: SweepRecord
    clean: float
    verdict: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecipeFacts:
    """Which parts of the same weights get which bits, as chosen from their scores.

    Attributes:
        record: The record of the recipe.
        verdict: The first finding of its page: what to quantize to which format, and what the metric loses.
        size: What its page says about the bits.
    """

    record: RecipeRecord
    verdict: str
    size: str


@dataclass(frozen=True)
class ModelFacts(StoredRecord):
    """The facts that the robustness section and the metadata of a model's card are made from.

    Attributes:
        name: Name of the model.
        base_model: Name on the Hub of the model that it was trained from; "" if unknown.
        datasets: Names on the Hub of its training data.
        task: The Hub's name of the task, such as "text-classification"; "" if unknown.
        evaluated_on: The data of the metrics.
        metric: The metric that the card shows.
        info: What its numbers mean.
        defense: The defense that it was trained with, as in `defense_config.json`; None for none. If its
            `defended_steps` are 0, it never ran, and the card does not claim it.
        repetitions: What n counts: random trials of one model, or models trained with different seeds.
        target: Which weights were corrupted, as requested.
        parameters: Number k of these weights.
        clean: The metrics without corruption.
        corruptions: The metrics under each corruption.
        data: Fingerprint of the data that gradients were taken on, as in `EvaluationRecord`; "" if there were none.
        versions: Versions of the libraries.
        command: The command that made the numbers; "" if unknown.
        notes: Remarks on the measurement, in sentences.
        weights: SHA-256 of the measured weights, one for each training; "" if a record does not state it.
        probe: What a probe of these weights found; None for none.
        recipe: Which parts of these weights may get which bits; None for none.
        benchmark_task: The task of the data set's leaderboard that the result without corruption is for, as in its
            `eval.yaml`; "" if the data set is not a registered benchmark, or the task is not stated.
        format: Version of this layout.
    """

    name: str
    base_model: str
    datasets: tuple[str, ...]
    task: str
    evaluated_on: EvaluationData
    metric: str
    info: MetricInfo
    defense: Mapping[str, Any] | None
    repetitions: Repetitions
    target: Mapping[str, Any]
    parameters: int
    clean: CorruptionFacts
    corruptions: tuple[CorruptionFacts, ...]
    data: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    probe: ProbeFacts | None = None
    recipe: RecipeFacts | None = None
    benchmark_task: str = ""
    format: int = FORMAT
    kind: ClassVar[str] = "model facts"
    remedy: ClassVar[str] = "make them again from the records"

    def rows(self) -> list[CorruptionFacts]:
        """Return the clean metrics, followed by those under each corruption."""
        return [self.clean, *self.corruptions]

    @property
    def disturbed(self) -> bool:
        """Whether the weights were changed at all, by an evaluation, a probe or a recipe."""
        return bool(self.corruptions) or self.probe is not None or self.recipe is not None

    def as_record(self) -> EvaluationRecord:
        """Return a record whose trials are the repetitions, for plots and tables."""
        clean, *rows = (row.as_record() for row in self.rows())
        info = {self.metric: self.info}
        return EvaluationRecord(self.name, self.target, self.parameters, clean, tuple(rows), metric_info=info)

    def check(self) -> None:
        """Refuse means, spreads and changes that are not those of the values.

        Raises:
            ValueError: One is not.
        """
        for row in self.rows():
            for name, found in row.metrics.items():
                expected = metric_facts(found.values, self.clean.metrics[name].values)
                for number in ("n", "mean", "deviation", "change"):
                    one, other = (float(getattr(facts, number)) for facts in (found, expected))
                    both_unknown = math.isnan(one) and math.isnan(other)
                    if not both_unknown and not math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12):
                        raise ValueError(f"{row.label}: expected {number} {other} of the values of {name}, got {one}")


def metric_facts(values: tuple[float, ...], clean: tuple[float, ...]) -> MetricFacts:
    """Return a metric's mean, spread and change from its values and those without corruption.

    Examples:
        >>> facts = metric_facts((0.5, 0.75), clean=(0.875,))
        >>> facts.n, facts.mean, round(facts.deviation, 3), facts.change
        (2, 0.625, 0.177, -0.25)
    """
    mean = sample_mean(values)
    return MetricFacts(values, len(values), mean, sample_deviation(values), mean - sample_mean(clean))


_SHOWN = 12  # as many letters of a fingerprint as tell two apart


def facts_of(
    records: EvaluationRecord | SweepRecord | Sequence[EvaluationRecord],
    *,
    name: str = "",
    base_model: str = "",
    datasets: Iterable[str] = (),
    task: str = "",
    evaluated_on: EvaluationData | None = None,
    metric: str | None = None,
    greater_is_better: bool | None = None,
    unit: str | None = None,
    defense: Mapping[str, Any] | None = None,
    command: str = "",
    benchmark_task: str = "",
) -> ModelFacts:
    """Return what a card says about a model.

    Args:
        records: The record of an evaluator, whose trials are the repetitions; a list of records, one for each seed of
            training, in which trials are averaged; or the record of a probe, if the model was not evaluated otherwise.
        name: Name of the model. By default, that in the record.
        base_model: As in `ModelFacts`.
        datasets: As in `ModelFacts`.
        task: As in `ModelFacts`. By default, that in the record.
        evaluated_on: The data of the metrics. By default, those in the record.
        metric: The metric that the card shows. By default, the `usual_metric` of the record.
        greater_is_better: Whether a large metric is good. By default, what the records say, or a guess that the card
            marks as one.
        unit: As in `MetricInfo`. By default, as for `greater_is_better`.
        defense: As in `ModelFacts`: what `DefenseConfig.to_dict` returns.
        command: As in `ModelFacts`.
        benchmark_task: As in `ModelFacts`.

    Raises:
        ValueError: There are no records; they differ in corruptions, targets or metrics; they lack the metric; or they
            are not repetitions (see `check_repetitions`).
        ImportError: A probe has several trials, and SciPy, which is needed to judge them, is not installed.

    Examples:
        >>> clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        >>> noisy = CorruptionRecord("gaussian", "Gaussian σ=0.02", {"std": 0.02}, (0, 1), {"accuracy": (0.75, 0.5)})
        >>> facts = facts_of(EvaluationRecord("org/bert", {"target_modules": "all"}, 10, clean, (noisy,)))
        >>> facts.name, facts.corruptions[0].metrics["accuracy"].mean
        ('bert', 0.625)
    """
    probe = records if isinstance(records, SweepRecord) else None
    if isinstance(records, SweepRecord):
        first = next(iter(records.records.values()))
        records = dataclasses.replace(without_corruption(first), weights=records.weights)
    found = [records] if isinstance(records, EvaluationRecord) else list(records)
    if not found:
        raise ValueError("records: expected at least one, got none; evaluate a model first")
    first = found[0]
    for other in found[1:]:
        if _shape(other) != _shape(first):
            raise ValueError(
                "records: expected the same corruptions, targets and metrics in each, got others; evaluate all alike, "
                "or make a card for each"
            )
    check_repetitions({"": found})
    names = [name for name in first.clean.metrics if all(name in row.metrics for row in first.corruptions)]
    chosen = _chosen(names, metric, first)
    info = agreed([one.info(chosen).stating(greater_is_better=greater_is_better, unit=unit) for one in found], chosen)
    clean = {name: values_of_repetitions([record.clean for record in found], name) for name in names}
    rows = [_facts(rows, clean) for rows in zip(*(record.rows() for record in found), strict=True)]
    facts = ModelFacts(
        name=name or first.model.rpartition("/")[2],
        base_model=base_model,
        datasets=tuple(datasets),
        task=task or first.task,
        evaluated_on=evaluated_on or first.evaluated_on or EvaluationData(),
        metric=chosen,
        info=info,
        defense=defense,
        repetitions="trials" if len(found) == 1 else "trainings",
        target=first.target,
        parameters=first.parameters,
        clean=rows[0],
        corruptions=tuple(rows[1:]),
        data="; ".join(dict.fromkeys(record.data for record in found if record.data)),
        versions=first.versions,
        command=command,
        benchmark_task=benchmark_task,
        notes=tuple(dict.fromkeys(note for record in found for note in all_notes(record))),
        weights=tuple(record.weights for record in found) if any(record.weights for record in found) else (),
    )
    return facts if probe is None else with_probe(facts, probe)


def with_probe(facts: ModelFacts, sweep: SweepRecord) -> ModelFacts:
    """Return the facts with the results of a probe of the same weights, which replace an earlier probe.

    Args:
        facts: The facts so far.
        sweep: The record of the probe.

    Raises:
        ValueError: The probe is of other weights, or says nothing of its weights, or lacks the metric of the card.
        ImportError: It has several trials, and SciPy, which is needed to judge them, is not installed.
    """
    _check_weights(facts, "probe", sweep.weights)
    info = sweep.info(facts.metric).stating(**facts.info.stated)
    study = Study.of({"": sweep}, facts.metric, greater_is_better=info.greater_is_better, unit=info.unit)
    first = probe_verdict(study, Numbers(info.unit))[0]
    verdict = " ".join(filter(None, [first.headline, first.detail]))
    noticed = tuple(f"{group}: {note}" for group, record in sweep.records.items() for note in all_notes(record))
    probe = ProbeFacts(sweep, sweep.clean.mean(facts.metric), verdict, noticed)
    return dataclasses.replace(facts, info=info, probe=probe)


def with_recipe(
    facts: ModelFacts, scores: SensitivityRecord, recipe: RecipeRecord, measured: EvaluationRecord
) -> ModelFacts:
    """Return the facts with a recipe for the same weights, which replaces an earlier recipe.

    Args:
        facts: The facts so far.
        scores: What `sensitivity` returned.
        recipe: The recipe that was chosen from `scores`.
        measured: The record of `measure_recipes`, in which one row is named "recipe".

    Raises:
        ValueError: The recipe was measured on other weights, or on unknown ones, or without the metric of the card.
    """
    _check_weights(facts, "recipe", measured.weights)
    if facts.metric not in measured.clean.metrics:
        known = ", ".join(measured.clean.metrics)
        raise ValueError(
            f"recipe: expected one that was measured in {facts.metric}, got one in {known}; pass metric=, or measure "
            "both in the same"
        )
    measured = measured.stating(facts.metric, **facts.info.stated)
    verdict, size = recipe_in_short(scores, recipe, measured, facts.metric)
    return dataclasses.replace(facts, recipe=RecipeFacts(recipe, verdict, size))


def _check_weights(facts: ModelFacts, name: str, weights: str) -> None:
    if weights not in facts.weights:
        known = ", ".join(weights[:_SHOWN] or "unknown" for weights in facts.weights) or "unknown ones"
        raise ValueError(
            f"{name}: expected one of the weights that were evaluated, {known}, got one of {weights[:_SHOWN]}; "
            "take those of the same model"
        )


def without_corruption(record: EvaluationRecord) -> EvaluationRecord:
    """Return what a record says of the model as it is."""
    return dataclasses.replace(record, target={}, parameters=0, corruptions=(), notes=(), weights_norm=None)


def _shape(record: EvaluationRecord) -> Any:
    rows = [(row.corruption, row.label, to_plain(row.settings), sorted(row.metrics)) for row in record.rows()]
    target = {"target_modules": "all", **record.target}  # not given and "all" are the same where k is
    return to_plain([rows, target, record.parameters])


def _chosen(metrics: Sequence[str], metric: str | None, record: EvaluationRecord) -> str:
    metric = record.usual_metric(metrics) if metric is None else metric
    if metric not in metrics:
        raise ValueError(f"metric: expected one of {', '.join(metrics) or 'no metrics'}, got {metric!r}; pass metric=")
    return metric


def _facts(rows: Sequence[CorruptionRecord], clean: Mapping[str, tuple[float, ...]]) -> CorruptionFacts:
    metrics = {name: metric_facts(values_of_repetitions(rows, name), clean[name]) for name in clean}
    return CorruptionFacts(rows[0].corruption, rows[0].label, rows[0].settings, metrics)
