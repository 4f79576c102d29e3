"""What a defense is: the risk that a training step minimises. It knows no Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.arguments import check_radius
from hf_parcor.functional.constrained_maximum import constrained_maximum_


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A risk under corruption of the selected parameters, and how its gradient is found.

    Args:
        start_epoch: Until this epoch (a fraction is fine) training is the stock one: early on, corruption harms
            learning. Default 0.

    Raises:
        ValueError: `start_epoch` is negative, infinite or NaN.
    """

    start_epoch: float = 0.0

    def __post_init__(self) -> None:
        check_radius("start_epoch", self.start_epoch)

    @property
    @abstractmethod
    def passes(self) -> int:
        """How many forward and backward passes one micro-batch takes."""

    @property
    def cost(self) -> float:
        """The operations of one micro-batch, in those of a stock step; the number of passes unless they differ."""
        return self.passes

    @property
    @abstractmethod
    def order(self) -> float:
        """The order p of the norm that corruptions are measured in."""

    @property
    def perturbs_inputs(self) -> bool:
        """Whether the step moves the inputs too, for which the model must have an input embedding."""
        return False

    @property
    @abstractmethod
    def is_stock(self) -> bool:
        """Whether these settings minimise the plain loss, so that the stock step does as well."""

    @property
    def differentiates_twice(self) -> bool:
        """Whether its objective contains a gradient, so that backward goes through backward."""
        return False

    @abstractmethod
    def minimize(self, step: DefendedStep) -> None:
        """Run the passes of one micro-batch, so that `.grad` becomes the gradient of the risk."""

    def is_active(self, epoch: float) -> bool:
        """Say whether a step at this epoch differs from the stock step at all."""
        return not self.is_stock and epoch >= self.start_epoch


@dataclass(frozen=True)
class ConstrainedDefense(Defense):
    """A defense against the corruptions of a constraint.

    Args:
        constraint: The set S of corruptions that the training defends against.
        start_epoch: As in `Defense`.

    Raises:
        TypeError: The constraint is none.
    """

    constraint: CorruptionConstraint

    def __post_init__(self) -> None:
        super().__post_init__()
        check_constraint(self.constraint)

    @property
    def order(self) -> float:
        """The constraint's p."""
        return self.constraint.p

    @property
    def is_stock(self) -> bool:
        """Whether no corruption is allowed, or none is made."""
        return self.passes == 1 or self.constraint.epsilon == 0

    def climb(self, step: DefendedStep) -> None:
        """Write the worst corruption of the constraint, `a = argmax_{a ∈ S} aᵀg` (SAM: *ascent step*)."""
        step.displace(self.update(step, self.constraint.epsilon))

    def update(self, step: DefendedStep, radius: float) -> dict[str, Tensor]:
        """Return the constrained maximum of this radius on the last pass's gradient."""
        update = step.gradients()
        constrained_maximum_(list(update.values()), self.constraint.p, radius, self.constraint.top_n)
        return update
