"""Names as PEFT matches them: a regular expression for the full name, or exact names and dotted suffixes.

Where PEFT's list has names only, ours may have expressions too, since what follows a flag of a command line is a list.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from torch import nn

from hf_parcor.targets.errors import TargetError
from hf_parcor.targets.words import WORDS

__all__ = ["NamedTargets", "match_entry", "match_pattern", "named_targets", "quoted"]

_OF_AN_EXPRESSION = re.compile(r"[\\^$*+?()\[\]{}|]")  # not the dot, which is in every name

NamedTargets = Mapping[str, Collection[nn.Parameter]]
"""Names of modules and parameters, with the parameters that each stands for."""


def named_targets(model: nn.Module) -> NamedTargets:
    """Name all that can be matched: the modules that have parameters, and the parameters. Aliases of shared ones too.

    Examples:
        >>> list(named_targets(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ['0', '0.weight', '0.bias']
    """
    targets: dict[str, Collection[nn.Parameter]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        below = tuple(module.parameters())
        if name and below:
            targets[name] = below
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
    nearest = difflib.get_close_matches(text, [*WORDS, *ends], n=3, cutoff=0.6)
    if nearest:
        return f"use one of the nearest names {quoted(nearest)}"
    tops = dict.fromkeys(name.split(".")[0] for name in targets)
    return f"use a word ({quoted(WORDS)}) or a name from model.named_modules() (at the top: {quoted(list(tops)[:6])})"


def _literal_part(pattern: str) -> str:
    """Strip a regular expression of what is not part of a name, as far as a message needs it."""
    return re.sub(r"\.[*+]\??|[^\w.-]", "", pattern).strip(".")
