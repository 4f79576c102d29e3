"""Loss, perplexity and accuracy of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from hf_parcor.evaluation.gradients import shifts_labels
from hf_parcor.evaluation.metrics.over_labels import OverLabels


class LanguageModelMetric(OverLabels):
    """Mean loss of a token, its exponential, and how often the likeliest token is the right one.

    For causal models the prediction at a place is that of the next token, and the first of a row counts for
    nothing; masked and encoder-decoder models predict the label at its own place. All tokens of all batches count
    alike, but for those with the label −100.

    Args:
        batches: Mappings of tensors with `labels`, a list or a `DataLoader`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no batches, they can be walked through only once, or no label counts.
    """

    def _shifts(self, model: nn.Module) -> bool:
        """Return whether a model predicts the label of the next place, as causal ones do."""
        return shifts_labels(model)

    def combine(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return `loss`, `perplexity` and `accuracy` from the sums of all batches.

        Raises:
            ValueError: No label counts.
        """
        means = super().combine(parts)
        return {"loss": means["loss"], "perplexity": _exponential(means["loss"]), "accuracy": means["accuracy"]}


def _exponential(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # a destroyed model
        return math.inf
