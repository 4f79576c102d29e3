"""What a classifier predicts, compared with the labels by any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_parcor.evaluation.metrics.answers import Answer, aligned
from hf_parcor.evaluation.metrics.finite import NOT_FINITE, chosen_class
from hf_parcor.evaluation.metrics.over_pairs import OverPairs, Pairs
from hf_parcor.evaluation.metrics.problem import Problem, problem_of
from hf_parcor.labels import IGNORED_LABEL


class PredictionMetric(OverPairs):
    """Predicted classes of all batches, of sequences, tokens or images, scored at once.

    Scores of libraries know no prediction that is none. Where it is not finite, as `ClassificationMetric` has it, the
    score gets a class that is wrong, the one after the label, so that it is never right and no score meets a class
    that it does not know; the share of these is `predictions_not_finite`.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`; the label −100 does not count.
        score: Called as `score(predictions=..., references=...)` with lists of whole numbers, returns numbers by
            name: `evaluate.load("f1").compute`, of a name or a local folder, or a function around scikit-learn.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or the score returns no number.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Sign(nn.Linear):
        ...     def forward(self, inputs, labels):
        ...         return SimpleNamespace(logits=torch.stack([-inputs, inputs], -1))
        >>> batches = [{"inputs": torch.tensor([-1.0, 2.0, 3.0]), "labels": torch.tensor([0, 1, 0])}]
        >>> def right(predictions, references):
        ...     return {"right": sum(p == r for p, r in zip(predictions, references))}
        >>> PredictionMetric(batches, right)(Sign(1, 1))
        {'right': 2.0}
    """

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        """Return predicted classes and labels of one batch, where the labels count, and how many were not finite.

        Raises:
            ValueError: There are no labels, the model returns no logits, the labels have not the shape of what it
                predicts, or they are not one class each.
        """
        labels = self._labels(batch)
        logits = Answer.of(model, batch).checked_logits()
        problem = problem_of(model, logits, labels)
        if problem is not Problem.CLASSES:
            raise ValueError(
                f"model: expected one that predicts one class for each label, got one for {problem.value}; use "
                "ClassificationMetric, which knows its scores, or a function of your own"
            )
        predicted, finite = (found.cpu() for found in chosen_class(logits))
        labels = aligned(labels.cpu(), predicted, "a class for each")
        predicted = torch.where(finite, predicted, (labels.long() + 1) % logits.shape[-1])
        counts = labels != IGNORED_LABEL
        return predicted[counts].tolist(), labels[counts].tolist(), {NOT_FINITE: int((counts & ~finite).sum())}
