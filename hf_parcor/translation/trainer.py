"""Batches bounded by tokens, for any subclass of `transformers.Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_parcor.translation.token_batches import TokenBatchSampler

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
