"""What a classifier's labels are: one class, any number of classes, or numbers."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor, nn


class Problem(Enum):
    """The values of `config.problem_type` in Transformers."""

    CLASSES = "single_label_classification"
    LABELS = "multi_label_classification"
    NUMBERS = "regression"


def problem_of(model: nn.Module, logits: Tensor, labels: Tensor) -> Problem:
    """Return what a model's labels are: what its `config.problem_type` says, else what Transformers infers.

    That is: numbers if there is one output, one class if labels are integers, any number of classes otherwise.

    Args:
        model: After it has run: models of Transformers write down then what they inferred.
        logits: What it returned.
        labels: Those of the batch.

    Raises:
        ValueError: The configuration names no such type.

    Examples:
        >>> import torch
        >>> problem_of(nn.Identity(), torch.zeros(4, 3), torch.ones(4, dtype=torch.long))
        <Problem.CLASSES: 'single_label_classification'>
        >>> problem_of(nn.Identity(), torch.zeros(4, 1), torch.ones(4))
        <Problem.NUMBERS: 'regression'>
    """
    config: Any = getattr(model, "config", None)
    named = getattr(config, "problem_type", None)
    if named is not None:
        try:
            return Problem(named)
        except ValueError:
            raise ValueError(
                f"config.problem_type: expected one of {', '.join(one.value for one in Problem)}, got {named!r}; set "
                "that of the model"
            ) from None
    one_output = logits.shape[-1] == 1 or (logits.ndim == labels.ndim == 1)
    if one_output:
        return Problem.NUMBERS
    return Problem.LABELS if labels.is_floating_point() else Problem.CLASSES
