"""Predictions and references of all batches, scored at once by any library."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_parcor.evaluation.metrics.over_batches import OverBatches
from hf_parcor.evaluation.metrics.scores import Score, scored
from hf_parcor.metric_info import MetricInfo, stated_by

# Predictions, references, and how many predictions are odd: not finite, say.
Pairs = tuple[list[Any], list[Any], Mapping[str, int]]


class OverPairs(OverBatches):
    """A score of what a model predicts beside what is right, over all batches together.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`.
        score: Called as `score(predictions=..., references=...)` with lists, returns a number or numbers by name.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], score: Score, *, progress: bool = False) -> None:
        super().__init__(batches, progress=progress)
        self._score = score

    @property
    def notes(self) -> tuple[str, ...]:
        """What the score says of itself, such as a signature, for the record."""
        return tuple(getattr(self._score, "notes", ()))

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the score states of its numbers of this name; None if that is nothing."""
        return stated_by(self._score, name)

    @abstractmethod
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        """Return predictions and references of one batch, and how many of the predictions are odd, by name."""

    def combine(self, parts: Sequence[Pairs]) -> dict[str, float]:
        """Return the score of all batches, and the share of each kind of odd predictions that there is.

        Raises:
            ValueError: No label counts, or the score returns no number.
        """
        predictions = [prediction for part, _, _ in parts for prediction in part]
        references = [reference for _, part, _ in parts for reference in part]
        if not references:
            raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
        odd = sum((Counter(counts) for _, _, counts in parts), Counter[str]())
        shares = {name: count / len(predictions) for name, count in odd.items()}
        return {**scored(self._score, predictions, references), **shares}
