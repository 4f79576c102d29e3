"""Weight quantization, tensor by tensor (paper 2, Eq. A.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.corruptions.corruption import Corruption, GradientSource, Strength
from hf_parcor.functional.quantization import MOST_BITS, check_bits, quantize
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class Quantization(Corruption):
    """Every selected tensor rounded to n-bit signed integers with one scale: `round(W/w0) w0`.

    Args:
        bits: n, in 2..16.

    Raises:
        ValueError: `bits` outside 2..16.

    Examples:
        >>> Quantization(2)({"w": torch.tensor([-1.0, 0.2, 0.6])})
        {'w': tensor([-1.,  0.,  1.])}
        >>> print(Quantization(4))
        4-bit quantization
    """

    bits: int
    title: ClassVar[str] = "quantization"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("bits", "bits per weight", "{} bits", none=MOST_BITS),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_bits(self.bits))

    def __str__(self) -> str:
        return f"{self.bits}-bit quantization"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        return Pieces(((name, quantize(weight, self.bits)) for name, weight in weights.items()), replaces=True)
