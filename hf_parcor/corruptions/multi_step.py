"""Multi-step adversarial corruption (paper 2, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.arguments import check_count, check_radius
from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.corruptions.corruption import RADIUS, Corruption, GradientSource, Strength, named
from hf_parcor.distributed.dtensors import has_shards
from hf_parcor.functional.ascent import RememberedAscent
from hf_parcor.functional.constrained_maximum import constrained_maximum_in_turn, goes_in_turn
from hf_parcor.functional.projections import check_projectable, project_
from hf_parcor.functional.vectors import working_dtype

Ascent = Generator[Mapping[str, Tensor], Mapping[str, Tensor], dict[str, Tensor]]
"""Yields corruptions, takes the gradients there, and returns the last corruption."""

STEP_SIZE_FACTOR = 1.5  # α = 1.5 ε/K lets K steps reach the boundary; the paper prints ε/k and means K


@dataclass(frozen=True)
class MultiStepCorruption(Corruption):
    """The worst corruption by projected gradient ascent, one batch a step: `a_k = Π_S(a_{k−1} + u_k)`, `a_0 = 0`.

    See paper 2, Eq. 13–19. `u_k` is the constrained maximum on the gradient at `w + a_{k−1}`, with radius α and at
    most n non-zero entries. Eq. 16 prints no n, but without it every entry of a step for p = ∞ has the size α, and the
    projection would choose n of them by position, not by the gradient.

    Args:
        constraint: The set S; p is 2 or ∞, for which the projection has a closed form.
        steps: K ≥ 1. Default: one pass over the data, `K = ⌈|D|/|B|⌉`.
        step_size: α in units of the weights. Default `1.5 ε/K`.

    Raises:
        NotImplementedError: p is neither 2 nor ∞.
        ValueError: `steps < 1` or `step_size < 0`.
        TypeError: `constraint` is not a `CorruptionConstraint`.

    Examples:
        >>> from hf_parcor import CorruptionConstraint, CorruptionEvaluator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> evaluator = CorruptionEvaluator(
        ...     model,
        ...     lambda m: {"loss": m(torch.tensor([3.0, 4.0])).item()},
        ...     [torch.tensor([3.0, 4.0])],
        ...     loss=lambda m, x: m(x).sum(),
        ...     progress=False,
        ... )
        >>> record = evaluator.evaluate([MultiStepCorruption(CorruptionConstraint(epsilon=0.1), steps=2)])
        >>> print(f"{record.corruptions[0].label}: loss {record.corruptions[0].mean('loss'):.2f}")  # ε ‖(3, 4)‖
        multi-step L2 ε=0.1 K=2: loss 0.50
    """

    constraint: CorruptionConstraint
    steps: int | None = None
    step_size: float | None = None
    uses_gradients: ClassVar[bool] = True
    title: ClassVar[str] = "multi-step"
    strengths: ClassVar[tuple[Strength, ...]] = (RADIUS,)

    def __post_init__(self) -> None:
        check_constraint(self.constraint)
        check_projectable(self.constraint.p)
        if self.steps is not None:
            object.__setattr__(self, "steps", check_count("steps", self.steps))
        if self.step_size is not None:
            object.__setattr__(self, "step_size", check_radius("step_size", self.step_size))

    def __str__(self) -> str:
        steps = "" if self.steps is None else f" K={self.steps}"
        return f"multi-step {self.constraint}{steps}" + ("" if self.step_size is None else f" α={self.step_size:g}")

    def ascent(self, weights: Mapping[str, Tensor], batches: int) -> Ascent:
        """Yield each `a_k` that needs a gradient, receive the gradient of a batch there, and return the last `a_k`.

        With this several ascents can go through the data together. Each step overwrites the tensors of the last `a_k`.

        Args:
            weights: As for a call.
            batches: `⌈|D|/|B|⌉`, the number of steps if `steps` is None.
        """
        p, epsilon, top_n = self.constraint.p, self.constraint.epsilon, self.constraint.top_n
        steps = batches if self.steps is None else self.steps
        step_size = self.step_size_of(steps)
        dtype = working_dtype(list(weights.values()))
        corruption = [torch.zeros_like(weight, dtype=dtype) for weight in weights.values()]
        for _ in range(steps):
            gradient = yield named(weights, corruption)
            done = 0
            for update in constrained_maximum_in_turn([gradient[name] for name in weights], p, step_size, top_n):
                torch._foreach_add_(corruption[done : done + len(update)], update)
                done += len(update)
                del update
            del gradient  # before the next one is found
            project_(corruption, p, epsilon, top_n)
        return named(weights, corruption)

    def remembered(self, weights: Mapping[str, Tensor]) -> RememberedAscent | None:
        """Return an ascent that keeps its gradients instead of a, if they take less memory; else None.

        This is so with one or two steps and weights in 16 bits. It then holds 2 bytes a weight for each step, whereas
        `ascent` holds a in float32 (4 bytes) and a gradient (2). None also if all of a is needed at once.

        Args:
            weights: As for a call.
        """
        if self.steps is None or not is_remembered(self.steps, self.constraint, weights.values()):
            return None
        return RememberedAscent(list(weights), self.constraint.p, self.constraint.epsilon, first_inside=False)

    def step_size_of(self, steps: int) -> float:
        """Return α for this number of steps."""
        return STEP_SIZE_FACTOR * self.constraint.epsilon / steps if self.step_size is None else self.step_size

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        assert gradients is not None, "checked by the caller"
        source = gradients
        ascent = self.ascent(weights, len(source))
        return climb_together([ascent], lambda climbing: map(source.on_next_batch, climbing.values()))[0]


def is_remembered(steps: int, constraint: CorruptionConstraint, weights: Iterable[Tensor]) -> bool:
    """Say whether an ascent is remembered by its gradients: in 16 bits two of them take what one `a` takes in float32.

    Not with `top_n`, which needs all of a at once, and not of shards, whose norms ranks find together.
    """
    weights = list(weights)
    narrow = all(weight.dtype.itemsize < 4 for weight in weights) and not has_shards(weights)
    return narrow and steps <= 2 and goes_in_turn(constraint.p, constraint.top_n)


def climb_together(
    ascents: Sequence[Ascent],
    gradients_at: Callable[[Mapping[int, Mapping[str, Tensor]]], Iterable[Mapping[str, Tensor]]],
) -> list[dict[str, Tensor]]:
    """Let several ascents walk through the same batches, and return where they end.

    Args:
        ascents: Their numbers of steps may differ.
        gradients_at: From the corruptions of all ascents that still climb, by their index, to their gradients on the
            next batch.
    """
    ends: dict[int, dict[str, Tensor]] = {}
    climbing: dict[int, Mapping[str, Tensor]] = {index: next(ascent) for index, ascent in enumerate(ascents)}
    while climbing:
        found = iter(gradients_at(dict(climbing)))
        for index in list(climbing):
            try:
                # None, where there is none, fails; held by nobody else, and not while the next is made.
                climbing[index] = ascents[index].send(next(found, None))  # type: ignore[arg-type]
            except StopIteration as end:
                del climbing[index]
                ends[index] = end.value
        for _ in found:
            raise ValueError("gradients_at: expected one gradient for each ascent, got more")
    return [ends[index] for index in range(len(ascents))]
