"""Loss, perplexity and accuracy of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from hf_parcor.evaluation.gradients import count_items, shifts_labels
from hf_parcor.evaluation.metrics.over_batches import OverBatches
from hf_parcor.labels import IGNORED_LABEL


class LanguageModelMetric(OverBatches):
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

    @torch.no_grad()
    def of_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return the sums over the tokens of one batch."""
        device = next(model.parameters()).device
        shifted = shifts_labels(model)
        labels = self._labels(batch).to(device)
        output = model(**send_to_device(batch, device))
        predicted = output.logits.argmax(-1)
        if shifted:
            labels, predicted = labels[:, 1:], predicted[:, :-1]
        tokens = count_items(batch, shifted=shifted)
        return {
            "correct": int(((predicted == labels) & (labels != IGNORED_LABEL)).sum()),
            "loss": float(output.loss) * tokens if tokens else 0.0,  # the mean over no token is NaN
            "tokens": tokens,
        }

    def combine(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return `loss`, `perplexity` and `accuracy` from the sums of all batches.

        Raises:
            ValueError: No label counts.
        """
        accuracy, loss = self._accuracy_and_loss(parts, "tokens")
        return {"loss": loss, "perplexity": _exponential(loss), "accuracy": accuracy}


def _exponential(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # a destroyed model
        return math.inf
