"""Curves of a metric against the strength of a corruption: which results make one, and one number for all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from hf_parcor.records.evaluation import CorruptionKind, CorruptionRecord
from hf_parcor.statistics import exact_sum

_LETTERS = {"ε": "epsilon ", "σ": "sigma ", "∞": "inf"}
_PHRASES = {  # of settings; others are "name = value"
    "p": "L{}",
    "bits": "{} bits",
    "top_n": "n = {}",
    "steps": "K = {}",
    "step_size": "α = {}",
    "relative_to": "relative to {}",
    "nu_mean": "mean ν = {}",
    "nu_std": "std ν = {}",
    "towards": "towards {}",
}


class Series(NamedTuple):
    """Corruptions that differ in their strength alone.

    Attributes:
        title: Their name, with the settings that they share; without, where no setting is their strength, and where a
            setting is a mapping, as the formats of a recipe are: labels tell them apart.
        corruption: Their name in the catalogue.
        strength: The setting that is their strength; None where there is none, and for a corruption outside the
            catalogue: labels tell them apart.
        unit: What an axis of strengths is called.
        shown: One strength in a table, with `{}` for the number.
    """

    title: str
    corruption: str
    strength: str | None
    unit: str
    shown: str = ""

    @classmethod
    def of(cls, row: CorruptionRecord) -> Series:
        """Return the series that a record belongs to.

        Examples:
            >>> row = CorruptionRecord("random", "random L2 ε=1", {"p": 2.0, "epsilon": 1.0}, (0,), {})
            >>> Series.of(row).title, Series.of(row).strength
            ('random, L2', 'epsilon')
        """
        kind = row.kind or _kind_in_catalogue(row)
        if kind is None:
            return cls(row.corruption, row.corruption, None, "")
        if kind.strength is None:
            return cls(kind.title, row.corruption, None, kind.unit)
        told = {} if _is_told_by_its_label(row) else row.settings
        details = [
            _detail(name, value)
            for name, value in told.items()
            if name not in (kind.strength, "sha256") and value is not None
        ]
        return cls(", ".join([kind.title, *details]), row.corruption, kind.strength, kind.unit, kind.shown)

    def place(self, row: CorruptionRecord) -> float:
        """Return the strength of one of these corruptions; bits, which may be a mean over weights, to the hundredth.

        Examples:
            >>> row = CorruptionRecord("quantization", "4-bit quantization", {"bits": 4}, (0,), {})
            >>> Series.of(row).place(row)
            4.0
        """
        strength = float(row.settings[str(self.strength)])
        return round(strength, 2) if self.strength == "bits" else strength

    def level(self, row: CorruptionRecord) -> str:
        """Return the strength of one of these corruptions as tables say it; its label where no strength is known.

        Where the title does not say all settings, it is both.

        Examples:
            >>> row = CorruptionRecord("quantization", "4-bit quantization", {"bits": 4}, (0,), {})
            >>> Series.of(row).level(row)
            '4 bits'
            >>> kind = CorruptionKind("mixed quantization", "bits", "bits per weight", "{} bits")
            >>> settings = {"bits": 4.5, "formats": {"embeddings.weight": "8-bit quantization"}}
            >>> row = CorruptionRecord("MixedQuantization", "recipe", settings, (0,), {}, kind=kind)
            >>> Series.of(row).title, Series.of(row).level(row)
            ('mixed quantization', 'recipe (4.5 bits)')
        """
        if self.strength is None:
            return row.label
        level = self.shown.replace("{}", short(self.place(row)))
        return f"{row.label} ({level})" if _is_told_by_its_label(row) and row.label != level else level

    @property
    def name(self) -> str:
        """The title for running text, where lines may break anywhere."""
        return self.title.replace("\N{NO-BREAK SPACE}", " ")


def short(number: float) -> str:
    """Return a number as an axis shows it.

    Examples:
        >>> short(0.0002), short(math.inf)
        ('0.0002', '∞')
    """
    return "∞" if math.isinf(number) else f"{number:g}".replace("e-0", "e-")


def plain_name(label: str) -> str:
    """Return a label in small letters, digits, points and underscores; a minus stays in an exponent.

    Examples:
        >>> [plain_name(label) for label in ("gradient-based L∞ ε=0.0002", "4-bit quantization", "Gaussian σ=0.02")]
        ['gradient_based_linf_epsilon_0.0002', '4_bit_quantization', 'gaussian_sigma_0.02']
        >>> plain_name("bit flips rate=1e-08 (any)")
        'bit_flips_rate_1e-08_any'
    """
    for letter, word in _LETTERS.items():
        label = label.replace(letter, word)
    kept = re.sub(r"[^a-z0-9.-]+", "_", label.lower())
    return re.sub(r"(?<!\de)-", "_", kept).strip("_")


def _is_told_by_its_label(row: CorruptionRecord) -> bool:
    """Return whether settings are too long for a title: a mapping may have an entry for each weight of a model."""
    return any(isinstance(value, Mapping) for value in row.settings.values())


def _kind_in_catalogue(row: CorruptionRecord) -> CorruptionKind | None:
    """Return what the catalogue says of a record from before records said it."""
    from hf_parcor.corruptions import CORRUPTIONS  # such records alone wait for PyTorch

    kind = CORRUPTIONS.get(row.corruption)
    return None if kind is None else CorruptionKind(**kind.kind(row.settings))


def _detail(name: str, value: object) -> str:
    """Return a setting that is not the strength, as a title says it."""
    shown = short(value) if isinstance(value, float) else str(value)
    if name == "per":
        text = f"per {value}" if isinstance(value, str) else f"per group of {value}"
        text = "all together" if value == "all" else text
    elif name == "symmetric":
        text = "symmetric" if value else "asymmetric"
    else:
        text = _PHRASES.get(name, f"{name.replace('_', ' ')} = {{}}").replace("{}", shown)
    return text if name == "p" else text.replace(" ", "\N{NO-BREAK SPACE}")


def metric_drop(clean: float, corrupted: float, *, greater_is_better: bool = True) -> float:
    """Return how much worse the metric is under corruption: clean − corrupted, or corrupted − clean for a loss.

    It is negative if corruption made the metric better, and NaN if either number is.

    Args:
        clean: The metric without corruption.
        corrupted: The metric under corruption.
        greater_is_better: Whether a large metric is good, as an accuracy is; False for a loss or a perplexity.

    Examples:
        >>> metric_drop(0.75, 0.5)
        0.25
        >>> metric_drop(0.25, 1.5, greater_is_better=False)
        1.25
    """
    return clean - corrupted if greater_is_better else corrupted - clean


def area_under_curve(epsilons: Sequence[float], values: Sequence[float], *, clean: float) -> float:
    """Return the area under the metric as a function of ε, as a share of the range: the mean metric from 0 to ε_max.

    ::

        1/ε_max ∫_0^ε_max m(ε) dε,    m(0) = clean, m linear between the points

    So it has the unit of the metric, and a model that nothing disturbs has its clean metric. A NaN makes it NaN.

    Args:
        epsilons: Where the metric was measured, in any order; each > 0 and finite, each once.
        values: The metric at each of them.
        clean: The metric without corruption, which is that at ε = 0.

    Raises:
        ValueError: There are no points, as many ε as values are missing, or an ε is not allowed.

    Examples:
        >>> area_under_curve([1.0, 2.0], [0.5, 0.5], clean=1.0)
        0.625
        >>> area_under_curve([0.1, 1.0], [0.75, 0.75], clean=0.75)
        0.75
    """
    points = _points(epsilons, values, clean)
    # Widths are shares of the range, so that neither tiny nor huge ε underflow or overflow.
    largest = points[-1][0]
    parts = [
        (right / largest - left / largest) * (before / 2 + after / 2)
        for (left, before), (right, after) in pairwise(points)
    ]
    return exact_sum(parts)


def epsilon_at_half(
    epsilons: Sequence[float], values: Sequence[float], *, clean: float, greater_is_better: bool = True
) -> float:
    """Return the smallest ε at which half of the clean metric is lost; for a loss, at which it has doubled.

    ::

        min {ε : m(ε) <= clean / 2},    or    min {ε : m(ε) >= 2 clean};    m(0) = clean, m linear between the points

    Args:
        epsilons: As in `area_under_curve`.
        values: As in `area_under_curve`.
        clean: As in `area_under_curve`.
        greater_is_better: As in `metric_drop`.

    Returns:
        ∞ if no measured ε is enough. NaN if that is unknown, because the clean metric is not positive and finite, or a
        NaN comes first.

    Raises:
        ValueError: As in `area_under_curve`.

    Examples:
        >>> epsilon_at_half([1.0, 2.0], [0.75, 0.25], clean=1.0)
        1.5
        >>> epsilon_at_half([1.0, 2.0], [0.75, 0.625], clean=1.0)
        inf
        >>> epsilon_at_half([1.0, 2.0], [1.0, 5.0], clean=1.0, greater_is_better=False)
        1.25
    """
    points = _points(epsilons, values, clean)
    if not 0 < clean < math.inf:
        return math.nan
    for (left, before), (right, after) in pairwise(points):
        if math.isnan(after):
            return math.nan
        half = clean / 2 if greater_is_better else 2 * clean
        missing, lost = (
            metric_drop(*drop, greater_is_better=greater_is_better) for drop in ((before, half), (half, after))
        )
        if lost >= 0:
            # An infinite metric is no end of a line: all that is known is that the jump lies before this ε.
            return right if math.inf in (missing, lost) else left + (right - left) * missing / (missing + lost)
    return math.inf


def _points(epsilons: Sequence[float], values: Sequence[float], clean: float) -> list[tuple[float, float]]:
    """Return the curve from ε = 0 on, in the order of ε."""
    if not epsilons or len(epsilons) != len(values):
        raise ValueError(
            f"values: expected one for each of one or more epsilons, got {len(values)} for {len(epsilons)}; "
            "pass them in pairs"
        )
    if len(set(epsilons)) != len(epsilons) or not all(0 < epsilon < math.inf for epsilon in epsilons):
        raise ValueError(
            f"epsilons: expected different positive finite numbers, got {list(epsilons)}; "
            "pass each once, and what was measured at 0 as clean="
        )
    return [(0.0, clean), *sorted(zip(epsilons, values, strict=True))]
