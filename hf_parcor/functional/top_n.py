"""The n entries of largest magnitude, over all tensors together, without joining or sorting them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_parcor.arguments import check_count
from hf_parcor.distributed.dtensors import ShardedVector, one_vector, total
from hf_parcor.functional.vectors import chunks, numel, working_dtype

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS


def _magnitude_bits(chunk: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers in the order of `|chunk|`: IEEE magnitudes sort as their bit patterns do."""
    return chunk.to(dtype).abs().view(torch.int64 if dtype == torch.float64 else torch.int32)


def _threshold(tensors: Sequence[Tensor], n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the n-th largest magnitude's bits and how many entries with exactly these bits belong to the n.

    Radix selection: a histogram of the leading 16 bits finds the digit in which the n-th largest lies, the next
    histogram looks only at entries with that digit, and so on to the last bit.
    """
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    remaining = torch.full((), n, dtype=torch.int64, device=device)
    for shift in range(dtype.itemsize * 8 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = total(tensors, partial(_histogram, dtype=dtype, shift=shift, prefix=prefix))
        at_least = histogram.flip(0).cumsum(0).flip(0)  # entries with this digit or a larger one
        digit = (at_least >= remaining).sum() - 1
        remaining = remaining - (at_least[digit] - histogram[digit])
        prefix = (prefix << _DIGIT_BITS) | digit
    return prefix, remaining


def _histogram(tensors: Sequence[Tensor], dtype: torch.dtype, shift: int, prefix: Tensor) -> Tensor:
    """Count the digits at a place, of the entries whose digits before it are those of the prefix."""
    histogram = torch.zeros(_DIGITS, dtype=torch.int64, device=prefix.device)
    for bits in _joined_bits(tensors, dtype, prefix.device):
        digit = (bits >> shift) & (_DIGITS - 1)
        if shift + _DIGIT_BITS < dtype.itemsize * 8:
            outside = (bits >> (shift + _DIGIT_BITS)) != prefix
            digit = digit.masked_fill_(outside, _DIGITS)
        histogram += torch.bincount(digit, minlength=_DIGITS + 1)[:_DIGITS]
    return histogram


def _joined_bits(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Yield magnitudes' bits, of small tensors joined: a histogram costs all its digits, however few the bits."""
    waiting: list[Tensor] = []
    entries = 0
    for chunk in chunks(tensors):
        waiting.append(_magnitude_bits(chunk, dtype).to(device))
        entries += len(waiting[-1])
        if entries >= _DIGITS:
            yield torch.cat(waiting)
            waiting, entries = [], 0
    if waiting:
        yield torch.cat(waiting)


def _keep_(tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, dtype: torch.dtype) -> None:
    """Set to zero what is below the threshold, and all but the first `ties` entries that are equal to it."""
    seen = torch.zeros_like(ties)
    for chunk in chunks(tensors):
        bits = _magnitude_bits(chunk, dtype)
        tied = bits == threshold.to(chunk.device)
        rank = tied.cumsum(0) + seen.to(chunk.device)
        kept = (bits > threshold.to(chunk.device)) | (tied & (rank <= ties.to(chunk.device)))
        chunk.masked_fill_(~kept, 0)
        seen = seen + tied.sum().to(seen.device)


def _count_ties(tensor: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch.zeros_like(threshold)
    for chunk in chunks([tensor]):
        found += (_magnitude_bits(chunk, dtype) == threshold.to(chunk.device)).sum().to(found.device)
    return found


def keep_top_n_(tensors: Sequence[Tensor], n: int) -> None:
    """Set to zero, in place, all but the n entries of largest magnitude (see `keep_top_n`)."""
    n = check_count("n", n)
    vector = one_vector(tensors)
    if n >= numel(vector):
        return
    scattered = [(tensor, tensor.contiguous()) for tensor in vector if not tensor.is_contiguous()]
    dense = iter([copy for _, copy in scattered])
    flat = [tensor if tensor.is_contiguous() else next(dense) for tensor in vector]
    dtype, device = working_dtype(flat), flat[0].device
    if isinstance(vector, ShardedVector):
        flat = vector.replaced(flat)
    threshold, ties = _threshold(flat, n, dtype, device)
    if isinstance(flat, ShardedVector):
        before = flat.before(torch.stack([_count_ties(tensor, threshold, dtype) for tensor in flat]))
        for tensor, earlier in zip(flat, before, strict=True):
            _keep_([tensor], threshold, ties - earlier, dtype)
    else:
        _keep_(flat, threshold, ties, dtype)
    for tensor, copy in scattered:
        tensor.copy_(copy)


def keep_top_n(tensors: Sequence[Tensor], n: int) -> list[Tensor]:
    """Return `h = top_n(v)`: the n entries of largest magnitude of ALL tensors together, zero elsewhere.

    Exactly n entries are kept, of all shards together where tensors are sharded. Among equal magnitudes the first ones
    are, in the order of the tensors and, within a tensor, of its memory layout (row-major; shards in the order of
    their ranks): the choice is deterministic.

    Args:
        tensors: Floating-point tensors of any shapes, seen as one vector of length k.
        n: How many entries to keep; `n ≥ k` keeps all.

    Raises:
        ValueError: `n < 1`.
        TypeError: `n` is not a whole number.

    Examples:
        >>> keep_top_n([torch.tensor([1.0, -5.0]), torch.tensor([[3.0], [0.5]])], 2)
        [tensor([ 0., -5.]), tensor([[3.], [0.]])]
    """
    kept = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    keep_top_n_(kept, n)
    return kept
