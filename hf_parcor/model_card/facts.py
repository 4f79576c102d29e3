"""What a model card says, as one frozen record: every number that stands on the card stands here first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.evaluation.records import CorruptionRecord
from hf_parcor.evaluation.sweep_record import SweepRecord
from hf_parcor.metric_info import MetricInfo, info_by_name, read_info
from hf_parcor.stored_record import StoredRecord

FORMAT = 1
_NOT_FINITE = ("nan", "inf", "-inf")
Repetitions = Literal["trials", "trainings"]


@dataclass(frozen=True)
class MetricFacts:
    """One metric over repetitions.

    Attributes:
        values: One a repetition; NaN is kept.
        n: How many there are.
        mean: Their mean.
        deviation: Their sample standard deviation (n − 1); NaN for a single one, and beside NaN or ∞.
        change: The mean, less the mean without corruption.
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
        """Return it as a record whose trials are the repetitions, as plots and tables read it."""
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
        verdict: What a report says of it first, in its words.
        notes: What was noticed while measuring, in sentences.
    """

    record: SweepRecord
    clean: float
    verdict: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFacts(StoredRecord):
    """All that the robustness section and the metadata of one model's card are made from.

    Attributes:
        name: Name of the model.
        base_model: Name on the Hub of the model that it was trained from; "" if unknown.
        datasets: Names on the Hub of the data that it was trained on.
        task: The Hub's name of the task, such as "text-classification"; "" if unknown.
        evaluated_on: The data of the metrics.
        metric: The metric that the card shows.
        info: What its numbers mean; a guess in facts from before it was kept.
        defense: The defense that it was trained with, as in `defense_config.json`; None for none. One whose
            `defended_steps` are 0 was set and never ran, and the card does not claim it.
        repetitions: What n counts: random trials of one model, or models trained with other seeds.
        target: Which weights were corrupted, as it was asked for.
        parameters: Number k of these weights.
        clean: The metrics without corruption.
        corruptions: The metrics under each corruption.
        data: SHA-256 of the batches that gradients were taken on; "" where none were given.
        versions: Versions of the libraries.
        command: The command that made the numbers; "" if unknown.
        notes: What was noticed while measuring, in sentences.
        weights: SHA-256 of the weights that were measured, one a training; "" where a record does not say.
        probe: What a probe of these weights found; None for none.
        benchmark_task: The task of the data set's leaderboard that the result without corruption is for, as in its
            `eval.yaml`; "" if the data set is no registered benchmark, or nobody said.
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
    benchmark_task: str = ""
    format: int = FORMAT
    kind: ClassVar[str] = "model facts"
    remedy: ClassVar[str] = "make them again from the records"

    def rows(self) -> list[CorruptionFacts]:
        """Return the clean metrics, and then those under each corruption."""
        return [self.clean, *self.corruptions]

    @classmethod
    def _read(cls, data: dict[str, Any]) -> ModelFacts:
        clean = data["clean"]["metrics"]
        data["clean"] = _row(data["clean"], clean)
        data["corruptions"] = tuple(_row(row, clean) for row in data["corruptions"])
        data["evaluated_on"] = EvaluationData(**data["evaluated_on"])
        for name in ("datasets", "notes", "weights"):
            data[name] = tuple(data.get(name, ()))
        data.pop("percent", None)  # the guess of before
        known = data.get("info")
        metric = data["metric"]
        rows = (data["clean"], *data["corruptions"])
        values = (value for row in rows for value in row.metrics[metric].values)
        data["info"] = info_by_name(metric, values) if known is None else read_info(known)
        data["probe"] = None if data.get("probe") is None else _probe(data["probe"])
        return cls(**data)


def metric_facts(values: tuple[float, ...], clean: tuple[float, ...]) -> MetricFacts:
    """Return a metric's mean, spread and change from its values and those without corruption.

    Examples:
        >>> facts = metric_facts((0.5, 0.75), clean=(0.875,))
        >>> facts.n, facts.mean, round(facts.deviation, 3), facts.change
        (2, 0.625, 0.177, -0.25)
    """
    row, untouched = (CorruptionRecord("", "", {}, (), {"": entry}) for entry in (values, clean))
    mean = row.mean("")
    return MetricFacts(values, len(values), mean, row.deviation(""), mean - untouched.mean(""))


def _row(row: dict[str, Any], clean: dict[str, Any]) -> CorruptionFacts:
    metrics = {}
    for name, entry in row["metrics"].items():
        metrics[name] = metric_facts(_floats(entry["values"]), _floats(clean[name]["values"]))
        for number in ("n", "mean", "deviation", "change"):
            found, expected = float(entry[number]), getattr(metrics[name], number)
            same = math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
            if not same and not (math.isnan(found) and math.isnan(expected)):
                raise ValueError(f"{row['label']}: expected {number} {expected} of the values of {name}, got {found}")
    settings = {name: float(value) if value in _NOT_FINITE else value for name, value in row["settings"].items()}
    return CorruptionFacts(row["corruption"], row["label"], settings, metrics)


def _probe(probe: dict[str, Any]) -> ProbeFacts:
    record = SweepRecord.from_plain(probe["record"])
    return ProbeFacts(record, float(probe["clean"]), str(probe["verdict"]), tuple(probe["notes"]))


def _floats(values: list[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
