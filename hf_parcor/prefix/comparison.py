"""Whether a run with its prefix reused finds what a full one finds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_parcor.prefix.cut import PrefixError

# How far a gradient that is summed in another order may be off; autocast computes in half precision, and many models
# in float64 norm in float32.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_SMALL_GRADIENT = 1e-2  # of the largest one's size: below, a tensor's gradient is compared on this scale
_REPEATABLE = 1e-3  # two full runs that differ by more draw random numbers, or count
_OF_RUNS = 4.0  # how much farther apart than two full runs a full one and one with the prefix reused may be


def tolerance_of(precisions: Iterable[torch.dtype]) -> float:
    """Return the tolerance of the least precise of what was computed."""
    return max((_TOLERANCES.get(precision, 0.0) for precision in precisions), default=0.0)


def leaves_of(result: Any) -> list[Any]:
    """Return all that a run of a model found, but for the keys and values that a generation would go on from."""
    return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in _leaves(result)]


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """Collect the leaves of all that a model returns inside a `with` block."""
    found: list[Any] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.extend(leaves_of(output))

    hook = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def numbers_of(result: Any) -> list[Tensor]:
    """Return the numbers of a result that a loss is made from."""
    return [part for part in _leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, Mapping):
        result = {name: value for name, value in result.items() if name != "past_key_values"}
    return tree_leaves(result)


def objective_of(result: Any) -> Tensor:
    """Return a function of a result whose gradients are compared: its loss, or the mean squares of its numbers.

    Raises:
        PrefixError: None of them has a gradient.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else None
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.mean()
    parts = (part.double().square().mean() for part in numbers_of(result) if part.requires_grad)
    objective = sum(parts, torch.zeros(()))
    if not isinstance(objective, Tensor) or not objective.requires_grad:
        raise PrefixError("the model returns no number that has a gradient")
    return objective


def distance(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return how far apart two lists of results are: 0 if every bit is the same, ∞ if they cannot be compared.

    Between them lies the largest difference of two tensors, or numbers, over the size of the expected one.

    Examples:
        >>> distance([torch.tensor([1.0, 2.5]), "a"], [torch.tensor([1.0, 2.0]), "a"])
        0.25
        >>> distance(["a"], ["b"])
        inf
    """
    if len(found) != len(expected):
        return math.inf
    return max((_distance(*pair) for pair in zip(found, expected, strict=True)), default=0.0)


@torch.no_grad()
def _distance(found: Any, expected: Any) -> float:
    if isinstance(found, float) and isinstance(expected, float):
        found, expected = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        plain = isinstance(expected, (bool, int, str, type(None)))
        return math.inf if plain and found != expected else 0.0  # of other objects nothing is known
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if torch.equal(found, expected):
        return 0.0
    if not found.is_floating_point():
        return math.inf
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    same = (found == expected) | (found.isnan() & expected.isnan())
    differences = (found - expected).masked_fill_(same, 0).abs()
    size = expected.masked_fill(~expected.isfinite(), 0).abs()
    return float(differences.max()) / max(float(size.max()), torch.finfo(expected.dtype).tiny)


def check_results(name: str, found: float, of_full_runs: float) -> None:
    """Check that a run with the prefix reused is as near to a full one as another full one is: on a CPU, the same.

    Args:
        name: What was compared.
        found: Its `distance` from a full run.
        of_full_runs: That of two full runs.

    Raises:
        PrefixError: It is not.
    """
    if of_full_runs > _REPEATABLE:
        raise PrefixError(f"the {name} of two full runs differs by {of_full_runs:.2g}")
    if found > _OF_RUNS * of_full_runs:
        raise PrefixError(f"the {name} differs by {found:.2g} where the prefix is reused")


@torch.no_grad()
def differing_gradient(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], factor: float, tolerance: float
) -> str | None:
    """Return the name of a gradient that is not the multiple of the expected one, but for sums in another order."""
    sizes = {
        name: float(part.nan_to_num(0, 0, 0).abs().max()) if part.numel() else 0.0 for name, part in expected.items()
    }
    least = _SMALL_GRADIENT * max(sizes.values(), default=0.0)
    for name, part in found.items():
        difference = (part - factor * expected[name]).nan_to_num(0)
        if part.numel() and not float(difference.abs().max()) <= tolerance * factor * max(sizes[name], least):
            return name
    return None
