"""Magnitudes, norms and products of a list of tensors that is seen as one long vector.

Nothing is concatenated, and nothing waits for the device, where it has float64: sizes are zero-dimensional tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_parcor.arguments import check_norm_order
from hf_parcor.devices import has_float64, has_launches, host_of, in_float64
from hf_parcor.distributed.dtensors import ShardedVector, one_vector
from hf_parcor.functional.vectors import chunks, numel, places_by_kind, working_dtype

_BLOCK = 1 << 10  # entries that may be summed one after another in float32


def _joined(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    device = values[0].device
    return torch.stack([value.to(device=device, dtype=dtype) for value in values])


def max_magnitude(tensors: Sequence[Tensor]) -> Tensor:
    """Return `max_i |v_i|` as a zero-dimensional tensor; 0 for no entries, NaN if any entry is NaN.

    Examples:
        >>> max_magnitude([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])])
        tensor(3.)
    """
    tensors = one_vector(tensors)
    if isinstance(tensors, ShardedVector):
        return tensors.gather(max_magnitude).amax()
    dtype = working_dtype(tensors)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=dtype, device="cpu")
    if filled[0].device.type == "cpu":
        # The max-norm is not vectorised on CPUs: aminmax was 15 times faster on 23 million entries, and there
        # are no kernel launches to save by batching.
        extremes = [extreme for tensor in filled for extreme in torch.aminmax(tensor)]
        largest: Tensor = _joined(extremes, dtype).abs_().amax()
        return largest
    of_each_kind = [
        torch.stack(torch._foreach_norm([filled[place] for place in places], math.inf))
        for places in places_by_kind(filled).values()
    ]
    host = host_of(of_each_kind[0].device)
    return torch.cat([norms.to(host, dtype) for norms in of_each_kind]).amax()


def euclidean_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return `‖v‖₂` in float64, of entries of any size, and in one read of those of ordinary size.

    A GPU adds up the squares in float64, where those of float32 keep their digits. A CPU, and a device that has no
    float64, adds them up in float32, and looks again, at `v / max_i |v_i|`, where the result shows that some may have
    left its range.

    Examples:
        >>> euclidean_norm([torch.tensor([3e38]), torch.tensor([3e38])])
        tensor(4.2426e+38, dtype=torch.float64)
    """
    tensors = one_vector(tensors)
    if isinstance(tensors, ShardedVector):
        return _norm_by_largest([tensors.gather(euclidean_norm)], 2)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    dtype = working_dtype(filled)
    if _adds_in_float32(filled[0].device):
        norm: Tensor = torch.linalg.vector_norm(_norms_of_parts(filled, 2, dtype), 2)
        return norm if _is_ordinary(norm, numel(filled), dtype) else _norm_by_largest(filled, 2)
    return _norm_by_largest(filled, 2) if dtype == torch.float64 else _norm_in_float64(filled)


def _is_ordinary(norm: Tensor, entries: int, dtype: torch.dtype) -> bool:
    """Say whether a norm, which lies on the CPU, shows that the squares it is made of stayed inside the range."""
    square = float(norm) * float(norm)
    return 1e8 * entries * torch.finfo(dtype).tiny < square < math.inf  # what is too small to count adds up to 1e-8


def _norm_in_float64(tensors: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(_norms_of_parts(tensors, 2, torch.float64), 2)
    return norm


def euclidean_norm_of_bundles(bundles: Callable[[], Iterable[list[Tensor]]]) -> Tensor:
    """Return `‖v‖₂` in float64 of float32 tensors that come some at a time.

    Of tensors on one device it is that of `euclidean_norm`, to the last bit.

    Args:
        bundles: Makes the tensors; where entries are so small or large that these are looked at again, all at once.

    Examples:
        >>> round(float(euclidean_norm_of_bundles(lambda: ([torch.full((2,), entry)] for entry in (1.0, 7.0)))), 6)
        10.0
    """
    parts: list[Tensor] = []
    entries = 0
    in_float32 = False
    for some in bundles():
        entries += numel(some)
        in_float32 = in_float32 or any(_adds_in_float32(tensor.device) for tensor in some)
        filled = [tensor for tensor in some if tensor.numel()]
        if filled:
            parts.append(_norms_of_parts(filled, 2, torch.float32 if in_float32 else torch.float64))
        del some, filled
    if not parts:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    norm: Tensor = torch.linalg.vector_norm(_end_to_end(parts), 2)
    if in_float32 and not _is_ordinary(norm, entries, torch.float32):
        return euclidean_norm([tensor for some in bundles() for tensor in some])
    return norm


def vector_norm_of_unit_scale(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return `‖v‖_p` of entries of ordinary size: fast, but squares of 1e-23 and of 1e20 leave float32's range."""
    tensors = one_vector(tensors)
    if isinstance(tensors, ShardedVector):
        return vector_norm([tensors.gather(partial(vector_norm_of_unit_scale, p=p))], p)
    dtype = working_dtype(tensors)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=dtype, device="cpu")
    if math.isinf(p):
        return max_magnitude(filled)
    norm: Tensor = torch.linalg.vector_norm(_norms_of_parts(filled, p, dtype), p)
    return norm.to(dtype)


def _norms_of_parts(tensors: Sequence[Tensor], p: float, dtype: torch.dtype) -> Tensor:
    """Return norms, in float64, whose norm is that of the tensors: of each, or of short blocks added in float32."""
    parts: list[Tensor] = []
    for (device, _), places in places_by_kind(tensors).items():
        alike = [tensors[place] for place in places]
        if _adds_in_float32(device):
            parts += [_block_norms(tensor, p, dtype) for tensor in alike]
        else:
            parts.append(torch.stack(torch._foreach_norm(alike, p, dtype=dtype)))
    return _end_to_end(parts)


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    host = host_of(parts[0].device)
    return torch.cat([part.to(host) for part in parts]).double()


def _adds_in_float32(device: torch.device) -> bool:
    """Say whether squares are added up in float32: where float64 takes longer, or is not to be had."""
    return device.type == "cpu" or not has_float64(device)


def _block_norms(tensor: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return norms of short blocks, whose norm is the tensor's.

    A CPU adds the powers of a long vector one after another, a GPU as a tree. In float32 the chain lost 8 % of the
    L1 norm and 0.2 % of the L2 norm of 32 million normal entries; in blocks it is as fast, and loses 1e-8.
    """
    flat = tensor.reshape(-1).to(dtype)
    whole = flat.numel() // _BLOCK * _BLOCK
    rest: Tensor = torch.linalg.vector_norm(flat[whole:], p, dtype=dtype).view(1)
    if not whole:
        return rest
    blocks: Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), p, dim=1, dtype=dtype)
    return torch.cat([blocks, rest])


def vector_norm(tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Return `‖v‖_p = (Σ_i |v_i|^p)^(1/p)`, or `max_i |v_i|` for p = ∞, of all tensors as ONE vector.

    No power over- or underflows: where one could, entries are divided by the largest magnitude first.

    Args:
        tensors: Tensors of any shapes.
        p: Order of the norm, `1 ≤ p ≤ ∞`.

    Returns:
        A zero-dimensional tensor in float32, or float64 if a tensor has it.

    Raises:
        ValueError: `p` is below 1 or NaN.

    Examples:
        >>> vector_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
        >>> vector_norm([torch.tensor([3e30, 4e30])])
        tensor(5.0000e+30)
    """
    p = check_norm_order(p)
    tensors = one_vector(tensors)
    if isinstance(tensors, ShardedVector):
        return vector_norm([tensors.gather(partial(vector_norm, p=p))], p)
    if math.isinf(p):
        return max_magnitude(tensors)
    norm = euclidean_norm(tensors) if p == 2 else _norm_by_largest(tensors, p)
    return norm.to(working_dtype(tensors))


def norms_of_each(tensors: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
    """Return `‖v_l‖_p` of each tensor by itself, as `vector_norm` does of all: by batched calls where launches cost.

    Args:
        tensors: Tensors of any shapes, on any devices; DTensors are whole.
        p: Order of the norm, `1 ≤ p ≤ ∞`.

    Returns:
        Zero-dimensional tensors, each on the device of its own, in float32 or, of one in float64, in that.

    Raises:
        ValueError: `p` is below 1 or NaN.

    Examples:
        >>> norms_of_each([torch.tensor([3.0, 4.0]), torch.tensor([1.0])])
        [tensor(5.), tensor(1.)]
    """
    p = check_norm_order(p)
    return _norms_of_each(tensors, p, torch.float32, lambda tensor: vector_norm([tensor], p))


def euclidean_norms_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `‖v_l‖₂` of each tensor by itself in float64, as `euclidean_norm` does of all."""
    return _norms_of_each(tensors, 2, torch.float64, lambda tensor: euclidean_norm([tensor]))


def _norms_of_each(
    tensors: Sequence[Tensor], p: float, dtype: torch.dtype, alone: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    norms = list(tensors)
    for (device, of_tensors), places in places_by_kind(tensors).items():
        together = [place for place in places if _is_batched(tensors[place], p) and of_tensors.itemsize <= 4]
        for place in sorted({*places} - {*together}):
            norms[place] = alone(tensors[place]).to(host_of(device))  # of an empty one it was on the CPU
        if together:
            alike = [tensors[place] for place in together]
            found = torch._foreach_norm(alike, p, dtype=None if math.isinf(p) else torch.float64)
            for place, norm in zip(together, torch.stack(found).to(dtype).unbind(), strict=True):
                norms[place] = norm
    return norms


def _is_batched(tensor: Tensor, p: float) -> bool:
    """Say whether the norm of a tensor is found in one call with others."""
    plain = has_launches(tensor.device) and has_float64(tensor.device) and not isinstance(tensor, DTensor)
    return plain and tensor.numel() > 0 and (p == 2 or math.isinf(p))


def _norm_by_largest(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return `max_i |v_i| · ‖v / max_i |v_i|‖_p` in float64."""
    largest = max_magnitude(tensors)
    divisor = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    dtype = working_dtype(tensors)
    parts = [
        vector_norm_of_unit_scale([chunk.to(dtype) / divisor.to(chunk.device)], p)
        for tensor in tensors
        for chunk in chunks([tensor.contiguous()])
    ]
    if not parts:
        return in_float64(largest)
    return in_float64(largest) * vector_norm_of_unit_scale([_joined(parts, torch.float64)], p)


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return `aᵀb = Σ_i a_i b_i` in float64.

    Examples:
        >>> inner_product([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
        tensor(11., dtype=torch.float64)
    """
    first, second = one_vector(first), one_vector(second)
    products = [torch.dot(*(in_float64(one.reshape(-1)) for one in pair)) for pair in zip(first, second, strict=True)]
    if isinstance(first, ShardedVector):
        return first.replaced(products).total(_sum)
    return _sum(products) if products else torch.zeros((), dtype=torch.float64, device="cpu")


def _sum(values: Sequence[Tensor]) -> Tensor:
    return _joined(values, torch.float64).sum()
