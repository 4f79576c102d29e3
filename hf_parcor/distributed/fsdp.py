"""Models that FSDP2 shards over ranks: whether one is, and how a pass runs on weights that were written since.

A parameter is a `DTensor` between passes, and a plain tensor of gathered values, in another object, while a module
computes. Weights are corrupted on the shards, so whatever was gathered before must be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_CHECKPOINTED = "_checkpoint_wrapped_module."  # in names, where FSDP's activation checkpointing wraps modules


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 shards the model."""
    return isinstance(model, FSDPModule)


def as_written(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers, whose names and class are its own; one without as it is.

    These are DataParallel, DistributedDataParallel, and what `torch.compile` returns.

    Examples:
        >>> as_written(nn.DataParallel(nn.Linear(1, 1)))
        Linear(in_features=1, out_features=1, bias=True)
    """
    wraps = isinstance(model, (nn.DataParallel, DistributedDataParallel))
    inner: Any = model.module if wraps else getattr(model, "_orig_mod", model)
    return model if inner is model else as_written(inner)


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the class of a model; FSDP2 puts one of its own before it, and wrappers a module around it.

    Examples:
        >>> class_of(nn.Linear(1, 1))
        <class 'torch.nn.modules.linear.Linear'>
    """
    model = as_written(model)
    kind = type(model)
    if not is_sharded(model):
        return kind
    (own,) = (base for base in kind.__bases__ if issubclass(base, nn.Module) and not issubclass(base, FSDPModule))
    return own


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def drop_gathered(model: nn.Module) -> None:
    """Reshard every parameter, so that the next use gathers its current values."""
    for unit in _units(model):
        unit.reshard()


@contextmanager
def reducing(model: nn.Module) -> Iterator[None]:
    """Reduce a pass's gradients to the shards, and drop its gathered weights, which the next pass must not use."""
    for unit in _units(model):  # the Trainer's loop sets it for each micro-batch anew
        unit.set_requires_gradient_sync(True, recurse=False)
    try:
        yield
    finally:
        drop_gathered(model)


def renewed(names: Iterable[str], model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stand under the names which they had before FSDP2 took the model."""
    drop_gathered(model)
    now = {name.replace(_CHECKPOINTED, ""): parameter for name, parameter in model.named_parameters()}
    return {name: now[name] for name in names}


def on_shards(run_pass: Callable[_Parameters, _Result], model: nn.Module) -> Callable[_Parameters, _Result]:
    """Return the pass of a defended step for a sharded model.

    Args:
        run_pass: Runs forward and backward of pass k, as `DefendedStep` takes it.
        model: The model as the Trainer wrapped it.
    """

    def run_on_shards(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with reducing(model):
            return run_pass(*args, **kwargs)

    return run_on_shards
