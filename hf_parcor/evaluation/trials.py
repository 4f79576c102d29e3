"""What single trials found, and the record that is made from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from transformers.utils import logging

from hf_parcor.evaluation.metrics.generation import CUT
from hf_parcor.evaluation.metrics.scores import without_shape
from hf_parcor.evaluation.metrics.trainer import is_beside_the_point
from hf_parcor.evaluation.outputs import NOT_FINITE
from hf_parcor.injection import CorruptionSize, is_swallowed
from hf_parcor.records.evaluation import UNCHANGED, CorruptionKind, CorruptionRecord
from hf_parcor.statistics import sample_mean

logger = logging.get_logger(__name__)

DEFAULT_TRIALS = 3
"""The default number of trials of each stochastic corruption: the fewest that show how much trials vary."""


@dataclass(frozen=True)
class Trial:
    """One measurement, as plain values.

    Attributes:
        seed: What its randomness was drawn with.
        metrics: What the metric returned; NaN for what is no number.
        size: What the corruption changed, if there was one.
        odd: How those metrics read that are not finite or no number; and, by their own names, the shares of
            predictions that were not finite, and of texts that were cut, if there were any.
    """

    seed: int
    metrics: Mapping[str, float]
    size: CorruptionSize | None = None
    odd: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int, metrics: Mapping[str, object], size: CorruptionSize | None = None) -> Trial:
        """Return the trial in which a metric returned this."""
        numbers = {key: number_of(value) for key, value in metrics.items()}
        odd = {key: repr(value) for key, value in metrics.items() if not math.isfinite(numbers[key])}
        for name in (NOT_FINITE, CUT):
            share = numbers.pop(name, 0.0)  # no metric: most trials have none
            if share:
                odd[name] = repr(share)
        return cls(seed, numbers, size, odd)

    @property
    def not_finite(self) -> float:
        """Which share of the predictions was not finite."""
        return float(self.odd.get(NOT_FINITE, 0.0))

    @property
    def cut(self) -> float:
        """Which share of the generated texts did not end within the length."""
        return float(self.odd.get(CUT, 0.0))


def checked_metrics(metrics: object) -> Mapping[str, object]:
    """Return what a metric found, tensors and arrays of one entry as numbers, without what tells how long it took.

    Names that are no texts, such as the numbers of classes, become their texts.

    Raises:
        TypeError: It is no mapping, or one without anything that was found.
    """
    named = {str(name): value for name, value in metrics.items()} if isinstance(metrics, Mapping) else {}
    found = {name: without_shape(value) for name, value in named.items() if not is_beside_the_point(name)}
    if not found:
        raise TypeError(
            f"metric: expected numbers by name, such as {{'accuracy': 0.9}}, got {metrics!r}; return a dict"
        )
    return found


def record_of(
    corruption: str,
    label: str,
    settings: Mapping[str, Any],
    trials: Sequence[Trial],
    kind: CorruptionKind | None = None,
) -> CorruptionRecord:
    """Return the record of one corruption's trials; what is odd about them is noted."""
    keys = dict.fromkeys(key for trial in trials for key in trial.metrics)
    metrics = {key: tuple(trial.metrics.get(key, math.nan) for trial in trials) for key in keys}
    notes = (
        *(f"{UNCHANGED} with seed {t.seed}" for t in trials if t.size is not None and not t.size.changed),
        *(
            f"the weights took a norm of {t.size.norm:.3g} where {t.size.asked:.3g} was asked for with seed {t.seed}; "
            "they are too narrow for it: measure in float32"
            for t in trials
            if t.size is not None and t.size.changed and is_swallowed(t.size.asked, t.size.norm)
        ),
        *(
            f"{100 * t.not_finite:.3g} % of the predictions were not finite with seed {t.seed}; they count as wrong"
            for t in trials
            if t.not_finite
        ),
        *(
            f"{100 * t.cut:.3g} % of the generated texts did not end within their length and are scored as they "
            "were cut; allow for more tokens"
            for t in trials
            if t.cut and t.size is None  # a corrupted model may well run on
        ),
        *(
            f"{key} was {trial.odd.get(key, 'missing')} with seed {trial.seed}"
            for key, values in metrics.items()
            for trial, value in zip(trials, values, strict=True)
            if not math.isfinite(value)
        ),
    )
    sizes = [trial.size for trial in trials if trial.size is not None]
    return CorruptionRecord(
        corruption=corruption,
        label=label,
        settings=dict(settings),
        seeds=tuple(trial.seed for trial in trials),
        metrics=metrics,
        changed=sample_mean([size.changed for size in sizes]) if sizes else 0.0,
        norm=sample_mean([size.norm for size in sizes]) if sizes else 0.0,
        notes=notes,
        not_finite=tuple(trial.not_finite for trial in trials) if any(t.not_finite for t in trials) else (),
        kind=kind,
    )


def warn_of_notes(records: Iterable[CorruptionRecord]) -> None:
    """Log what is noted in records: once where it is the same of several groups, and of how many."""
    for said, count in Counter(f"{record.label}: {note}" for record in records for note in record.notes).items():
        of_several = f", in {count} groups" if count > 1 else ""
        logger.warning(f"{said}{of_several}; it is kept in the record.")


def number_of(value: object) -> float:
    """Return what a metric returned as a number; NaN where it is none."""
    return float(value) if isinstance(value, Real) else math.nan
