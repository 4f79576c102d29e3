"""Flips of single bits in the IEEE representation of floating-point numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_parcor.arguments import check_count, check_real
from hf_parcor.distributed.dtensors import cut_as, local_part, sharded_as, shared_generator

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


def check_amount(rate: object, count: object) -> tuple[float | None, int | None]:
    """Return the one amount of flips that is given: a rate in [0, 1] or a count of at least 1."""
    if (rate is None) == (count is None):
        raise ValueError(f"expected one of rate and count, got rate={rate} and count={count}; give one")
    if rate is None:
        return None, check_count("count", count)
    probability = check_real("rate", rate, "0 <= rate <= 1")
    if not 0 <= probability <= 1:
        raise ValueError(f"rate: expected 0 <= rate <= 1, got {probability:g}; it is a probability per bit")
    return probability, None


def flip_bits(tensor: Tensor, elements: Tensor, positions: Tensor) -> Tensor:
    """Return a copy of `tensor` in which bit `positions[j]` of entry `elements[j]` is inverted, for every j.

    Args:
        tensor: float16, bfloat16, float32 or float64, any shape. Of a sharded one each rank flips what it holds.
        elements: Indices into the flattened tensor (row-major), int64.
        positions: Bit positions, 0 the least significant, int64, same length. A pair given twice flips once.

    Raises:
        TypeError: The tensor is not of these dtypes.
        ValueError: The lengths differ, or there is no such entry or bit.

    Examples:
        >>> flip_bits(torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor([31]))
        tensor([ 1., -2.])
    """
    width = len(field_bits(tensor.dtype))
    if elements.shape != positions.shape or elements.ndim != 1:
        raise ValueError(
            "elements, positions: expected two vectors of one length, got shapes "
            f"{tuple(elements.shape)} and {tuple(positions.shape)}; give every bit its entry"
        )
    for name, given, limit in (("elements", elements, tensor.numel()), ("positions", positions, width)):
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < limit:
            raise ValueError(
                f"{name}: expected indices in 0..{limit - 1}, got {int(given.min())}..{int(given.max())}; "
                f"the tensor has {tensor.numel()} entries of {width} bits"
            )
    integer = _INTEGER_OF_SIZE[tensor.dtype.itemsize]
    here = local_part(tensor).detach().clone(memory_format=torch.contiguous_format)
    flat = here.view(-1).view(integer)
    pairs = torch.unique(elements * width + positions)
    touched, slot = torch.unique_consecutive(pairs // width, return_inverse=True)
    masks = torch.zeros(len(touched), dtype=torch.int64, device=flat.device)
    # Distinct bits of one entry add up to their union; int64 arithmetic wraps to the sign bit of narrower integers.
    masks.index_add_(0, slot, torch.ones_like(pairs) << pairs % width)
    if isinstance(tensor, DTensor):
        everywhere = flat.new_zeros(tensor.shape)
        everywhere.view(-1)[touched] = masks.to(integer)
        flat ^= local_part(cut_as(everywhere, tensor)).reshape(-1).to(flat.device)
    else:
        flat[touched] ^= masks.to(integer)
    return sharded_as(here, tensor)


def sample_positions(total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` distinct whole numbers below `total`, every subset equally likely, in increasing order.

    Memory grows with `count`, not with `total` (with `total` only where most of the numbers are asked for).

    Raises:
        ValueError: `count` is negative or exceeds `total`.

    Examples:
        >>> len(sample_positions(10**12, 1000, torch.Generator().manual_seed(0)).unique())
        1000
    """
    if not 0 <= count <= total:
        raise ValueError(f"count: expected 0 <= count <= {total}, got {count}; they are to be distinct")
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
        ValueError: Both or none of `rate` and `count`, a rate outside [0, 1], a count below 1 or above the number of
            bits in the field, an unknown field.
    """
    return list(flipped_in_turn(tensors, field, rate=rate, count=count, generator=generator))


def flipped_in_turn(
    tensors: Sequence[Tensor],
    field: str = "any",
    *,
    rate: float | None = None,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield what `flip_random_bits` returns; which bits flip is drawn before the first, each copied when asked for."""
    rate, count = check_amount(rate, count)
    generator = shared_generator(tensors, generator)
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
    starts = list(accumulate(sizes, initial=0))
    # The positions are in order: the first of each tensor is found by bisection, and no tensor looks at another's.
    firsts = torch.searchsorted(positions, torch.tensor(starts, device=positions.device)).tolist()
    for tensor, bits, start, (first, end) in zip(tensors, fields, starts[:-1], pairwise(firsts), strict=True):
        here = positions[first:end].to(local_part(tensor).device) - start
        yield flip_bits(tensor, here // len(bits), here % len(bits) + bits.start)
