"""Batches bounded by tokens instead of sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of sentences of like length, each of at most so many tokens with padding, in a new order each epoch.

    A batch of n sentences counts as n times its longest one. The batches are made once, so all epochs have as many; in
    each epoch every sentence is in exactly one. On several processes their number is a multiple of that of the
    processes (large batches are halved), so that Accelerate deals all of them out, none twice.

    Args:
        lengths: The tokens of each sentence, of the longer side.
        max_tokens: The bound: 4,096 in the papers.
        seed: Decides which of equally long sentences share a batch, and the order of the batches.
        processes: How many processes share the batches.

    Raises:
        ValueError: A sentence is longer than the bound, there are fewer sentences than processes, or each batch holds
            one sentence and they cannot be dealt out evenly.

    Examples:
        >>> batches = TokenBatchSampler([3, 9, 3, 4], max_tokens=12, seed=0)
        >>> sorted(sorted(batch) for batch in batches)
        [[0, 2, 3], [1]]
    """

    drop_last = True  # to Accelerate: there is no remainder to be filled up

    def __init__(self, lengths: Sequence[int], max_tokens: int, *, seed: int, processes: int = 1) -> None:
        longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        if longest is None or len(lengths) < processes:
            raise ValueError(
                f"lengths: expected a sentence for each of {processes} processes, got {len(lengths)}; give more data"
            )
        if lengths[longest] > max_tokens:
            raise ValueError(
                f"max_tokens: expected room for each sentence, got {max_tokens:,} for sentence {longest:,} of "
                f"{lengths[longest]:,} tokens; leave out what is longer, or raise the bound"
            )
        self._seed, self._epoch = seed, 0
        ties = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        order = sorted(ties, key=lengths.__getitem__)
        self._batches = _even(_filled(order, lengths, max_tokens), processes)

    @property
    def sampler(self) -> TokenBatchSampler:
        """Itself: where Accelerate looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * (self._epoch + 1))
        for index in torch.randperm(len(self._batches), generator=generator).tolist():
            yield list(self._batches[index])


def _filled(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return batches filled one after the other; `order` goes from short to long, so the newest is the longest."""
    starts = [0]
    for place, index in enumerate(order):
        if (place - starts[-1] + 1) * lengths[index] > max_tokens:
            starts.append(place)
    return [list(order[start:stop]) for start, stop in pairwise([*starts, len(order)])]


def _even(batches: list[list[int]], processes: int) -> list[list[int]]:
    """Return the batches with the largest ones halved, until each process gets as many."""
    while len(batches) % processes:
        largest = max(batches, key=len)
        if len(largest) == 1:
            raise ValueError(
                f"max_tokens: expected room for two sentences, so that each of {processes} processes gets as many "
                f"batches, got {len(batches)} batches of one; raise the bound, or give more data"
            )
        batches.remove(largest)
        half = len(largest) // 2
        batches += [largest[:half], largest[half:]]
    return batches
