"""The mode that a model is in, training or evaluation, and putting it back; and where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module's own training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices that a model's parameters lie on."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))
