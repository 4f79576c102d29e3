"""Which matrices get a format together, and which formats fit them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hf_parcor.corruptions import FloatQuantization, Quantization
from hf_parcor.evaluation.placement.reach import Reach
from hf_parcor.functional.vectors import numel
from hf_parcor.records.sensitivity import some_of
from hf_parcor.targets import TargetError

Format = Quantization | FloatQuantization

FORMATS: tuple[Format, ...] = (
    Quantization(8, "channel", code_range="full"),
    FloatQuantization("fp8_e4m3", "channel"),
    *(Quantization(bits, 32, code_range="full", arithmetic="weight") for bits in (6, 4, 3)),
)
"""The default of `sensitivity`: 8 bits and FP8 per channel; 6, 4 and 3 bits per group of 32, as in torchao."""

FEWEST_DIMENSIONS = 2
"""Of what is quantized: vectors stay as they are in every tool."""


def checked_formats(formats: Any) -> list[Format]:
    """Return formats as a list.

    Raises:
        TypeError: Something else is among them.
        ValueError: There are none, or two are the same.
    """
    if isinstance(formats, str) or not isinstance(formats, Iterable):
        raise TypeError(
            f"formats: expected a list of them, got {str(formats)!r}; write [Quantization(4, 'channel')], say"
        )
    found = list(formats)
    for one in found:
        if type(one) not in (Quantization, FloatQuantization):
            raise TypeError(
                f"formats: expected Quantization and FloatQuantization, got {str(one)!r}; choose among these: "
                "how many bits other corruptions take is not known"
            )
    labels = [str(one) for one in found]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(
            f"formats: expected one or more, each once, got {', '.join(labels) or 'none'}; name each format once"
        )
    return found


def fits(one: Format, weights: Mapping[str, Tensor]) -> bool:
    """Return whether all matrices of a group can have a format."""
    try:
        one.check(weights)
    except (ValueError, NotImplementedError):  # as where it is scored
        return False
    return True


def mean_bits(one: Format, weights: Mapping[str, Tensor]) -> float:
    """Return how many bits a weight takes in a format, mean over a group."""
    return sum(one.stored_bits(weight) for weight in weights.values()) / numel(list(weights.values()))


def matrix_groups(
    reach: Reach, formats: Sequence[Format], groups: Mapping[str, str | Collection[str]] | str | None
) -> tuple[dict[str, dict[str, nn.Parameter]], list[str]]:
    """Return the matrices of each group by their names, and sentences on what is left out.

    Args:
        reach: The model.
        formats: Of which one has to fit a group.
        groups: As in `sensitivity`.

    Raises:
        TargetError: No group has a matrix, no format fits one, or a weight is in two groups that are named.
    """
    found, notes = _each_linear(reach) if groups is None else _of_groups(reach, groups)
    if not found:
        raise TargetError("groups: expected at least one with a matrix, got none; name linear modules")
    if not any(fits(one, weights) for weights in found.values() for one in formats):
        raise TargetError(
            f"formats: expected one that fits a group, got {', '.join(map(str, formats))}, whose blocks divide the "
            "rows of none; take a scale a channel, as Quantization(4, 'channel') has"
        )
    return found, notes


def _each_linear(reach: Reach) -> tuple[dict[str, dict[str, nn.Parameter]], list[str]]:
    """Return the matrix of each linear module that a tool can replace."""
    selection = reach.select("all-linear")
    past = {
        module.weight: name
        for name, module in reach.model.named_modules()
        if isinstance(module, NonDynamicallyQuantizableLinear)
    }
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in _matrices(selection.parameters).items():
        if weight not in past:
            found.setdefault(name.rpartition(".")[0] or name, {})[name] = weight
    notes = list(selection.notes)
    left_out = [past[weight] for weight in selection.parameters.values() if weight in past]
    if left_out:
        notes.append(
            f"{some_of(left_out, 'modules')} stay as they are: PyTorch's attention reads their weights past the "
            "module that a tool would replace"
        )
    return found, notes


def _of_groups(
    reach: Reach, groups: Mapping[str, str | Collection[str]] | str
) -> tuple[dict[str, dict[str, nn.Parameter]], list[str]]:
    """Return the matrices of each group that is named, or of each layer, kind, module or adapter."""
    selections, _ = reach.select_groups(
        groups if isinstance(groups, str) else {name: {"target_modules": one} for name, one in groups.items()}
    )
    found: dict[str, dict[str, nn.Parameter]] = {}
    notes: list[str] = []
    without: list[str] = []
    seen: dict[nn.Parameter, str] = {}
    for label, selection in selections.items():
        notes += [sentence for sentence in selection.notes if sentence not in notes]
        matrices = _matrices(selection.parameters)
        shared = [name for name, weight in matrices.items() if weight in seen]
        if shared and not isinstance(groups, str):
            raise TargetError(
                f"groups: expected every weight in one group, got {shared[0]} in {seen[matrices[shared[0]]]!r} "
                f"and {label!r}; group by_module or by_kind"
            )
        if shared:  # layers may, as those of Zamba
            notes.append(f"{label} shares {some_of(shared, 'weights')} with an earlier group, and is without them")
        own = {name: weight for name, weight in matrices.items() if weight not in seen}
        seen |= dict.fromkeys(own.values(), label)
        if own:
            found[label] = own
        elif not shared:
            without.append(label)
    if without:
        notes.append(f"groups without matrices stay as they are: {some_of(without)}")
    return found, notes


def _matrices(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: one for name, one in parameters.items() if one.ndim >= FEWEST_DIMENSIONS and one.numel()}
