"""Projection onto a corruption constraint (Proposition 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hf_parcor.arguments import check_norm_order, check_radius, check_top_n
from hf_parcor.distributed.dtensors import one_vector
from hf_parcor.functional.norms import (
    euclidean_norm,
    euclidean_norms_of_each,
)
from hf_parcor.functional.top_n import keep_top_n_
from hf_parcor.functional.vectors import on_each, scale_each_, scaled, working_copy


def check_projectable(p: float) -> None:
    """Refuse the norms whose Euclidean projection has no closed form here, and what is the order of none."""
    if check_norm_order(p) != 2 and not math.isinf(p):
        raise NotImplementedError(
            f"projection onto an L_p ball: expected p = 2 or p = inf, got p = {p:g}; the paper gives no closed form "
            "for other p (Proposition 3): use one of these two, or a single-step corruption, which needs none"
        )


def project_(tensors: list[Tensor], p: float, epsilon: float, top_n: int | None = None) -> None:
    """Overwrite `tensors` with their projection (see `project`)."""
    check_projectable(p)
    epsilon, top_n = check_radius("epsilon", epsilon), check_top_n(top_n)
    if not tensors:
        return
    tensors = one_vector(tensors)
    if top_n is not None:
        keep_top_n_(tensors, top_n)
    if math.isinf(p):
        torch._foreach_clamp_min_(tensors, -epsilon)
        torch._foreach_clamp_max_(tensors, epsilon)
        return
    scaled(tensors, factor_of_projection(euclidean_norm(tensors), epsilon), overwrite=True)


def factor_of_projection(norm: Tensor, epsilon: float) -> Tensor:
    """Return what vectors of these norms are multiplied by: those inside by exactly 1, and they keep their bits."""
    return torch.where(norm > epsilon, epsilon / norm, 1.0)


def project_each_(tensors: list[Tensor], p: float, epsilon: float, top_n: int | None = None) -> None:
    """Overwrite each tensor with its own projection (see `project`), as if it were the vector.

    Of all entries in batched calls, where launches cost.

    Examples:
        >>> tensors = [torch.tensor([3.0, 4.0]), torch.tensor([-0.5])]
        >>> project_each_(tensors, p=2, epsilon=1.0)
        >>> tensors
        [tensor([0.6000, 0.8000]), tensor([-0.5000])]
    """
    if top_n is not None:
        for tensor in tensors:
            project_([tensor], p, epsilon, top_n)
    elif math.isinf(p):
        project_(tensors, p, epsilon)
    else:
        check_projectable(p)
        epsilon = check_radius("epsilon", epsilon)
        scale_each_(tensors, on_each(euclidean_norms_of_each(tensors), partial(factor_of_projection, epsilon=epsilon)))


def project(tensors: Sequence[Tensor], p: float, epsilon: float, top_n: int | None = None) -> list[Tensor]:
    r"""Return the point of the constraint that is nearest to a vector.

    .. math:: \arg\min_y \; \|y - x\|_2 \quad \text{such that} \quad \|y\|_p \le \epsilon, \; \|y\|_0 \le n

    For p = 2 it is `min(1, ε/‖h‖₂) h`, and for p = ∞ `clip(h, −ε, ε)`, with `h = top_n(x)`. A point inside is returned
    unchanged. (Rescaling to the radius is something else: for p ≠ 2 it leads to another point.)
    Paper 2, Eq. 17–19, Proposition 3 (which prints `arg max` and means `arg min`).

    Args:
        tensors: `x`, floating-point tensors of any shapes, seen as one vector.
        p: 2 or ∞.
        epsilon: Radius, `ε ≥ 0`.
        top_n: How many coordinates may be non-zero; None for all.

    Returns:
        Tensors of the shapes of `tensors`, in float32 (or float64).

    Raises:
        NotImplementedError: `p` is neither 2 nor ∞.
        ValueError: `p < 1`, `epsilon < 0`, `top_n < 1`, or NaN.

    Examples:
        >>> project([torch.tensor([3.0]), torch.tensor([4.0])], p=2, epsilon=1.0)
        [tensor([0.6000]), tensor([0.8000])]
        >>> project([torch.tensor([3.0]), torch.tensor([0.4])], p=math.inf, epsilon=1.0)
        [tensor([1.]), tensor([0.4000])]
    """
    projected = working_copy(tensors)
    project_(projected, p, epsilon, top_n)
    return projected
