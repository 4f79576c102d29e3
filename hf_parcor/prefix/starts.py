"""Where selected parameters come into a model's computation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


class PrefixError(RuntimeError):
    """The model cannot be cut; the message says why."""


class NothingToReuse(PrefixError):  # noqa: N818, no mistake of anybody's
    """The selected parameters come in at the very start."""


def refuse_all_of_the_model(model: nn.Module, selected: Mapping[str, Tensor]) -> None:
    """Raise `NothingToReuse` where every parameter is selected: no run is needed to know."""
    identities = {id(parameter) for parameter in selected.values()}
    if all(id(parameter) in identities for parameter in model.parameters()):
        raise NothingToReuse("all of the model is selected")


def find_starts(model: nn.Module, selected: Mapping[str, Tensor], called: Collection[nn.Module]) -> list[nn.Module]:
    """Return the called modules in which a selected parameter comes into the computation.

    Raises:
        PrefixError: A selected parameter is held by no module that is called, nor is any around it.
    """
    identities = {id(parameter) for parameter in selected.values()}
    modules = dict(model.named_modules(remove_duplicate=False))
    starts = []
    for name, module in modules.items():
        if not any(id(parameter) in identities for parameter in module._parameters.values()):
            continue
        parts = name.split(".") if name else []
        path = [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
        # What a checkpoint computes again must not be cut inside.
        deepest = next((depth for depth in range(len(path)) if _is_checkpointed(path[: depth + 1])), len(path) - 1)
        # A module that is never called itself is used by the nearest one around it that is.
        around = [module for module in path[: deepest + 1] if module in called]
        if not around:
            raise PrefixError(f"{name} holds a selected parameter, and no module around it is called")
        starts.append(around[-1])
    return starts


def _is_checkpointed(path: Sequence[nn.Module]) -> bool:
    """Say whether the last module of a path is one that a checkpoint computes again as a whole."""
    module = path[-1]
    if hasattr(module, "_checkpoint_wrapped_module"):  # of FSDP's activation checkpointing
        return True
    if isinstance(module, (nn.ModuleList, GradientCheckpointingLayer)):
        return bool(getattr(module, "gradient_checkpointing", False))
    parents = [other for other in path[:-1] if not isinstance(other, nn.ModuleList)]
    return bool(parents) and getattr(parents[-1], "gradient_checkpointing", False) is True
