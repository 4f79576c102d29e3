"""Random corruption (paper 1, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.constraints import CorruptionConstraint, check_constraint
from hf_parcor.corruptions.corruption import RADIUS, Corruption, GradientSource, Strength, named, named_pieces
from hf_parcor.distributed.dtensors import has_shards
from hf_parcor.functional.constrained_maximum import constrained_maximum_, epsilon_over
from hf_parcor.functional.noise import drawn_gaussian, gaussian_noise
from hf_parcor.functional.norms import euclidean_norm_of_bundles
from hf_parcor.functional.vectors import numel, scaled
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class RandomCorruption(Corruption):
    """The worst corruption along a random direction: `argmax_{a ∈ S} aᵀr`, `r ~ N(0, I)` (paper 1, Eq. 5).

    It lies on the boundary of S; for p = 2 without `top_n` it is uniform on the sphere of radius ε. With a
    generator, the direction of a large model is then drawn twice, and never held as a whole. In all other cases it is,
    in float32.

    Args:
        constraint: The set S.

    Raises:
        TypeError: `constraint` is not a `CorruptionConstraint`.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> corruption = RandomCorruption(CorruptionConstraint(epsilon=0.1))
        >>> a = corruption({"w": torch.zeros(1000)}, generator=torch.Generator().manual_seed(0))
        >>> a["w"].norm()
        tensor(0.1000)
        >>> print(corruption)
        random L2 ε=0.1
    """

    constraint: CorruptionConstraint
    stochastic: ClassVar[bool] = True
    title: ClassVar[str] = "random"
    strengths: ClassVar[tuple[Strength, ...]] = (RADIUS,)

    def __post_init__(self) -> None:
        check_constraint(self.constraint)

    def __str__(self) -> str:
        return f"random {self.constraint}"

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Mapping[str, Tensor] | Pieces:
        p, epsilon, top_n = self.constraint.p, self.constraint.epsilon, self.constraint.top_n
        tensors = list(weights.values())
        if generator is not None and p == 2 and top_n is None and _is_large(tensors):
            return Pieces(named_pieces(weights, _drawn_twice(tensors, epsilon, generator)))
        direction = gaussian_noise(tensors, 1.0, generator)
        constrained_maximum_(direction, p, epsilon, top_n)
        return named(weights, direction)


_LARGE = 1 << 24  # entries, 64 MiB in float32


def _is_large(tensors: Sequence[Tensor]) -> bool:
    """Say whether the whole direction takes memory that is worth a second draw; shards are held by many."""
    plain = all(tensor.dtype.itemsize <= 4 for tensor in tensors) and not has_shards(tensors)
    return plain and numel(tensors) > _LARGE


def _drawn_twice(tensors: Sequence[Tensor], epsilon: float, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield `ε r/‖r‖₂` tensor by tensor: the first draw finds the norm, and the second is the same one again."""
    state = generator.get_state()

    def drawn() -> Iterator[Tensor]:
        generator.set_state(state)
        return drawn_gaussian(tensors, 1.0, generator)

    def bundles() -> Iterator[list[Tensor]]:
        for part in drawn():
            yield [part]
            del part  # before the next one is drawn

    factor = epsilon_over(euclidean_norm_of_bundles(bundles), epsilon)
    for part in drawn():
        scaled([part], factor, overwrite=True)
        yield part
        del part
