"""Δ_ave by Monte-Carlo: the loss under random corruptions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import RandomCorruption
from hf_parcor.functional import inner_product, vector_norm
from hf_parcor.functional.arguments import check_count
from hf_parcor.indicators.estimate import Estimate
from hf_parcor.indicators.loss import LossOverData


@dataclass(frozen=True)
class RandomLossChanges:
    """What random corruptions ã of one constraint did to a loss.

    Attributes:
        changes: L(w + ã) − L(w) of each draw.
        first_order: ãᵀg of each draw.
        square_norms: ‖ã‖₂² of each draw; ε² for p = 1 and 2, ε²n for p = ∞ and n corrupted weights.
    """

    changes: Estimate
    first_order: Estimate
    square_norms: Estimate

    @property
    def beyond_first_order(self) -> Estimate:
        """Δ_ave: the changes less their first-order part, whose mean is known to be zero.

        ã and −ã are equally likely, so E[ãᵀg] = 0: taking ãᵀg away keeps the mean, and removes most of the spread.
        """
        pairs = zip(self.changes.values, self.first_order.values, strict=True)
        return Estimate(tuple(change - part for change, part in pairs))


def random_loss_changes(
    loss: LossOverData, constraint: CorruptionConstraint, draws: int = 16, seed: int = 0
) -> RandomLossChanges:
    """Corrupt at random, again and again, and measure the loss over the data each time.

    Args:
        loss: The loss over data.
        constraint: The set S that `RandomCorruption` draws from the boundary of.
        draws: How many corruptions; each costs a forward pass over the data.
        seed: Draw t comes from a CPU generator seeded `seed + t`, as trial t of a `CorruptionEvaluator`.

    Raises:
        ValueError: `draws < 1`.
        TypeError: The constraint is none.
    """
    check_count("draws", draws)
    corruption = RandomCorruption(constraint)
    gradient = loss.gradient()
    changes, first_order, square_norms = [], [], []
    for draw in range(seed, seed + draws):
        chosen = corruption(loss.parameters, generator=torch.Generator().manual_seed(draw))
        changes.append(loss.change(chosen))
        first_order.append(float(inner_product([*chosen.values()], [gradient[name] for name in chosen])))
        square_norms.append(float(vector_norm([*chosen.values()])) ** 2)
    return RandomLossChanges(Estimate(tuple(changes)), Estimate(tuple(first_order)), Estimate(tuple(square_norms)))
