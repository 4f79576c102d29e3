"""The largest inner product over a corruption constraint, in closed form (Proposition 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_parcor.arguments import check_norm_order, check_radius, check_top_n
from hf_parcor.distributed.dtensors import local_parts, one_vector, sharded_as
from hf_parcor.functional.norms import (
    euclidean_norm,
    euclidean_norms_of_each,
    max_magnitude,
    norms_of_each,
    vector_norm,
    vector_norm_of_unit_scale,
)
from hf_parcor.functional.top_n import keep_top_n, keep_top_n_
from hf_parcor.functional.vectors import (
    Factor,
    divide_,
    in_turn,
    on_each,
    one_by_one,
    scale_each_,
    scaled,
    widened,
    working_copy,
    working_dtype,
)


def constrained_maximum_(tensors: list[Tensor], p: float, epsilon: float, top_n: int | None = None) -> None:
    """Overwrite `tensors` with their constrained maximum (see `constrained_maximum`)."""
    p, epsilon, top_n = _checked(p, epsilon, top_n)
    if not tensors:
        return
    vector = one_vector(tensors)
    if top_n is not None:
        keep_top_n_(vector, top_n)
    _maximum_on_sphere(vector, p, epsilon, overwrite=True)


def constrained_maximum_of_each_(tensors: list[Tensor], p: float, epsilon: float, top_n: int | None = None) -> None:
    """Overwrite each tensor with its own constrained maximum (see `constrained_maximum`), as if it were the vector.

    For p = 2 and ∞ of all entries in batched calls, where launches cost.

    Examples:
        >>> tensors = [torch.tensor([3.0, 4.0]), torch.tensor([-2.0])]
        >>> constrained_maximum_of_each_(tensors, p=2, epsilon=1.0)
        >>> tensors
        [tensor([0.6000, 0.8000]), tensor([-1.])]
    """
    p, epsilon, top_n = _checked(p, epsilon, top_n)
    if not goes_in_turn(p, top_n) or working_dtype(tensors) != torch.float32:
        for tensor in tensors:
            constrained_maximum_([tensor], p, epsilon, top_n)
        return
    norms = euclidean_norms_of_each(tensors) if p == 2 else norms_of_each(tensors, p)
    if math.isinf(p) and tensors:
        torch._foreach_sign_(local_parts(tensors))
    scale_each_(tensors, on_each(norms, partial(_factor, p=p, epsilon=epsilon)))


def _checked(p: float, epsilon: float, top_n: int | None) -> tuple[float, float, int | None]:
    p = check_norm_order(p)
    epsilon = check_radius("epsilon", epsilon)
    top_n = check_top_n(top_n)
    return p, epsilon, 1 if p == 1 else top_n  # with p = 1, all of epsilon on the largest coordinate


def _maximum_on_sphere(vector: list[Tensor], p: float, epsilon: float, *, overwrite: bool) -> list[Tensor]:
    """Return the maximum over the sphere alone, after the choice of coordinates.

    A gradient that overflowed has no direction: no corruption is better than a NaN in every weight.
    """
    factor = _one_factor(vector, p, epsilon)
    if factor is not None:
        return _multiplied(vector, p, factor, overwrite=overwrite)
    largest = max_magnitude(vector)
    divide_(vector, torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0))
    for places in in_turn(vector) if p != 2 else ():  # so that their signs take no memory worth mentioning
        some = [vector[place] for place in places]
        signs = torch._foreach_sign(some)
        torch._foreach_abs_(some)
        torch._foreach_pow_(some, 1 / (p - 1))
        torch._foreach_mul_(some, signs)
    norm = vector_norm_of_unit_scale(vector, p).double()
    usable = torch.isfinite(largest) & (norm > 0)
    return scaled(vector, torch.where(usable, epsilon / norm, 0.0), overwrite=True)


def _one_factor(vector: list[Tensor], p: float, epsilon: float) -> Tensor | None:
    """Return what the vector, or the vector of its signs, is multiplied by; None where that is not all."""
    if p == 1 or math.isinf(p):
        return _factor(max_magnitude(vector), math.inf, epsilon)
    return _factor(euclidean_norm(vector), p, epsilon) if _takes_one_factor(vector, p) else None


def _factor(norm: Tensor, p: float, epsilon: float) -> Tensor:
    """Return what vectors of these norms are multiplied by, or the vectors of their signs for p = ∞."""
    return epsilon * torch.isfinite(norm).double() if math.isinf(p) else epsilon_over(norm, epsilon)


def epsilon_over(norm: Tensor, epsilon: float) -> Tensor:
    """Return `ε/‖v‖`, and 0 of a vector that is zero or not finite."""
    return torch.where(torch.isfinite(norm) & (norm > 0), epsilon / norm, 0.0)


def _multiplied(tensors: list[Tensor], p: float, factor: Tensor | Factor, *, overwrite: bool) -> list[Tensor]:
    if p == 2 or not tensors:  # a bundle that has no gradient in this step
        return scaled(tensors, factor, overwrite=overwrite)
    if overwrite:
        torch._foreach_sign_(tensors)
    else:
        tensors = list(torch._foreach_sign(tensors))
    return scaled(tensors, factor, overwrite=True)


def _takes_one_factor(tensors: Sequence[Tensor], p: float) -> bool:
    return p == 2 and working_dtype(tensors) == torch.float32  # whose squares float64 holds, of whatever size


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
    p, epsilon, top_n = _checked(p, epsilon, top_n)
    of_one_read = top_n is None and (math.isinf(p) or _takes_one_factor(tensors, p))
    if tensors and of_one_read and all(tensor.dtype == working_dtype(tensors) for tensor in tensors):
        vector = one_vector([tensor.detach() for tensor in tensors])
        solution = _maximum_on_sphere(vector, p, epsilon, overwrite=False)
        return [sharded_as(part, tensor) for part, tensor in zip(solution, tensors, strict=True)]
    solution = working_copy(tensors)
    constrained_maximum_(solution, p, epsilon, top_n)
    return solution


def goes_in_turn(p: float, top_n: int | None) -> bool:
    """Say whether one number of the whole vector is enough to find the maximum tensor by tensor.

    Examples:
        >>> goes_in_turn(2, None), goes_in_turn(2, 100), goes_in_turn(3, None)
        (True, False, False)
    """
    return top_n is None and (p == 2 or math.isinf(p))


def constrained_maximum_in_turn(
    tensors: Sequence[Tensor], p: float, epsilon: float, top_n: int | None = None
) -> Iterator[list[Tensor]]:
    """Yield the tensors that `constrained_maximum` returns, to the last bit, small ones together, one after the other.

    For p = 2 and ∞ of all entries a tensor at a time is all that is needed; else all are made at once, and let go.

    Args:
        tensors: As for `constrained_maximum`; they are only read, until the last one has come.
        p: As for `constrained_maximum`.
        epsilon: As for `constrained_maximum`.
        top_n: As for `constrained_maximum`.

    Raises:
        ValueError: As for `constrained_maximum`.

    Examples:
        >>> list(constrained_maximum_in_turn([torch.tensor([3.0]), torch.tensor([4.0])], p=2, epsilon=1.0))
        [[tensor([0.6000]), tensor([0.8000])]]
    """
    p, epsilon, top_n = _checked(p, epsilon, top_n)
    vector = one_vector([tensor.detach() for tensor in tensors])
    factor = None if top_n is not None else _one_factor(vector, p, epsilon)
    known = None if factor is None else Factor(factor)
    dtype = working_dtype(tensors)
    left = iter(()) if factor is not None else one_by_one([constrained_maximum(tensors, p, epsilon, top_n)])
    for places in in_turn(tensors):
        if known is None:
            yield [next(left) for _ in places]
            continue
        parts = maximum_with_factor([vector[place] for place in places], p, known, dtype)
        some = [sharded_as(part, tensors[place]) for place, part in zip(places, parts, strict=True)]
        del parts
        yield some
        del some


def factor_of_maximum(tensors: Sequence[Tensor], p: float, epsilon: float) -> Factor:
    """Return the one number of a whole vector that `maximum_with_factor` needs, for p = 2 and ∞; not of float64."""
    factor = _one_factor([tensor.detach() for tensor in tensors], p, epsilon)
    assert factor is not None
    return Factor(factor)


def maximum_with_factor(
    tensors: Sequence[Tensor], p: float, factor: Factor, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return new tensors: those of `constrained_maximum` that belong to some tensors of a vector.

    Args:
        tensors: Some of the vector, only read.
        p: 2 or ∞.
        factor: That of the whole vector.
        dtype: In which they are made.

    Examples:
        >>> v = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> maximum_with_factor(v[1:], 2, factor_of_maximum(v, 2, 1.0))
        [tensor([0.8000])]
    """
    ours = all(tensor.dtype != dtype for tensor in tensors)
    return _multiplied(widened(tensors, dtype), p, factor, overwrite=ours)


def is_multiple(tensors: Sequence[Tensor], p: float, top_n: int | None = None) -> bool:
    """Say whether the constrained maximum on a vector of these dtypes is `f v`, with f found in one read of v.

    Examples:
        >>> is_multiple([torch.ones(1)], 2), is_multiple([torch.ones(1)], math.inf), is_multiple([torch.ones(1)], 2, 9)
        (True, False, False)
    """
    return top_n is None and _takes_one_factor(tensors, p)


def maximum_as_multiple(tensors: Sequence[Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """Return f with the constrained maximum `f v` of p = 2, and its norm `‖f v‖₂`, where `is_multiple` says so.

    Args:
        tensors: `v`, only read.
        epsilon: Radius of the constraint, `ε ≥ 0`.

    Returns:
        Two zero-dimensional tensors in float64.

    Raises:
        ValueError: `epsilon` is negative or NaN.

    Examples:
        >>> factor, norm = maximum_as_multiple([torch.tensor([3.0, -4.0])], 0.5)
        >>> round(float(factor), 6), round(float(norm), 6)
        (0.1, 0.5)
    """
    length = euclidean_norm([tensor.detach() if tensor.requires_grad else tensor for tensor in tensors])
    factor = epsilon_over(length, check_radius("epsilon", epsilon))
    return factor, torch.where(factor > 0, factor * length, 0.0)


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
    p, epsilon, top_n = check_norm_order(p), check_radius("epsilon", epsilon), check_top_n(top_n)
    dual = dual_order(p)
    kept = tensors if top_n is None else keep_top_n(tensors, top_n)
    return epsilon * vector_norm(kept, dual)
