"""Models that FSDP2 shards over ranks: what a defended step needs there.

A parameter is a `DTensor` between passes, and a plain tensor of gathered values, in another object, while a module
computes. Weights are corrupted on the shards, so whatever was gathered before must be dropped. Gradients are reduced
in every pass, also where the Trainer's loop defers that to the last micro-batch: FSDP2 would keep whole gradients
until then, out of reach. They are means over ranks, so the corruption is that of the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_parcor.defenses import Objective

_CHECKPOINTED = "_checkpoint_wrapped_module."  # in names, where FSDP's activation checkpointing wraps modules


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 shards the model."""
    return isinstance(model, FSDPModule)


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def drop_gathered(model: nn.Module) -> None:
    """Let every parameter be its shard again, so that the next use gathers the values of now."""
    for unit in _units(model):
        unit.reshard()


def renewed(names: Iterable[str], model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stand under the names which they had before FSDP2 took the model."""
    drop_gathered(model)
    now = {name.replace(_CHECKPOINTED, ""): parameter for name, parameter in model.named_parameters()}
    return {name: now[name] for name in names}


def on_shards(run_pass: Callable[[Objective, int], Tensor], model: nn.Module) -> Callable[[Objective, int], Tensor]:
    """Return the pass of a defended step for a sharded model.

    It leaves its gradients on the shards, and no gathered weights, which would be those of this pass in the next one.

    Args:
        run_pass: Runs forward and backward of pass k, as `DefendedStep` takes it.
        model: The model as the Trainer wrapped it.
    """

    def run_on_shards(objective: Objective, index: int) -> Tensor:
        for unit in _units(model):  # the Trainer's loop sets it for each micro-batch anew
            unit.set_requires_gradient_sync(True, recurse=False)
        try:
            return run_pass(objective, index)
        finally:
            drop_gathered(model)

    return run_on_shards
