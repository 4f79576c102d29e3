"""Loss, perplexity and accuracy of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from hf_parcor.evaluation.gradients import shifts_labels
from hf_parcor.evaluation.metrics.over_batches import OverLabels
from hf_parcor.records.metric_info import NATS, SHARE, MetricInfo


class LanguageModelMetric(OverLabels):
    """Mean loss of a token, its exponential, and how often the likeliest token is the right one.

    For causal models the prediction at a place is that of the next token, and the first of a row counts for
    nothing; masked and encoder-decoder models predict the label at its own place. All tokens of all batches count
    alike, but for those with the label −100. What is not finite is never right, as in `ClassificationMetric`.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or no label counts.
    """

    _infos: ClassVar[Mapping[str, MetricInfo]] = {
        "loss": MetricInfo(False, NATS),
        "perplexity": MetricInfo(False),
        "accuracy": MetricInfo(True, SHARE),
    }

    def _shifts(self, model: nn.Module) -> bool:
        """Return whether a model predicts the label of the next place, as causal ones do."""
        return shifts_labels(model)

    def combine(self, parts: Sequence[Any]) -> dict[str, float]:
        """Return `loss`, `perplexity` and `accuracy` from the sums of all batches; else as `ClassificationMetric`.

        Raises:
            ValueError: No label counts.
        """
        means = super().combine(parts)
        loss, accuracy = means.pop("loss"), means.pop("accuracy")
        return {"loss": loss, "perplexity": _exponential(loss), "accuracy": accuracy, **means}


def _exponential(loss: float) -> float:
    if loss == -math.inf:  # no loss of a model: a perplexity of 0 would be better than any
        return math.nan
    try:
        return math.exp(loss)
    except OverflowError:  # a destroyed model
        return math.inf
