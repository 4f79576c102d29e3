"""Towards the weights of another model: what a quantizer, a merge, or a training made of the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_parcor.arguments import check_finite
from hf_parcor.corruptions.corruption import Corruption, GradientSource, Strength
from hf_parcor.distributed.dtensors import cut_as, local_part, sharded_as, spread_alike
from hf_parcor.functional.vectors import bytes_of, working_dtype
from hf_parcor.injection import Pieces


class OtherWeights:
    """Weights of another model, which are held and not copied; equal to others of the same names and numbers.

    Args:
        tensors: By name. What is none, such as further state of a module, is left out.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of names, shapes, dtypes and bytes, in the order of the names; found when first asked for.

        Of tensors on the meta device there are no bytes, and of shards those that are here.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            here = local_part(dequantized(tensor))
            digest.update(f"{name} {tuple(tensor.shape)} {here.dtype};".encode())
            if not here.is_meta:
                digest.update(bytes_of(here))
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OtherWeights):
            return NotImplemented
        return self is other or (self.tensors.keys() == other.tensors.keys() and self.sha256 == other.sha256)

    def __hash__(self) -> int:
        return hash(frozenset(self.tensors))

    def __repr__(self) -> str:
        return f"{len(self.tensors)} tensors"


def dequantized(tensor: Tensor) -> Tensor:
    """Return a tensor of a quantizer's class as the numbers that it stands for; any other as it is."""
    here = tensor.detach()
    of_quantizer = here.is_quantized or (hasattr(here, "__tensor_flatten__") and not isinstance(here, DTensor))
    return here.dequantize() if of_quantizer else here


@dataclass(frozen=True)
class Interpolation(Corruption):
    r"""Moves each selected weight towards that of another model: `w + λ (w' − w)`, and at λ = 1 makes it `w'`.

    What another program made of a model can be measured part by part: a `LayerProbe` with the weights of a quantized
    model says which layer costs the accuracy, whatever tool has rounded them, and by which method. The other model may
    also be a merge or an average with others, what the model was fine-tuned from, or what it began from
    (re-initialization robustness, Zhang, Bengio and Singer, JMLR 2022). Between 0 and 1 it is the line of WiSE-FT
    (Wortsman et al., CVPR 2022); beyond 1 and below 0 it extrapolates. It is computed in float32 at least, and rounded
    once.

    It is not in the catalogue, since weights are no word of a command line; there, `--towards` names a model.

    Args:
        share: λ, any finite number.
        towards: `w'` by name, such as `other.state_dict()`. They are held, not copied, so do not change them. Tensors
            of a quantizer's class, as torchao's, are dequantized one after the other.
        name: What tables and records call them.

    Raises:
        TypeError: `share` is no number, or `towards` no mapping.
        ValueError: `share` is not finite; or it is applied to a weight that has no counterpart of its name and shape,
            of floating-point numbers in memory.

    Examples:
        >>> other = {"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([1.0])}
        >>> halfway = Interpolation(0.5, other, "merged")
        >>> halfway({"w": torch.tensor([1.0, 1.0])})
        {'w': tensor([2.0000, 0.5000])}
        >>> print(halfway, halfway.with_strength(1.0), sep=", ")
        0.5 of the way to merged, weights of merged
    """

    share: float
    towards: Mapping[str, Tensor] | OtherWeights
    name: str = "other weights"
    title: ClassVar[str] = "interpolation"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("share", "share λ of the way", "λ={}"),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_finite("share", self.share))
        if not isinstance(self.towards, (Mapping, OtherWeights)):
            raise TypeError(
                f"towards: expected weights by name, got {type(self.towards).__name__}; pass other.state_dict()"
            )
        if isinstance(self.towards, Mapping):
            object.__setattr__(self, "towards", OtherWeights(self.towards))

    def __str__(self) -> str:
        return f"weights of {self.name}" if self.share == 1 else f"{self.share:g} of the way to {self.name}"

    def settings(self) -> dict[str, Any]:
        """Return the share, what the other weights are called, and the SHA-256 of them."""
        return {"share": self.share, "towards": self.name, "sha256": self._others.sha256}

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error for weights without a counterpart.

        Raises:
            ValueError: A name is missing, or a tensor is of another shape, of whole numbers, on the meta device, or
                sharded in another way.
        """
        others = self._others.tensors
        missing = [name for name in weights if name not in others]
        if missing:
            raise ValueError(
                f"towards: expected a weight for each of those that are moved, got none in {self.name!r} for "
                f"{len(missing)} of {len(weights)}, such as {missing[0]!r}; leave them out (exclude_modules), or take "
                "a model of the same architecture"
            )
        for name, weight in weights.items():
            found = others[name]
            if found.shape != weight.shape:
                wrong = f"shape {tuple(found.shape)} instead of {tuple(weight.shape)}"
            elif not found.is_floating_point():
                wrong = f"whole numbers, {found.dtype}"
            elif found.is_meta:
                wrong = "a tensor without numbers, on the meta device"
            elif isinstance(found, DTensor) and not spread_alike(found, weight):
                wrong = f"placements {found.placements} of its own"
            else:
                continue
            raise ValueError(
                f"towards: expected floating-point weights of the same shapes, in memory and whole, got {wrong} for "
                f"{name!r} in {self.name!r}; load or dequantize that model, or leave the weight out (exclude_modules)"
            )

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        self.check(weights)
        return Pieces(self._moved(weights), replaces=True)

    def _moved(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            here, other = local_part(weight).detach(), dequantized(self._others.tensors[name])
            other = local_part(other if isinstance(other, DTensor) else cut_as(other, weight)).to(here.device)
            if self.share in (0, 1):  # on the way, infinities become NaN
                moved = other if self.share else here
            else:
                wide = working_dtype([here, other])
                moved = torch.lerp(here.to(wide), other.to(wide), self.share)
            yield name, sharded_as(moved.to(here.dtype, copy=True), weight)
            del moved, other

    @property
    def _others(self) -> OtherWeights:
        assert isinstance(self.towards, OtherWeights), "set above"
        return self.towards
