"""What an evaluation measured, and what a sweep over groups of weights did: plain frozen data, JSON in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_parcor.records.data import EvaluationData
from hf_parcor.records.metric_info import MetricInfo, agreed, info_by_name
from hf_parcor.records.stored import StoredRecord
from hf_parcor.statistics import sample_deviation, sample_mean

if TYPE_CHECKING:
    import pandas

FORMAT = 1
UNCHANGED = "no weight changed"
"""How the note on a trial begins in which a corruption was none."""


@dataclass(frozen=True)
class CorruptionKind:
    """How plots and tables show a kind of corruption; see `Corruption.kind`.

    Attributes:
        title: Its name.
        strength: The setting that says how strong it is; None if there is none.
        unit: The label of an axis of strengths.
        shown: The format of a strength in a table, with `{}` for the number.
    """

    title: str
    strength: str | None = None
    unit: str = ""
    shown: str = ""


@dataclass(frozen=True)
class CorruptionRecord:
    """The metrics under one corruption, in each trial.

    Attributes:
        corruption: Its name in the catalogue, or "none".
        label: Its name for tables and plots.
        settings: Its settings as plain values.
        seeds: The seed of each trial.
        metrics: The value of each metric in each trial, in the order of `seeds`; NaN is kept.
        changed: The number of weights that differed from the clean ones, mean over trials.
        norm: Realised L2 norm of the corruption, mean over trials; infinite or NaN if a weight became so.
        notes: Remarks in sentences.
        not_finite: In each trial, the share of predictions that were not finite and so counted as wrong. Empty if all
            were finite, if the metric does not report it, and in older records.
        kind: How plots and tables show its kind; None without corruption, and in older records.

    Examples:
        >>> record = CorruptionRecord(
        ...     "gaussian_noise", "Gaussian σ=0.02", {"std": 0.02}, (0, 1), {"accuracy": (0.5, 0.75)}
        ... )
        >>> record.mean("accuracy"), round(record.deviation("accuracy"), 3)
        (0.625, 0.177)
    """

    corruption: str
    label: str
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...]]
    changed: float = 0.0
    norm: float = 0.0
    notes: tuple[str, ...] = ()
    not_finite: tuple[float, ...] = ()
    kind: CorruptionKind | None = None

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over trials; NaN if a trial has NaN, or if ∞ and −∞ meet.

        Raises:
            ValueError: There is no such metric.
        """
        return sample_mean(self._values(metric))

    def deviation(self, metric: str) -> float:
        """Return the sample standard deviation over trials (n − 1); NaN for one trial, or if a value is NaN or ∞.

        Raises:
            ValueError: There is no such metric.
        """
        return sample_deviation(self._values(metric))

    @property
    def changed_nothing(self) -> bool:
        """Whether no weight changed in any trial, as a note says of each: its metrics are those without corruption."""
        return bool(self.seeds) and sum(note.startswith(UNCHANGED) for note in self.notes) == len(self.seeds)

    def _values(self, metric: str) -> tuple[float, ...]:
        if metric not in self.metrics:
            raise ValueError(
                f"metric: expected one of {', '.join(self.metrics)}, got {metric!r}, which {self.label!r} lacks; "
                "pass metric="
            )
        return self.metrics[metric]


@dataclass(frozen=True)
class EvaluationRecord(StoredRecord):
    """One model's robustness: its clean metrics, and its metrics under each corruption.

    Attributes:
        model: Name or path of the model.
        target: What was corrupted, as requested.
        parameters: Number k of weights that could be corrupted.
        clean: The metrics without corruption.
        corruptions: One record for each corruption.
        data: Fingerprint of the data that gradients were taken on: "rows:" and the SHA-256 of all rows, however they
            were batched. A SHA-256 alone is that of the batches, if their rows cannot be told apart, and in older
            records. "" if no batches were given.
        versions: Versions of the libraries.
        notes: Remarks in sentences.
        weights_norm: L2 norm of the weights that could be corrupted, to compare a radius with; None in older records.
        weights: SHA-256 of all parameters and buffers of the model; "" in older records.
        metric_info: What the numbers of each metric mean, as stated or guessed; empty in older records. Read it with
            `info`.
        evaluated_on: The data of the metrics; None if not stated, and in older records.
        task: The Hub's name of the task, such as "text-classification"; "" if not stated, and in older records.
        flags: Other flags of the command `hf-parcor`, by name: how model and data were loaded. Empty if there were
            none, or if another program measured.
        format: Version of this layout.

    Examples:
        >>> clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        >>> four_bits = CorruptionRecord("quantization", "4-bit quantization", {"bits": 4}, (0,), {"accuracy": (0.6,)})
        >>> record = EvaluationRecord("my-model", {}, 1_000, clean, (four_bits,))
        >>> for row in record.rows():
        ...     print(f"{row.label}: {row.mean('accuracy'):.1%}")
        no corruption: 90.0%
        4-bit quantization: 60.0%
        >>> EvaluationRecord.from_json(record.to_json()) == record
        True
    """

    model: str
    target: Mapping[str, Any]
    parameters: int
    clean: CorruptionRecord
    corruptions: tuple[CorruptionRecord, ...]
    data: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    weights_norm: float | None = None
    weights: str = ""
    metric_info: Mapping[str, MetricInfo] = field(default_factory=dict)
    evaluated_on: EvaluationData | None = None
    task: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    kind: ClassVar[str] = "record"

    def check(self) -> None:
        """Refuse a corruption whose strength is no number.

        Raises:
            ValueError: There is one.
        """
        for row in self.rows():
            strength = None if row.kind is None else row.kind.strength
            if strength is not None and not isinstance(row.settings.get(strength), (int, float)):
                raise ValueError(
                    f"expected the strength {strength!r} as a number in the settings, got {dict(row.settings)}"
                )

    def info(self, metric: str) -> MetricInfo:
        """Return what the numbers of a metric mean: as the record states, or a guess from the name, marked as one.

        Raises:
            ValueError: There is no such metric.
        """
        self.clean.mean(metric)  # says what is missing
        values = (value for row in self.rows() for value in row.metrics.get(metric, ()))
        return self.metric_info.get(metric) or info_by_name(metric, values)

    def usual_metric(self, among: Sequence[str] | None = None) -> str:
        """Return the metric to show where none is named, "" where there is none.

        It is the perplexity of a text, or else accuracy, or else the first whose large values are good, what is stated
        before what is guessed, or else the first.

        Args:
            among: Metrics to choose from. By default, all.
        """
        names = list(self.clean.metrics) if among is None else among
        usual = ["perplexity"] * (self.task == "text-generation") + ["accuracy"]
        good = [name for name in names if self.info(name).greater_is_better]
        good.sort(key=lambda name: self.info(name).direction_guessed)
        return next((name for name in (*usual, *good, *names) if name in names), "")

    def stating(
        self, metric: str, *, greater_is_better: bool | None = None, unit: str | None = None
    ) -> EvaluationRecord:
        """Return the record with the meaning of a metric as you state it; None leaves a value unchanged.

        Raises:
            ValueError: There is no such metric.
        """
        info = self.info(metric).stating(greater_is_better=greater_is_better, unit=unit)
        return replace(self, metric_info={**self.metric_info, metric: info})

    def told(self, flags: Mapping[str, Any]) -> EvaluationRecord:
        """Return the record with these `flags`."""
        return replace(self, flags=flags)

    def rows(self) -> list[CorruptionRecord]:
        """Return the clean record, followed by all others."""
        return [self.clean, *self.corruptions]

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row for each corruption, metric and trial.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.plain_rows())

    def plain_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of `to_pandas`: one for each corruption, metric and trial."""
        for row in self.rows():
            for metric, values in row.metrics.items():
                for seed, value in zip(row.seeds, values, strict=True):
                    yield {
                        "model": self.model,
                        "corruption": row.corruption,
                        "label": row.label,
                        **{f"setting_{name}": value for name, value in row.settings.items()},
                        "metric": metric,
                        "seed": seed,
                        "value": value,
                    }


def all_notes(record: EvaluationRecord) -> list[str]:
    """Return the notes of a record, and those of its rows, each behind the label of its row."""
    return [*record.notes, *(f"{row.label}: {note}" for row in record.rows() for note in row.notes)]


def values_of_repetitions(rows: Sequence[CorruptionRecord], metric: str) -> tuple[float, ...]:
    """Return one value a record, or, of a single record, one a trial.

    Raises:
        ValueError: One lacks the metric.
    """
    means = tuple(row.mean(metric) for row in rows)  # says what is missing
    return means if len(rows) > 1 else rows[0].metrics[metric]


def data_frame(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return a table of rows.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas; install it with: pip install 'hf-parcor[pandas]'") from error
    return pandas.DataFrame(rows)


def strength_of(settings: Mapping[str, Any]) -> str | None:
    """Return which setting a command line takes as the strength: the radius of the constraint, or else the first.

    Examples:
        >>> strength_of({"p": 2.0, "epsilon": 0.1}), strength_of({"bits": 4, "per": 32}), strength_of({})
        ('epsilon', 'bits', None)
    """
    return "epsilon" if "epsilon" in settings else next(iter(settings), None)


def corruption_words(corruptions: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the words of `--corruptions` that name corruptions; those that differ in their strength share one.

    Args:
        corruptions: Each by its name in the catalogue and its settings, as records have them.

    Examples:
        >>> corruption_words([("bit_flips", {"rate": 0.1}), ("quantization", {"bits": 4, "symmetric": False})])
        ['bit-flips=0.1', 'quantization=4:symmetric=false']
        >>> corruption_words(("gradient", {"p": float("inf"), "epsilon": epsilon}) for epsilon in (0.1, 0.2))
        ['gradient=0.1,0.2:norm=inf']
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, settings in corruptions:
        strength = strength_of(settings)
        others = {key: value for key, value in settings.items() if key != strength and value is not None}
        norm = {"norm": order} if (order := others.pop("p", 2.0)) != 2.0 else {}  # which is the default
        said = [f"{key.replace('_', '-')}={_word(value)}" for key, value in {**norm, **others}.items()]
        strengths = found.setdefault((name.replace("_", "-"), ",".join(said)), [])
        strengths += [] if strength is None else [_word(settings[strength])]
    return [f"{name}={','.join(strengths)}{f':{said}' * bool(said)}" for (name, said), strengths in found.items()]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


SWEEP_FORMAT = 1
_SHARED = ("model", "clean", "data", "versions", "metric_info", "evaluated_on", "task", "flags")


@dataclass(frozen=True)
class SweepRecord(StoredRecord):
    """What a `LayerProbe` measured: each group of weights corrupted by itself.

    Attributes:
        records: The record of each group, by its name. All of them have the same model, data, task, versions, clean
            metrics and meaning of these.
        weights: SHA-256 of all parameters and buffers of the model.
        trials: Trials of each stochastic corruption.
        seed: First seed.
        grouping: The kind of groups, as on the command line: "layers", "kinds", "modules" or "adapters"; "" for
            groups of your own.
        format: Version of this layout.

    Raises:
        ValueError: There is no record, or they are not of one model on the same data.

    Examples:
        >>> clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
        >>> four_bits = CorruptionRecord("quantization", "4-bit quantization", {"bits": 4}, (0,), {"accuracy": (0.6,)})
        >>> layer = EvaluationRecord("my-model", {"target_modules": ["encoder.0"]}, 100, clean, (four_bits,))
        >>> sweep = SweepRecord({"encoder.0": layer}, weights="", trials=1, seed=0)
        >>> [(name, row.mean("accuracy")) for name, row in sweep.rows()]
        [('encoder.0', 0.6)]
    """

    records: Mapping[str, EvaluationRecord]
    weights: str
    trials: int
    seed: int
    grouping: str = ""
    format: int = SWEEP_FORMAT
    kind: ClassVar[str] = "sweep record"

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
        """Fingerprint of the data that gradients were taken on, as in `EvaluationRecord`."""
        return self._first.data

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries."""
        return self._first.versions

    def info(self, metric: str) -> MetricInfo:
        """Return what the numbers of a metric mean, as in `EvaluationRecord.info`."""
        return agreed([record.info(metric) for record in self.records.values()], metric)

    def stating(self, metric: str, *, greater_is_better: bool | None = None, unit: str | None = None) -> SweepRecord:
        """Return the record with the meaning of a metric as you state it, as in `EvaluationRecord.stating`."""
        stated = {
            label: record.stating(metric, greater_is_better=greater_is_better, unit=unit)
            for label, record in self.records.items()
        }
        return replace(self, records=stated)

    def told(self, flags: Mapping[str, Any]) -> SweepRecord:
        """Return the record with these `flags` in the record of each group."""
        return replace(self, records={label: record.told(flags) for label, record in self.records.items()})

    @property
    def evaluated_on(self) -> EvaluationData | None:
        """The data of the metrics; None if not stated."""
        return self._first.evaluated_on

    @property
    def task(self) -> str:
        """The Hub's name of the task; "" if not stated."""
        return self._first.task

    @property
    def _first(self) -> EvaluationRecord:
        return next(iter(self.records.values()))

    def rows(self) -> list[tuple[str, CorruptionRecord]]:
        """Return pairs of a group and one of its corruptions; the clean metrics, which all share, are left out."""
        return [(label, row) for label, record in self.records.items() for row in record.corruptions]

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row for each group, corruption, metric and trial; the clean rows are repeated for each group.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(
            {"group": label, **row} for label, record in self.records.items() for row in record.plain_rows()
        )
