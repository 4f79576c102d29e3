"""Models that FSDP2 shards over ranks: whether one is, and how a pass runs on weights that were written since.

A parameter is a `DTensor` between passes, and a plain tensor of gathered values, in another object, while a module
computes. Weights are corrupted on the shards, so whatever was gathered before must be dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 shards the model."""
    return isinstance(model, FSDPModule)


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class of a model; FSDP2 puts one of its own before it.

    Examples:
        >>> class_of(nn.Linear(1, 1))
        <class 'torch.nn.modules.linear.Linear'>
    """
    kind = type(model)
    return kind.__mro__[2] if is_sharded(model) else kind


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def drop_gathered(model: nn.Module) -> None:
    """Let every parameter be its shard again, so that the next use gathers the values of now."""
    for unit in _units(model):
        unit.reshard()


@contextmanager
def reducing(model: nn.Module) -> Iterator[None]:
    """Let a pass leave its gradients on the shards, and no gathered weights, which would be those of another pass."""
    for unit in _units(model):  # the Trainer's loop sets it for each micro-batch anew
        unit.set_requires_gradient_sync(True, recurse=False)
    try:
        yield
    finally:
        drop_gathered(model)
