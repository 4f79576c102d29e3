"""What a defense is: the risk that a training step minimises. It knows no Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from hf_parcor.arguments import check_count, check_flag, check_not_negative, check_real
from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.corruptions.corruption import Corruption, named_pieces
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.constrained_maximum import (
    constrained_maximum,
    constrained_maximum_,
    constrained_maximum_in_turn,
    goes_in_turn,
    is_multiple,
    maximum_as_multiple,
)
from hf_parcor.functional.vectors import one_by_one
from hf_parcor.injection import Multiple, Pieces


@dataclass(frozen=True, kw_only=True)
class Defense(ABC):
    """A risk under corruption of the selected parameters, and how its gradient is found.

    Args:
        start_epoch: Take stock steps until this epoch, which may be a fraction: early in training, corruption harms
            learning. Default 0.
        interval: Defend every `interval`-th optimizer step, and take the stock step at the others, an approximation
            that costs less. Default 1: defend every step.

    Raises:
        ValueError: `start_epoch` is negative, infinite or NaN, or `interval < 1`.
        TypeError: A setting that is on or off is neither True nor False, such as the word "false".
    """

    start_epoch: float = field(
        default=0.0, metadata={"help": "train without the defense until this epoch; a fraction is fine"}
    )
    interval: int = field(
        default=1, metadata={"help": "defend every so many optimizer steps; an approximation that costs less"}
    )

    def __post_init__(self) -> None:
        check_not_negative("start_epoch", self.start_epoch, "pass 0 to defend from the first step")
        check_count("interval", self.interval)
        for setting in fields(self):
            if isinstance(setting.default, bool):
                check_flag(setting.name, getattr(self, setting.name))

    @property
    @abstractmethod
    def passes(self) -> int:
        """Number of forward and backward passes for one micro-batch."""

    @property
    def cost(self) -> float:
        """Operations of one micro-batch, in stock steps: the number of passes unless passes differ in cost."""
        return self.passes

    @property
    @abstractmethod
    def p(self) -> float:
        """The order p of the norm that corruptions are measured in."""

    @property
    def perturbs_inputs(self) -> bool:
        """Whether the step perturbs the inputs too. The model must then have an input embedding."""
        return False

    @property
    def uses_gradients(self) -> bool:
        """Whether corruptions follow gradients of the selected parameters, which then must not be frozen."""
        return True

    @property
    def merges_adapters(self) -> bool:
        """Whether weights under adapters are corrupted as they will be when the adapters are merged into them."""
        return False

    @property
    def first_pass_is_clean(self) -> bool:
        """Whether the first pass is at the clean weights."""
        return True

    @property
    def first_pass_is_stock(self) -> bool:
        """Whether the first pass computes what a stock step does: the clean weights, on the whole batch."""
        return self.first_pass_is_clean and self.share_of_batch(0) == 1

    @property
    @abstractmethod
    def is_stock(self) -> bool:
        """Whether these settings minimise the plain loss, so that the stock step is taken instead."""

    @property
    def why_stock(self) -> str:
        """If `is_stock`: the settings that make it so, as text."""
        zeros = [
            name for name, value in self._amounts() if value == 0 and value is not False and name != "start_epoch"
        ]
        return " and ".join(f"{name}=0" for name in zeros) or str(self)

    def _amounts(self) -> Iterator[tuple[str, Any]]:
        return ((setting.name, getattr(self, setting.name)) for setting in fields(self))

    def corrupted_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """Return what is logged as the corrupted loss: by default the loss of the last pass.

        Args:
            losses: The loss of each pass of a step.
        """
        return losses[-1]

    @property
    def differentiates_twice(self) -> bool:
        """Whether its objective contains a gradient, so that backward goes through backward."""
        return False

    def check(self, weights: Mapping[str, Tensor]) -> None:  # noqa: B027 (most can defend any weight)
        """Raise an error before any weight is written, as `Corruption.check`, if it cannot defend these."""

    @abstractmethod
    def minimize(self, step: DefendedStep) -> None:
        """Run the passes of one micro-batch, so that `.grad` becomes the gradient of the risk."""

    def share_of_batch(self, index: int) -> float:
        """Return the share of the batch's examples that pass `index` runs on."""
        return 1.0

    @property
    def splits_batch(self) -> bool:
        """Whether any pass sees only a part of the batch; False if `is_stock`."""
        return not self.is_stock and any(self.share_of_batch(index) != 1 for index in range(self.passes))

    def is_active(self, epoch: float, step: int = 0) -> bool:
        """Return whether this optimizer step, at this epoch, is defended."""
        return not self.is_stock and epoch >= self.start_epoch and step % self.interval == 0


@dataclass(frozen=True)
class ConstrainedDefense(Defense):
    """A defense against the corruptions of a constraint.

    Args:
        constraint: The set S of corruptions that the training defends against.
        batch_share: The share of the batch, in (0, 1], that the passes see which a stock step does not have: its first
            examples. This approximation saves time on a CPU. On a GPU, where launches bound a small pass, it saves
            little or no time unless batches are large. Default 1, the whole batch.
        sync_perturbation: Whether several processes find one corruption on the batches of all. Gradients are then
            averaged before each corruption step, and the run is that of one process on the joined batch. Default
            False: each process corrupts its weights for its own batch (*m-sharpness*), without communication.
        start_epoch: As in `Defense`.
        interval: As in `Defense`.

    Raises:
        TypeError: `constraint` is not a `CorruptionConstraint`.
        ValueError: `batch_share` is outside (0, 1].
    """

    constraint: CorruptionConstraint
    batch_share: float = field(
        default=1.0,
        kw_only=True,
        metadata={"help": "share of the batch that the passes see which a stock step lacks; saves time on a CPU"},
    )
    sync_perturbation: bool = field(
        default=False,
        kw_only=True,
        metadata={"help": "on several processes, find one corruption for the batches of all of them"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_constraint(self.constraint)
        if not 0 < check_real("batch_share", self.batch_share, "0 < batch_share <= 1") <= 1:
            raise ValueError(f"batch_share: expected 0 < batch_share <= 1, got {self.batch_share}; 1 is all of it")

    @property
    def whole_pass(self) -> int:
        """The index of the pass that always sees the whole batch, whatever `batch_share` is."""
        return 0

    def share_of_batch(self, index: int) -> float:
        """Return 1 for the `whole_pass`, and `batch_share` for the others."""
        return 1.0 if index == self.whole_pass else self.batch_share

    @property
    def cost(self) -> float:
        """Operations of one micro-batch, in stock steps: 1, and `batch_share` for each further pass."""
        return 1 + (self.passes - 1) * self.batch_share

    @property
    def p(self) -> float:
        """The p of the constraint."""
        return self.constraint.p

    def _amounts(self) -> Iterator[tuple[str, Any]]:
        yield from super()._amounts()
        yield from ((setting.name, getattr(self.constraint, setting.name)) for setting in fields(self.constraint))

    @property
    def is_stock(self) -> bool:
        """Whether the constraint allows no corruption, or no pass makes one."""
        return self.passes == 1 or self.constraint.epsilon == 0

    def climb(self, step: DefendedStep) -> None:
        """Write the worst corruption of the constraint, `a = argmax_{a ∈ S} aᵀg` (SAM: *ascent step*)."""
        step.displace(self.update(step, self.constraint.epsilon, once=True), last_of=self.p)

    def update(
        self, step: DefendedStep, radius: float, *, once: bool = False
    ) -> dict[str, Tensor] | Pieces | Multiple:
        """Return the constrained maximum on the last pass's gradient, as a `Multiple` or `Pieces` to save memory.

        Args:
            step: The step.
            radius: The radius, in place of ε.
            once: Whether the corruption is moved only once, from zero. Weights narrower than float32 then need no
                wider tensor to hold it.
        """
        weights = list(step.parameters.values())
        exact = all(dtype.itemsize >= 4 for dtype in {weight.dtype for weight in weights})
        if (exact or once) and is_multiple(weights, self.constraint.p, self.constraint.top_n):
            direction = step.gradients_to_read(self.sync_perturbation)
            return Multiple(direction, *maximum_as_multiple(list(direction.values()), radius))
        if goes_in_turn(self.constraint.p, self.constraint.top_n):
            narrow = step.narrow_gradients(self.sync_perturbation)
            if narrow:
                parts = constrained_maximum_in_turn(list(narrow.values()), self.constraint.p, radius)
                return Pieces(named_pieces(list(narrow), one_by_one(parts)))
        gradients, ours = step.gradients(self.sync_perturbation)
        update, p, top_n = list(gradients.values()), self.constraint.p, self.constraint.top_n
        if ours:
            constrained_maximum_(update, p, radius, top_n)
        else:
            update = constrained_maximum(update, p, radius, top_n)
        return dict(zip(gradients, update, strict=True))


def check_defense(given: object) -> None:
    """Refuse what is no defense.

    Raises:
        TypeError: It is none; of a corruption the message says which defense is against it.
    """
    if not isinstance(given, Defense):
        advice = f"pass CorruptionRisk({given!r})" if isinstance(given, Corruption) else "pass an object"
        raise TypeError(f"defense: expected a Defense such as MultiStepRisk(...), got {given!r}; {advice}")
