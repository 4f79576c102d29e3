"""What a defense is: the risk that a training step minimises. It knows no Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import partial

from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.arguments import check_radius
from hf_parcor.functional.constrained_maximum import constrained_maximum_
from hf_parcor.functional.projections import project_


@dataclass(frozen=True)
class Defense(ABC):
    """A risk under corruption of the selected parameters, and how its gradient is found.

    Args:
        constraint: The set S of corruptions that the training defends against.
        start_epoch: Until this epoch (a fraction is fine) training is the stock one: early on, corruption harms
            learning. Default 0.

    Raises:
        ValueError: `start_epoch` is negative, infinite or NaN.
        TypeError: The constraint is none.
    """

    constraint: CorruptionConstraint
    _: KW_ONLY
    start_epoch: float = 0.0

    def __post_init__(self) -> None:
        check_constraint(self.constraint)
        check_radius("start_epoch", self.start_epoch)

    @property
    @abstractmethod
    def passes(self) -> int:
        """How many forward and backward passes one micro-batch takes; 1 means the stock step."""

    @abstractmethod
    def minimize(self, step: DefendedStep) -> None:
        """Run the passes of one micro-batch, so that `.grad` becomes the gradient of the risk."""

    def is_active(self, epoch: float) -> bool:
        """Say whether a step at this epoch differs from the stock step at all."""
        return self.passes > 1 and self.constraint.epsilon > 0 and epoch >= self.start_epoch

    def ascend(self, step: DefendedStep, radius: float) -> None:
        """Take one corruption step (SAM: *ascent step*): `a ← Π_S(a + u)`, u the constrained maximum of `radius`."""
        update = step.gradients()
        p, epsilon, top_n = self.constraint.p, self.constraint.epsilon, self.constraint.top_n
        constrained_maximum_(list(update.values()), p, radius, top_n)
        step.displace(update, partial(project_, p=p, epsilon=epsilon, top_n=top_n))
