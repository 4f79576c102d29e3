"""What a check is given, and the rows that it reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class Skipped(Exception):  # noqa: N818
    """A check that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where the checks run, how large their models are, and where records go."""

    device: str
    quick: bool
    output: str

    def need_cuda(self, what: str) -> None:
        """Raise `Skipped` without a GPU."""
        if self.device != "cuda":
            raise Skipped(f"{what} needs a GPU")


@dataclass(frozen=True)
class Row:
    """A number that a check found; it fails above its limit, or where it is NaN."""

    what: str
    value: float
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the number is at most its limit; a number without limit is only reported."""
        return self.limit is None or self.value <= self.limit


def distance(ours: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Return the L2 norm of the difference of two lists of tensors, over that of the second."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, others, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(difference / max(sum(float(b.square().sum()) for _, b in pairs), 1e-300))


def differing_bits(ours: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Count the bytes that differ between two lists of tensors."""
    return sum(
        int((a.detach().contiguous().view(torch.uint8) != b.detach().contiguous().view(torch.uint8)).sum())
        for a, b in zip(ours, others, strict=True)
        if a.dim()
    )
