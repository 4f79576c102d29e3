"""Adversarial corruption-resistant training, direct form (paper 1, section on training; paper 2, Eq. 27)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_parcor.arguments import check_share
from hf_parcor.defenses.defense import ConstrainedDefense
from hf_parcor.defenses.step import DefendedStep


@dataclass(frozen=True)
class ACRT(ConstrainedDefense):
    r"""Minimises a mixture of the clean loss and the loss under the corruption that is worst to first order.

    .. math:: (1 - \alpha) L(w, \theta; B) + \alpha L(w + \hat a, \theta; B), \quad \hat a = \arg\max_{a \in S} a^T g

    g is the gradient at w on this batch; no gradient flows through `â`. It takes two passes.

    Args:
        constraint: The set S; any p.
        alpha: Weight α of the corrupted loss, in [0, 1]; 0 is the stock step, 1 is `SAM`. Default 0.5.
        batch_share: The share of the batch that the corrupted pass sees; with α = 1 as in `SAM`. Default 1.
        sync_perturbation: Whether all processes use one corruption, for the joined batch. Default False.
        start_epoch: Take stock steps until this epoch. Default 0.
        interval: Defend every `interval`-th optimizer step. Default 1.

    Raises:
        ValueError: `alpha` is outside [0, 1].

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> defense = ACRT(CorruptionConstraint(p=2, epsilon=0.1), alpha=0.5)
        >>> defense.passes, defense.cost
        (2, 2.0)
    """

    alpha: float = field(default=0.5, metadata={"help": "weight of the corrupted loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha, "it weighs the corrupted loss")

    @property
    def passes(self) -> int:
        """2, or 1 if the corrupted loss has no weight."""
        return 2 if self.alpha > 0 else 1

    @property
    def whole_pass(self) -> int:
        """0, the clean pass; with α = 1 it is 1, the corrupted pass."""
        return 0 if self.alpha < 1 else 1

    def minimize(self, step: DefendedStep) -> None:
        """Run the clean pass and the corrupted one."""

        def clean(loss: Tensor) -> Tensor:
            return (1 - self.alpha) * loss

        def corrupted(loss: Tensor) -> Tensor:
            return self.alpha * loss

        if self.alpha < 1:
            step.backward(clean)
        else:
            step.probe()
        self.climb(step)
        step.backward(corrupted)
