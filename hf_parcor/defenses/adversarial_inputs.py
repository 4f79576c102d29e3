"""Adversarial inputs: what the input embedding returns, moved so that the loss of this batch grows."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.arguments import check_radius
from hf_parcor.overriding import hook_after


def ascend_per_example(perturbation: Tensor, gradient: Tensor, step_size: float, epsilon: float) -> Tensor:
    r"""Return one step of projected gradient ascent for each example of a batch.

    .. math:: \Pi(\delta_i + u_i), \quad u_i = \arg\max_{\|u\|_2 \le r} u^T g_i, \quad \|\Pi(\cdot)\|_2 \le \epsilon

    An example whose gradient is zero, or not finite, does not move.

    Args:
        perturbation: δ, `[batch, ...]`; the norm of an example goes over all other dimensions.
        gradient: g, of the same shape.
        step_size: r ≥ 0.
        epsilon: ε ≥ 0, the radius of each example's ball.

    Returns:
        A tensor of the shape and dtype of `perturbation`.

    Raises:
        ValueError: A radius is negative or NaN.

    Examples:
        >>> g = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> ascend_per_example(torch.zeros(2, 2), g, step_size=1.0, epsilon=2.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    check_radius("step_size", step_size)
    check_radius("epsilon", epsilon)
    rows = gradient.reshape(len(gradient), -1)
    largest = rows.abs().amax(1, keepdim=True)
    known = torch.isfinite(largest) & (largest > 0)
    rows = torch.where(known, rows / torch.where(known, largest, 1.0), 0.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    moved = perturbation.reshape(rows.shape) + step_size * rows / torch.where(known, norms, 1.0)
    lengths = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return (moved * torch.where(lengths > epsilon, epsilon / lengths, 1.0)).view_as(perturbation)


class AdversarialInputs:
    """The perturbations δ of one micro-batch, added by a hook to each output of the input embedding.

    A model may call its input embedding several times in a pass (two texts that are compared): each call has a δ of
    its own, but for those without gradients. They are zero until the first `displace`.

    Args:
        embedding: The module whose output, `[batch, ...]`, is perturbed.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._perturbations: list[Tensor] = []
        self._calls = 0
        self._hooked = ExitStack()
        # Compiled code would freeze the count of calls.
        hook_after(self._hooked, embedding, torch.compiler.disable(self._add))  # type: ignore[no-untyped-call]

    def _add(self, module: nn.Module, arguments: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"input embedding: expected a module that returns a tensor, got {type(output).__name__} from "
                f"{type(module).__name__}; set input_epsilon=0"
            )
        if not torch.is_grad_enabled():  # as a batch is generated: it has no direction
            return output
        if torch._C._current_graph_task_id() != -1:  # which call of the forward pass it repeats, nobody knows
            raise RuntimeError(
                "adversarial inputs: expected an input embedding that runs in forward alone, got one that backward "
                "runs again, inside a checkpoint or for a cached loss; leave it out of the checkpoint, or set "
                "input_epsilon=0"
            )
        if self._calls == len(self._perturbations):
            wide = torch.promote_types(output.dtype, torch.float32)
            self._perturbations.append(torch.zeros_like(output, dtype=wide, requires_grad=True))
        perturbation = self._perturbations[self._calls]
        self._calls += 1
        return output + perturbation.to(output.dtype)

    def end_pass(self) -> None:
        """Reset the count of the embedding's calls, for the next pass.

        Raises:
            RuntimeError: The pass went around the embedding, so there was nothing to perturb.
        """
        if not self._calls:
            raise RuntimeError(
                "adversarial inputs: expected the model to call its input embedding, got a pass that did not (inputs "
                "given as inputs_embeds, or a compiled model that does not see the hook); set input_epsilon=0"
            )
        self._calls = 0

    def displace(self, step_size: float, epsilon: float) -> None:
        """Move every δ one step of this size along its gradient, and project it: `δ_i ← Π(δ_i + u_i)`."""
        for perturbation in self._perturbations:
            gradient, perturbation.grad = perturbation.grad, None
            if gradient is not None:
                perturbation.detach().copy_(ascend_per_example(perturbation.detach(), gradient, step_size, epsilon))

    def withdraw(self) -> None:
        """Remove the hook."""
        self._hooked.close()
