"""What narrows a selection: the class of the owning module, and the number of the block."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from torch import nn

from hf_parcor.targets.errors import TargetError
from hf_parcor.targets.stacks import Stack, find_stacks
from hf_parcor.targets.words import describe_stacks, owner_classes

__all__ = ["ModuleTypes", "parameters_in_layers", "parameters_of_types"]

ModuleTypes = type | str | Collection[type | str]


def parameters_of_types(model: nn.Module, module_types: ModuleTypes) -> set[nn.Parameter]:
    """Return the parameters that belong directly to modules of some classes, or of classes derived from these.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> parameters_of_types(model, "LayerNorm") == parameters_of_types(model, [nn.LayerNorm]) == set(
        ...     model[1].parameters()
        ... )
        True

    Raises:
        TargetError: No module of the model is of one of the classes and has parameters of its own.
        TypeError: An entry is neither a class nor a name.
    """
    entries = (
        [module_types]
        if isinstance(module_types, (type, str))
        else list(_iterated(module_types, "module_types", "classes or their names"))
    )
    if not entries:
        raise TargetError("expected at least one class in module_types, got an empty list, pass None for every class")
    return set().union(*(_of_type(model, entry) for entry in entries))


def parameters_in_layers(model: nn.Module, layers: int | Iterable[int]) -> set[nn.Parameter]:
    """Return the parameters inside the blocks with some indices, of each encoder and decoder that is long enough.

    Of a model with neither, the blocks of its other stacks are meant.

    Examples:
        >>> model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> parameters_in_layers(model, -1) == set(model[1].parameters())
        True

    Raises:
        TargetError: There is no stack, or an index is outside every stack.
        TypeError: An index is not an integer.
    """
    indices = [layers] if isinstance(layers, int) else list(_iterated(layers, "layers", "integers"))
    if not indices:
        raise TargetError("expected at least one index in layers, got an empty list, pass None for every layer")
    every = find_stacks(model)
    stacks = [stack for stack in every if stack.role != "other"] or every
    if not stacks:
        raise TargetError(
            f"expected layers in a model with stacks, got {describe_stacks(every)}, select by name instead"
        )
    return set().union(*(_in_layer(stacks, index) for index in indices))


def _of_type(model: nn.Module, entry: object) -> set[nn.Parameter]:
    if not isinstance(entry, (type, str)):
        raise TypeError(
            f"expected classes or class names in module_types, got {entry!r} of type {type(entry).__name__}, "
            'pass for example nn.Linear or "Linear"'
        )

    def is_wanted(module: nn.Module) -> bool:
        if isinstance(entry, type):
            return isinstance(module, entry)
        return any(ancestor.__name__ == entry for ancestor in type(module).__mro__)

    parameters = {
        parameter for module in model.modules() if is_wanted(module) for parameter in module.parameters(recurse=False)
    }
    if not parameters:
        name = entry if isinstance(entry, str) else entry.__name__
        classes = owner_classes(model)
        nearest = difflib.get_close_matches(name, classes, n=3) or classes[:8]
        raise TargetError(
            f"expected classes of modules with parameters of their own in module_types, got {name}, which no such "
            f"module of the model is, use {', '.join(nearest)}"
        )
    return parameters


def _in_layer(stacks: Collection[Stack], index: object) -> set[nn.Parameter]:
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(
            f"expected integers in layers, got {index!r} of type {type(index).__name__}, pass block numbers"
        )
    reached = [stack for stack in stacks if -len(stack) <= index < len(stack)]
    if not reached:
        raise TargetError(
            f"expected the index of a block of the model in layers, got {index} for a model with "
            f"{describe_stacks(stacks)}, use an index inside one of them"
        )
    return {parameter for stack in reached for parameter in stack.parameters_of(index)}


def _iterated(value: object, argument: str, wanted: str) -> Iterable[object]:
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return value
    raise TypeError(
        f"expected {wanted} in {argument}, got {value!r} of type {type(value).__name__}, pass one or a list"
    )
