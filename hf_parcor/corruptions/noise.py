"""Gaussian and uniform noise on the weights (paper 2, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.arguments import check_radius
from hf_parcor.corruptions.corruption import Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.noise import drawn_gaussian, drawn_uniform
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """Independent noise `a_i ~ N(0, σ²)` on every selected weight.

    Args:
        std: σ ≥ 0, in units of the weights.

    Raises:
        ValueError: `std` is negative, infinite or NaN.

    Examples:
        >>> print(GaussianNoise(0.02))
        Gaussian σ=0.02
    """

    std: float
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "Gaussian noise"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("std", "standard deviation σ", "σ={}"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", check_radius("std", self.std))

    def __str__(self) -> str:
        return f"Gaussian σ={self.std:g}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        return Pieces(named_pieces(weights, drawn_gaussian(list(weights.values()), self.std, generator)))


@dataclass(frozen=True)
class UniformNoise(Corruption):
    """Independent noise `a_i ~ U(−b, b)` on every selected weight.

    Args:
        bound: b ≥ 0, in units of the weights.

    Raises:
        ValueError: `bound` is negative, infinite or NaN.

    Examples:
        >>> print(UniformNoise(0.05))
        uniform b=0.05
    """

    bound: float
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "uniform noise"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("bound", "bound b", "b={}"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", check_radius("bound", self.bound))

    def __str__(self) -> str:
        return f"uniform b={self.bound:g}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        return Pieces(named_pieces(weights, drawn_uniform(list(weights.values()), self.bound, generator)))
