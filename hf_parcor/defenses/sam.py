"""Sharpness-aware minimization (Foret et al., ICLR 2021; paper 2, section 5.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_parcor.arguments import known_elsewhere_as
from hf_parcor.defenses.defense import ConstrainedDefense
from hf_parcor.defenses.step import DefendedStep


@known_elsewhere_as(rho="SAM(CorruptionConstraint(epsilon={}))")
@dataclass(frozen=True)
class SAM(ConstrainedDefense):
    r"""Minimise the loss under the worst corruption to first order, and nothing else.

    .. math:: L(w + \hat a, \theta; B), \quad \hat a = \arg\max_{a \in S} a^T g

    g is the gradient at w on this batch. Two passes; the first one's gradient only makes `â`. The original is p = 2 on
    all parameters, where ε is called rho; p = ∞ and a start epoch are those of paper 2.

    Args:
        constraint: The set S; any p.
        batch_share: Find `â` on this share of the batch. Default 1.
        sync_perturbation: On several processes, one corruption for the batches of all. Default False.
        start_epoch: Until this epoch training is the stock one. Default 0.
        interval: Defend every so many optimizer steps. Default 1.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> constraint = CorruptionConstraint(epsilon=0.05)
        >>> SAM(constraint).cost, SAM(constraint, batch_share=0.25).cost
        (2.0, 1.25)
    """

    @property
    def whole_pass(self) -> int:
        """The corrupted pass: it alone makes the update."""
        return 1

    @property
    def passes(self) -> int:
        """2: one at w for its gradient, one at `w + â` for the update."""
        return 2

    def minimize(self, step: DefendedStep) -> None:
        """Find the worst corruption, and minimise there."""

        def plain(loss: Tensor) -> Tensor:
            return loss

        step.probe()
        self.climb(step)
        step.backward(plain)
