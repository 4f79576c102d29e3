"""The bit flips that do most damage: found along gradients, or without any data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice, check_count
from hf_parcor.corruptions.bit_flips import stored_as
from hf_parcor.corruptions.corruption import OPTION, Corruption, GradientSource, Strength
from hf_parcor.corruptions.quantization import Quantization
from hf_parcor.functional.bits import field_bits, flip_bits
from hf_parcor.functional.worst_bits import check_whole, kernels_of, largest_of_kernels, worst_flip
from hf_parcor.injection import Replacement

SEARCHES = ("gradient", "data-free")
_Flips = dict[str, dict[int, int]]  # of each tensor, by its entry's index, a mask of bits


@dataclass(frozen=True)
class WorstBitFlips(Corruption):
    """Flips the few bits that break a model, as an attacker would choose them.

    `search="gradient"` is the progressive bit search of Rakin et al. (Bit-Flip Attack, ICCV 2019), also on the bits of
    floats, as in Levy et al. (Impactful Bit-Flip Search, 2024). Each round flips one bit, until `count` are flipped.
    The gradient g at the weights as flipped so far ranks the bits of each tensor by `g·Δw` (see `worst_flip`). Then
    the best bit of each of the `candidates` tensors with the largest gain is tried, and the one with the largest loss
    is kept. Only flips to finite numbers are candidates, and no bit is flipped twice. The flips of a smaller `count`
    are the first ones of a larger `count`. A loss that is not finite counts as the largest, because such a model gives
    no right answers. Losses cannot rank flips after that, so the next ones are those with the largest `g·Δw` at the
    last gradient. If the first gradient is not finite, nothing is flipped.

    `search="data-free"` follows the pass-free attack of Galil et al. (Deep Neural Lesion, arXiv 2502.07408, 2025). It
    flips the signs of the weights of largest magnitude in the first `candidates` matrices, in the order of the
    selection, at most one for each kernel (a row of a matrix, or the filter of a pair of channels). It takes more
    matrices if these have fewer than `count` kernels, and vectors after all matrices. Select `"all-linear"` to leave
    out tables of embeddings, where a flip matters only when its row is looked up.

    Each flip by the gradient costs a gradient and `candidates` losses on `batches` batches, and a look at all selected
    weights; the data-free search costs one look in all. Memory holds the gradient, two copies of each tensor that has
    flips (new values and saved bits), and one more tensor. With another format in `of`, all tensors have copies.

    Args:
        count: Number of bits that flip, over all selected weights.
        of: What the weights are stored as: "float32", "bfloat16", "float16", or `Quantization(8)` (also "int8") for
            the two's-complement codes of `round(W/w0)`. Default: the weights' own dtype. With any other format the
            result is all weights rounded to it, with the flips.
        search: "gradient" (the default), or "data-free", which flips signs, but not those of integer codes.
        candidates: Number of tensors whose best flip is tried by its loss in each round; for the data-free search, of
            matrices that are searched. Default 10.
        batches: Number of batches, the first ones, for gradient and loss. Default 1, as published; None for all.

    Raises:
        ValueError: A number is below 1, the format or search is unknown, or integer codes are searched data-free.

    Examples:
        >>> weights = {"first": torch.tensor([[0.5, -3.0], [2.0, 1.0]]), "second": torch.tensor([[0.1, 0.2]])}
        >>> WorstBitFlips(2, search="data-free", candidates=1)(weights)["first"]
        tensor([[ 0.5000,  3.0000],
                [-2.0000,  1.0000]])
        >>> print(WorstBitFlips(5, of=Quantization(8)))
        5 worst flips (int8)
    """

    count: int
    of: str | Quantization | None = field(default=None, metadata=OPTION)
    search: str = field(default="gradient", metadata=OPTION)
    candidates: int = field(default=10, metadata=OPTION)
    batches: int | None = field(default=1, metadata=OPTION)
    rounding_decides: ClassVar[bool] = True
    title: ClassVar[str] = "worst bit flips"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("count", "flipped bits", "count={}"),)

    def __post_init__(self) -> None:
        for name in ("count", "candidates"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.batches is not None:
            object.__setattr__(self, "batches", check_count("batches", self.batches))
        object.__setattr__(self, "of", stored_as(self.of))
        check_choice("search", self.search, SEARCHES)
        if not self.uses_gradients and self._format is not None and self._format.startswith("int"):
            raise ValueError(
                f"search: expected 'gradient' for {self.of}, got 'data-free', which flips signs; that of a code "
                "in two's complement changes its size, too: take a floating-point format, or the gradient"
            )

    def __str__(self) -> str:
        details = [*([] if self.of is None else [str(self.of)]), *([] if self.uses_gradients else [self.search])]
        if self.candidates != WorstBitFlips.candidates:
            details.append("1 candidate" if self.candidates == 1 else f"{self.candidates} candidates")
        if self.batches != WorstBitFlips.batches:
            details.append("all batches" if self.batches is None else f"{self.batches} batches")
        flips = "flip" if self.count == 1 else "flips"
        return f"{self.count} worst {flips}" + (f" ({', '.join(details)})" if details else "")

    @property
    def uses_gradients(self) -> bool:
        """Whether it needs a `GradientSource`, which the data-free search does not."""
        return self.search == "gradient"

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error for fewer weights (of the data-free search: kernels) than flips, and for sharded ones."""
        check_whole(list(weights.values()))
        one, count_of = ("weight", torch.numel) if self.uses_gradients else ("kernel", kernels_of)
        most = sum(map(count_of, weights.values()))
        if self.count > most:
            raise ValueError(f"count: expected at most {most}, one for each {one}, got {self.count}; pass fewer")

    @property
    def _format(self) -> str | None:
        return stored_as(self.of)

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Replacement:
        *_, values = self.walk(weights, gradients)
        return values  # what holds no flip is not copied, and not saved either

    @torch.no_grad()
    def walk(self, weights: Mapping[str, Tensor], gradients: GradientSource | None = None) -> Iterator[Replacement]:
        """Yield the new values of the changed weights before the first flip, and after each flip.

        With this the model can be measured after each flip. Each time the same object is yielded, with new content.

        Args:
            weights: As for a call.
            gradients: As for a call.

        Raises:
            ValueError: There are fewer weights or kernels than flips, or a dtype cannot hold the format.
            NotImplementedError: Weights are sharded over ranks.
        """
        self.check(weights)
        values = Replacement()
        if self._format is not None:
            values.update({name: self._flipped(weight, {}) for name, weight in weights.items()})
        yield values
        if self.uses_gradients:
            assert gradients is not None, "checked by the caller"
            yield from self._search(weights, values, gradients)
        else:
            for name, element in self._largest(weights):
                flips = {element: 1 << field_bits(self._format or weights[name].dtype, "sign").start}
                values[name] = self._flipped(values.get(name, weights[name]), flips)
                yield values

    def _search(
        self, weights: Mapping[str, Tensor], values: Replacement, gradients: GradientSource
    ) -> Iterator[Replacement]:
        flips: _Flips = {name: {} for name in weights}
        gradient: Mapping[str, Tensor] = {}
        finite = True
        for _ in range(self.count):
            if finite:
                gradient = {}  # before the next one is found
                gradient = gradients.gradient_at(values, self.batches)
            found = {
                name: worst_flip(weight, gradient[name], self._format, flips[name]) for name, weight in weights.items()
            }
            ranked = sorted(
                ((flip, name) for name, flip in found.items() if flip is not None), key=lambda one: -one[0].gain
            )
            if not ranked:
                return
            largest = -math.inf
            for flip, name in ranked[: self.candidates if finite else 1]:
                mask = flips[name].get(flip.element, 0) | 1 << flip.position
                tried = self._flipped(weights[name], {**flips[name], flip.element: mask})
                loss = gradients.loss_at(Replacement({**values, name: tried}), self.batches) if finite else math.inf
                loss = loss if math.isfinite(loss) else math.inf
                if loss > largest:
                    largest, chosen = loss, (name, flip.element, mask, tried)
                del tried
            name, element, mask, values[name] = chosen
            del chosen
            flips[name][element] = mask
            finite = math.isfinite(largest)
            yield values

    def _flipped(self, weight: Tensor, flips: Mapping[int, int]) -> Tensor:
        """Return a tensor as it is stored, with these bits flipped."""
        pairs = [(place, bit) for place, mask in flips.items() for bit in range(mask.bit_length()) if mask >> bit & 1]
        table = torch.tensor(pairs, dtype=torch.int64, device=weight.device).view(-1, 2)
        return flip_bits(weight, table[:, 0], table[:, 1], self._format)

    def _largest(self, weights: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        """Return the largest weights, by the name of their tensor and their place in it."""
        matrices = [name for name, weight in weights.items() if weight.ndim >= 2]
        vectors = [name for name in weights if name not in matrices]
        usual = len((matrices or vectors)[: self.candidates])
        chosen: list[str] = []
        for name in (*matrices, *vectors):
            if len(chosen) >= usual and sum(kernels_of(weights[one]) for one in chosen) >= self.count:
                break
            chosen.append(name)
        found = []
        for name in chosen:
            magnitudes, elements = largest_of_kernels(weights[name], self.count)
            found += [(size, name, place) for size, place in zip(magnitudes.tolist(), elements.tolist(), strict=True)]
        if len(found) < self.count:
            raise ValueError(
                f"count: expected at most {len(found)}, one for each kernel with a finite weight, got {self.count}; "
                "pass fewer, or search along the gradient"
            )
        found.sort(key=lambda one: -one[0])
        return [(name, element) for _, name, element in found[: self.count]]
