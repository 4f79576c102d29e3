"""Adversarial parameter defense by multi-step risk minimization (paper 2, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_parcor.defenses.projected_ascent import ProjectedAscent
from hf_parcor.defenses.step import DefendedStep


@dataclass(frozen=True)
class MultiStepRisk(ProjectedAscent):
    r"""Minimises the mean loss over the steps of projected gradient ascent to a corruption on this batch.

    .. math:: \frac{1}{K+1} \sum_{k=0}^{K} L((w + a_k, \theta); B), \quad a_0 = 0, \; a_k = \Pi_S(a_{k-1} + u_k)

    `u_k` is the constrained maximum of radius α on the gradient at `w + a_{k−1}`. The a_k are constants: no gradient
    flows through them. It takes K + 1 passes (paper 2, Algorithm 1, Eq. 24). For K = 1 this is `ACRT` with α = 1/2.

    Args:
        constraint: The set S; p is 2 or ∞. Any p is allowed if K steps of a given `step_size` cannot leave S.
        steps: K ≥ 0; 0 is the stock step. Default 1, which costs two stock steps and was measured to help. The papers
            found 2 best on translation.
        step_size: α in units of the weights. Default `1.5 ε/K` (printed `1.5 ε/k` in the paper).
        random_start: Whether to start from a random `a_0` with `‖a_0‖_p = ε` instead of 0, drawn from PyTorch's global
            generator. Default False, which was better in paper 2, Table 2.
        batch_share: The share of the batch that all passes after the first see. Default 1.
        sync_perturbation: Whether all processes use one corruption, for the joined batch. Default False.
        start_epoch: Take stock steps until this epoch. Default 0.
        interval: Defend every `interval`-th optimizer step. Default 1.

    Raises:
        NotImplementedError: p is neither 2 nor ∞, and the steps may leave S.
        ValueError: `steps < 0` or `step_size < 0`.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> defense = MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=2)
        >>> defense.passes, round(defense.resolved_step_size, 3)
        (3, 0.075)
    """

    @property
    def passes(self) -> int:
        """`K + 1`."""
        return self.steps + 1

    def minimize(self, step: DefendedStep) -> None:
        """Run Algorithm 1 for one micro-batch."""

        def mean_over_passes(loss: Tensor) -> Tensor:
            return loss / (self.steps + 1)

        self.start(step)
        step.backward(mean_over_passes)
        for _ in range(self.steps):
            self.climb_and_project(step)
            step.backward(mean_over_passes)
