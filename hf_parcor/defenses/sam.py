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
    r"""Minimises only the loss under the corruption that is worst to first order.

    .. math:: L(w + \hat a, \theta; B), \quad \hat a = \arg\max_{a \in S} a^T g

    g is the gradient at w on this batch. Of its two passes the first only serves to find `â`. The original has p = 2
    on all parameters, and calls ε rho; paper 2 adds p = ∞ and a start epoch.

    Args:
        constraint: The set S; any p.
        batch_share: The share of the batch on which `â` is found. Default 1.
        sync_perturbation: Whether all processes use one corruption, for the joined batch. Default False.
        start_epoch: Take stock steps until this epoch. Default 0.
        interval: Defend every `interval`-th optimizer step. Default 1.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> constraint = CorruptionConstraint(epsilon=0.05)
        >>> SAM(constraint).cost, SAM(constraint, batch_share=0.25).cost
        (2.0, 1.25)
    """

    @property
    def whole_pass(self) -> int:
        """1, the corrupted pass, which alone makes the update."""
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
