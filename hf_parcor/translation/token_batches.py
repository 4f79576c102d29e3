"""Batches bounded by tokens instead of sentences, also for any subclass of `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback

from hf_parcor.overriding import overriding


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
        ties = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
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
        for index in torch.randperm(len(self._batches), generator=generator, device="cpu").tolist():
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


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class TokenBatchesMixin(_Base):
    """Makes a Trainer train on batches of at most so many tokens, padding included; put it first among the bases.

    `per_device_train_batch_size` counts for nothing then, in training. Every sentence is in one batch an epoch, also
    on several processes, and a run that was interrupted goes on with the batches that were left.

    Args:
        *args: For the Trainer.
        max_tokens: The bound of each batch of a process; None trains with the stock batches.
        **kwargs: For the Trainer.

    Raises:
        ValueError: When training starts, if a sentence is longer than the bound.

    Examples:
        >>> from hf_parcor import Seq2SeqParameterDefenseTrainer
        >>> class TranslationTrainer(TokenBatchesMixin, Seq2SeqParameterDefenseTrainer):
        ...     pass
    """

    def __init__(self, *args: Any, max_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens
        self._epochs = _Epochs()
        self.add_callback(self._epochs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of at most `max_tokens` tokens."""
        if self.max_tokens is None or self.train_dataset is None:
            return super().get_train_dataloader()
        stock, dataset = self.args, self.train_dataset
        sampler = TokenBatchSampler(
            sentence_lengths(dataset),
            self.max_tokens,
            seed=stock.seed if stock.data_seed is None else stock.data_seed,
            processes=self.accelerator.num_processes,
        )
        self._epochs.sampler = sampler
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            num_workers=stock.dataloader_num_workers,
            pin_memory=stock.dataloader_pin_memory,
            persistent_workers=stock.dataloader_persistent_workers,
        )
        # Each process gets as many. Accelerate before 1.14 would make sure of it by a size, which these have not.
        with overriding(self.accelerator.dataloader_config, even_batches=False):
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


def sentence_lengths(rows: Any) -> list[int]:
    """Return the tokens of each row, of the longer of its sides `input_ids` and `labels`.

    Examples:
        >>> sentence_lengths([{"input_ids": [5, 2], "labels": [7, 8, 2]}])
        [3]
    """
    return [max(len(row["input_ids"]), len(row["labels"])) for row in rows]


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch it is; the loops do not reach it when a run goes on within an epoch."""

    def __init__(self) -> None:
        self.sampler: TokenBatchSampler | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))
