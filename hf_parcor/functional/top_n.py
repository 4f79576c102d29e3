"""The n entries of largest magnitude, over all tensors together, without joining or sorting them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_parcor.arguments import check_count
from hf_parcor.distributed.dtensors import ShardedVector, alike, local_part, one_vector, total
from hf_parcor.functional.vectors import INTEGER_OF_SIZE, numel, working_dtype

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_SPARE = 1 << 10  # counters for what is not counted: on a GPU, additions to a single one would wait for each other


@dataclass(frozen=True)
class _Run:
    """How many entries are worked on at a time: of one tensor, and of small ones, which are copied to be joined."""

    alone: int
    joined: int


# A CPU has caches to stay inside of; elsewhere a launch costs more than to copy what is small. 300 MiB of scratch.
_RUNS = {"cpu": _Run(alone=1 << 20, joined=1 << 16)}
_RUN = _Run(alone=1 << 24, joined=1 << 24)


def _runs(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the vector as lists of flat views on one device, each list small enough to work on copies."""
    waiting: list[Tensor] = []
    entries = 0
    for tensor in tensors:
        run = _RUNS.get(tensor.device.type, _RUN)
        for piece in torch.split(tensor.view(-1), run.alone):
            if waiting and (entries + len(piece) > run.joined or piece.device != waiting[0].device):
                yield waiting
                waiting, entries = [], 0
            waiting.append(piece)
            entries += len(piece)
    if waiting:
        yield waiting


def _joined(run: list[Tensor]) -> Tensor:
    return run[0] if len(run) == 1 else torch.cat(run)


def _bits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bit patterns as integers: without the sign, IEEE magnitudes sort as their bit patterns do."""
    return values.to(dtype).view(INTEGER_OF_SIZE[dtype.itemsize])


def _magnitudes(dtype: torch.dtype) -> int:
    """Return the bits of a pattern that are not the sign."""
    return (1 << (dtype.itemsize * 8 - 1)) - 1


def _threshold(tensors: Sequence[Tensor], n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the n-th largest magnitude's bits and how many entries with exactly these bits belong to the n.

    Radix selection: a histogram of the leading 16 bits finds the digit in which the n-th largest lies, the next
    histogram looks only at entries with that digit, and so on to the last bit.
    """
    known = torch.zeros((), dtype=INTEGER_OF_SIZE[dtype.itemsize], device=device)
    remaining = torch.full((), n, dtype=torch.int64, device=device)
    for shift in range(dtype.itemsize * 8 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = total(tensors, partial(_histogram, dtype=dtype, shift=shift, known=known)).flip(0)
        at_least = counts.cumsum(0)  # entries with this digit or a larger one, from the largest digit down
        place = (at_least < remaining).sum()
        remaining = remaining - (at_least.take(place) - counts.take(place))
        known = known | ((_DIGITS - 1 - place) << shift).to(known.dtype)
    return known, remaining


def _histogram(tensors: Sequence[Tensor], dtype: torch.dtype, shift: int, known: Tensor) -> Tensor:
    """Count the digits at a place, of the entries whose digits before it are the known ones."""
    leading = shift + _DIGIT_BITS == dtype.itemsize * 8
    counts: dict[torch.device, Tensor] = {}
    spare: dict[torch.device, Tensor] = {}
    ones: dict[torch.device, Tensor] = {}
    for run in _runs(tensors):
        bits = _bits(_joined(run), dtype)
        device = bits.device
        if device not in counts:
            counts[device] = torch.zeros(_DIGITS + _SPARE, dtype=torch.int64, device=device)
            ones[device] = torch.ones((), dtype=torch.int64, device=device)
        if leading:
            digits = (bits >> shift).bitwise_and_(_DIGITS // 2 - 1)
        else:
            digits = (bits ^ known.to(device)).bitwise_and_(_magnitudes(dtype))  # small where the digits before agree
            if shift:
                digits.bitwise_right_shift_(shift)
            if device not in spare or len(spare[device]) < len(digits):
                places = torch.arange(_DIGITS, _DIGITS + _SPARE, dtype=digits.dtype, device=device)
                spare[device] = places.repeat(-(-len(digits) // _SPARE))
            torch.minimum(digits, spare[device][: len(digits)], out=digits)
        counts[device].index_add_(0, digits, ones[device].expand(len(digits)))
    parts = [part.to(known.device) for part in counts.values()]
    found = sum(parts[1:], parts[0]) if parts else torch.zeros(_DIGITS, dtype=torch.int64, device=known.device)
    return found[:_DIGITS]


def _keep_(tensors: Sequence[Tensor], threshold: Tensor, ties: Tensor, dtype: torch.dtype) -> Tensor:
    """Set to zero what is below the threshold, and all but the first `ties` entries that are equal to it.

    Returns how many ties are left for what comes after these tensors.
    """
    for run in _runs(tensors):
        values = _joined(run)
        lowest, left = threshold.to(values.device), ties.to(values.device)
        bits = _bits(values, dtype) & _magnitudes(dtype)
        rank = (bits == lowest).cumsum(0, dtype=torch.int32)
        bits.add_(rank > left.clamp(0, len(bits)), alpha=-1)  # what is equal and comes later falls below
        values.masked_fill_(bits < lowest, 0)
        ties = ties - rank[-1:].sum().to(ties.device)
        if len(run) > 1:
            torch._foreach_copy_(run, torch.split(values, [len(piece) for piece in run]))
    return ties


def _count_ties(tensor: Tensor, threshold: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch.zeros_like(threshold, dtype=torch.int64)
    for run in _runs([tensor]):
        bits = _bits(_joined(run), dtype) & _magnitudes(dtype)
        found += (bits == threshold.to(bits.device)).sum().to(found.device)
    return found


def _ties_of_each(vector: ShardedVector, threshold: Tensor, ties: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return how many ties are left where each local part begins."""
    counts = torch.stack([_count_ties(tensor, threshold, dtype) for tensor in vector])
    return list((ties - vector.before(counts)).unbind())


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
        for tensor, own in zip(flat, _ties_of_each(flat, threshold, ties, dtype), strict=True):
            _keep_([tensor], threshold, own, dtype)
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


def keep_top_n_in_turn(tensors: Sequence[Tensor], n: int) -> Iterator[Tensor]:
    """Yield what `keep_top_n` returns, each tensor when it is asked for; the n are found before the first.

    Args:
        tensors: As in `keep_top_n`. Each may be overwritten once its own result is there.
        n: As in `keep_top_n`.

    Yields:
        A new tensor for each.

    Raises:
        ValueError: As in `keep_top_n`.
        TypeError: As in `keep_top_n`.

    Examples:
        >>> list(keep_top_n_in_turn([torch.tensor([1.0, -5.0]), torch.tensor([3.0])], 2))
        [tensor([ 0., -5.]), tensor([3.])]
    """
    n = check_count("n", n)
    vector = one_vector(tensors)
    if n >= numel(vector):
        yield from (tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors)
        return
    flat = alike(vector, [tensor.contiguous() for tensor in vector])
    dtype = working_dtype(flat)
    threshold, ties = _threshold(flat, n, dtype, flat[0].device)
    of_each = _ties_of_each(flat, threshold, ties, dtype) if isinstance(flat, ShardedVector) else None
    del flat
    for place, tensor in enumerate(tensors):
        kept = tensor.detach().clone(memory_format=torch.contiguous_format)
        ties = _keep_([local_part(kept)], threshold, of_each[place] if of_each else ties, dtype)
        yield kept
        del kept
