"""Whether a run with its prefix reused finds what a full one finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_parcor.prefix.cut import PrefixError

# How far a sum in another order may be off, relative to the largest entry; autocast computes in half precision.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def tolerance_of(tensors: Iterable[Tensor]) -> float:
    """Return the tolerance of the least precise of what was computed."""
    return max(_TOLERANCES.get(tensor.dtype, 0.0) for tensor in tensors)


def numbers_of(result: Any) -> list[Tensor]:
    """Return the numbers of a result that a loss is made from."""
    if isinstance(result, Mapping):
        result = {name: value for name, value in result.items() if name != "past_key_values"}
    return [part for part in tree_leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]


def objective_of(result: Any) -> Tensor:
    """Return a function of a result whose gradients are compared: the sum of the mean squares of its numbers.

    Raises:
        PrefixError: None of them has a gradient.
    """
    parts = (part.double().square().mean() for part in numbers_of(result) if part.requires_grad)
    objective = sum(parts, torch.zeros(()))
    if not isinstance(objective, Tensor) or not objective.requires_grad:
        raise PrefixError("the model returns no number that has a gradient")
    return objective


def compare(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Check that tensors agree up to a tolerance, relative to the largest expected entry.

    Raises:
        PrefixError: They do not.
    """
    if [part.shape for part in found] != [part.shape for part in expected]:
        raise PrefixError(f"the {name} has other shapes where the prefix is reused")
    with torch.no_grad():
        # Masked entries are infinite in both.
        size = _largest([part.masked_fill(~part.isfinite(), 0) for part in expected])
        difference = _largest([(one - other).nan_to_num(0) for one, other in zip(found, expected, strict=True)])
    if not difference <= tolerance * size:
        raise PrefixError(f"the {name} differs by {difference:.2g} where the prefix is reused")


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
