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
    r"""Minimises only the loss on adversarial inputs at corrupted weights.

    .. math:: L(w + a, \theta; B'), \quad B' = B + \delta

    First δ, which is added to the output of the input embedding, is found by projected gradient ascent at the clean
    weights, for each example inside its own L2 ball, `‖δ_i‖_2 ≤ ε_B`. Then a is found on B' in K steps. Both are
    constants: no gradient flows through them. It takes `input_steps + K + 1` passes; only the last makes the update.

    Args:
        constraint: The set S of corruptions a; p is 2 or ∞. Any p is allowed if the steps cannot leave S.
        steps: K ≥ 0. Default 1, as in the original; paper 2 takes 2 or 3.
        step_size: α in units of the weights. Default `1.5 ε/K`.
        random_start: Whether to start from a random `a_0` with `‖a_0‖_p = ε` instead of 0. Default False.
        per_tensor: Whether each tensor has its own radius, `‖a_l‖_p ≤ ε ‖w_l‖_p`, as in the original, which calls ε
            gamma. α is then relative too, and n holds for each tensor. Default False: all are one vector.
        input_epsilon: ε_B ≥ 0, in units of the embedding's output. Default 0.1; 0 leaves the inputs as they are.
        input_steps: Number of steps, each of size `1.5 ε_B / input_steps`, that find δ; ≥ 0. Default 1.
        sync_perturbation: Whether all processes use one corruption, for the joined batch. Default False.
        start_epoch: Take stock steps until this epoch. Default 0.
        interval: Defend every `interval`-th optimizer step. Default 1.

    Raises:
        NotImplementedError: p is neither 2 nor ∞, and the steps may leave S.
        ValueError: A number of steps, `step_size` or `input_epsilon` is negative; `per_tensor` is combined with
            `random_start`; or `batch_share` is not 1, because the adversarial inputs are those of the whole batch.

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
        """Whether the settings allow adversarial inputs, and take a step to find them."""
        return self.input_epsilon > 0 and self.input_steps > 0

    @property
    def first_pass_is_clean(self) -> bool:
        """Whether the first pass looks for adversarial inputs, or else starts at the clean weights."""
        return self.perturbs_inputs or super().first_pass_is_clean

    @property
    def passes(self) -> int:
        """`input_steps + K + 1`, without the steps whose radius or size is 0."""
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
        """Find adversarial inputs, find the corruption on them, and minimise the loss there."""

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
