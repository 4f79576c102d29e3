"""Which weights can be corrupted, and which corruption belongs to which weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_parcor.distributed.dtensors import addresses_of, has_shards, local_part, spread_alike

Device = torch.device | str | None
"""A device, or None for that of the weights."""


def check_device(what: str, device: Device) -> torch.device | None:
    """Return a device that can hold numbers, or None.

    Raises:
        ValueError: There is no device of this name, or it holds none.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{what}: expected the name of a device, got {device!r}; pass for example "cpu"') from error
    if found.type == "meta":
        raise ValueError(f'{what}: expected a device that holds numbers, got meta; pass for example "cpu"')
    return found


def obstacle(weight: Tensor) -> str | None:
    """Return why a tensor's numbers cannot be corrupted, to be read after "is" or "are"; None where they can.

    Examples:
        >>> obstacle(torch.ones(2)), obstacle(torch.ones(2, dtype=torch.int8)), obstacle(torch.ones(2, device="meta"))
        (None, 'int8', 'on the meta device, as what is offloaded')
    """
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
    if _overlaps(weight):
        return "expanded or overlapping, several entries in one place"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode, which forbids writes outside of it"
    return None


def _overlaps(weight: Tensor) -> bool:
    """Say whether entries share memory, as expanded rows and sliding windows do: each write there reaches others."""
    if weight.layout != torch.strided or weight.is_contiguous():
        return False
    reach = 1  # of the dimensions inside
    for step, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and step < reach:
            return True
        reach += step * (size - 1)
    return False


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Refuse an empty selection, weights that cannot be corrupted, and weights that stand under two names."""
    check_mapping("weights", weights, "select_parameters(model, ...) returns one")
    if not weights:
        raise ValueError("weights: expected at least one tensor, got none; select parameters first")
    first_of_kind: dict[object, str] = {}
    for name, weight in weights.items():
        memory = weight.dtype, weight.layout, weight.device, weight.is_inference(), _overlaps(weight)
        first_of_kind.setdefault((type(weight), memory), name)
    for name in first_of_kind.values():
        found = obstacle(weights[name])
        if found is not None:
            raise TypeError(
                f"{name}: expected a floating-point weight of 16 bits or more in plain memory, got one that is "
                f"{found}; leave it out of the selection, or load the model without quantization and offloading"
            )
    names: dict[int, str] = {}
    for name, address in zip(weights, addresses_of(list(weights.values())), strict=True):
        if address and address in names:
            raise ValueError(
                f"{name}: expected every weight under one name, got that of {names[address]} again; "
                "tied weights are one weight: leave one of the names out"
            )
        names[address] = name


def check_mapping(what: str, given: object, advice: str) -> None:
    """Refuse what is no mapping."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: expected tensors by name, got {type(given).__name__}; {advice}")


def check_corruption(weights: Mapping[str, Tensor], corruption: Mapping[str, Tensor]) -> None:
    """Refuse names and shapes that do not belong to the weights."""
    check_mapping("corruption", corruption, "call a corruption on the parameters to get one")
    sharded = has_shards(weights.values()) or has_shards(corruption.values())
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
        if sharded and not spread_alike(change, weights[name]):
            raise ValueError(
                f"{name}: expected a corruption that is sharded over the ranks as its weight is, got another layout; "
                "make it from the weights that it is for"
            )
