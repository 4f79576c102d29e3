"""The first examples of a batch, for passes that see only a part of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from hf_parcor.labels import count_labels


def first_examples(batch: Any, share: float) -> Any:
    """Return the first `⌈share · n⌉` of a batch's n examples; what is not per example stays.

    Args:
        batch: Tensors, and lists, of n examples, in mappings, lists or tuples.
        share: In (0, 1]; 1 returns the batch itself.

    Raises:
        ValueError: A tensor's first dimension is not that of the examples.
    """
    if share == 1:
        return batch
    examples = find_batch_size(batch)  # type: ignore[no-untyped-call]
    if examples is None:
        raise ValueError("batch_share: expected a batch with tensors, got one without; set batch_share to 1")
    return _first(batch, math.ceil(share * examples), examples)


def _first(value: Any, count: int, examples: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0:
        if len(value) != examples:
            raise ValueError(
                f"batch_share: expected tensors with {examples} examples in their first dimension, got one of shape "
                f"{tuple(value.shape)}; set batch_share to 1 for this model"
            )
        return value[:count]
    if isinstance(value, Mapping):
        return {name: _first(part, count, examples) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and not any(isinstance(part, Tensor) for part in value):
        return value[:count] if len(value) == examples else value
    if isinstance(value, (list, tuple)):
        return type(value)(_first(part, count, examples) for part in value)
    return value


def items_of_part(items: Tensor | int | None, batch: Any, share: float, shifted: bool = False) -> Tensor | int | None:
    """Return what a part's loss is to be divided by, so that it has the scale of the whole batch's.

    Models divide the sum over labels by the number of labels, `items`, of all batches of an optimizer step; a part
    with a third of its batch's labels is to be divided by a third of that.

    Args:
        items: The number of labels, None where the model takes a mean.
        batch: The whole batch.
        share: As in `first_examples`.
        shifted: Whether the loss is that of the next token, so that the first label counts for nothing.
    """
    if items is None or share == 1 or not isinstance(batch, Mapping):
        return items
    part, whole = (count_labels(some, shifted=shifted) for some in (first_examples(batch, share), batch))
    if part is None or whole is None:
        return items
    scaled: Tensor = torch.as_tensor(items, device=whole.device) * part / whole.clamp(min=1)
    return torch.where(part > 0, scaled, 1.0)  # no label, no loss
