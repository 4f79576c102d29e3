"""Magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.corruptions.blocks import by_blocks, check_blocks_of_each, matrices, told_blocks
from hf_parcor.corruptions.corruption import OPTION, Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.blocks import Per, check_per, row_width
from hf_parcor.functional.pruning import check_sparsity, prune, prune_together
from hf_parcor.injection import Pieces

_TOGETHER = "all"


@dataclass(frozen=True)
class Pruning(Corruption):
    """Sets the weights of smallest magnitude in each block of a matrix to zero. Vectors stay as they are.

    In a block of k weights `round(s k)` become zero; among equal magnitudes the first are kept. By default each matrix
    is a block, as in `torch.nn.utils.prune.l1_unstructured`. In training with `CorruptionRisk` the weights are pruned
    anew in each step, and those that are zero in it learn, too.

    Args:
        sparsity: The share s of weights that become zero, from 0 to 1.
        per: What is a block: "tensor" (the default); "all", all selected matrices together, as in PyTorch's
            `global_unstructured`; "channel", one index of the first dimension; or the size of a group of consecutive
            entries of the last dimension. `Pruning(0.5, per=4)` is the 2:4 pattern that GPUs multiply faster.

    Raises:
        TypeError: `sparsity` is no number, or `per` is not a whole number.
        ValueError: `sparsity` is outside 0..1, or `per` is unknown; or it is applied to a weight whose last dimension
            is not a multiple of the group.
        NotImplementedError: It is applied to a weight whose channels or groups are split by sharding.

    Examples:
        >>> weights = {"w": torch.tensor([[0.1, -0.2, 0.3, 0.4], [5.0, 6.0, -7.0, 8.0]]), "b": torch.tensor([0.1])}
        >>> Pruning(0.5, per=4)(weights)["w"]
        tensor([[ 0.0000,  0.0000,  0.3000,  0.4000],
                [ 0.0000,  0.0000, -7.0000,  8.0000]])
        >>> print(Pruning(0.5), Pruning(0.9, "all"), Pruning(0.5, 4), sep=", ")
        pruning s=0.5, pruning s=0.9 of all together, pruning s=0.5 per group of 4
    """

    sparsity: float
    per: Per = field(default="tensor", metadata=OPTION)
    title: ClassVar[str] = "magnitude pruning"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("sparsity", "share of pruned weights s", "s={}"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        object.__setattr__(self, "per", check_per(self.per, also=(_TOGETHER,)))

    def __str__(self) -> str:
        return f"pruning s={self.sparsity:g}" + (
            " of all together" if self.per == _TOGETHER else told_blocks(self.per)
        )

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error for matrices that do not consist of whole blocks."""
        check_blocks_of_each(weights, "tensor" if self.per == _TOGETHER else self.per)

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        chosen = matrices(weights)
        if self.per == _TOGETHER:
            pruned = prune_together(list(chosen.values()), self.sparsity)
            return Pieces(named_pieces(chosen, pruned), replaces=True)
        return Pieces(by_blocks(chosen, self._row_width, self._pruned), replaces=True)

    def _row_width(self, weight: Tensor) -> int | None:
        return row_width(weight, self.per)

    def _pruned(self, weight: Tensor) -> Tensor:
        return prune(weight, self.sparsity, self.per)
