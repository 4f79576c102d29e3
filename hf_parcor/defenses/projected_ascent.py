"""Defenses whose corruption climbs step by step inside the constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from hf_parcor.arguments import check_count, check_radius
from hf_parcor.corruptions.multi_step import STEP_SIZE_FACTOR, is_remembered
from hf_parcor.corruptions.random import RandomCorruption
from hf_parcor.defenses.defense import ConstrainedDefense
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.projections import check_projectable, project_

_ROUNDING = 1 + 1e-9  # three steps of 0.1 reach 0.3, whatever floats say


@dataclass(frozen=True)
class ProjectedAscent(ConstrainedDefense):
    r"""A defense against corruptions found by projected gradient ascent on this batch (paper 2, Eq. 13).

    .. math:: a_k = \Pi_S(a_{k-1} + u_k), \quad u_k = \arg\max_{\|u\|_p \le \alpha, \|u\|_0 \le n} u^T g_{k-1}

    Args:
        constraint: The set S; p is 2 or ∞. Any p is allowed if the steps together cannot leave S.
        steps: K ≥ 0, the number of corruption steps. Default 1.
        step_size: α in units of the weights. Default `1.5 ε/K` (printed `1.5 ε/k` in the paper).
        random_start: Whether `a_0` is random, with `‖a_0‖_p = ε`, drawn from PyTorch's global generator.
        batch_share: As in `ConstrainedDefense`.
        sync_perturbation: As in `ConstrainedDefense`.
        start_epoch: As in `Defense`.
        interval: As in `Defense`.

    Raises:
        NotImplementedError: p is neither 2 nor ∞, and K steps of size α may leave S.
        ValueError: `steps < 0` or `step_size < 0`.
    """

    steps: int = field(default=1, metadata={"help": "corruption steps K; a training step takes K + 1 passes"})
    step_size: float | None = field(
        default=None, metadata={"help": "size of one corruption step; not set for 1.5 epsilon / K"}
    )
    random_start: bool = field(
        default=False, metadata={"help": "start the corruption from a random point of norm epsilon instead of zero"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps, minimum=0)
        if self.step_size is not None:
            check_radius("step_size", self.step_size)
        if not self._stays_inside:
            check_projectable(self.constraint.p)

    @property
    def first_pass_is_clean(self) -> bool:
        """Whether the first pass is at the clean weights."""
        return not self.random_start

    @property
    def is_stock(self) -> bool:
        """Whether the constraint allows no corruption, or none is made: no step, or steps of size 0 from 0."""
        return super().is_stock or not self._moves

    @property
    def _moves(self) -> bool:
        return self.random_start or self.step_size != 0

    @property
    def resolved_step_size(self) -> float:
        """The step size α."""
        return STEP_SIZE_FACTOR * self.constraint.epsilon / self.steps if self.step_size is None else self.step_size

    @property
    def projection(self) -> Callable[[list[Tensor]], None] | None:
        """`Π_S`, which overwrites the tensors of a; None if the steps cannot leave S."""
        p, epsilon, top_n = self.constraint.p, self.constraint.epsilon, self.constraint.top_n
        return None if self._stays_inside else partial(project_, p=p, epsilon=epsilon, top_n=top_n)

    @property
    def _stays_inside(self) -> bool:
        if self.random_start or self.step_size is None or (self.constraint.top_n is not None and self.steps > 1):
            return False
        return self.steps * self.step_size <= self.constraint.epsilon * _ROUNDING

    def start(self, step: DefendedStep) -> None:
        """Write `a_0`, if it is random; nothing is written for zero."""
        step.remembers = self._is_remembered(step)
        if self.random_start:
            start = RandomCorruption(self.constraint)(step.parameters)
            if self.sync_perturbation:
                step.agree_(start)
            step.displace(start)

    def _is_remembered(self, step: DefendedStep) -> bool:
        """Say whether a is made again from the gradients of its steps whenever it is written, and not kept.

        Bytes that a step of weights in 16 bits holds at its peak, for each, beyond the 2 of a stock step's gradient::

            saved bits 2 + a in float32 4 + sum of the gradients 2 + gradient of the last pass 2 − 2 = 8
            saved bits 2                  + gradients of K passes, the first the sum later 2K − 2    = 2K

        So K = 2 holds 4, twice the weights, and moves 253 bytes a weight in place of 143 as on a GPU, beside the
        passes. K = 3 would save 2 for two more walks through all steps, and K ≥ 4 nothing: they keep a, as does what
        needs all of a at once, `top_n` and a random start; shards, whose norms ranks must find together; and one
        gradient for several processes.
        """
        simple = self.steps == 2 and not self.random_start and not self.sync_perturbation
        return simple and is_remembered(self.steps, self.constraint, step.parameters.values())

    def climb_and_project(self, step: DefendedStep) -> None:
        """Take one corruption step along the last pass's gradient: `a ← Π_S(a + u)`."""
        if step.remembers:
            radius = self.resolved_step_size if step.climbs else min(self.resolved_step_size, self.constraint.epsilon)
            within = None if self._stays_inside else self.constraint.epsilon
            step.climb(radius, self.p, within, last=step.climbs == self.steps - 1)
        elif step.is_displaced:
            step.displace(self.update(step, self.resolved_step_size), self.projection)
        else:  # from zero, and so along u: the nearest point of S is as long as S allows, and has n entries already
            radius = min(self.resolved_step_size, self.constraint.epsilon)
            once = self.steps == 1
            step.displace(self.update(step, radius, once=once), last_of=self.p if once else None)
