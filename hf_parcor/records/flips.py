"""The record of how many worst bit flips break a model: plain frozen data, JSON in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from hf_parcor.records.stored import StoredRecord

FORMAT = 1


@dataclass(frozen=True)
class FlipRecord(StoredRecord):
    """A metric after 0, 1, 2, ... of the worst bit flips, until half of it is gone.

    Attributes:
        model: Name or path of the model.
        target: What may be corrupted, as requested.
        parameters: Number k of weights that may be corrupted.
        settings: The settings of the `WorstBitFlips`; its count is the largest number of flips.
        metric: The name of the metric.
        greater_is_better: Whether a large metric is good.
        chance: The metric that guessing reaches.
        clean: The metric of the uncorrupted model.
        values: The metric after 0, 1, 2, ... flips; NaN where it was not finite. The first is measured with the
            weights as they are stored, for example rounded to integer codes.
        data: Fingerprint of the data that gradients were taken on, as in `EvaluationRecord`; "" if there were none.
        versions: Versions of the libraries.
        notes: Remarks in sentences.
        format: Version of this layout.

    Examples:
        >>> record = FlipRecord("m", {}, 4, {"count": 9}, "accuracy", True, chance=0.5, clean=0.9, values=(0.9, 0.8))
        >>> record.threshold, record.flips, record.after_another(0.6).flips
        (0.7, None, 2)
        >>> FlipRecord.from_json(record.to_json()) == record
        True
    """

    model: str
    target: Mapping[str, Any]
    parameters: int
    settings: Mapping[str, Any]
    metric: str
    greater_is_better: bool
    chance: float
    clean: float
    values: tuple[float, ...] = ()
    data: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: int = FORMAT
    kind: ClassVar[str] = "flip record"

    @property
    def threshold(self) -> float:
        """Where half of the metric is gone: midway between clean and chance; for a loss, twice the clean loss."""
        return self.chance + (self.clean - self.chance) / 2 if self.greater_is_better else 2 * self.clean

    @property
    def is_sound(self) -> bool:
        """Whether the clean metric is finite and there is something to lose: above chance; for a loss, above 0."""
        least = self.chance if self.greater_is_better else 0.0
        return math.isfinite(self.clean) and math.isfinite(self.chance) and self.clean > least

    @property
    def flips(self) -> int | None:
        """The smallest number of flips after which half of the metric is gone; None if all were not enough."""
        for count, value in enumerate(self.values):
            within = value > self.threshold if self.greater_is_better else value < self.threshold
            if not within:  # NaN too
                return count
        return None

    def after_another(self, value: float) -> FlipRecord:
        """Return the record extended by the metric after one more flip."""
        return replace(self, values=(*self.values, value))
