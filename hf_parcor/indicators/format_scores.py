"""What a format is estimated to cost a part of a model, from the gradient of the loss over data.

The scores are those of `sensitivity`: of one pass over the data, or batch by batch where memory is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_parcor.devices import host_of
from hf_parcor.distributed.processes import MeasuringProcesses
from hf_parcor.evaluation.passes.gradients import DatasetGradients
from hf_parcor.functional import inner_product
from hf_parcor.functional.vectors import working_dtype
from hf_parcor.indicators.matrix_groups import Format, mean_bits
from hf_parcor.records.sensitivity import FISHER, FormatScore


class GradientOverData(NamedTuple):
    """What one pass over the data finds of the weights' gradient, by their names; and the diagonal of the Hessian."""

    gradient: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    diagonal: Mapping[str, Tensor] | None

    @classmethod
    def of(cls, source: DatasetGradients, diagonal: Mapping[str, Tensor] | None) -> GradientOverData:
        """Walk through the data."""
        squares, gradient = source.second_moment(), source.over_data()
        return cls(gradient, squares, diagonal)

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the gradient of a weight, and the mean of its square."""
        return self.gradient[name], self.squares[name]


class _OfBatch(NamedTuple):
    """What one batch adds to that: nothing is made before it is asked for."""

    gradient: Mapping[str, Tensor]
    share: float
    items: int
    diagonal: None = None

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Return what is added to the gradient of a weight, and to the mean of its square."""
        gradient = self.gradient[name]
        added = gradient.to(working_dtype([gradient])) * self.share
        return added, added.square().mul_(self.items)  # N (n_b/N)² g², as in `second_moment`


def each_batch(source: DatasetGradients) -> Iterator[_OfBatch]:
    """Yield what each batch adds, of which one is held at a time."""
    for gradient, share in source.batch_by_batch():
        yield _OfBatch(gradient, share, source.items)
        del gradient  # before the next one


def needed_memory(weights: Mapping[str, Tensor], sums: int) -> Counter[torch.device]:
    """Return how many bytes a gradient takes on each device, and so many sums of its size in float32."""
    needed: Counter[torch.device] = Counter()
    for weight in weights.values():
        needed[weight.device] += weight.numel() * (sums * working_dtype([weight]).itemsize + weight.itemsize)
    return needed


def score_groups(
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    formats: Sequence[Format],
    parts: Iterable[GradientOverData | _OfBatch],
    processes: MeasuringProcesses,
) -> list[FormatScore]:
    """Return every group in every format that fits it.

    Args:
        groups: The weights of each.
        formats: What is tried.
        parts: What scores are made of, which add up over them.
        processes: Those over which they add up, too.
    """
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for part in parts:
        for label, weights in groups.items():
            for one in formats:
                scores = _scores(one, weights, part)
                if scores is not None:
                    _add(sums, (label, str(one)), scores)
        del part  # before the next one is made
    whole: dict[tuple[str, str], dict[str, float]] = {}
    for of_process in processes.gather(sums):
        for cell, scores in of_process.items():
            _add(whole, cell, scores)
    return [
        FormatScore(label, str(one), mean_bits(one, weights), whole[label, str(one)])
        for label, weights in groups.items()
        for one in formats
        if (label, str(one)) in whole
    ]


def _add(sums: dict[tuple[str, str], dict[str, float]], cell: tuple[str, str], scores: Mapping[str, float]) -> None:
    before = sums.setdefault(cell, dict.fromkeys(scores, 0.0))
    for name, value in scores.items():
        before[name] += value


@torch.no_grad()
def _scores(one: Format, weights: Mapping[str, Tensor], part: GradientOverData | _OfBatch) -> dict[str, float] | None:
    """Return the scores of a group in a format; None where that does not fit."""
    found, curved = {"first_order": 0.0, FISHER: 0.0, "fit": 0.0}, 0.0
    try:
        for name, rounded in one.pieces(weights):
            gradient, squares = part.moments(name)
            error = rounded.to(gradient.dtype) - weights[name].to(gradient.dtype)
            found["first_order"] += _sum_of_products(gradient, error)
            squared = error.square()
            found[FISHER] += _sum_of_products(squares, squared) / 2
            host = host_of(squared.device)
            found["fit"] += float(
                squares.to(host).mean(dtype=torch.float64) * squared.to(host).sum(dtype=torch.float64) / 2
            )
            if part.diagonal is not None:
                curved += _sum_of_products(part.diagonal[name], squared) / 2
            del rounded, error, squared, gradient, squares
    except (ValueError, NotImplementedError):  # of blocks that do not divide a matrix, or that its sharding cuts
        return None
    return found if part.diagonal is None else {**found, "second_order": found["first_order"] + curved}


def _sum_of_products(first: Tensor, second: Tensor) -> float:
    return float(inner_product([first], [second]))
