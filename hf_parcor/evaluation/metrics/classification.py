"""What a classifier predicts, compared with the labels: accuracy and loss, or scores of any library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.devices import in_float64
from hf_parcor.evaluation.metrics.over_batches import OverLabels, OverPairs, Pairs, mean_loss, not_finite, sum_of
from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.evaluation.outputs import (
    NOT_FINITE,
    Output,
    Problem,
    aligned,
    chosen_class,
    chosen_labels,
    problem_of,
)
from hf_parcor.records.metric_info import SHARE, SQUARED_LABEL_UNITS, MetricInfo

_NOT_FINITE_TAG = "B-not-finite"


class ClassificationMetric(OverLabels):
    """Accuracy in [0, 1] and mean loss of a classifier of sequences, tokens or images, over batches with labels.

    The kind of labels is what `config.problem_type` says, or else what Transformers infers:

    - one class each: `accuracy` and `loss`, means over all labels; the label −100 is ignored.
    - any number of classes each, as 0 and 1: `accuracy`, the share of rows whose labels are all right; `f1` over all
      single labels (micro), 0 if there is nothing to find; and `loss`. A label is chosen if its logit is > 0.
    - numbers: `mse`, `pearson` (the mean over several outputs; NaN if one of them, or its labels, do not vary) and
      `loss`.

    The loss is the model's own. If a model returns only logits, bare or by name, it is the usual loss of Transformers
    for such labels (`usual_loss`); such a model need not take labels.

    A prediction that is not finite is never right: a class counts only if no logit of its row is NaN and the largest
    is finite, a label only if its logit is neither NaN nor +∞. If there are other predictions, their share is
    `predictions_not_finite`.

    Args:
        batches: Mappings of tensors with `labels`, as a list or a `DataLoader`. Labels have the shape of the
            predictions, for example (B,); (B, 1) is the same.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or all labels are ignored.
    """

    _infos: ClassVar[Mapping[str, MetricInfo]] = {
        "accuracy": MetricInfo(True, SHARE),
        "f1": MetricInfo(True, SHARE),
        "mse": MetricInfo(False, SQUARED_LABEL_UNITS),
        "pearson": MetricInfo(True),
        "loss": MetricInfo(False),  # the model's own, in whatever unit
    }

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """Return the sums over the labels of one batch; for numbers, the numbers themselves.

        Raises:
            ValueError: There are no labels, the model returns no logits, or the shape of the labels is not that of the
                predictions.
        """
        labels = self._labels(batch)
        output = Output.of(model, batch)
        logits = output.checked_logits()
        problem = problem_of(model, logits, labels)
        if problem is Problem.CLASSES:
            found = self._classes(model, output, logits, labels, batch)
        elif problem is Problem.LABELS:
            found = _of_labels(output, logits, labels.to(logits.device))
        else:
            found = _of_numbers(output, logits, labels.to(logits.device))
        return {"problem": problem.value, **found}

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return the metrics from the results of all batches, and the share that was not finite, if there is one.

        Raises:
            ValueError: All labels are ignored, or batches have labels of different kinds.
        """
        problems = dict.fromkeys(part["problem"] for part in parts)
        if len(problems) > 1:
            raise ValueError(
                f"labels: expected those of one kind of problem in all batches, got {' and '.join(problems)}; set "
                "config.problem_type, and collate labels alike"
            )
        problem = Problem(*problems)
        if problem is Problem.LABELS:
            return _f1_and_exact_match(parts)
        return _errors(parts) if problem is Problem.NUMBERS else super().combine(parts)


def _of_labels(output: Output, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    labels = aligned(labels, logits, "a 0 or 1 for each label of a row")
    others = labels[(labels != 0) & (labels != 1)]
    if len(others):
        raise ValueError(
            f"labels: expected a 0 or 1 for each label of a row, got {others[0].item():g}; leave out rows where one "
            "is missing, or for regression set config.problem_type = 'regression'"
        )
    chosen, finite = chosen_labels(logits)
    truth = labels.bool()
    chosen = torch.where(finite, chosen, ~truth)  # wrong, whichever would be right
    return {
        "exact": int((chosen == truth).all(-1).sum()),
        "rows": truth[..., 0].numel(),
        "found": int((chosen & truth).sum()),
        "chosen": int(chosen.sum()),
        "true": int(truth.sum()),
        "loss": output.mean_loss(Problem.LABELS, labels) * labels.numel(),
        "labels": labels.numel(),
        "not_finite": int((~finite).sum()),
    }


def _f1_and_exact_match(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    odd = not_finite(parts)  # says if no label counts
    either = sum_of(parts, "chosen") + sum_of(parts, "true")
    return {
        "accuracy": sum_of(parts, "exact") / sum_of(parts, "rows"),
        "f1": 2 * sum_of(parts, "found") / either if either else 0.0,
        **mean_loss(parts),
        **odd,
    }


def _of_numbers(output: Output, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    labels = aligned(labels, logits, "a number for each output")
    missing = ~labels.isfinite() if labels.is_floating_point() else labels == IGNORED_LABEL
    if bool(missing.any()):
        raise ValueError(
            f"labels: expected a number for each output of a regression, got {labels[missing][0].item()}, which "
            "stands for none; leave such rows out, or use a model with num_labels of two or more for classes"
        )
    width = logits.shape[-1] if logits.ndim > 1 else 1
    return {
        "predictions": in_float64(logits).reshape(-1, width).tolist(),
        "references": in_float64(labels).reshape(-1, width).tolist(),
        "loss": output.mean_loss(Problem.NUMBERS, labels) * labels.numel(),
        "labels": labels.numel(),
        "not_finite": int((~logits.isfinite()).sum()),
    }


def _errors(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    odd = not_finite(parts)  # says if no label counts
    predictions, references = (
        np.array([row for part in parts for row in part[name]]) for name in ("predictions", "references")
    )
    with np.errstate(all="ignore"):  # NaN and infinities are what was found
        return {
            "mse": float(np.square(predictions - references).mean()),
            "pearson": float(np.mean(correlations(predictions, references))),
            **mean_loss(parts),
            **odd,
        }


def correlations(one: Any, other: Any) -> Any:
    """Return Pearson's correlation of each column of two arrays, (rows, columns); NaN where one does not vary."""
    varies = (one != one[0]).any(0) & (other != other[0]).any(0)  # the mean of equal numbers may round to another one
    one, other = (values - values.mean(0) for values in (one, other))
    found = (one * other).sum(0) / np.sqrt(np.square(one).sum(0)) / np.sqrt(np.square(other).sum(0))
    return np.where(varies, found, np.nan)


class PredictionMetric(OverPairs):
    """A score of the predicted classes of sequences, tokens or images, over all batches together.

    Scores of libraries expect a class for each prediction. For a prediction that is not finite, as defined in
    `ClassificationMetric`, the score gets the class after the label, which is wrong and known to the score. The share
    of these predictions is `predictions_not_finite`.

    Args:
        batches: Mappings of tensors with `labels`, as a list or a `DataLoader`; the label −100 is ignored.
        score: Called as `score(predictions=..., references=...)` with lists of whole numbers; returns numbers by name.
            For example `evaluate.load("f1").compute`, by name or from a local folder, or a function around
            scikit-learn.
        class_names: The names of the classes, in order. If given, the score gets a list of names for each sentence, as
            `EntityScore` and the seqeval of `evaluate` take tags. A prediction that is not finite becomes an entity of
            a type of its own, because the class after the label might continue the right entity.

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

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        score: Score,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(batches, score)
        self._class_names = None if class_names is None else tuple(class_names)

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Pairs:
        """Return predicted classes and labels of one batch without −100, and how many were not finite.

        Raises:
            ValueError: There are no labels, the model returns no logits, the shape of the labels is not that of the
                predictions, or they are not one class each.
        """
        labels = self._labels(batch)
        logits = Output.of(model, batch).checked_logits()
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
        odd = {NOT_FINITE: int((counts & ~finite).sum())}
        names = self._class_names
        if names is None:
            return predicted[counts].tolist(), labels[counts].tolist(), odd
        if labels.ndim != 2 or len(names) != logits.shape[-1]:
            raise ValueError(
                f"class_names: expected the names of {logits.shape[-1]} classes, and labels of the words of "
                f"sentences, got {len(names)} names and labels of shape {tuple(labels.shape)}; name all, or leave "
                "class_names out"
            )
        told = [*names, _NOT_FINITE_TAG]

        def of_sentences(classes: Tensor) -> list[Any]:
            rows = zip(classes, counts, strict=True)
            return [[told[one] for one in row[own].tolist()] for row, own in rows if own.any()]

        return of_sentences(torch.where(finite, predicted, len(names))), of_sentences(labels), odd
