"""Flips of single bits in the IEEE representation of floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

_MANTISSA_BITS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
)
_INTEGER_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16}
FIELDS = ("any", "sign", "exponent", "mantissa")


def field_bits(dtype: torch.dtype, field: str = "any") -> range:
    """Return the positions of a field's bits, 0 the least significant.

    Args:
        dtype: float16, bfloat16, float32 or float64.
        field: "sign", "exponent", "mantissa" or "any".

    Raises:
        TypeError: The dtype is not one of these.
        ValueError: The field is not one of these.

    Examples:
        >>> field_bits(torch.float32, "exponent")
        range(23, 31)
        >>> field_bits(torch.bfloat16, "sign")
        range(15, 16)
    """
    if dtype not in _MANTISSA_BITS:
        known = ", ".join(str(name).removeprefix("torch.") for name in _MANTISSA_BITS)
        raise TypeError(f"dtype: expected one of {known}, got {dtype}; select floating-point parameters only")
    mantissa, width = _MANTISSA_BITS[dtype], dtype.itemsize * 8
    positions = {
        "any": range(width),
        "sign": range(width - 1, width),
        "exponent": range(mantissa, width - 1),
        "mantissa": range(mantissa),
    }
    if field not in positions:
        raise ValueError(f"bits: expected one of {', '.join(FIELDS)}, got {field!r}; choose one of these")
    return positions[field]


def flip_bits(tensor: Tensor, elements: Tensor, positions: Tensor) -> Tensor:
    """Return a copy of `tensor` in which bit `positions[j]` of entry `elements[j]` is inverted, for every j.

    Args:
        tensor: float16, bfloat16, float32 or float64, any shape.
        elements: Indices into the flattened tensor (row-major), int64.
        positions: Bit positions, 0 the least significant, same length. A pair given twice flips once: pairs are
            expected to be distinct.

    Examples:
        >>> flip_bits(torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor([31]))
        tensor([ 1., -2.])
    """
    integer = _INTEGER_OF_SIZE[tensor.dtype.itemsize]
    flat = tensor.detach().contiguous().clone().view(-1).view(integer)
    touched, slot = torch.unique(elements, return_inverse=True)
    masks = torch.zeros(len(touched), dtype=torch.int64, device=flat.device)
    # Distinct bits of one entry add up to their union; int64 arithmetic wraps to the sign bit of narrower integers.
    masks.index_add_(0, slot, torch.ones_like(positions) << positions)
    flat[touched] ^= masks.to(integer)
    return flat.view(tensor.dtype).view(tensor.shape)


def sample_positions(total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` distinct whole numbers below `total`, every subset equally likely, in increasing order.

    Memory grows with `count`, not with `total` (with `total` only where most of the numbers are asked for).

    Examples:
        >>> len(sample_positions(10**12, 1000, torch.Generator().manual_seed(0)).unique())
        1000
    """
    device = None if generator is None else generator.device
    if count > total // 2:
        left_out = sample_positions(total, total - count, generator)
        kept = torch.ones(total, dtype=torch.bool, device=device)
        kept[left_out] = False
        return kept.nonzero().squeeze(1)
    chosen = torch.empty(0, dtype=torch.int64, device=device)
    while len(chosen) < count:
        missing = count - len(chosen)
        drawn = torch.randint(total, (missing + missing // 8 + 16,), generator=generator, device=device)
        chosen = torch.unique(torch.cat([chosen, drawn]))
    surplus = torch.randperm(len(chosen), generator=generator, device=device)[:count]
    return chosen[surplus.sort().values]


def flip_random_bits(
    tensors: Sequence[Tensor],
    field: str = "any",
    *,
    rate: float | None = None,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return copies of `tensors` with random bits of a field inverted, over all tensors together.

    Args:
        tensors: float16, bfloat16, float32 or float64 tensors of any shapes.
        field: "sign", "exponent", "mantissa" or "any".
        rate: Every bit of the field flips independently with this probability.
        count: Exactly this many distinct bits flip. One of `rate` and `count` is given.
        generator: Source of randomness; None for PyTorch's global one.

    Raises:
        TypeError: A tensor is not of these dtypes.
        ValueError: `count` exceeds the number of bits in the field.
    """
    fields = [field_bits(tensor.dtype, field) for tensor in tensors]
    sizes = [tensor.numel() * len(bits) for tensor, bits in zip(tensors, fields, strict=True)]
    total = sum(sizes)
    if count is None:
        device = None if generator is None else generator.device
        trials = torch.tensor(float(total), dtype=torch.float64, device=device)
        probability = torch.tensor(rate, dtype=torch.float64, device=device)
        count = int(torch.binomial(trials, probability, generator=generator))
    if count > total:
        raise ValueError(f"count: expected at most {total} bits (all that were selected), got {count}; pass fewer")
    positions = sample_positions(total, count, generator)
    flipped, start = [], 0
    for tensor, bits, size in zip(tensors, fields, sizes, strict=True):
        here = positions[(positions >= start) & (positions < start + size)].to(tensor.device) - start
        flipped.append(flip_bits(tensor, here // len(bits), here % len(bits) + bits.start))
        start += size
    return flipped
