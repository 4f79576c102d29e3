"""Which format each part of a model gets, and what that is expected to cost: plain data, JSON in and out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_parcor.records.sensitivity import WeightGroup
from hf_parcor.records.stored import StoredRecord

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """The format of a group.

    Attributes:
        format: Its label; None if the group stays as it is.
        bits: Average bits a weight, with scales.
    """

    format: str | None
    bits: float


@dataclass(frozen=True)
class PairCost:
    """The cost of two groups of a recipe together, with all other weights unchanged, and apart.

    Attributes:
        first, second: The groups.
        metric: The metric whose drop is the cost.
        together: The cost of both groups in their formats at once.
        apart: The sum of the costs of each group by itself.
    """

    first: str
    second: str
    metric: str
    together: float
    apart: float

    @property
    def interaction(self) -> float:
        """The cost together minus the cost apart: to second order δ₁ᵀHδ₂, with the Hessian's block between them."""
        return self.together - self.apart


@dataclass(frozen=True)
class RecipeRecord(StoredRecord):
    """The format of every group, and what that is expected to cost.

    Attributes:
        model: Name or path of the model.
        groups: The groups by name.
        formats: As in `SensitivityRecord`.
        choice: The format of each group, in the same order.
        budget: The requested budget, by the name of the argument; empty if nothing was chosen.
        by: The metric or score that costs were measured in.
        expected: The sum of the costs of each group by itself, for `by` and for each measured metric.
        estimated: How many of the chosen cells were not measured, so that `expected` estimates their costs.
        pairs: Pairs of groups that were measured together; see `measure_pairs`.
        outside: As in `SensitivityRecord`.
        loaded_part: As in `SensitivityRecord`.
        kept_in_float: As in `SensitivityRecord`.
        notes: Remarks in sentences.
        bits_of_base: The bits a weight that each group would take in the format of most weights, if that fits it;
            empty in older records.
        format: Version of this layout.

    Examples:
        >>> from hf_parcor.records import Choice, WeightGroup
        >>> group = WeightGroup({"a.weight": 8}, 32.0)
        >>> four = {"4-bit quantization": {"corruption": "quantization", "settings": {"bits": 4}}}
        >>> record = RecipeRecord(
        ...     "m", {"a": group, "b": group}, four, {"a": Choice("4-bit quantization", 4.0), "b": Choice(None, 32.0)}
        ... )
        >>> record.bits, record.spared, RecipeRecord.from_json(record.to_json()) == record
        (18.0, ['b'], True)
    """

    model: str
    groups: Mapping[str, WeightGroup]
    formats: Mapping[str, Mapping[str, Any]]
    choice: Mapping[str, Choice]
    budget: Mapping[str, float] = field(default_factory=dict)
    by: str = ""
    expected: Mapping[str, float] = field(default_factory=dict)
    estimated: int = 0
    pairs: tuple[PairCost, ...] = ()
    outside: tuple[str, ...] = ()
    loaded_part: str = ""
    kept_in_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bits_of_base: Mapping[str, float] = field(default_factory=dict)
    format: int = FORMAT
    kind: ClassVar[str] = "recipe"
    remedy: ClassVar[str] = "choose again, or read it with the version of hf_parcor that wrote it"

    @property
    def bits(self) -> float:
        """Average bits a weight over all groups."""
        parameters = sum(group.parameters for group in self.groups.values())
        return sum(one.bits * self.groups[name].parameters for name, one in self.choice.items()) / parameters

    @property
    def base(self) -> str | None:
        """The format that most of the quantized weights get; None if none is quantized."""
        counts: Counter[str] = Counter()
        for name, one in self.choice.items():
            if one.format is not None:
                counts[one.format] += self.groups[name].parameters
        return counts.most_common(1)[0][0] if counts else None

    @property
    def exceptions(self) -> list[str]:
        """The groups whose format is not `base`."""
        return [name for name, one in self.choice.items() if one.format != self.base]

    @property
    def spared(self) -> list[str]:
        """The groups that `base` fits, but that get more bits than it would give them.

        Defend these groups, so that they need not be spared.
        """
        most = max((one.bits for one in self.choice.values() if one.format == self.base), default=0.0)
        known = self.bits_of_base or dict.fromkeys(self.choice, most)
        return [name for name in self.exceptions if self.choice[name].bits > known.get(name, math.inf)]

    def weights(self) -> Iterator[tuple[str, Choice]]:
        """Yield every weight with its format."""
        for name, one in self.choice.items():
            for weight in self.groups[name].weights:
                yield weight, one
