"""Groupings of a model's parameters, for a probe of one group after the other.

Their names are those of the model that is measured: the one inside of DDP, or of what `torch.compile` returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set

from torch import nn

from hf_parcor.distributed.fsdp import as_written
from hf_parcor.targets.kinds import is_normalization, linear_modules, output_layers, parameters_below
from hf_parcor.targets.matching import WORDS, TargetError, parameters_by_module
from hf_parcor.targets.selection import Selector
from hf_parcor.targets.stacks import find_stacks

__all__ = ["GROUPINGS", "Groups", "Targets", "by_adapter", "by_kind", "by_layer", "by_module"]

Groups = dict[str, "str | list[str]"]
"""Targets, as `select_parameters` takes them, by a name for tables and plots."""

# Each parameter is of the first kind that has it: a normalization layer inside attention is no attention.
_KINDS: Mapping[str, Callable[[nn.Module], set[nn.Parameter]]] = {
    "layer-norm": WORDS["layer-norm"].select,
    "other normalization": lambda model: parameters_below(filter(is_normalization, model.modules())),
    "attention": WORDS["attention"].select,
    "embedding": WORDS["embedding"].select,
    "output": lambda model: parameters_below(output_layers(model)),
    "linear": lambda model: parameters_below(linear_modules(model)),
    "convolution": lambda model: parameters_below(filter(_is_convolution, model.modules())),
    "other": lambda model: set(model.parameters()),
}


def by_layer(model: nn.Module) -> Groups:
    """Group parameters by layer: one group for each block of each stack of the model, under its full name.

    Raises:
        TargetError: The model has no stack. A `ValueError`.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
        >>> by_layer(model)
        {'1.0': ['1.0'], '1.1': ['1.1']}
    """
    model = as_written(model)
    stacks = find_stacks(model)
    if not stacks:
        raise TargetError(
            f"targets: expected a model with stacks of blocks, got {type(model).__name__} without any; group by_kind "
            "or by_module, or name the targets"
        )
    targets = Targets(model)
    return {name: targets.of(set(block.parameters())) for stack in stacks for name, block in stack.blocks.items()}


def by_kind(model: nn.Module) -> Groups:
    """Group parameters by the kind of their module; each parameter is in one group.

    The kinds are layer-norm, other normalization, attention (without the normalization in it), embedding, output (if
    it is not tied to the embedding), linear (outside of all these), convolution, and other. Empty groups are left out.

    Raises:
        TargetError: The model has no parameters. A `ValueError`.

    Examples:
        >>> by_kind(nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2), nn.Linear(2, 2)))
        {'layer-norm': ['1'], 'embedding': ['0'], 'linear': ['2']}
    """
    model = as_written(model)
    left, targets = _all_parameters(model), Targets(model)
    groups: Groups = {}
    for kind, select in _KINDS.items():
        found = select(model) & left
        left -= found
        if found:
            groups[kind] = targets.of(found)
    return groups


def by_module(model: nn.Module) -> Groups:
    """Group parameters by the module that directly holds them; each parameter, also a tied one, is in one group.

    Raises:
        TargetError: The model has no parameters. A `ValueError`.

    Examples:
        >>> by_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
        {'0': ['0'], '2': ['2']}
    """
    model = as_written(model)
    left, targets = _all_parameters(model), Targets(model)
    groups: Groups = {}
    for name, module in model.named_modules():
        found = left.intersection(module.parameters(recurse=False))
        left -= found
        if found:
            groups[name or type(model).__name__] = targets.of(found)
    return groups


def by_adapter(model: nn.Module) -> Groups:
    """Group the parameters that PEFT has added by the name of their adapter, with the modules saved with it.

    Raises:
        TargetError: The model has no adapter with parameters. A `ValueError`.

    Examples:
        >>> model = nn.ModuleDict({"base": nn.Linear(2, 2), "lora": nn.ModuleDict({"default": nn.Linear(2, 1)})})
        >>> model.peft_config = {"default": "as of a model that PEFT has wrapped"}
        >>> by_adapter(model)
        {'default': ['lora.default']}
    """
    model = as_written(model)
    names: Iterable[str] = getattr(model, "peft_config", {})
    found: dict[str, set[nn.Parameter]] = {name: set() for name in names}
    for module in model.modules():
        if isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            for name in found.keys() & set(module.keys()):
                entry = module[name]
                found[name].update(entry.parameters() if isinstance(entry, nn.Module) else [entry])
    targets = Targets(model)
    groups: Groups = {name: targets.of(parameters) for name, parameters in found.items() if parameters}
    if not groups:
        raise TargetError(
            f"targets: expected a model with PEFT adapters, got {type(model).__name__} without any; wrap it with "
            "peft.get_peft_model, or group by_kind"
        )
    return groups


GROUPINGS: Mapping[str, Callable[[nn.Module], Groups]] = {
    "layers": by_layer,
    "kinds": by_kind,
    "modules": by_module,
    "adapters": by_adapter,
}
"""Every grouping, by its word on the command line and in records."""


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _all_parameters(model: nn.Module) -> set[nn.Parameter]:
    parameters = set(model.parameters())
    if not parameters:
        raise TargetError(
            f"targets: expected a model with parameters, got {type(model).__name__} without any; pass the model after "
            "its layers are built"
        )
    return parameters


class Targets:
    """Finds targets of sets of parameters; the model is walked through once."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._selector = model, Selector(model)
        self._named = dict(model.named_parameters(remove_duplicate=False))
        self._below = {module: set(below) for module, below in parameters_by_module(model).items()}

    def of(self, parameters: Set[nn.Parameter]) -> str | list[str]:
        """Return what selects these and no others: few names or, where one ends another one, an expression."""
        if parameters == self._below[self._model]:
            return "all"
        return self._only(list(self._names(self._model, "", parameters, set())), parameters)

    def named(self, names: Iterable[str]) -> str | list[str]:
        """Return what selects the parameters with these full names and no others, as `of` does.

        Raises:
            TargetError: The model has no parameter of a name. A `ValueError`.
        """
        names = list(names)
        unknown = next((name for name in names if name not in self._named), None)
        if unknown is not None:
            raise TargetError(
                f'expected full names of parameters in target_modules, got "{unknown}", which '
                f"{type(self._model).__name__} does not have, see model.named_parameters()"
            )
        return self._only(names, {self._named[name] for name in names})

    def _only(self, names: list[str], parameters: Set[nn.Parameter]) -> str | list[str]:
        if set(self._selector.select(names).values()) == parameters and WORDS.keys().isdisjoint(names):
            return names
        return _expression(names)

    def _names(
        self, module: nn.Module, name: str, wanted: Set[nn.Parameter], seen: set[nn.Parameter]
    ) -> Iterator[str]:
        """Yield modules whose parameters are all wanted, as large as possible, and single parameters."""
        below = self._below[module]
        if below.isdisjoint(wanted):
            return
        if below <= wanted and below - seen and not any(self._below[child] == below for child in module.children()):
            seen |= below
            yield name
            return
        prefix = f"{name}." if name else ""
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter in wanted and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}{parameter_name}"
        for child_name, child in module.named_children():
            yield from self._names(child, f"{prefix}{child_name}", wanted, seen)


def _expression(names: Iterable[str]) -> str:
    r"""Return a regular expression for these full names.

    Examples:
        >>> _expression(["a.b", "c"])
        '(?:a\\.b|c)'
    """
    return f"(?:{'|'.join(map(re.escape, names))})"
