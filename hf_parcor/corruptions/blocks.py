"""Corruptions of matrices block by block: which of them, and how many in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TypeVar

from torch import Tensor

from hf_parcor.functional.blocks import ROUNDED_TOGETHER, Per, check_blocks, in_rows
from hf_parcor.functional.vectors import in_turn

_Found = TypeVar("_Found")


def told_blocks(per: Per) -> str:
    """Return what a block is, for a label; nothing for whole tensors.

    Examples:
        >>> told_blocks("channel"), told_blocks(32), told_blocks("tensor")
        (' per channel', ' per group of 32', '')
    """
    return "" if per == "tensor" else " per channel" if per == "channel" else f" per group of {per}"


def matrices(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without vectors, which are biases and those of norms."""
    return {name: weight for name, weight in weights.items() if weight.ndim > 1}


def check_blocks_of_each(weights: Mapping[str, Tensor], per: Per) -> None:
    """Raise an error, which names the weight, for a matrix that does not consist of whole blocks."""
    if per != "tensor":
        for name, weight in matrices(weights).items():
            _naming(name, partial(check_blocks, per=per), weight)


def by_blocks(
    weights: Mapping[str, Tensor],
    width: Callable[[Tensor], int | None],
    changed: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight changed: on a CPU one after the other, elsewhere some in one call.

    Args:
        weights: By name.
        width: Says how many entries of a tensor are a block, in rows that can be joined; None where they cannot.
        changed: Makes each block of a tensor from that block alone.
    """
    for places in in_turn(list(weights.values()), ROUNDED_TOGETHER):
        some = dict(islice(weights.items(), places[0], places[-1] + 1))
        afar = {name: weight for name, weight in some.items() if weight.device.type != "cpu"}
        together = in_rows(afar, width, changed)
        for name, weight in some.items():
            yield name, together.pop(name) if name in together else _naming(name, changed, weight)


def _naming(name: str, done: Callable[[Tensor], _Found], weight: Tensor) -> _Found:
    """Return what is done with a weight; an error says which one it was."""
    try:
        return done(weight)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{name}: {error}") from error
