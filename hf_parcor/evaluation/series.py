"""Corruptions of one kind that differ in their strength alone: what stands in one panel, or one heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from hf_parcor.evaluation.records import CorruptionRecord

# A corruption's title, and its strengths: the setting along the axis, and what the axis is called.
_KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "random": ("random", {"epsilon": "radius ε"}),
    "gradient": ("gradient-based", {"epsilon": "radius ε"}),
    "multi_step": ("multi-step", {"epsilon": "radius ε"}),
    "gaussian": ("Gaussian noise", {"std": "standard deviation σ"}),
    "uniform": ("uniform noise", {"bound": "bound b"}),
    "quantization": ("quantization", {"bits": "bits per weight"}),
    "bit_flips": ("bit flips", {"rate": "flip rate per bit", "count": "flipped bits"}),
}
_SYMBOLS = {"epsilon": "ε=", "std": "σ=", "bound": "b=", "rate": "rate=", "count": "count="}
_NAMES = {"top_n": "n", "steps": "K", "step_size": "α"}


class Series(NamedTuple):
    """Corruptions that differ in their strength alone.

    Attributes:
        title: Their name, with the settings that they share.
        corruption: Their name in the catalogue.
        strength: The setting that is their strength; None for a corruption outside the catalogue: labels are all that
            is known of it.
        unit: What an axis of strengths is called.
    """

    title: str
    corruption: str
    strength: str | None
    unit: str

    @classmethod
    def of(cls, row: CorruptionRecord) -> Series:
        """Return the series that a record belongs to.

        Examples:
            >>> row = CorruptionRecord("random", "random L2 ε=1", {"p": 2.0, "epsilon": 1.0}, (0,), {})
            >>> Series.of(row).title, Series.of(row).strength
            ('random, L2', 'epsilon')
        """
        if row.corruption not in _KINDS:
            return cls(row.corruption, row.corruption, None, "")
        title, strengths = _KINDS[row.corruption]
        strength = next((name for name in strengths if row.settings.get(name) is not None), None)
        details = [
            _detail(name, value) for name, value in row.settings.items() if name != strength and value is not None
        ]
        return cls(", ".join([title, *details]), row.corruption, strength, strengths.get(strength or "", ""))

    def level(self, row: CorruptionRecord) -> str:
        """Return the strength of one of these corruptions as tables say it; its label where no strength is known.

        Examples:
            >>> row = CorruptionRecord("quantization", "4-bit quantization", {"bits": 4}, (0,), {})
            >>> Series.of(row).level(row)
            '4 bits'
        """
        if self.strength is None:
            return row.label
        shown = short(float(row.settings[self.strength]))
        return f"{shown} bits" if self.strength == "bits" else f"{_SYMBOLS[self.strength]}{shown}"

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


def _detail(name: str, value: object) -> str:
    """Return a setting that is not the strength, as a title says it."""
    shown = short(value) if isinstance(value, float) else str(value)
    if name == "p":
        return f"L{shown}"
    text = f"{shown} bits" if name == "bits" else f"{_NAMES.get(name, name)} = {shown}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
