"""Adversarial corruption-resistant training, penalty form (paper 1, Eq. 16)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_parcor.arguments import check_norm_order, check_not_negative
from hf_parcor.defenses.defense import Defense
from hf_parcor.defenses.second_derivative import (
    TriedModel,
    check_second_derivative,
    gradients_put_back,
    may_hold_a_gradient,
    own_functions,
    refusing_hidden_gradients,
)
from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.constrained_maximum import dual_order


@dataclass(frozen=True)
class GradientPenalty(Defense):
    r"""Minimises the loss plus the norm of its gradient with respect to the selected parameters, by double backward.

    .. math:: L(w, \theta; B) + \lambda \|g\|_{p/(p-1)}, \quad g = \partial L / \partial w

    To first order this is `ACRT` with λ = αε, because `max_{‖a‖_p ≤ ε} L(w + a) ≈ L(w) + ε ‖g‖_{p/(p−1)}`.

    Args:
        p: Order of the norm of the corruption; the penalty has the dual order `p/(p−1)`. Default 2.
        weight: λ ≥ 0, in units of the weights; 0 is the stock step. Default 0.05.
        start_epoch: Take stock steps until this epoch. Default 0.
        interval: Defend every `interval`-th optimizer step. Default 1.

    Raises:
        ValueError: `p < 1` or `weight < 0`, or NaN.

    Examples:
        >>> defense = GradientPenalty(p=2, weight=0.05)  # to first order `ACRT` with αε = 0.05
        >>> defense.passes, defense.cost
        (1, 3.0)
    """

    p: float = field(default=2.0, metadata={"help": "order p of the norm of the corruption", "flag": "norm"})
    weight: float = field(default=0.05, metadata={"help": "weight of the gradient's norm, in units of the weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm_order(self.p)
        check_not_negative("weight", self.weight, "pass 0 for no penalty")

    @property
    def passes(self) -> int:
        """1, with a second backward through it."""
        return 1

    @property
    def cost(self) -> float:
        """3 stock steps, which a defense of all parameters costs; that of a part of the model costs less."""
        return 3.0

    @property
    def is_stock(self) -> bool:
        """Whether the penalty has no weight."""
        return self.weight == 0

    @property
    def differentiates_twice(self) -> bool:
        """Always True, because the norm of the gradient is part of the objective."""
        return True

    @cached_property
    def _tried(self) -> TriedModel:
        return TriedModel()

    def minimize(self, step: DefendedStep) -> None:
        """Run one pass whose objective contains its own gradient.

        In a model's first step the second derivative is tried, if the loss goes through functions of other libraries.

        Raises:
            RuntimeError: The loss has no graph to differentiate twice, or its second derivative is wrong, because it
                goes through reentrant checkpoints, or through a fused function that computes its gradient in forward.
                Each `.grad` is left as it was before.
        """
        parameters = list(step.parameters.values())
        order = dual_order(self.p)
        is_new = not self._tried.is_of(parameters[0])
        doubted: list[Any] = []

        def penalized(loss: Tensor) -> Tensor:
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            norms = [torch.linalg.vector_norm(part, order).to(loss.device) for part in gradient if part is not None]
            if not norms and loss.is_leaf:
                raise RuntimeError(
                    "GradientPenalty: expected a loss with a graph, got one that runs a backward of its own, as "
                    "cached losses do; it has no second derivative: choose another defense or another loss"
                )
            functions = own_functions(loss) if is_new or len(norms) < len(parameters) else []
            if functions:
                putting_back.enter_context(gradients_put_back(step.trained))
                refusal.enter_context(refusing_hidden_gradients(parameters, gradient, functions))
                doubted.extend(filter(may_hold_a_gradient, functions))
            if not norms:  # LayerDrop may have skipped all of them
                return loss
            penalty: Tensor = self.weight * torch.linalg.vector_norm(torch.stack(norms), order)
            return loss + penalty

        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), ExitStack() as putting_back:
            with ExitStack() as refusal:
                step.backward(penalized)
            if is_new and doubted:
                check_second_derivative(step, doubted)
        self._tried.keep(parameters[0])
