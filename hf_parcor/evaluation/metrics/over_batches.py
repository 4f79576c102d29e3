"""Metrics that are made batch by batch: what all of them share, those over labels, and those over pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_parcor.batches import IGNORED_LABEL, check_batch
from hf_parcor.evaluation.identity.repeated_batches import check_repeatable, unseen
from hf_parcor.evaluation.identity.settings import fixed_attributes
from hf_parcor.evaluation.losses import with_prompt
from hf_parcor.evaluation.metrics.scores import Score, scored
from hf_parcor.evaluation.outputs import Output, Problem, aligned, chosen_class, share_not_finite
from hf_parcor.records.metric_info import MetricInfo, stated_by

ANSWERS = "logits_of_answers"
"""What a metric finds on a batch may have logits by this name: of answers that the model does not return itself."""


class OverBatches(ABC):
    """A `BatchMetric` over data that can be walked through repeatedly.

    The model is measured in its current mode; `CorruptionEvaluator` puts it into evaluation mode.

    Args:
        batches: Mappings of tensors, as a list or a `DataLoader`.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or they are single examples, such as
            the rows of a data set.
    """

    _infos: ClassVar[Mapping[str, MetricInfo]] = {}
    _named: ClassVar[bool] = False
    """Whether a batch has to be a mapping."""
    kept_bytes: int = 0
    """What is found on all batches, until it is combined: set by `combine` where that is more than some numbers."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Refuse a class whose numbers would depend on how many corruptions are measured at once.

        Raises:
            TypeError: It has a `__call__` of its own.
        """
        super().__init_subclass__(**settings)
        if "__call__" in vars(cls):
            raise TypeError(
                f"{cls.__name__}: expected of_batch or combine of its own, got __call__, which is not called where "
                "several corruptions are measured on each batch; change the numbers in combine"
            )

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        check_repeatable(batches)
        with unseen(batches):
            first = next(iter(batches), None)
        if first is None:
            raise ValueError("batches: expected at least one batch of data, got none; is the data set empty?")
        check_batch(first, named=self._named)
        self._batches = batches

    @property
    def batches(self) -> Iterable[Mapping[str, Any]]:
        """The data."""
        return self._batches

    def identity(self) -> dict[str, Any]:
        """Return what determines the numbers besides data and class: all attributes that are set only once."""
        return {name.lstrip("_"): value for name, value in fixed_attributes(self).items() if name != "_batches"}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean; None for an unknown name."""
        return self._infos.get(name)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics over all batches."""
        return self.combine([self.of_batch(model, batch) for batch in self._batches])

    @staticmethod
    def _labels(batch: Mapping[str, Any]) -> Tensor:
        """Return the labels of a batch.

        Raises:
            ValueError: It has none.
        """
        if "labels" not in batch:
            raise ValueError(f"batches: expected labels in each, got {', '.join(batch)}; put 'labels' into them")
        return torch.as_tensor(batch["labels"])

    @abstractmethod
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return what one batch adds."""

    @abstractmethod
    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return the metrics from what all batches add, in their order."""


@runtime_checkable
class BatchMetric(Protocol):
    """A metric that is computed batch by batch, and combined from the results of all batches.

    This lets `CorruptionEvaluator` run what does not depend on the corrupted weights once a batch for all corruptions,
    and give each of n processes every n-th batch. The result of a batch must then be picklable.
    """

    @property
    def batches(self) -> Iterable[Mapping[str, Any]]:
        """The data."""
        ...

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        """Return the metrics over all batches."""
        ...

    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return what one batch adds."""
        ...

    def combine(self, parts: Sequence[Any]) -> Mapping[str, float]:
        """Return the metrics from what all batches add, in their order."""
        ...


class AroundMetric:
    """Numbers beside those of a metric, which says what is looked at, and what is to be known of them.

    Args:
        metric: The metric.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    @property
    def primary_metric(self) -> str | None:
        """The metric's own."""
        return getattr(self._metric, "primary_metric", None)

    @property
    def notes(self) -> tuple[str, ...]:
        """The metric's own, such as the signature of a score."""
        return tuple(getattr(self._metric, "notes", ()))


@runtime_checkable
class Identified(Protocol):
    """A metric, a loss or a score that says what determines its numbers, besides the data of a `BatchMetric`.

    A checkpoint goes on only if that is the same. Without this method, public attributes and code are compared.
    """

    def identity(self) -> Mapping[str, Any]:
        """Return the settings by name: plain values, and objects that are called, such as a score or a tokenizer."""
        ...


@runtime_checkable
class Informed(Protocol):
    """A metric or a score that says what its numbers mean.

    Instead of the method, attributes `primary_metric`, `greater_is_better` and `unit` can describe a single number.
    """

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers of this name mean; None if unknown."""
        ...


class OverLabels(OverBatches):
    """The share of labels that are the likeliest class, and the mean loss of a label; the label −100 is ignored."""

    _named: ClassVar[bool] = True

    def _shifts(self, model: nn.Module) -> bool:
        """Return whether a model predicts the label of the next place; here none does."""
        return False

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the sums over the labels of one batch.

        Raises:
            ValueError: There are no labels, the model returns no logits, or the shape of the labels is not that of the
                predictions.
        """
        output = Output.of(model, batch)
        return self._classes(model, output, output.checked_logits(), self._labels(batch), batch)

    def _classes(
        self, model: nn.Module, output: Output, logits: Tensor, labels: Tensor, batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        predicted, finite = chosen_class(logits)
        given, shifts = with_prompt(model, labels), self._shifts(model)
        if shifts and "shift_labels" in batch:  # shifted already, and what the loss is taken of
            shifts, given = False, torch.as_tensor(batch["shift_labels"])
        labels = aligned(given.to(logits.device), predicted, "a class for each")
        if shifts:
            labels, predicted, finite = labels[..., 1:], predicted[..., :-1], finite[..., :-1]
        counts = labels != IGNORED_LABEL
        count = int(counts.sum())
        return {
            "correct": int(((predicted == labels) & finite & counts).sum()),
            # The mean over no label is NaN.
            "loss": output.mean_loss(Problem.CLASSES, given, shifted=shifts) * count if count else 0.0,
            "labels": count,
            "not_finite": int((counts & ~finite).sum()),
        }

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return `accuracy` and `loss` from the sums of all batches, and the share that was not finite, if any was.

        Raises:
            ValueError: All labels are −100, or there are none.
        """
        accuracy = sum_of(parts, "correct") / label_count(parts)
        return {"accuracy": accuracy, **mean_loss(parts), **not_finite(parts)}


def sum_of(parts: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the sum over batches."""
    return sum(part[name] for part in parts)


def label_count(parts: Sequence[Mapping[str, Any]]) -> int:
    """Return how many labels count.

    Raises:
        ValueError: None does.
    """
    count = int(sum_of(parts, "labels"))
    if not count:
        raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
    return count


def mean_loss(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over all labels, as `loss`."""
    return {"loss": sum_of(parts, "loss") / label_count(parts)}


def not_finite(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return for which share of the labels the prediction was not finite, by its name; nothing where all were."""
    return share_not_finite(sum_of(parts, "not_finite"), label_count(parts))


NO_TEXT = "\ufffd"  # not "", which some scores cannot divide by, and which an empty reference equals

# Predictions, references, and how many predictions are odd: not finite, say.
Pairs = tuple[list[Any], list[Any], Mapping[str, int]]


class OverPairs(OverBatches):
    """A score of a model's predictions compared with references, over all batches together.

    Args:
        batches: Mappings of tensors with `labels`, as a list or a `DataLoader`.
        score: Called as `score(predictions=..., references=...)` with lists; returns a number or numbers by name.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number.
    """

    _named: ClassVar[bool] = True

    def __init__(self, batches: Iterable[Mapping[str, Any]], score: Score) -> None:
        super().__init__(batches)
        self._score = score

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the score, such as a signature, for the record."""
        return tuple(getattr(self._score, "notes", ()))

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the score states about its numbers of this name; None if nothing."""
        return stated_by(self._score, name)

    @abstractmethod
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        """Return predictions and references of one batch, and how many of the predictions are odd, by name."""

    def combine(self, parts: Sequence[Pairs]) -> dict[str, float]:
        """Return the score of all batches, and the share of each kind of odd predictions.

        Raises:
            ValueError: There are no labels other than −100, or the score returns no number.
        """
        predictions = [prediction for part, _, _ in parts for prediction in part]
        references = [reference for _, part, _ in parts for reference in part]
        if not references:
            raise ValueError("batches: expected labels other than -100, got none; put labels into the batches")
        odd = sum((Counter(counts) for _, _, counts in parts), Counter[str]())
        # A list has the tags of a sentence.
        size = sum(len(one) if isinstance(one, list) else 1 for one in predictions)
        shares = {name: count / size for name, count in odd.items()}
        return {**scored(self._score, predictions, references), **shares}
