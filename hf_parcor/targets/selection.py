"""`select_parameters`: the targets of a corruption or a defense, by name, kind and position."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from hf_parcor.targets.matching import (
    WORDS,
    NamedTargets,
    TargetError,
    describe_stacks,
    match_entry,
    match_pattern,
    named_targets,
    owner_classes,
    select_word,
)
from hf_parcor.targets.stacks import Stack, find_stacks

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


def select_parameters(
    model: nn.Module,
    target_modules: str | Collection[str] = "all",
    exclude_modules: str | Collection[str] | None = None,
    module_types: ModuleTypes | None = None,
    layers: int | Iterable[int] | None = None,
) -> dict[str, nn.Parameter]:
    r"""Select parameters of a model, to corrupt or to defend them.

    Names are matched as in PEFT. These words stand for the parts that the papers probe:

    | word | selects |
    |---|---|
    | `"all"` | every parameter |
    | `"all-linear"` | `nn.Linear` and Transformers' `Conv1D`, except the output layer |
    | `"layer-norm"` | LayerNorm and RMSNorm of every library |
    | `"attention"` | attention modules, without the normalization layers and MLPs in them |
    | `"embedding"` | embeddings of tokens, positions, patches, without the normalization layers in them |
    | `"last-decoder-layer"` | the last block of the decoder (of each, in a model with several) |
    | `"last-encoder-layer"` | the last block of the encoder (of each, in a model with several) |

    If the name of a module matches, all parameters below that module are selected. Names of parameters match too.
    Each name or word must find something, also in a list and in `exclude_modules`; otherwise it is an error.

    Args:
        model: Any module. Stacks of layers, attention and so on are found by structure and class, not by path. If
            PEFT, DDP or the like has wrapped the model, names are the longer ones of `model.named_parameters()`.
        target_modules: A string is one of the words above, or else a regular expression for the *full* name. A
            list selects the union of its entries. Each entry is tried as a word, an exact name, a dotted suffix
            (`"query"`, `"attention.output.dense"`, `"bias"`), and a regular expression for the full name, in this
            order. What follows a flag of a command line is a list. A word takes precedence over a module of that name:
            write `r".*\.attention"` for the modules.
        exclude_modules: What to leave out, in the same forms.
        module_types: A class, the name of a class, or several. Keeps only parameters that belong directly to such a
            module, not to a module below it.
        layers: The number of a block, or several; negative numbers count from the end. Keeps only parameters inside
            these blocks of each encoder and decoder that is long enough. Other stacks count only if the model has
            neither encoder nor decoder.

    Returns:
        Parameters by name, with the names and in the order of `model.named_parameters()`. A tied weight comes once,
        under its first name, even if another of its names matched. Frozen parameters are included.

    Raises:
        TargetError: A name, word, class or number finds nothing, or nothing is left. A `ValueError`.
        TypeError: An argument is of the wrong type.
        NotImplementedError: The model makes some of the weights anew whenever its modules are listed, as LoRA of PEFT
            does on `nn.MultiheadAttention`.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
        >>> model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "decoder": nn.ModuleList([Block(), Block()])})
        >>> list(select_parameters(model, "embedding"))
        ['embed.weight']
        >>> list(select_parameters(model, "last-decoder-layer", exclude_modules=["norm"]))
        ['decoder.1.linear.weight', 'decoder.1.linear.bias']
        >>> list(select_parameters(model, [r"bias"], module_types=nn.LayerNorm, layers=[0, -1]))
        ['decoder.0.norm.bias', 'decoder.1.norm.bias']
        >>> list(select_parameters(model, r".*\.1\.norm.*"))
        ['decoder.1.norm.weight', 'decoder.1.norm.bias']
        >>> select_parameters(model, "last-encoder-layer")
        Traceback (most recent call last):
        ...
        hf_parcor.targets.matching.TargetError: expected a stack of encoder blocks for the word "last-encoder-layer",
        got the stack "decoder" (decoder, 2 blocks), use "last-decoder-layer" or layers=-1
    """
    return Selector(model).select(target_modules, exclude_modules, module_types, layers)


class Selector:
    """Selects parameters of one model again and again: what it is made of is looked at once.

    Args:
        model: As in `select_parameters`; no module or parameter may come or go afterwards.

    Raises:
        TypeError: It is no module.

    Examples:
        >>> selector = Selector(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
        >>> [list(selector.select([name])) for name in ("0", "1.bias")]
        [['0.weight', '0.bias'], ['1.bias']]
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected an nn.Module, got {type(model).__name__}, pass the model itself")
        self._model, self._targets = model, named_targets(model)
        self._names = dict(model.named_parameters())
        self._remade = [
            name
            for name, parameter in self._names.items()
            if all(one is not parameter for one in self._targets.get(name, [parameter]))
        ]

    def select(
        self,
        target_modules: str | Collection[str] = "all",
        exclude_modules: str | Collection[str] | None = None,
        module_types: ModuleTypes | None = None,
        layers: int | Iterable[int] | None = None,
    ) -> dict[str, nn.Parameter]:
        """Do as `select_parameters` does."""
        return self._named(self.parameters(target_modules, exclude_modules, module_types, layers))

    def _named(self, chosen: set[nn.Parameter]) -> dict[str, nn.Parameter]:
        if self._remade and not chosen <= set(self._names.values()):
            raise NotImplementedError(
                f"expected weights that stay the same objects, got {len(self._remade)} such as {self._remade[0]!r} "
                "that are made anew whenever modules are listed, as LoRA of PEFT does on nn.MultiheadAttention, merge "
                "its adapters first with merge_and_unload, or target others by name"
            )
        return {name: parameter for name, parameter in self._names.items() if parameter in chosen}

    def parameters(
        self,
        target_modules: str | Collection[str] = "all",
        exclude_modules: str | Collection[str] | None = None,
        module_types: ModuleTypes | None = None,
        layers: int | Iterable[int] | None = None,
    ) -> set[nn.Parameter]:
        """Return the parameters that `select_parameters` names, also such as it refuses to name."""
        model, targets = self._model, self._targets
        chosen = _union(model, targets, target_modules, "target_modules")
        if not chosen:
            raise TargetError('expected at least one name in target_modules, got an empty list, pass names or "all"')
        if exclude_modules is not None:
            excluded = _union(model, targets, exclude_modules, "exclude_modules")
            advice = "which takes all of them away, exclude less or target more"
            chosen = _keep(chosen, chosen - excluded, "exclude_modules", exclude_modules, advice)
        if module_types is not None:
            owners = ", ".join(owner_classes(model, chosen))
            advice = f"but these belong to modules of the classes {owners}, use one of these"
            chosen = _keep(chosen, parameters_of_types(model, module_types), "module_types", module_types, advice)
        if layers is not None:
            stacks = describe_stacks(find_stacks(model))
            advice = f"but these lie outside the blocks of that number in {stacks}, change or drop layers"
            chosen = _keep(chosen, parameters_in_layers(model, layers), "layers", layers, advice)
        return chosen

    def select_trainable(
        self, target_modules: str | Collection[str] | None = None, **selection: Any
    ) -> dict[str, nn.Parameter]:
        """Do as the function of this name does."""
        if target_modules is not None:
            return self.select(target_modules, **selection)
        everything = self.parameters("all", **selection)
        trained = {parameter for parameter in everything - sinusoidal_tables(self._model) if parameter.requires_grad}
        return self._named(trained or everything)


def _union(model: nn.Module, targets: NamedTargets, entries: object, argument: str) -> set[nn.Parameter]:
    if isinstance(entries, str):
        return select_word(model, entries) if entries in WORDS else match_pattern(targets, entries, argument=argument)
    if not isinstance(entries, Collection) or isinstance(entries, bytes):
        raise TypeError(
            f"expected a string or a list of strings in {argument}, got {entries!r} of type {type(entries).__name__}, "
            "pass a word, a regular expression or a list of names"
        )
    chosen: set[nn.Parameter] = set()
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"expected strings in {argument}, got {entry!r} of type {type(entry).__name__}, pass names or words"
            )
        chosen |= select_word(model, entry) if entry in WORDS else match_entry(targets, entry, argument=argument)
    return chosen


def _keep(
    chosen: set[nn.Parameter], kept: set[nn.Parameter], argument: str, value: object, advice: str
) -> set[nn.Parameter]:
    if chosen.isdisjoint(kept):
        raise TargetError(
            f"expected {argument} to leave some of the {len(chosen)} selected parameters, got {value!r}, {advice}"
        )
    return chosen & kept


def select_trainable(
    model: nn.Module, target_modules: str | Collection[str] | None = None, **selection: Any
) -> dict[str, nn.Parameter]:
    """Select parameters as `select_parameters` does; where no target is named, without the frozen ones.

    Models hold fixed tables, such as sinusoidal positions, and adapters freeze the model around them: neither is a
    result of training. What is named is taken as it is. Where all that is left is frozen, it is taken all the same.

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
    return Selector(model).select_trainable(target_modules, **selection)


def sinusoidal_tables(model: nn.Module) -> set[nn.Parameter]:
    """Return the tables of positions that are computed and not trained, those of Marian, Pegasus or FSMT.

    They are frozen in a new model, but `from_pretrained` of Transformers 5 forgets that.
    """
    tables = (module for module in model.modules() if "Sinusoidal" in type(module).__name__)
    return {parameter for table in tables for parameter in table.parameters()}
