"""Gaussian and uniform noise on the weights: of paper 2, Table 1, and relative, as that of analog hardware."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice, check_radius
from hf_parcor.corruptions.corruption import OPTION, Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.noise import REFERENCES, drawn_gaussian, drawn_uniform, relative
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """Independent noise `a_i ~ N(0, σ²)` on every selected weight, in units of the weights or relative to them.

    Analog hardware maps the largest weight of a tile to its largest conductance, so its programming and read noise is
    relative to that weight. In aihwkit (Rasch et al. 2021, arXiv:2104.02184) noise relative to the tensor is
    `AddNormal`, relative to channels `AddNormalPerChannel`, and relative to each weight `MultNormal`. Noise-aware
    training for phase-change memory draws the first (Joshi et al. 2020, arXiv:1906.03138).

    Args:
        std: σ ≥ 0, in units of the weights, or of what the noise is relative to.
        relative_to: "tensor" or "channel" multiply σ by the largest |w| there; a channel is one index of the first
            dimension, in a vector one entry. "weight" gives multiplicative noise `w_i (1 + σ n_i)`, which is the
            log-normal `w_i exp(σ n_i)` to first order. None (the default) does not depend on the weights.

    Raises:
        ValueError: `std` is negative, infinite or NaN, or `relative_to` is unknown.
        NotImplementedError: It is applied to a weight whose channels are split by sharding.

    Examples:
        >>> print(GaussianNoise(0.02))
        Gaussian σ=0.02
        >>> noise = GaussianNoise(0.03, relative_to="channel")
        >>> print(noise)
        Gaussian σ=0.03 relative to channel
        >>> weights = {"w": torch.tensor([[4.0, -2.0], [0.0, 0.0]])}
        >>> noise(weights, generator=torch.Generator().manual_seed(0))["w"] / 0.03 / 4
        tensor([[ 1.5410, -0.2934],
                [-0.0000,  0.0000]])
    """

    std: float
    relative_to: str | None = field(default=None, metadata=OPTION)
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "Gaussian noise"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("std", "standard deviation σ", "σ={}"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", check_radius("std", self.std))
        _check(self.relative_to)

    def __str__(self) -> str:
        return f"Gaussian σ={self.std:g}{_told(self.relative_to)}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        return Pieces(
            _relative(weights, drawn_gaussian(list(weights.values()), self.std, generator), self.relative_to)
        )


@dataclass(frozen=True)
class UniformNoise(Corruption):
    """Independent noise `a_i ~ U(−b, b)` on every selected weight, in units of the weights or relative to them.

    Args:
        bound: b ≥ 0, in units of the weights, or of what the noise is relative to.
        relative_to: "tensor", "channel", "weight" or None, as in `GaussianNoise`.

    Raises:
        ValueError: `bound` is negative, infinite or NaN, or `relative_to` is unknown.
        NotImplementedError: It is applied to a weight whose channels are split by sharding.

    Examples:
        >>> print(UniformNoise(0.05))
        uniform b=0.05
    """

    bound: float
    relative_to: str | None = field(default=None, metadata=OPTION)
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "uniform noise"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("bound", "bound b", "b={}"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", check_radius("bound", self.bound))
        _check(self.relative_to)

    def __str__(self) -> str:
        return f"uniform b={self.bound:g}{_told(self.relative_to)}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        return Pieces(
            _relative(weights, drawn_uniform(list(weights.values()), self.bound, generator), self.relative_to)
        )


def _relative(weights: Mapping[str, Tensor], drawn: Iterator[Tensor], to: str | None) -> Iterator[tuple[str, Tensor]]:
    for name, noise in named_pieces(weights, drawn):
        yield name, relative(noise, weights[name], to)
        del noise


def _check(relative_to: str | None) -> None:
    if relative_to is not None:
        check_choice("relative_to", relative_to, REFERENCES)


def _told(relative_to: str | None) -> str:
    return "" if relative_to is None else f" relative to {relative_to}"
