"""The largest inner product over a corruption constraint, in closed form (Proposition 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_parcor.arguments import check_norm_order, check_radius, check_top_n
from hf_parcor.distributed.dtensors import one_vector
from hf_parcor.functional.top_n import keep_top_n, keep_top_n_
from hf_parcor.functional.vectors import (
    divide_,
    max_magnitude,
    multiply_,
    vector_norm,
    vector_norm_of_unit_scale,
    working_copy,
    zero_unless_,
)


def constrained_maximum_(tensors: list[Tensor], p: float, epsilon: float, top_n: int | None = None) -> None:
    """Overwrite `tensors` with their constrained maximum (see `constrained_maximum`)."""
    p = check_norm_order(p)
    epsilon = check_radius("epsilon", epsilon)
    top_n = check_top_n(top_n)
    if not tensors:
        return
    tensors = one_vector(tensors)
    if p == 1:
        top_n = 1  # all of epsilon on the largest coordinate
    if top_n is not None:
        keep_top_n_(tensors, top_n)
    largest = max_magnitude(tensors)
    # A gradient that overflowed has no direction: no corruption is better than a NaN in every weight.
    zero_unless_(tensors, torch.isfinite(largest))
    largest = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    if p == 1 or math.isinf(p):
        torch._foreach_sign_(tensors)
        torch._foreach_mul_(tensors, epsilon)
        return
    divide_(tensors, largest)
    if p != 2:
        signs = torch._foreach_sign(tensors)
        torch._foreach_abs_(tensors)
        torch._foreach_pow_(tensors, 1 / (p - 1))
        torch._foreach_mul_(tensors, signs)
    norm = vector_norm_of_unit_scale(tensors, p)
    multiply_(tensors, torch.where(norm > 0, epsilon / norm, 0.0))


def constrained_maximum(tensors: Sequence[Tensor], p: float, epsilon: float, top_n: int | None = None) -> list[Tensor]:
    r"""Return the corruption that maximises a linear function.

    .. math:: \arg\max_a \; a^T v \quad \text{such that} \quad \|a\|_p \le \epsilon, \; \|a\|_0 \le n

    The solution is `a = ε sgn(h) |h|^(1/(p−1)) / ‖ |h|^(1/(p−1)) ‖_p` with `h = top_n(v)`: for p = 2 the scaled vector
    itself, for p = ∞ `ε sgn(h)`, for p = 1 all of ε on the largest coordinate. `v = 0` gives `a = 0`, and so does
    a `v` with an entry that is not finite. Paper 1, Eq. 5 and 10, Proposition 1.

    Args:
        tensors: `v`, floating-point tensors of any shapes, seen as one vector.
        p: Order of the norm, `1 ≤ p ≤ ∞`.
        epsilon: Radius of the constraint, `ε ≥ 0`.
        top_n: How many coordinates may be non-zero; None for all.

    Returns:
        Tensors of the shapes of `tensors`, in float32 (or float64).

    Raises:
        ValueError: `p < 1`, `epsilon < 0`, `top_n < 1`, or NaN.

    Examples:
        >>> v = [torch.tensor([3.0, 0.0]), torch.tensor([-4.0])]
        >>> constrained_maximum(v, p=2, epsilon=1.0)
        [tensor([0.6000, 0.0000]), tensor([-0.8000])]
        >>> constrained_maximum(v, p=math.inf, epsilon=0.5)
        [tensor([0.5000, 0.0000]), tensor([-0.5000])]
        >>> constrained_maximum(v, p=2, epsilon=1.0, top_n=1)
        [tensor([0., 0.]), tensor([-1.])]
    """
    solution = working_copy(tensors)
    constrained_maximum_(solution, p, epsilon, top_n)
    return solution


def dual_order(p: float) -> float:
    """Return `p/(p−1)`, the order of the dual norm: ∞ for p = 1, and 1 for p = ∞.

    Examples:
        >>> dual_order(2.0), dual_order(1.0), dual_order(math.inf)
        (2.0, inf, 1.0)
    """
    limits = {1.0: math.inf, math.inf: 1.0}
    return limits[p] if p in limits else p / (p - 1)


def constrained_maximum_value(tensors: Sequence[Tensor], p: float, epsilon: float, top_n: int | None = None) -> Tensor:
    """Return `max_{a ∈ S} aᵀv = ε ‖top_n(v)‖_{p/(p−1)}` (Eq. 11), the first-order estimate of the loss change.

    Args:
        tensors: `v`, seen as one vector.
        p: Order of the norm of the constraint; the dual norm `p/(p−1)` is ∞ for p = 1 and 1 for p = ∞.
        epsilon: Radius of the constraint.
        top_n: How many coordinates may be non-zero; None for all.

    Returns:
        A zero-dimensional tensor.

    Raises:
        ValueError: `p < 1`, `epsilon < 0`, `top_n < 1`, or NaN.

    Examples:
        >>> constrained_maximum_value([torch.tensor([3.0, -4.0])], p=2, epsilon=0.1)
        tensor(0.5000)
    """
    p = check_norm_order(p)
    epsilon = check_radius("epsilon", epsilon)
    top_n = check_top_n(top_n)
    dual = dual_order(p)
    kept = tensors if top_n is None else keep_top_n(tensors, top_n)
    return epsilon * vector_norm(kept, dual)
