"""What is not finite is never a right answer."""

from __future__ import annotations

import torch
from torch import Tensor

NOT_FINITE = "predictions_not_finite"
"""The share of predictions that were not finite: among the numbers of a metric where there was any."""


def chosen_class(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest class, and whether it is one: there is no NaN, and the largest logit is finite.

    Logits of −∞ rule classes out, which models do on purpose; where nothing else is left, or one is +∞, there is no
    answer. PyTorch's `argmax` would call the place of the first NaN a class.

    Args:
        logits: Scores, a class each along the last dimension.

    Examples:
        >>> inf, nan = float("inf"), float("nan")
        >>> chosen_class(torch.tensor([[0.0, 1.0, -inf], [0.0, nan, 2.0], [0.0, inf, 1.0], [-inf, -inf, -inf]]))
        (tensor([1, 1, 1, 0]), tensor([ True, False, False, False]))
    """
    largest, index = logits.max(-1)  # NaN if there is one
    return index, torch.isfinite(largest)


def chosen_labels(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each label whether it is chosen, its sigmoid above 1/2, and whether that is an answer.

    It is none where the logit is NaN or +∞; −∞ rules a label out.

    Examples:
        >>> chosen_labels(torch.tensor([1.0, -2.0, float("-inf"), float("nan")]))
        (tensor([ True, False, False, False]), tensor([ True,  True,  True, False]))
    """
    return logits > 0, ~(logits.isnan() | logits.isposinf())


def share_not_finite(count: int, total: int) -> dict[str, float]:
    """Return the share by its name, or nothing where all predictions were finite.

    Examples:
        >>> share_not_finite(1, 4), share_not_finite(0, 4)
        ({'predictions_not_finite': 0.25}, {})
    """
    return {NOT_FINITE: count / total} if count else {}
