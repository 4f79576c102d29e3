"""`select_parameters`: the targets of a corruption or a defense, by name, kind and position."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from hf_parcor.targets.errors import TargetError
from hf_parcor.targets.filters import ModuleTypes, parameters_in_layers, parameters_of_types
from hf_parcor.targets.matching import NamedTargets, match_entry, match_pattern, named_targets
from hf_parcor.targets.stacks import find_stacks
from hf_parcor.targets.words import WORDS, describe_stacks, owner_classes, select_word

__all__ = ["select_parameters"]


def select_parameters(
    model: nn.Module,
    target_modules: str | Collection[str] = "all",
    exclude_modules: str | Collection[str] | None = None,
    module_types: ModuleTypes | None = None,
    layers: int | Iterable[int] | None = None,
) -> dict[str, nn.Parameter]:
    r"""Select the parameters of a model that are corrupted.

    Names work as in PEFT, and words stand for what the papers probe:

    | word | selects |
    |---|---|
    | `"all"` | every parameter |
    | `"all-linear"` | `nn.Linear` and Transformers' `Conv1D`, except the output layer |
    | `"layer-norm"` | LayerNorm and RMSNorm of every library |
    | `"attention"` | attention modules, without the normalization layers in them |
    | `"embedding"` | embeddings of tokens, positions, patches, without the normalization layers in them |
    | `"last-decoder-layer"` | the last block of the decoder (of each, in a model with several) |
    | `"last-encoder-layer"` | the last block of the encoder (of each, in a model with several) |

    A match on the name of a module selects all parameters below that module; the names of parameters match too.
    Whatever is named must exist: a name or word that finds nothing is an error, also in a list and also in
    `exclude_modules`.

    Args:
        model: Any module. Stacks of layers, attention and so on are found by structure and class, not by path. A
            model that PEFT, DDP or the like has wrapped has the longer names that `model.named_parameters()`
            shows.
        target_modules: A string is one of the words above, or else a regular expression for the *full* name. A
            list has words, exact names, dotted suffixes (`"query"`, `"attention.output.dense"`, `"bias"`), and
            regular expressions for the full name, in this order, and selects their union. What follows a flag of a
            command line is a list. A word wins over a module of that name: write `r".*\.attention"` for the modules.
        exclude_modules: What to take away, in the same forms.
        module_types: A class, the name of a class, or several. Keeps parameters that belong directly to such a
            module (not to a module below it).
        layers: The number of a block or several, negative ones from the end. Keeps parameters inside these blocks,
            of each encoder and decoder that is long enough; of other stacks only in a model with neither.

    Returns:
        Names and parameters, in the names and the order of `model.named_parameters()`: a tied weight comes once,
        under its first name, also when another of its names was matched. Frozen parameters are not left out.

    Raises:
        TargetError: Something finds nothing, or nothing is left. A `ValueError`.
        TypeError: An argument is of the wrong type.

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
        hf_parcor.targets.errors.TargetError: expected a stack of encoder blocks for the word "last-encoder-layer", got
        the stack "decoder" (decoder, 2 blocks), use "last-decoder-layer" or layers=-1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}, pass the model itself")
    targets = named_targets(model)
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
    return {name: parameter for name, parameter in model.named_parameters() if parameter in chosen}


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
