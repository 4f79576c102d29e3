"""What is selected where nothing is named: the parameters that can be trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from hf_parcor.targets.selection import select_parameters


def select_trainable(
    model: nn.Module, target_modules: str | Collection[str] | None = None, **selection: Any
) -> dict[str, nn.Parameter]:
    """Select parameters as `select_parameters` does; where no target is named, without the frozen ones.

    Models hold fixed tables, such as sinusoidal positions, and adapters freeze the model around them: neither is a
    result of training. What is named is taken as it is. A model without any trainable parameter is taken whole.

    Args:
        model: The model.
        target_modules: As in `select_parameters`; None for all parameters that can be trained.
        **selection: `exclude_modules`, `module_types` and `layers` of `select_parameters`.

    Raises:
        TargetError: Something finds nothing, or nothing is left.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = model[0].requires_grad_(False)
        >>> list(select_trainable(model))
        ['1.weight', '1.bias']
        >>> list(select_trainable(model, ["0"]))
        ['0.weight', '0.bias']
    """
    if target_modules is not None:
        return select_parameters(model, target_modules, **selection)
    everything = select_parameters(model, "all", **selection)
    fixed = sinusoidal_tables(model)
    return {
        name: parameter for name, parameter in everything.items() if parameter.requires_grad and parameter not in fixed
    } or everything


def sinusoidal_tables(model: nn.Module) -> set[nn.Parameter]:
    """Return the tables of positions that are computed and not trained, those of Marian, Pegasus or FSMT.

    They are frozen in a new model, but `from_pretrained` of Transformers 5 forgets that.
    """
    tables = (module for module in model.modules() if "Sinusoidal" in type(module).__name__)
    return {parameter for table in tables for parameter in table.parameters()}
