"""The forms in which a corruption comes: tensors to be added, new values, a multiple, or one piece after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_parcor.functional.vectors import together_on


class Replacement(dict[str, Tensor]):
    """New values of weights, by name, where a difference would not do.

    Quantized weights and flipped bits are values: where an exponent bit flips, `w + (w' − w)` is not `w'` in floating
    point, and `w'` may be ∞ or NaN. Any other mapping of names to tensors is a corruption `a` to be added.
    """


@dataclass(frozen=True)
class Multiple:
    """A corruption `a = f v` that nobody needs by itself: it is made while it is added, in no memory of its own.

    Attributes:
        direction: `v` by name, which is only read.
        factor: `f ≥ 0`, a zero-dimensional tensor in float64; with 0 nothing is added, whatever `v` holds.
        norm: The norm of `a`, of the order that `Injection.write` is told.
    """

    direction: Mapping[str, Tensor]
    factor: Tensor
    norm: Tensor


class Pieces:
    """A corruption that comes one tensor after the other: each is made when it is asked for, and only once.

    Nobody here holds a tensor while the next one is made, so that a corruption of a whole model takes no more memory
    than its largest tensor. A piece may depend on its own weight, but on no other one: that may be written already.

    Args:
        pairs: Names and tensors; each name at most once.
        replaces: Whether they are new values of the weights, as in a `Replacement`, and not to be added to them.

    Examples:
        >>> pieces = Pieces((name, torch.ones(2)) for name in ("a", "b"))
        >>> [name for name, tensor in pieces], pieces.whole()
        (['a', 'b'], {})
    """

    def __init__(self, pairs: Iterable[tuple[str, Tensor]], *, replaces: bool = False) -> None:
        self._pairs = iter(pairs)
        self.replaces = replaces

    @classmethod
    def consuming(cls, tensors: dict[str, Tensor]) -> Pieces:
        """Return the tensors of a corruption that exists as a whole; each leaves the dictionary as it is asked for."""
        return cls(((name, tensors.pop(name)) for name in list(tensors)), replaces=isinstance(tensors, Replacement))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is left, under `torch.no_grad()`."""
        while True:
            with torch.no_grad():
                pair = next(self._pairs, None)
            if pair is None:
                return
            yield pair
            del pair

    def whole(self) -> dict[str, Tensor]:
        """Return all that is left, as one mapping."""
        return Replacement(self) if self.replaces else dict(self)


def in_bundles(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield tensors by name, small ones together, and hold none while the next is made."""
    bundle: dict[str, Tensor] = {}
    entries = 0
    for name, piece in pairs:
        bundle[name] = piece
        entries += piece.numel() if isinstance(piece, Tensor) else 0
        enough = isinstance(piece, Tensor) and entries >= together_on(piece.device)
        del piece
        if enough:
            yield bundle
            bundle, entries = {}, 0
    if bundle:
        yield bundle
