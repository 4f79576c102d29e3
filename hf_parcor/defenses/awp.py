"""Adversarial weight perturbation (Wu et al., NeurIPS 2020; paper 2, Eq. 29)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_parcor.arguments import check_count, check_radius, known_elsewhere_as
from hf_parcor.corruptions.multi_step import STEP_SIZE_FACTOR
from hf_parcor.defenses.projected_ascent import ProjectedAscent
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.distributed.dtensors import local_parts
from hf_parcor.functional.constrained_maximum import constrained_maximum_of_each_
from hf_parcor.functional.norms import norms_of_each
from hf_parcor.functional.projections import project_each_
from hf_parcor.functional.vectors import on_each


@known_elsewhere_as(gamma="AWP(CorruptionConstraint(epsilon={}), per_tensor=True)")
@dataclass(frozen=True)
class AWP(ProjectedAscent):
    r"""Minimise the loss on adversarial inputs at corrupted weights, and nothing else.

    .. math:: L(w + a, \theta; B'), \quad B' = B + \delta

    First the inputs: δ moves what the input embedding returns, by projected gradient ascent at the clean weights, each
    example inside its own L2 ball, `‖δ_i‖_2 ≤ ε_B`. Then the weights: a is found on B' in K steps. Both are constants,
    no gradient flows through them. `input_steps + K + 1` passes; only the last one makes the update.

    Args:
        constraint: The set S of corruptions a; p is 2 or ∞, or any p where the steps cannot leave S.
        steps: K ≥ 0. Default 1, as the original; paper 2 takes 2 or 3.
        step_size: α in units of the weights; None, the default, for `1.5 ε/K`.
        random_start: Start from a random `a_0` with `‖a_0‖_p = ε` instead of 0. Default False.
        per_tensor: Each tensor by itself, with the radius relative to it, `‖a_l‖_p ≤ ε ‖w_l‖_p`, as in the original,
            where ε is called gamma; α is relative, and n counts in each tensor, too. Default False: one vector.
        input_epsilon: ε_B ≥ 0, in units of the embedding's output; 0 leaves the inputs as they are. Default 0.1.
        input_steps: Steps of size `1.5 ε_B / input_steps`, ≥ 0. Default 1.
        sync_perturbation: On several processes, one corruption for the batches of all. Default False.
        start_epoch: Until this epoch training is the stock one. Default 0.
        interval: Defend every so many optimizer steps. Default 1.

    Raises:
        NotImplementedError: p is neither 2 nor ∞, and the steps may leave the ball.
        ValueError: A number of steps, `step_size` or `input_epsilon` is negative; `per_tensor` with `random_start`; or
            a `batch_share`: the adversarial inputs are those of the whole batch.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> AWP(CorruptionConstraint(epsilon=0.1), steps=2).passes
        4
        >>> AWP(CorruptionConstraint(epsilon=0.1), steps=2, input_epsilon=0).passes
        3
    """

    per_tensor: bool = field(default=False, metadata={"help": "a radius epsilon * |w_l| for each tensor by itself"})
    input_epsilon: float = field(
        default=0.1, metadata={"help": "radius of the adversarial inputs, in units of the embedding"}
    )
    input_steps: int = field(default=1, metadata={"help": "steps that find the adversarial inputs; 0 for none"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_radius("input_epsilon", self.input_epsilon)
        check_count("input_steps", self.input_steps, minimum=0)
        if self.per_tensor and self.random_start:
            raise ValueError("random_start: expected False with per_tensor=True, got True; leave one of them out")
        if self.batch_share != 1:
            raise ValueError(
                f"batch_share: expected 1 with AWP, got {self.batch_share}; its adversarial inputs are those of the "
                "whole batch: use interval=, SAM or MultiStepRisk"
            )

    @property
    def perturbs_inputs(self) -> bool:
        """Whether any δ but zero is allowed, and found."""
        return self.input_epsilon > 0 and self.input_steps > 0

    @property
    def first_pass_is_stock(self) -> bool:
        """Whether it is one that looks for inputs, or the weights start clean."""
        return self.perturbs_inputs or super().first_pass_is_stock

    @property
    def passes(self) -> int:
        """`input_steps + K + 1`, without those of a radius zero."""
        return self._input_passes + self._weight_passes + 1

    @property
    def _input_passes(self) -> int:
        return self.input_steps if self.perturbs_inputs else 0

    @property
    def _weight_passes(self) -> int:
        return self.steps if self.constraint.epsilon > 0 and self._moves else 0

    @property
    def is_stock(self) -> bool:
        """Whether neither inputs nor weights move."""
        return self.passes == 1

    def _is_remembered(self, step: DefendedStep) -> bool:
        return not self.per_tensor and super()._is_remembered(step)

    def minimize(self, step: DefendedStep) -> None:
        """Find adversarial inputs, then the corruption on them, and minimise there."""

        def plain(loss: Tensor) -> Tensor:
            return loss

        for _ in range(self._input_passes):
            step.probe(watch_inputs=True)
            step.displace_inputs(STEP_SIZE_FACTOR * self.input_epsilon / self.input_steps, self.input_epsilon)
        weights = {name: weight.detach() for name, weight in step.parameters.items() if self.per_tensor}
        sizes = dict(zip(weights, norms_of_each(list(weights.values()), self.p), strict=True))
        if self._weight_passes:
            self.start(step)
        for _ in range(self._weight_passes):
            step.probe()
            if self.per_tensor:
                self._climb_and_project_each(step, sizes)
            else:
                self.climb_and_project(step)
        step.backward(plain)

    def _climb_and_project_each(self, step: DefendedStep, sizes: dict[str, Tensor]) -> None:
        """Take one corruption step, `a_l ← Π(a_l + u_l)`, each tensor in units of its own size."""
        update, _ = step.gradients(self.sync_perturbation)  # of a probe, and so to be overwritten
        tensors = list(update.values())
        constrained_maximum_of_each_(tensors, self.p, self.resolved_step_size, self.constraint.top_n)
        if tensors:
            torch._foreach_mul_(local_parts(tensors), [sizes[name] for name in update])

        def project(corruption: list[Tensor]) -> None:
            here, of_each = local_parts(corruption), list(sizes.values())
            torch._foreach_div_(here, on_each(of_each, lambda size: torch.where(size > 0, size, 1.0)))
            if not self._stays_inside:
                project_each_(corruption, self.p, self.constraint.epsilon, self.constraint.top_n)
            torch._foreach_mul_(here, of_each)

        step.displace(update, project)
