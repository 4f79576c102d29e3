"""What may be corrupted, and with what: checked before anything is written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_parcor.functional.sharded import local_part, spread_alike


def obstacle(weight: Tensor) -> str | None:
    """Return why a tensor's numbers cannot be corrupted, to be read after "is" or "are"; None where they can.

    Examples:
        >>> obstacle(torch.ones(2)), obstacle(torch.ones(2, dtype=torch.int8)), obstacle(torch.ones(2, device="meta"))
        (None, 'int8', 'on the meta device, as what is offloaded')
    """
    if isinstance(weight, DTensor):
        weight = local_part(weight)
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # which says itself what a write or a view means
        return f"of the class {kind.__name__}, no plain numbers"
    if weight.is_meta:
        return "on the meta device, as what is offloaded"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return str(weight.dtype).removeprefix("torch.")
    if weight.layout != torch.strided:
        return f"{str(weight.layout).removeprefix('torch.')} tensors"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode, which forbids writes outside of it"
    return None


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse an empty selection, weights that cannot be corrupted, and weights that stand under two names."""
    check_mapping("weights", weights, "select_parameters(model, ...) returns one")
    if not weights:
        raise ValueError("weights: expected at least one tensor, got none; select parameters first")
    names: dict[int, str] = {}
    for name, weight in weights.items():
        found = obstacle(weight)
        if found is not None:
            raise TypeError(
                f"{name}: expected a floating-point weight of 16 bits or more in plain memory, got one that is "
                f"{found}; leave it out of the selection, or load the model without quantization and offloading"
            )
        address = local_part(weight).data_ptr()  # 0 for tensors without memory of their own
        if address and names.setdefault(address, name) != name:
            raise ValueError(
                f"{name}: expected every weight under one name, got that of {names[address]} again; "
                "tied weights are one weight: leave one of the names out"
            )


def check_mapping(what: str, given: object, advice: str) -> None:
    """Refuse what is no mapping."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected tensors by name, got {type(given).__name__}; {advice}")


def check_corruption(weights: Mapping[str, Tensor], corruption: Mapping[str, Tensor]) -> None:
    """Refuse names and shapes that do not belong to the weights."""
    check_mapping("corruption", corruption, "call a corruption on the parameters to get one")
    for name, change in corruption.items():
        if name not in weights:
            near = difflib.get_close_matches(name, weights, n=3) or list(weights)[:3]
            raise ValueError(
                f"corruption: expected names of the {len(weights)} selected parameters, got {name!r}; "
                f"the nearest are {', '.join(near)}"
            )
        if not isinstance(change, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(change).__name__}; pass torch.as_tensor(...)")
        if change.shape != weights[name].shape:
            raise ValueError(
                f"{name}: expected a corruption of shape {tuple(weights[name].shape)}, got {tuple(change.shape)}; "
                "make it from the weights that it is for"
            )
        if not spread_alike(change, weights[name]):
            raise ValueError(
                f"{name}: expected a corruption that is sharded over the ranks as its weight is, got another layout; "
                "make it from the weights that it is for"
            )
