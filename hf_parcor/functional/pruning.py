"""Magnitude pruning: the weights of smallest magnitude become zero, of each block, each tensor, or all together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_parcor.arguments import check_share
from hf_parcor.distributed.dtensors import local_part, sharded_as
from hf_parcor.functional.blocks import ROUNDED_TOGETHER, Per, check_blocks, check_per
from hf_parcor.functional.top_n import keep_top_n_in_turn
from hf_parcor.functional.vectors import numel


def check_sparsity(sparsity: object) -> float:
    """Return a share of weights that become zero, `0 ≤ s ≤ 1`."""
    return check_share("sparsity", sparsity, "it is the share of weights that become zero")


def kept_count(entries: int, sparsity: float) -> int:
    """Return how many of so many entries are kept: `k − round(s k)`, halves to the even number, as in PyTorch.

    Examples:
        >>> [kept_count(4, sparsity) for sparsity in (0.0, 0.5, 0.6, 1.0)]
        [4, 2, 2, 0]
    """
    return entries - round(sparsity * entries)


def prune(tensor: Tensor, sparsity: float, per: Per = "tensor") -> Tensor:
    """Return a tensor whose `round(s k)` entries of smallest magnitude are zero, in each block of k entries.

    Among equal magnitudes the first are kept, in row-major order. NaN counts as larger than every number.

    Args:
        tensor: A floating-point tensor of any shape.
        sparsity: s, from 0 to 1.
        per: What is a block: "tensor" (the default); "channel", one index of the first dimension; or the size of a
            group of consecutive entries of the last dimension: of 4 with s = 0.5, it is the 2:4 pattern. With these
            two, vectors stay as they are.

    Returns:
        A new tensor in the same dtype, sharded alike.

    Raises:
        TypeError: `sparsity` is no number, or `per` is not a whole number.
        ValueError: `sparsity` is outside 0..1, `per` is unknown, or groups do not divide the last dimension.
        NotImplementedError: Channels or groups are split by sharding.

    Examples:
        >>> weights = torch.tensor([[0.1, -0.2, 0.3, 0.4], [5.0, 6.0, -7.0, 8.0]])
        >>> prune(weights, 0.5)
        tensor([[ 0.,  0.,  0.,  0.],
                [ 5.,  6., -7.,  8.]])
        >>> prune(weights, 0.5, per=4)
        tensor([[ 0.0000,  0.0000,  0.3000,  0.4000],
                [ 0.0000,  0.0000, -7.0000,  8.0000]])
    """
    sparsity, per = check_sparsity(sparsity), check_per(per)
    if per == "tensor":
        return next(prune_together([tensor], sparsity))
    if tensor.ndim > 1:
        check_blocks(tensor, per)
    here = local_part(tensor).detach()
    if tensor.ndim < 2 or not here.numel():
        return sharded_as(here.clone(memory_format=torch.contiguous_format), tensor)
    width = per if isinstance(per, int) else math.prod(here.shape[1:])
    rows = _kept_of_each_row(here.reshape(-1, width), kept_count(width, sparsity))
    return sharded_as(rows.reshape(here.shape), tensor)


def prune_together(tensors: Sequence[Tensor], sparsity: float) -> Iterator[Tensor]:
    """Yield tensors without their entries of smallest magnitude, of ALL tensors together; each when it is asked for.

    Args:
        tensors: Floating-point tensors of any shapes, seen as one vector of length k.
        sparsity: The share s of it that becomes zero, `round(s k)` entries: the first of equal magnitudes are kept.

    Yields:
        A new tensor for each, in the same dtype, sharded alike.

    Examples:
        >>> [kept.tolist() for kept in prune_together([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.5])], 0.5)]
        [[0.0, 5.0], [2.0, 0.0]]
    """
    kept = kept_count(numel(tensors), sparsity)
    return keep_top_n_in_turn(tensors, kept) if kept else map(torch.zeros_like, tensors)


def _kept_of_each_row(rows: Tensor, n: int) -> Tensor:
    """Return rows with the n entries of largest magnitude in each; among equal ones, the first."""
    if n == rows.shape[1]:
        return rows.clone(memory_format=torch.contiguous_format)
    if n == 0:
        return torch.zeros_like(rows, memory_format=torch.contiguous_format)
    kept = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    step = max(1, ROUNDED_TOGETHER // rows.shape[1])  # an order takes eight bytes an entry
    for some, into in zip(torch.split(rows, step), torch.split(kept, step), strict=True):
        places = some.abs().sort(dim=1, descending=True, stable=True).indices[:, :n]
        into.scatter_(1, places, some.gather(1, places))
    return kept
