"""Projected gradient ascent on the examples of a batch, each in its own ball."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_parcor.functional.arguments import check_radius


def ascend_per_example(perturbation: Tensor, gradient: Tensor, radius: float, epsilon: float) -> Tensor:
    r"""Return one step of projected gradient ascent for each example of a batch.

    .. math:: \Pi(\delta_i + u_i), \quad u_i = \arg\max_{\|u\|_2 \le r} u^T g_i, \quad \|\Pi(\cdot)\|_2 \le \epsilon

    An example whose gradient is zero, or not finite, does not move.

    Args:
        perturbation: δ, `[batch, ...]`; the norm of an example goes over all other dimensions.
        gradient: g, of the same shape.
        radius: r ≥ 0, the step size.
        epsilon: ε ≥ 0, the radius of each example's ball.

    Returns:
        A tensor of the shape and dtype of `perturbation`.

    Raises:
        ValueError: A radius is negative or NaN.

    Examples:
        >>> g = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> ascend_per_example(torch.zeros(2, 2), g, radius=1.0, epsilon=2.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    check_radius("radius", radius)
    check_radius("epsilon", epsilon)
    rows = gradient.reshape(len(gradient), -1)
    largest = rows.abs().amax(1, keepdim=True)
    known = torch.isfinite(largest) & (largest > 0)
    rows = torch.where(known, rows / torch.where(known, largest, 1.0), 0.0)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    moved = perturbation.reshape(rows.shape) + radius * rows / torch.where(known, norms, 1.0)
    lengths = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return (moved * torch.where(lengths > epsilon, epsilon / lengths, 1.0)).view_as(perturbation)
