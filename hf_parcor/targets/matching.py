"""Names as PEFT matches them, a regular expression or dotted suffixes, and words for what the papers probe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass

from torch import nn

from hf_parcor.targets.kinds import (
    attention_modules,
    embedding_modules,
    feed_forward_modules,
    is_layer_norm,
    is_normalization,
    linear_modules,
    output_layers,
    parameters_below,
)
from hf_parcor.targets.stacks import Role, Stack, find_stacks


class TargetError(ValueError):
    """The targets that were asked for do not fit the model.

    The message says what was expected, what the model has, and what to write instead.

    Examples:
        >>> from torch import nn
        >>> from hf_parcor.targets import select_parameters
        >>> select_parameters(nn.Sequential(nn.Linear(2, 2)), ["querry"])
        Traceback (most recent call last):
        ...
        hf_parcor.targets.matching.TargetError: expected the name (or its dotted end) of a module or parameter in
        target_modules, got "querry", which matches nothing, use a word ...
    """


@dataclass(frozen=True)
class Word:
    """A word for `target_modules`: what it selects, and the message where that is nothing.

    Attributes:
        select: Maps a model to its parameters that the word stands for.
        looks_for: What the word looks for, for messages ("expected ...").
        advice: Maps a model that has none to what it has and what to do instead ("got ..., do ...").
    """

    select: Callable[[nn.Module], set[nn.Parameter]]
    looks_for: str
    advice: Callable[[nn.Module], str]


def select_word(model: nn.Module, word: str) -> set[nn.Parameter]:
    """Return the parameters that a word stands for.

    Examples:
        >>> sorted(
        ...     parameter.shape
        ...     for parameter in select_word(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), "layer-norm")
        ... )
        [torch.Size([2]), torch.Size([2])]

    Raises:
        TargetError: The model has none.
    """
    row = WORDS[word]
    parameters = row.select(model)
    if not parameters:
        named = any(name.split(".")[-1] == word for name, _ in model.named_modules())
        otherwise = rf' (for the modules named {word}: r"(.*\.)?{word}")' if named else ""
        raise TargetError(f'expected {row.looks_for} for the word "{word}", got {row.advice(model)}{otherwise}')
    return parameters


def describe_stacks(stacks: Collection[Stack]) -> str:
    """Name stacks with their roles and lengths, for messages."""
    if not stacks:
        return "no stack (no nn.ModuleList or nn.Sequential of blocks of one family)"
    return f"the stack{'s' if len(stacks) > 1 else ''} {', '.join(map(str, stacks))}"


def owner_classes(model: nn.Module, parameters: Set[nn.Parameter] | None = None) -> list[str]:
    """Return the names of the classes that own parameters (or some of `parameters`) directly, in model order.

    Examples:
        >>> owner_classes(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        ['Linear']
    """
    wanted = set(model.parameters()) if parameters is None else parameters
    owners = (module for module in model.modules() if not wanted.isdisjoint(module.parameters(recurse=False)))
    return list(dict.fromkeys(type(module).__name__ for module in owners))


def _all(model: nn.Module) -> set[nn.Parameter]:
    return set(model.parameters())


def _all_linear(model: nn.Module) -> set[nn.Parameter]:
    return parameters_below(linear_modules(model)) - parameters_below(output_layers(model))


def _layer_norm(model: nn.Module) -> set[nn.Parameter]:
    return parameters_below(filter(is_layer_norm, model.modules()))


def _attention(model: nn.Module) -> set[nn.Parameter]:
    modules = attention_modules(model)
    return parameters_below(modules) - parameters_below(feed_forward_modules(modules)) - _normalization(model)


def _embedding(model: nn.Module) -> set[nn.Parameter]:
    return parameters_below(embedding_modules(model)) - _normalization(model)


def _normalization(model: nn.Module) -> set[nn.Parameter]:
    return parameters_below(filter(is_normalization, model.modules()))


def _last_layer(role: Role) -> Callable[[nn.Module], set[nn.Parameter]]:
    def select(model: nn.Module) -> set[nn.Parameter]:
        stacks = [stack for stack in find_stacks(model) if stack.role == role]
        return {parameter for stack in stacks for parameter in stack.parameters_of(-1)}

    return select


def _name_classes(model: nn.Module) -> str:
    classes = owner_classes(model)
    if not classes:
        return "a model without parameters, pass the model after its layers are built"
    example = next((name for name in classes if name != "Linear"), classes[0])
    return (
        f"a model whose parameters are in modules of the classes {', '.join(classes[:8])}, "
        f'select by class with module_types="{example}" or by name'
    )


def _name_normalizations(model: nn.Module) -> str:
    classes = dict.fromkeys(type(module).__name__ for module in model.modules() if is_normalization(module))
    if not classes:
        return _name_classes(model)
    names = ", ".join(classes)
    return f'a model that normalizes with {names}, select these with module_types="{next(iter(classes))}"'


def _name_stacks(model: nn.Module) -> str:
    roles: tuple[Role, ...] = ("encoder", "decoder")
    words = [f'"last-{role}-layer"' for role in roles if _last_layer(role)(model)]
    return f"{describe_stacks(find_stacks(model))}, {f'use {words[0]} or layers=-1' if words else 'select by name'}"


WORDS: dict[str, Word] = {
    "all": Word(_all, "parameters", _name_classes),
    "all-linear": Word(_all_linear, "nn.Linear or Conv1D modules besides the output layer", _name_classes),
    "layer-norm": Word(_layer_norm, "LayerNorm or RMSNorm modules with parameters", _name_normalizations),
    "attention": Word(
        _attention, "modules with Attention or MLA in their class name, or nn.MultiheadAttention", _name_classes
    ),
    "embedding": Word(_embedding, "nn.Embedding, or modules with Embedding in their class name", _name_classes),
    "last-decoder-layer": Word(_last_layer("decoder"), "a stack of decoder blocks", _name_stacks),
    "last-encoder-layer": Word(_last_layer("encoder"), "a stack of encoder blocks", _name_stacks),
}
"""The words and their rows. To add a word, add a row."""


_OF_AN_EXPRESSION = re.compile(r"[\\^$*+?()\[\]{}|]")  # not the dot, which is in every name

NamedTargets = Mapping[str, Collection[nn.Parameter]]
"""Names of modules and parameters, with the parameters that each stands for."""


def parameters_by_module(model: nn.Module) -> dict[nn.Module, Set[nn.Parameter]]:
    """Return the parameters of each module and of all below it, in the order of the model, from a single walk.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> [len(below) for below in parameters_by_module(model).values()]
        [2, 2, 0]
    """
    found: dict[nn.Module, dict[nn.Parameter, None]] = {}
    _walk(model, found)
    return {module: below.keys() for module, below in found.items()}


def _walk(module: nn.Module, found: dict[nn.Module, dict[nn.Parameter, None]]) -> dict[nn.Parameter, None]:
    if module not in found:
        found[module] = below = dict.fromkeys(module.parameters(recurse=False))
        for child in module.children():
            below.update(_walk(child, found))
    return found[module]


def named_targets(model: nn.Module) -> NamedTargets:
    """Name all that can be matched: the modules that have parameters, and the parameters. Aliases of shared ones too.

    Examples:
        >>> list(named_targets(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ['0', '0.weight', '0.bias']
    """
    targets: dict[str, Collection[nn.Parameter]] = {}
    below = parameters_by_module(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if name and below[module]:
            targets[name] = below[module]
        for parameter_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            targets[f"{name}.{parameter_name}" if name else parameter_name] = (parameter,)
    return targets


def match_pattern(targets: NamedTargets, pattern: str, *, argument: str) -> set[nn.Parameter]:
    r"""Return the parameters whose name, or whose module's name, is matched in full by a regular expression.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> match_pattern(named_targets(model), r"\d\.bias", argument="target_modules") == {
        ...     model[0].bias,
        ...     model[1].bias,
        ... }
        True

    Raises:
        TargetError: The expression matches nothing, or does not compile.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise TargetError(
            f'expected a word or a regular expression in {argument}, got "{pattern}", which does not compile '
            f"({error}), escape its special characters or pass a list of names"
        ) from error
    matched = {parameter for name, below in targets.items() if expression.fullmatch(name) for parameter in below}
    if matched:
        return matched
    expected = (
        f"expected a word or a regular expression that matches the full name of a module or parameter in {argument}"
    )
    if any(_ends_with(name, pattern) for name in targets):
        whole = r".*\." + re.escape(pattern)
        raise TargetError(
            f'{expected}, got "{pattern}", which is only the end of names, '
            f'pass the list ["{pattern}"] or the expression r"{whole}"'
        )
    raise TargetError(
        f'{expected}, got "{pattern}", which matches nothing, {_advice(targets, _literal_part(pattern))}'
    )


def match_entry(targets: NamedTargets, entry: str, *, argument: str) -> set[nn.Parameter]:
    r"""Return the parameters that an entry of a list stands for.

    These are those whose name, or whose module's name, is `entry` or ends with a dot and `entry`; where there is none,
    and the entry has signs of a regular expression other than the dot, those of `match_pattern`.

    Examples:
        >>> model = nn.ModuleDict({"query": nn.Linear(2, 2), "subquery": nn.Linear(2, 2)})
        >>> match_entry(named_targets(model), "query", argument="target_modules") == set(model["query"].parameters())
        True
        >>> match_entry(named_targets(model), r".*query\.bias", argument="target_modules") == {
        ...     model["query"].bias,
        ...     model["subquery"].bias,
        ... }
        True

    Raises:
        TargetError: There is no such name, or the expression matches nothing or does not compile.
    """
    matched = {parameter for name, below in targets.items() if _ends_with(name, entry) for parameter in below}
    if matched:
        return matched
    if _OF_AN_EXPRESSION.search(entry):
        return match_pattern(targets, entry, argument=argument)
    raise TargetError(
        f"expected the name (or its dotted end) of a module or parameter in {argument}, "
        f'got "{entry}", which matches nothing, {_advice(targets, entry)}'
    )


def quoted(names: Collection[str]) -> str:
    """Write names for a message.

    Examples:
        >>> print(quoted(["a", "b"]))
        "a", "b"
    """
    return ", ".join(f'"{name}"' for name in names)


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _advice(targets: NamedTargets, text: str) -> str:
    """Tell which real names are nearest, compared at the length of `text`, in components."""
    length = text.count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-length:]) for name in targets)
    nearest = difflib.get_close_matches(text, list(dict.fromkeys([*WORDS, *ends])), n=3, cutoff=0.6)
    if nearest:
        return f"use one of the nearest names {quoted(nearest)}"
    tops = dict.fromkeys(name.split(".")[0] for name in targets)
    return f"use a word ({quoted(WORDS)}) or a name from model.named_modules() (at the top: {quoted(list(tops)[:6])})"


def _literal_part(pattern: str) -> str:
    """Strip a regular expression of what is not part of a name, as far as a message needs it."""
    return re.sub(r"\.[*+]\??|[^\w.-]", "", pattern).strip(".")
