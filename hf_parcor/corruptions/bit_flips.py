"""Random bit flips in the weights' floating-point representation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.corruptions.corruption import Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.bits import check_amount, field_bits, flipped_in_turn
from hf_parcor.injection import Pieces


@dataclass(frozen=True, kw_only=True)
class BitFlips(Corruption):
    """Bits of the selected weights inverted at random, as a failing memory would.

    Args:
        rate: Every bit of the field flips independently with this probability, in [0, 1].
        count: Exactly this many distinct bits flip, over all selected weights. Give one of `rate` and `count`.
        bits: Which field may flip: "any" (the default), "sign", "exponent" or "mantissa".

    Raises:
        ValueError: Both or none of `rate` and `count`, a rate outside [0, 1], a count below 1, an unknown field.

    Examples:
        >>> flip = BitFlips(count=1, bits="sign")
        >>> flip({"w": torch.tensor([1.5])})
        {'w': tensor([-1.5000])}
        >>> print(flip)
        bit flips count=1 (sign)
    """

    rate: float | None = None
    count: int | None = None
    bits: str = "any"
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "bit flips"
    strengths: ClassVar[tuple[Strength, ...]] = (
        Strength("rate", "flip rate per bit", "rate={}"),
        Strength("count", "flipped bits", "count={}"),
    )

    def __post_init__(self) -> None:
        rate, count = check_amount(self.rate, self.count)
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "count", count)
        field_bits(torch.float32, self.bits)

    def __str__(self) -> str:
        amount = f"rate={self.rate:g}" if self.rate is not None else f"count={self.count}"
        return f"bit flips {amount} ({self.bits})"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        flipped = flipped_in_turn(
            list(weights.values()), self.bits, rate=self.rate, count=self.count, generator=generator
        )
        return Pieces(named_pieces(weights, flipped), replaces=True)
