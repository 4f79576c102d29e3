"""The record of indicators: plain frozen data, JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.records.stored import StoredRecord
from hf_parcor.statistics import MeanAndSpread, sample_deviation, sample_mean


@dataclass(frozen=True)
class Estimate:
    """The mean of independent samples, and its uncertainty.

    Attributes:
        values: The samples; NaN is kept.

    Examples:
        >>> trace = Estimate((2.0, 4.0, 3.0))
        >>> trace.mean, round(trace.standard_error, 3)
        (3.0, 0.577)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean; NaN without samples, or if one is NaN."""
        return sample_mean(self.values)

    @property
    def standard_deviation(self) -> float:
        """Sample standard deviation of the values (n − 1); NaN for fewer than two, or if one is NaN or ∞."""
        return sample_deviation(self.values)

    @property
    def standard_error(self) -> float:
        """Standard deviation of the mean, s/√n; NaN if s is."""
        return self.standard_deviation / math.sqrt(max(len(self.values), 1))

    def confidence_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided interval of the mean by Student's t distribution.

        Raises:
            ValueError: There are fewer than two samples, one is not finite, or the level is not between 0 and 1.
            ImportError: SciPy is not installed.
        """
        return MeanAndSpread.from_values(self.values).confidence_interval(level)

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate of this multiple of the quantity."""
        return Estimate(tuple(factor * value for value in self.values))


FORMAT = 1


@dataclass(frozen=True)
class ConstraintIndicators:
    """Several estimates of both indicators on one constraint S, in units of the loss.

    Attributes:
        constraint: The set S.
        first_order: Δ_max to first order, ε ‖top_n(g)‖_{p/(p−1)}.
        gradient_based: Loss change under the gradient-based corruption, a lower bound of Δ_max.
        multi_step: Loss change under the multi-step corruption, a lower bound of Δ_max; None unless p is 2 or ∞.
        second_order: Δ_ave to second order, tr(H) E‖ã‖₂²/2k, which is tr(H) ε²/2k for p = 2; a sample for each probe.
        monte_carlo: Δ_ave as measured: for each random corruption ã, its loss change minus ãᵀg, whose mean is zero.
        random: The same loss changes without subtracting ãᵀg: the effect of a random corruption, and its spread.
    """

    constraint: CorruptionConstraint
    first_order: float
    gradient_based: float
    multi_step: float | None
    second_order: Estimate
    monte_carlo: Estimate
    random: Estimate

    @property
    def lower_bound(self) -> float:
        """The largest loss change found in S, at least 0 (no corruption): a lower bound of Δ_max; NaN if one is."""
        found = [self.gradient_based, *([] if self.multi_step is None else [self.multi_step]), *self.random.values]
        return math.nan if any(map(math.isnan, found)) else max(0.0, *found)

    @property
    def linearity(self) -> float:
        """Loss change under the gradient-based corruption divided by its first-order estimate: 1 for small enough ε.

        If it is far from 1, the loss is curved or saturated within S, and the first order says little about Δ_max.
        """
        return self.gradient_based / self.first_order if self.first_order else float("nan")


@dataclass(frozen=True)
class IndicatorRecord(StoredRecord):
    """How a model's loss over data changes under small corruptions of selected parameters.

    Attributes:
        model: Name or path of the model.
        target: What may be corrupted, as requested.
        parameters: Number k of weights that may be corrupted.
        loss: The mean loss over the data, L(w).
        gradient_norm: G = ‖g‖₂ of its gradient.
        hessian_trace: tr(H), a sample for each probe.
        indicators: One entry for each constraint.
        seed: First seed of probes and of random corruptions.
        data: Fingerprint of the data, as in `EvaluationRecord`.
        versions: Versions of the libraries.
        notes: Remarks in sentences.
        format: Version of this layout.

    Examples:
        >>> from hf_parcor.records import Estimate
        >>> record = IndicatorRecord(
        ...     "my-model",
        ...     {},
        ...     4,
        ...     loss=0.5,
        ...     gradient_norm=1.0,
        ...     hessian_trace=Estimate((4.0, 4.0)),
        ...     indicators=(),
        ...     seed=0,
        ... )
        >>> record.hessian_trace.mean, IndicatorRecord.from_json(record.to_json()) == record
        (4.0, True)
    """

    model: str
    target: Mapping[str, Any]
    parameters: int
    loss: float
    gradient_norm: float
    hessian_trace: Estimate
    indicators: tuple[ConstraintIndicators, ...]
    seed: int
    data: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: int = FORMAT
    kind: ClassVar[str] = "indicator record"
