"""Gradient-based corruption (paper 1, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.corruptions.corruption import RADIUS, Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.constrained_maximum import constrained_maximum_in_turn
from hf_parcor.functional.vectors import one_by_one
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class GradientCorruption(Corruption):
    """The worst corruption to first order: `argmax_{a ∈ S} aᵀg`, with the gradient g of the mean loss over the data.

    See paper 1, Definition 4, Eq. 10. Sharpness-aware minimisation calls it the *ascent step*.

    Args:
        constraint: The set S.

    Raises:
        TypeError: `constraint` is not a `CorruptionConstraint`.

    Examples:
        >>> from hf_parcor import CorruptionConstraint, CorruptionEvaluator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> evaluator = CorruptionEvaluator(
        ...     model,
        ...     lambda m: {"loss": m(torch.tensor([3.0, 4.0])).item()},
        ...     [torch.tensor([3.0, 4.0])],
        ...     loss=lambda m, x: m(x).sum(),
        ...     progress=False,
        ... )
        >>> record = evaluator.evaluate([GradientCorruption(CorruptionConstraint(epsilon=0.1))])
        >>> print(f"{record.corruptions[0].label}: loss {record.corruptions[0].mean('loss'):.2f}")  # ε ‖(3, 4)‖
        gradient-based L2 ε=0.1: loss 0.50
    """

    constraint: CorruptionConstraint
    uses_gradients: ClassVar[bool] = True
    title: ClassVar[str] = "gradient-based"
    strengths: ClassVar[tuple[Strength, ...]] = (RADIUS,)

    def __post_init__(self) -> None:
        check_constraint(self.constraint)

    def __str__(self) -> str:
        return f"gradient-based {self.constraint}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        assert gradients is not None, "checked by the caller"
        gradient = gradients.over_data()
        found = constrained_maximum_in_turn(
            [gradient[name] for name in weights], self.constraint.p, self.constraint.epsilon, self.constraint.top_n
        )
        return Pieces(named_pieces(weights, one_by_one(found)))
