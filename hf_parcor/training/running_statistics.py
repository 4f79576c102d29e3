"""BatchNorm's running statistics, which must see clean activations only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by its batch, as in training, without moving its running mean and variance.

    Examples:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> with frozen_running_statistics(norm):
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    tracking = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
