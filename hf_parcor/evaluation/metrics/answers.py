"""What a model answers to a batch: its loss and its logits, in whatever form it returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_parcor.batches import private_copy


def own_batch(batch: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return a batch on the model's device that this run of the model may write into.

    It is copied before it moves: a `BatchEncoding` moves in place.
    """
    moved: Mapping[str, Any] = send_to_device(private_copy(batch), next(model.parameters()).device)
    return moved


class Answer(NamedTuple):
    """What a model returned, as far as metrics need it.

    Attributes:
        loss: Its own loss, a single number; None if it returned none.
        logits: Its logits; None if it returned none.
        kind: How the output calls itself, for messages.
    """

    loss: Tensor | None
    logits: Tensor | None
    kind: str

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Any]) -> Answer:
        """Return what a model answers to its own copy of a batch.

        A tuple is read as Transformers makes it: the loss, if there is one, a single number, then the logits.
        """
        output = model(**own_batch(batch, model))
        kind = type(output).__name__
        if isinstance(output, tuple) and not hasattr(output, "logits"):
            tensors = [part for part in output if isinstance(part, Tensor)]
            has_loss = bool(tensors) and tensors[0].ndim == 0
            return cls(tensors[0] if has_loss else None, next(iter(tensors[has_loss:]), None), kind)
        found = [
            output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
            for name in ("loss", "logits")
        ]
        loss, logits = (value if isinstance(value, Tensor) else None for value in found)
        if loss is None and isinstance(found[0], (int, float)):
            loss = torch.tensor(float(found[0]))
        return cls(loss, logits, kind)

    def mean_loss(self) -> float:
        """Return the loss.

        Raises:
            ValueError: There is none, or not one number.
        """
        if self.loss is None:
            raise ValueError(
                f"loss: expected the model to return one beside its logits, got a {self.kind} without; let forward "
                "return it when a batch has labels, or use PredictionMetric, which needs none"
            )
        if self.loss.numel() != 1:
            raise ValueError(
                f"loss: expected one number, the mean over the batch, got shape {tuple(self.loss.shape)}; let the "
                "model return the mean, and take the model out of DataParallel (model.module)"
            )
        return float(self.loss)

    def checked_logits(self) -> Tensor:
        """Return the logits.

        Raises:
            ValueError: There are none.
        """
        if self.logits is None or not self.logits.ndim:
            raise ValueError(
                f"logits: expected the model to return a tensor of scores, got a {self.kind} without; use a model "
                "with a head for the task, or measure with a function of your own: model -> numbers by name"
            )
        return self.logits


def aligned(labels: Tensor, predictions: Tensor, what: str) -> Tensor:
    """Return labels in the shape of the predictions; dimensions of size 1 may be more or fewer.

    Raises:
        ValueError: The shapes differ otherwise, so that it is not known which label is whose.

    Examples:
        >>> aligned(torch.tensor([[0], [1]]), torch.tensor([1, 1]), "one class for each sequence")
        tensor([0, 1])
    """
    given, wanted = ([size for size in tensor.shape if size != 1] for tensor in (labels, predictions))
    if given != wanted:
        raise ValueError(
            f"labels: expected the shape of what the model predicts, {tuple(predictions.shape)}, {what}, got "
            f"{tuple(labels.shape)}; collate one label for each prediction, or measure with a function of your own"
        )
    return labels.reshape(predictions.shape)
