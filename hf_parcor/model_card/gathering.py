"""Facts from records: what was measured, and what only the caller can know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_parcor.evaluation.comparable import check_repetitions
from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord
from hf_parcor.evaluation.sweep_record import SweepRecord
from hf_parcor.metric_info import agreed
from hf_parcor.model_card.facts import CorruptionFacts, ModelFacts, ProbeFacts, metric_facts
from hf_parcor.report.numbers import Numbers
from hf_parcor.report.probe_verdict import probe_verdict
from hf_parcor.report.study import Study
from hf_parcor.strict_json import to_plain

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
    """Return what a card says of a model.

    Args:
        records: The record of an evaluator, whose trials are the repetitions; or a list of records, one a seed of
            training: then trials within a record count as their mean. Or the record of a probe, for a model of which
            nothing else is known.
        name: Name of the model; "" for that in the record.
        base_model: As in `ModelFacts`.
        datasets: As in `ModelFacts`.
        task: As in `ModelFacts`; "" for that in the record.
        evaluated_on: The data of the metrics; None for what the record says.
        metric: The metric that the card shows; None for "accuracy", or else for the first of which more is better.
        greater_is_better: Whether a large one is good; None for what the records say, or a guess that the card calls
            one.
        unit: As in `MetricInfo`; None as for `greater_is_better`.
        defense: As in `ModelFacts`: what `DefenseConfig.to_dict` returns.
        command: As in `ModelFacts`.
        benchmark_task: As in `ModelFacts`.

    Raises:
        ValueError: There are no records, or they are not of the same corruptions, targets and metrics, or lack the
            metric, or are no repetitions; see `check_repetitions`.
        ImportError: A probe has several trials, and SciPy, which judges them, is not installed.

    Examples:
        >>> clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        >>> noisy = CorruptionRecord("gaussian", "Gaussian σ=0.02", {"std": 0.02}, (0, 1), {"accuracy": (0.75, 0.5)})
        >>> facts = facts_of(EvaluationRecord("org/bert", {"target_modules": "all"}, 10, clean, (noisy,)))
        >>> facts.name, facts.corruptions[0].metrics["accuracy"].mean
        ('bert', 0.625)
    """
    probe = records if isinstance(records, SweepRecord) else None
    if isinstance(records, SweepRecord):
        records = _without_corruption(records)
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
    clean = {name: _values([record.clean for record in found], name) for name in names}
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
        notes=tuple(dict.fromkeys(note for record in found for note in _notes(record))),
        weights=tuple(record.weights for record in found) if any(record.weights for record in found) else (),
    )
    return facts if probe is None else with_probe(facts, probe)


def with_probe(facts: ModelFacts, sweep: SweepRecord) -> ModelFacts:
    """Return the facts with what a probe of the same weights found, in place of an earlier probe.

    Args:
        facts: What else is known of the model.
        sweep: The record of the probe.

    Raises:
        ValueError: The probe is of other weights, as far as is known, or lacks the metric of the card.
        ImportError: It has several trials, and SciPy, which judges them, is not installed.
    """
    if sweep.weights not in facts.weights:
        known = ", ".join(weights[:_SHOWN] or "unknown" for weights in facts.weights) or "unknown ones"
        raise ValueError(
            f"probe: expected one of the weights that were evaluated, {known}, got one of {sweep.weights[:_SHOWN]}; "
            "evaluate and probe the same model"
        )
    info = sweep.info(facts.metric).stating(**facts.info.stated)
    study = Study.of({"": sweep}, facts.metric, greater_is_better=info.greater_is_better, unit=info.unit)
    first = probe_verdict(study, Numbers(info.unit))[0]
    verdict = " ".join(filter(None, [first.headline, first.detail]))
    noticed = tuple(f"{group}: {note}" for group, record in sweep.records.items() for note in _notes(record))
    probe = ProbeFacts(sweep, sweep.clean.mean(facts.metric), verdict, noticed)
    return dataclasses.replace(facts, info=info, probe=probe)


def _without_corruption(sweep: SweepRecord) -> EvaluationRecord:
    """Return what a probe says of the model as it is."""
    first = next(iter(sweep.records.values()))
    return dataclasses.replace(
        first, target={}, parameters=0, corruptions=(), notes=(), weights_norm=None, weights=sweep.weights
    )


def _shape(record: EvaluationRecord) -> Any:
    rows = [(row.corruption, row.label, to_plain(row.settings), sorted(row.metrics)) for row in record.rows()]
    target = {"target_modules": "all", **record.target}  # not given and "all" are the same where k is
    return to_plain([rows, target, record.parameters])


def _chosen(metrics: Sequence[str], metric: str | None, record: EvaluationRecord) -> str:
    if metric is None:
        good = [name for name in metrics if record.info(name).greater_is_better]
        metric = "accuracy" if "accuracy" in metrics else next(iter([*good, *metrics]), "")
    if metric not in metrics:
        raise ValueError(f"metric: expected one of {', '.join(metrics) or 'no metrics'}, got {metric!r}; pass metric=")
    return metric


def _facts(rows: Sequence[CorruptionRecord], clean: Mapping[str, tuple[float, ...]]) -> CorruptionFacts:
    metrics = {name: metric_facts(_values(rows, name), clean[name]) for name in clean}
    return CorruptionFacts(rows[0].corruption, rows[0].label, rows[0].settings, metrics)


def _values(rows: Sequence[CorruptionRecord], metric: str) -> tuple[float, ...]:
    """Return one value a record, or, of a single record, one a trial."""
    return tuple(row.mean(metric) for row in rows) if len(rows) > 1 else rows[0].metrics[metric]


def _notes(record: EvaluationRecord) -> list[str]:
    return [*record.notes, *(f"{row.label}: {note}" for row in record.rows() for note in row.notes)]
