"""Random bit flips in what the weights are stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.corruptions.corruption import OPTION, Corruption, GradientSource, Strength, named_pieces
from hf_parcor.corruptions.quantization import Quantization
from hf_parcor.functional.bits import check_amount, field_bits, flipped_in_turn
from hf_parcor.functional.stored_numbers import check_format
from hf_parcor.injection import Pieces


def stored_as(of: str | Quantization | None) -> str | None:
    """Return the name of what weights are stored as, as settings and records have it; None for their own dtype.

    Raises:
        ValueError: It is none, or a quantization with more than one scale a tensor.

    Examples:
        >>> stored_as(Quantization(8)), stored_as("bfloat16")
        ('int8', 'bfloat16')
    """
    if isinstance(of, Quantization):
        if of != Quantization(of.bits):
            raise ValueError(f"of: expected one scale a tensor, Quantization({of.bits}), got {of}; take that")
        of = f"int{of.bits}"
    return check_format(of)


@dataclass(frozen=True, kw_only=True)
class BitFlips(Corruption):
    """Inverts bits of the selected weights at random, as a failing memory would.

    To train with `CorruptionRisk`, flip bits of integer codes (`of="int8"`), or set `bits` to "sign" or "mantissa":
    these flips stay in range. A flip of a float's exponent can make a weight of 1e38. Then a model that is measured
    returns NaN, and a model that is trained becomes NaN within a few steps.

    Args:
        rate: Each bit of the field flips independently with this probability, in [0, 1].
        count: Exactly this many distinct bits flip, over all selected weights. Give either `rate` or `count`.
        bits: The field whose bits may flip: "any" (the default), "sign", "exponent" or "mantissa".
        of: What the weights are stored as: "float32", "bfloat16", "float16", or `Quantization(8)` (also "int8") for
            the two's-complement codes of `round(W/w0)`, whose sign is the top bit, without exponent and mantissa.
            Default: the weights' own dtype. With any other format the result is all weights rounded to it, with the
            flips.

    Raises:
        ValueError: Both or none of `rate` and `count` are given; `rate` is outside [0, 1]; `count` is below 1; or the
            format is unknown, or has no such field.

    Examples:
        >>> flip = BitFlips(count=1, bits="sign")
        >>> flip({"w": torch.tensor([1.5])})
        {'w': tensor([-1.5000])}
        >>> print(flip)
        bit flips count=1 (sign)
        >>> print(BitFlips(rate=1e-6, of=Quantization(8)))
        bit flips rate=1e-06 (any, int8)
    """

    rate: float | None = None
    count: int | None = None
    bits: str = "any"
    of: str | Quantization | None = field(default=None, metadata=OPTION)
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
        object.__setattr__(self, "of", stored_as(self.of))
        field_bits(stored_as(self.of) or torch.float32, self.bits)

    @property
    def changes_nothing(self) -> bool:
        """Whether no bit flips, and no weight is rounded to another format."""
        return super().changes_nothing and self.of is None

    def __str__(self) -> str:
        amount = f"rate={self.rate:g}" if self.rate is not None else f"count={self.count}"
        return f"bit flips {amount} ({self.bits}{'' if self.of is None else f', {self.of}'})"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        flipped = flipped_in_turn(
            list(weights.values()),
            self.bits,
            rate=self.rate,
            count=self.count,
            of=stored_as(self.of),
            generator=generator,
        )
        return Pieces(named_pieces(weights, flipped), replaces=True)
