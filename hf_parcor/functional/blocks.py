"""Blocks of a tensor, whose entries share a scale, say, and rows of several tensors that are changed in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice, check_count
from hf_parcor.distributed.dtensors import ShardedVector, has_whole_rows, local_part, one_vector, sharded_as
from hf_parcor.functional.vectors import working_dtype

Per = str | int
"""What is a block: "tensor", "channel", or so many consecutive entries of the last dimension."""

ROUNDED_TOGETHER = 1 << 24  # entries that a GPU rounds in one call


def check_per(per: object, also: tuple[str, ...] = ()) -> Per:
    """Return what is a block: "tensor", "channel", another word, or the size of a group, at least 2."""
    words = ("tensor", "channel", *also)
    return check_choice("per", per, words) if isinstance(per, str) else check_count("per", per, 2)


class Blocks(NamedTuple):
    """The local part of a tensor as rows that share a scale each; its extremes are those of whole blocks."""

    tensor: Tensor
    rows: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, tensor: Tensor, per: Per) -> Blocks | None:
        """Return the blocks; None for tensors that stay as they are: empty ones, and vectors but for one scale."""
        if per != "tensor" and tensor.ndim > 1:
            check_blocks(tensor, per)
        if tensor.numel() == 0 or (per != "tensor" and tensor.ndim < 2):
            return None
        here = local_part(tensor)
        if per == "tensor":
            low, high = extremes(tensor)
            return cls(tensor, here.reshape(1, -1), low, high)
        width = math.prod(here.shape[1:]) if isinstance(per, str) else per
        rows = here.reshape(here.numel() // width, width)
        low, high = torch.aminmax(rows, dim=1, keepdim=True)
        return cls(tensor, rows, low, high)

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each block, in the dtype of the weights."""
        return torch.maximum(-self.low, self.high)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of computations: float32, or float64."""
        return working_dtype([self.rows])

    def joined(self, rounded: Tensor, usable: Tensor) -> Tensor:
        """Return the tensor of the rounded rows, of finite numbers; those whose scale is of no use stay."""
        largest = torch.finfo(self.rows.dtype).max
        rows = torch.where(usable, rounded.clamp_(-largest, largest).to(self.rows.dtype), self.rows)
        return sharded_as(rows.reshape(local_part(self.tensor).shape), self.tensor)


def check_blocks(tensor: Tensor, per: Per) -> None:
    """Refuse a matrix that has no whole blocks.

    Raises:
        ValueError: The size of a group does not divide its last dimension.
        NotImplementedError: Its shards cut blocks.
    """
    if isinstance(per, int) and tensor.shape[-1] % per:
        raise ValueError(
            f"per: expected groups that divide the last dimension, got groups of {per} for a tensor of shape "
            f"{tuple(tensor.shape)}; take a size that divides it, or leave the tensor out (exclude_modules)"
        )
    if not has_whole_rows(tensor):
        raise NotImplementedError(
            f"per: expected a tensor that is cut along its first dimension alone, got placements "
            f"{tensor.placements}; take per='tensor', or shard the first dimension"  # type: ignore[attr-defined]
        )


def extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest entry of a whole tensor, in its dtype; NaN if any is."""
    vector = one_vector([tensor])
    if not isinstance(vector, ShardedVector):
        low, high = torch.aminmax(tensor)
    else:
        low = vector.gather(partial(_extreme, largest=False)).amin()
        high = vector.gather(partial(_extreme, largest=True)).amax()
    return low.to(tensor.dtype).reshape(1, 1), high.to(tensor.dtype).reshape(1, 1)


def _extreme(parts: list[Tensor], largest: bool) -> Tensor:
    (part,) = parts
    dtype = working_dtype(parts)
    if not part.numel():
        return torch.full((), -math.inf if largest else math.inf, dtype=dtype, device=part.device)
    return (part.amax() if largest else part.amin()).to(dtype)


def divided(numbers: Tensor, by: float) -> Tensor:
    """Return a quotient, rounded once: a GPU would multiply by the rounded reciprocal of what is no tensor there."""
    wide = numbers.to(working_dtype([numbers]))
    return (wide / torch.full_like(wide, by)).to(numbers.dtype)


def as_rows(tensors: list[Tensor], width: int) -> tuple[Tensor, list[slice]]:
    """Return a matrix that holds tensors of one dtype and device, each from a row of its own on, and where each lies.

    What fills up the last row of a tensor is anything.
    """
    ends = list(accumulate((math.ceil(tensor.numel() / width) for tensor in tensors), initial=0))
    places = [slice(width * end, width * end + t.numel()) for end, t in zip(ends, tensors, strict=False)]
    rows = torch.empty(ends[-1], width, dtype=tensors[0].dtype, device=tensors[0].device)
    parts = [rows.view(-1)[place].view(t.shape) for place, t in zip(places, tensors, strict=True)]
    torch._foreach_copy_(parts, tensors)
    return rows, places


def row_width(tensor: Tensor, per: Per, *, flat: bool = False) -> int | None:
    """Return how many entries of a tensor are a block, in rows that `in_rows` can join; None where it cannot.

    Args:
        tensor: Any tensor.
        per: As in `quantize`.
        flat: Whether groups run over the rows of a tensor, as those of NF4. Default False.

    Examples:
        >>> row_width(torch.zeros(2, 3, 4), "channel"), row_width(torch.zeros(2, 12), 4), row_width(torch.zeros(8), 4)
        (12, 4, None)
    """
    if per == "tensor" or type(tensor.detach()) is not Tensor or tensor.ndim < 2 or not tensor.numel():
        return None
    if isinstance(per, int):
        return None if (tensor.numel() if flat else tensor.shape[-1]) % per else per
    return tensor.numel() // tensor.shape[0]


def in_rows(
    tensors: Mapping[str, Tensor],
    width: Callable[[Tensor], int | None],
    rounded: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return what `rounded` makes of tensors whose rows do not know of each other: those of one width in one call.

    A GPU is kept waiting by calls, not by numbers. Tensors that gain nothing are left out: those without a width, the
    only ones of theirs, and those of 16 million entries and more, of which a copy would cost more than it saves.

    Args:
        tensors: By name.
        width: Says how long the rows of a tensor are; None where it is no row after row.
        rounded: Returns a matrix in which each row is made from that row alone.

    Examples:
        >>> found = in_rows(
        ...     {"a": torch.ones(1, 2, 2), "b": torch.zeros(3), "c": torch.eye(2)},
        ...     lambda tensor: None if tensor.ndim < 2 else 2,
        ...     lambda rows: rows.cumsum(1),
        ... )
        >>> found["a"], found["c"], len(found)
        (tensor([[[1., 2.],
                 [1., 2.]]]), tensor([[1., 1.],
                [0., 1.]]), 2)
    """
    alike: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        entries = width(tensor) if tensor.numel() < ROUNDED_TOGETHER else None
        if entries is not None:
            alike.setdefault((entries, tensor.dtype, tensor.device), []).append(name)
    found: dict[str, Tensor] = {}
    for (entries, _, _), names in alike.items():
        if len(names) > 1:
            rows, places = as_rows([tensors[name] for name in names], entries)
            flat = rounded(rows).view(-1)
            found |= {n: flat[place].view(tensors[n].shape) for n, place in zip(names, places, strict=True)}
    return found
