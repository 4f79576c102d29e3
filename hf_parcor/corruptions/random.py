"""Random corruption (paper 1, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.corruptions.corruption import RADIUS, Corruption, GradientSource, Strength, named
from hf_parcor.functional.constrained_maximum import constrained_maximum_
from hf_parcor.functional.noise import gaussian_noise


@dataclass(frozen=True)
class RandomCorruption(Corruption):
    """The worst corruption along a random direction: `argmax_{a ∈ S} aᵀr`, `r ~ N(0, I)` (paper 1, Eq. 5).

    On the boundary of the constraint; for p = 2 without `top_n` uniform on the sphere of radius ε.

    Args:
        constraint: The set S.

    Raises:
        TypeError: The constraint is none.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> corruption = RandomCorruption(CorruptionConstraint(epsilon=0.1))
        >>> a = corruption({"w": torch.zeros(1000)}, generator=torch.Generator().manual_seed(0))
        >>> a["w"].norm()
        tensor(0.1000)
        >>> print(corruption)
        random L2 ε=0.1
    """

    constraint: CorruptionConstraint
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "random"
    strengths: ClassVar[tuple[Strength, ...]] = (RADIUS,)

    def __post_init__(self) -> None:
        check_constraint(self.constraint)

    def __str__(self) -> str:
        return f"random {self.constraint}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        direction = gaussian_noise(list(weights.values()), 1.0, generator)
        constrained_maximum_(direction, self.constraint.p, self.constraint.epsilon, self.constraint.top_n)
        return named(weights, direction)
