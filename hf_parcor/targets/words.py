"""The words for what the papers probe: one row of `WORDS` each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from dataclasses import dataclass

from torch import nn

from hf_parcor.targets.errors import TargetError
from hf_parcor.targets.kinds import (
    attention_modules,
    embedding_modules,
    is_layer_norm,
    is_normalization,
    linear_modules,
    output_layers,
    parameters_below,
)
from hf_parcor.targets.stacks import Role, Stack, find_stacks

__all__ = ["WORDS", "Word", "describe_stacks", "owner_classes", "select_word"]


@dataclass(frozen=True)
class Word:
    """A word, by what it selects and by what to say when that is nothing.

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
        return "no stack (no nn.ModuleList of blocks of one family)"
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
    return parameters_below(attention_modules(model)) - _normalization(model)


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
        _attention, "modules with Attention in their class name, or nn.MultiheadAttention", _name_classes
    ),
    "embedding": Word(_embedding, "nn.Embedding, or modules with Embedding in their class name", _name_classes),
    "last-decoder-layer": Word(_last_layer("decoder"), "a stack of decoder blocks", _name_stacks),
    "last-encoder-layer": Word(_last_layer("encoder"), "a stack of encoder blocks", _name_stacks),
}
"""The words and their rows. To add a word, add a row."""
