"""The record of a sweep: one record for each group of weights, all of one model on the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord, data_frame
from hf_parcor.metric_info import MetricInfo, agreed
from hf_parcor.stored_record import StoredRecord

if TYPE_CHECKING:
    import pandas

FORMAT = 1
_SHARED = ("model", "clean", "data", "versions", "metric_info", "evaluated_on", "task")


@dataclass(frozen=True)
class SweepRecord(StoredRecord):
    """What a `LayerProbe` found: each group of weights corrupted by itself.

    Attributes:
        records: The record of each group, by its name. Model, data, task, versions, clean metrics and what these mean
            are the same.
        weights: SHA-256 of all parameters and buffers of the model.
        trials: Trials of each stochastic corruption.
        seed: First seed.
        format: Version of this layout.

    Raises:
        ValueError: There is no record, or they are not of one model on the same data.
    """

    records: Mapping[str, EvaluationRecord]
    weights: str
    trials: int
    seed: int
    format: int = FORMAT
    kind: ClassVar[str] = "sweep record"
    remedy: ClassVar[str] = "measure again, or read it with the version of hf_parcor that wrote it"

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("records: expected at least one, got none; probe one group or more")
        first = repr([getattr(self._first, name) for name in _SHARED])  # NaN equals NaN
        for label, record in self.records.items():
            if repr([getattr(record, name) for name in _SHARED]) != first:
                raise ValueError(
                    f"records: expected one model, data, task, versions, clean metrics and metric_info for all "
                    f"groups, got others for {label!r}; make one record for each sweep"
                )

    @property
    def model(self) -> str:
        """Name or path of the model."""
        return self._first.model

    @property
    def clean(self) -> CorruptionRecord:
        """The metrics without corruption."""
        return self._first.clean

    @property
    def data(self) -> str:
        """SHA-256 of the batches that gradients were taken on, or "" where no batches were given."""
        return self._first.data

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries."""
        return self._first.versions

    def info(self, metric: str) -> MetricInfo:
        """Return what the numbers of a metric mean, as `EvaluationRecord.info`."""
        return agreed([record.info(metric) for record in self.records.values()], metric)

    def stating(self, metric: str, *, greater_is_better: bool | None = None, unit: str | None = None) -> SweepRecord:
        """Return the record with what somebody states of a metric, as `EvaluationRecord.stating`."""
        stated = {
            label: record.stating(metric, greater_is_better=greater_is_better, unit=unit)
            for label, record in self.records.items()
        }
        return replace(self, records=stated)

    @property
    def evaluated_on(self) -> EvaluationData | None:
        """The data of the metrics; None where nobody said."""
        return self._first.evaluated_on

    @property
    def task(self) -> str:
        """The Hub's name of the task; "" where nobody said."""
        return self._first.task

    @property
    def _first(self) -> EvaluationRecord:
        return next(iter(self.records.values()))

    def rows(self) -> list[tuple[str, CorruptionRecord]]:
        """Return each group with each of its corruptions; the clean metrics, which they share, are not among them."""
        return [(label, row) for label, record in self.records.items() for row in record.corruptions]

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row for each group, corruption, metric and trial; the clean rows are repeated for each group.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(
            {"group": label, **row} for label, record in self.records.items() for row in record.plain_rows()
        )

    @classmethod
    def _read(cls, data: dict[str, Any]) -> SweepRecord:
        data["records"] = {label: EvaluationRecord.from_plain(entry) for label, entry in data["records"].items()}
        return cls(**data)
