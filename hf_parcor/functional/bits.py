"""Flips of single bits in what a number is stored as: an IEEE float, or an integer code of quantized weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hf_parcor.arguments import check_count, check_share
from hf_parcor.devices import has_float64
from hf_parcor.distributed.dtensors import cut_as, has_shards, local_part, sharded_as, shared_generator
from hf_parcor.functional.stored_numbers import FLOATS, StoredNumbers, check_format, integer_width, mantissa_bits

FIELDS = ("any", "sign", "exponent", "mantissa")


def field_bits(dtype: torch.dtype | str, field: str = "any") -> range:
    """Return the positions of a field's bits, 0 the least significant.

    Args:
        dtype: float16, bfloat16, float32 or float64; or the name of a format, as in `check_format`, such as "int8".
        field: "sign", "exponent", "mantissa" or "any". Of an integer code the sign is its top bit, and there is
            neither exponent nor mantissa.

    Raises:
        TypeError: The dtype is not one of these.
        ValueError: The field, or the format, is not one of these.

    Examples:
        >>> field_bits(torch.float32, "exponent")
        range(23, 31)
        >>> field_bits(torch.bfloat16, "sign")
        range(15, 16)
        >>> field_bits("int8", "sign")
        range(7, 8)
    """
    if isinstance(dtype, str):
        name = check_format(dtype)
        width = integer_width(name)
        if width is not None:
            if field not in ("any", "sign"):
                raise ValueError(f"bits: expected any or sign, got {field!r}; {name} has no such part")
            return range(width) if field == "any" else range(width - 1, width)
        dtype = FLOATS[str(name)]
    mantissa, width = mantissa_bits(dtype), dtype.itemsize * 8
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
    return check_share("rate", rate, "it is a probability per bit"), None


def flip_bits(tensor: Tensor, elements: Tensor, positions: Tensor, of: str | None = None) -> Tensor:
    """Return a copy of `tensor` in which bit `positions[j]` of entry `elements[j]` is inverted, for every j.

    Args:
        tensor: float16, bfloat16, float32 or float64, any shape. Of a sharded one each rank flips what it holds.
        elements: Indices into the flattened tensor (row-major), int64.
        positions: Bit positions, 0 the least significant, int64, same length. A pair given twice flips once.
        of: The format that the tensor is stored in, as in `check_format`: all of it is rounded to that, and comes back
            in its own dtype. A tensor without a step of integer codes (all zeros, or not finite) stays as it is.

    Raises:
        TypeError: The tensor is not of these dtypes.
        ValueError: The lengths differ, there is no such entry, bit or format, or the dtype cannot hold the format.

    Examples:
        >>> flip_bits(torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor([31]))
        tensor([ 1., -2.])
        >>> flip_bits(torch.tensor([1.0, 127.0]), torch.tensor([0]), torch.tensor([7]), of="int8")  # 1 - 128
        tensor([-127.,  127.])
    """
    width = len(field_bits(of or tensor.dtype))
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
    stored = StoredNumbers.of(tensor, of)
    if stored is None:
        return sharded_as(local_part(tensor).detach().clone(memory_format=torch.contiguous_format), tensor)
    flat = stored.bits.clone()
    pairs = torch.unique(elements * width + positions)
    touched, slot = torch.unique_consecutive(pairs // width, return_inverse=True)
    masks = torch.zeros(len(touched), dtype=torch.int64, device=flat.device)
    # Distinct bits of one entry add up to their union; int64 arithmetic wraps to the sign bit of narrower integers.
    masks.index_add_(0, slot, torch.ones_like(pairs) << pairs % width)
    if has_shards([tensor]):
        everywhere = flat.new_zeros(tensor.shape)
        everywhere.view(-1)[touched] = masks.to(flat.dtype)
        flat ^= local_part(cut_as(everywhere, tensor)).reshape(-1).to(flat.device)
    else:
        flat[touched] ^= masks.to(flat.dtype)
    return stored.tensor(flat)


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
    of: str | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return copies of `tensors` with random bits of a field inverted, over all tensors together.

    Args:
        tensors: float16, bfloat16, float32 or float64 tensors of any shapes.
        field: "sign", "exponent", "mantissa" or "any".
        rate: Every bit of the field flips independently with this probability.
        count: Exactly this many distinct bits flip. One of `rate` and `count` is given.
        of: The format that the tensors are stored in, as in `flip_bits`; None, the default, for their own dtypes.
        generator: Source of randomness; None for PyTorch's global one.

    Raises:
        TypeError: A tensor is not of these dtypes.
        ValueError: Both or none of `rate` and `count`, a rate outside [0, 1], a count below 1 or above the number of
            bits in the field, an unknown field or format, or one that a dtype cannot hold.
    """
    return list(flipped_in_turn(tensors, field, rate=rate, count=count, of=of, generator=generator))


def flipped_in_turn(
    tensors: Sequence[Tensor],
    field: str = "any",
    *,
    rate: float | None = None,
    count: int | None = None,
    of: str | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield what `flip_random_bits` returns; which bits flip is drawn before the first, each copied when asked for."""
    rate, count = check_amount(rate, count)
    generator = shared_generator(tensors, generator)
    fields = [field_bits(of or tensor.dtype, field) for tensor in tensors]
    coded = [StoredNumbers.has_bits(tensor, of) for tensor in tensors]
    sizes = [
        tensor.numel() * len(bits) if has_bits else 0
        for tensor, bits, has_bits in zip(tensors, fields, coded, strict=True)
    ]
    total = sum(sizes)
    count = _drawn_count(total, rate, generator) if count is None else count
    if count > total:
        without = "" if all(coded) else f"; tensors of zeros, and what is not finite, have no {of} codes"
        raise ValueError(
            f"count: expected at most {total} bits (all that were selected{without}), got {count}; pass fewer"
            + ("" if total else ", or select other weights")
        )
    positions = sample_positions(total, count, generator)
    starts = list(accumulate(sizes, initial=0))
    # The positions are in order: the first of each tensor is found by bisection, and no tensor looks at another's.
    firsts = torch.searchsorted(positions, torch.tensor(starts, device=positions.device)).tolist()
    for tensor, bits, start, (first, end) in zip(tensors, fields, starts[:-1], pairwise(firsts), strict=True):
        here = positions[first:end].to(local_part(tensor).device) - start
        yield flip_bits(tensor, here // len(bits), here % len(bits) + bits.start, of)


def _drawn_count(bits: int, rate: float | None, generator: torch.Generator | None) -> int:
    """Return how many of some bits flip, each with a probability."""
    device = torch.device("cpu") if generator is None else generator.device
    if not has_float64(device):  # a generator of the CPU goes on from it
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
        generator = torch.Generator().manual_seed(seed)
        device = generator.device
    trials = torch.tensor(float(bits), dtype=torch.float64, device=device)
    probability = torch.tensor(rate, dtype=torch.float64, device=device)
    return int(torch.binomial(trials, probability, generator=generator))
