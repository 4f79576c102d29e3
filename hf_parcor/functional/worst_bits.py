"""Which single bit does the most damage: to first order along a gradient, or by the weights' magnitude alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_parcor.devices import host_of
from hf_parcor.distributed.dtensors import has_shards
from hf_parcor.functional.stored_numbers import MANTISSA_BITS, StoredNumbers
from hf_parcor.functional.vectors import chunks

Flips = Mapping[int, int]
"""Bits of a tensor that are flipped: by the entry's index, row-major, a mask."""


class BitFlip(NamedTuple):
    """One bit of a tensor.

    Attributes:
        gain: What flipping it is expected to do.
        element: The entry, an index into the flattened tensor (row-major).
        position: The bit, 0 the least significant.
    """

    gain: float
    element: int
    position: int


def check_whole(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that are spread over ranks: none of them sees which bit is the worst.

    Raises:
        NotImplementedError: One is.
    """
    if has_shards(tensors):
        raise NotImplementedError(
            "worst bit flips: expected whole weights, got some that are sharded over ranks; measure them in one "
            "process, or take BitFlips, which works on shards"
        )


def worst_flip(
    tensor: Tensor, gradient: Tensor, of: str | None = None, flipped: Flips | None = None
) -> BitFlip | None:
    r"""Return the bit whose flip gains most to first order, and leaves a finite number.

    .. math:: \arg\max_{i,j} \; g_i \, \bigl(\mathrm{flip}_j(w_i) - w_i\bigr)

    Every entry has one best bit, which needs no search. Where the gradient wants a float's magnitude to grow, it is
    the highest bit below the sign that is zero (not that which makes ∞ or NaN); else the sign, whose `|Δw| = 2|w|` no
    other bit reaches. Codes in two's complement are in order once their top bit is inverted: to grow, the highest
    zero; to shrink, the highest one. The tensor is worked on piece by piece.

    Args:
        tensor: The weights, whole; they are only read.
        gradient: g, of this shape.
        of: The format that they are stored in, as in `flip_bits`.
        flipped: Bits that are flipped already: gains are from there, and an entry whose best bit is one of them is
            left out.

    Returns:
        None where no entry is left: all of them, or their gradients, are not finite, or there are no codes.

    Raises:
        NotImplementedError: The tensor is sharded.
        TypeError: As for `flip_bits`.
        ValueError: As for `flip_bits`.

    Examples:
        >>> worst_flip(torch.tensor([0.5, -1.5]), torch.tensor([-1.0, 1.0]))
        BitFlip(gain=3.0, element=1, position=31)
        >>> worst_flip(torch.tensor([100.0, -127.0]), torch.tensor([-1.0, 0.5]), of="int8")  # 100 - 128
        BitFlip(gain=128.0, element=0, position=7)
    """
    check_whole([tensor])
    tensor, gradient = (one.to(host_of(tensor.device)) for one in (tensor, gradient))
    stored = StoredNumbers.of(tensor, of)
    if stored is None or not tensor.numel():
        return None
    flipped = flipped or {}
    device = stored.bits.device
    elements = torch.tensor(list(flipped), dtype=torch.int64, device=device)
    taken = _masks(flipped.values(), stored.bits)
    bits = stored.bits
    if flipped:
        bits = bits.clone()
        bits[elements] ^= taken
    best = BitFlip(-torch.inf, 0, 0)
    start = 0
    for here, along in zip(chunks([bits]), chunks([gradient.contiguous()]), strict=True):
        mask = _best_bits(stored, here, along)
        before = stored.values(here).double()
        gain = along.double() * (stored.values(here ^ mask).double() - before)
        gain.masked_fill_((mask == 0) | ~gain.isfinite(), -torch.inf)
        inside = (elements >= start) & (elements < start + len(here))
        if flipped and bool(inside.any()):
            own = elements[inside] - start
            gain[own] = gain[own].masked_fill((mask[own] & taken[inside]) != 0, -torch.inf)
        place = int(gain.argmax())
        if float(gain[place]) > best.gain:
            pattern = int(mask[place]) & ((1 << stored.width) - 1)
            best = BitFlip(float(gain[place]), start + place, pattern.bit_length() - 1)
        start += len(here)
    return None if best.gain == -torch.inf else best


def _masks(flipped: Iterable[int], like: Tensor) -> Tensor:
    """Return masks as signed integers of the patterns' dtype: the top bit of a float is its sign, and wraps."""
    signed = [mask if mask < 1 << 63 else mask - (1 << 64) for mask in flipped]
    return torch.tensor(signed, dtype=torch.int64, device=like.device).to(like.dtype)


def _best_bits(stored: StoredNumbers, bits: Tensor, gradient: Tensor) -> Tensor:
    """Return a mask with the best bit of each pattern; 0 for none."""
    grow = gradient > 0
    if stored.step is not None:
        offset = bits ^ (1 << (stored.width - 1))
        return _highest(torch.where(grow, offset ^ ((1 << stored.width) - 1), offset), stored.width)
    limits = torch.iinfo(bits.dtype)
    exponent = limits.max - ((1 << MANTISSA_BITS[stored.dtype]) - 1)
    zeros = ~bits & limits.max
    highest = _highest(zeros, stored.width)
    infinite = ((bits | highest) & exponent) == exponent
    highest = torch.where(infinite, _highest(zeros & ~exponent, stored.width), highest)
    return torch.where(grow ^ (bits < 0), highest, torch.full_like(bits, limits.min))


def _highest(patterns: Tensor, width: int) -> Tensor:
    """Return the highest one of each pattern, none of which is negative."""
    shift = 1
    while shift < width:
        patterns = patterns | (patterns >> shift)
        shift *= 2
    return patterns ^ (patterns >> 1)


def largest_of_kernels(tensor: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest `|w|`, at most one of each kernel, and where they are.

    A kernel is a row of a matrix, what feeds one output; the filter of one pair of channels of a convolution; a single
    entry of a vector. Numbers that are not finite do not count.

    Args:
        tensor: The weights, whole.
        n: How many; of fewer kernels, one each.

    Raises:
        NotImplementedError: The tensor is sharded.

    Examples:
        >>> largest_of_kernels(torch.tensor([[1.0, -9.0, 8.0], [3.0, 2.0, 0.0], [-5.0, 0.0, 4.0]]), 2)
        (tensor([9., 5.]), tensor([1, 6]))
    """
    check_whole([tensor])
    kernels = kernels_of(tensor)
    if not kernels or not tensor.numel():
        return tensor.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=tensor.device)
    rows = tensor.detach().reshape(kernels, -1).abs()
    largest, column = rows.masked_fill(~rows.isfinite(), -1).max(1)
    # A stable sort: which of two equal ones comes first is not left to the device.
    chosen = largest.sort(descending=True, stable=True).indices[:n]
    chosen = chosen[largest[chosen] >= 0]
    return largest[chosen], chosen * rows.shape[1] + column[chosen]


def kernels_of(tensor: Tensor) -> int:
    """Return how many kernels a tensor has.

    Examples:
        >>> kernels_of(torch.ones(8, 3, 5, 5)), kernels_of(torch.ones(4, 6)), kernels_of(torch.ones(7))
        (24, 4, 7)
    """
    if tensor.ndim > 2:
        return tensor.shape[0] * tensor.shape[1]
    return tensor.shape[0] if tensor.ndim == 2 else tensor.numel()
