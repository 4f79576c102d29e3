"""Weight quantization as in paper 2 (Eq. A.1), and as the quantizers that people deploy round.

**Which object is which**, to the last bit. A test compares each line with the library (torchao 0.18, bitsandbytes
0.50), for weights in float32, in bfloat16, and in float16 if the library takes them. Here `b` is the number of bits,
`g` the size of a group, and `deployed` stands for `code_range="full", arithmetic="weight"`:

| deployed | here |
|:--|:--|
| torchao `Int8WeightOnlyConfig()` | `Quantization(8, "channel", code_range="full")` |
| `Int8WeightOnlyConfig(granularity=PerGroup(g))` | `Quantization(8, g, code_range="full")` |
| `Int8WeightOnlyConfig(granularity=PerTensor())` | `Quantization(8, code_range="full")` |
| `IntxWeightOnlyConfig(torch.int{b}, PerGroup(g))`, b in 2..8 | `Quantization(b, g, **deployed)` |
| `IntxWeightOnlyConfig(torch.int{b}, PerAxis(0))` | `Quantization(b, "channel", **deployed)` |
| ... `MappingType.SYMMETRIC_NO_CLIPPING_ERR` | `Quantization(b, g, code_range="unclipped", arithmetic="weight")` |
| ... `MappingType.ASYMMETRIC` | `Quantization(b, g, symmetric=False, arithmetic="weight")` |
| `PrototypeInt4WeightOnlyConfig(g)`, for CPUs | `Quantization(4, g, False, zero_point="float", arithmetic="weight")` |
| `Float8WeightOnlyConfig()`, a scale a row | `FloatQuantization("fp8_e4m3", "channel")` |
| ... with `PerTensor()`, `PerGroup(g)` | `FloatQuantization("fp8_e4m3")`, `FloatQuantization("fp8_e4m3", g)` |
| `NVFP4WeightOnlyConfig()` | `FloatQuantization("nvfp4")` |
| `MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32)` | `FloatQuantization("mxfp4")` |
| bitsandbytes `Linear4bit`, "nf4", `compress_statistics=False` | `FloatQuantization("nf4")` |

**Where they differ.** torchao's FP8 turns a block whose scale is 0 into NaN, such as a row of zeros, or of small
numbers in float16; here it stays. In torchao the largest numbers of a dtype may become infinite, such as 65504 of
float16 in FP8; here they stay finite. In NVFP4, tensors below 8e-36 stay here; torchao turns their zeros into other
numbers. Its 4 bits for CPUs keep scales at 10^-6 or more, and in float32 are equal up to a fused multiplication.
Weights that are not finite stay here; there they become anything. For weights in float32, `arithmetic` matters
only in blocks whose scale is below 2^-23. On CPUs bitsandbytes reads rows that are not whole blocks of 64 back with
the scale of another block; here each block keeps its own.

**Which tensors.** Tools quantize the matrices of linear layers, and leave embeddings, norms and biases as they are.
Choose `target_modules="all-linear"`, which leaves out the output layer too. With one scale a tensor, vectors are
rounded too, since Eq. A.1 holds for every tensor. To leave them, take `FloatQuantization` or another `per`, or name
only the weights. Channels are the first dimension, not the outputs in `Conv1D` (GPT-2) and in stacked experts.

**Other tools.** GGUF: `Q8_0` is near `Quantization(8, 32)`, `Q4_0` near `Quantization(4, 32)`, and `Q4_1` near
`Quantization(4, 32, symmetric=False, zero_point="float")`. But their scales are float16, and those of `Q4_0` have the
sign of the largest weight; the `K` formats quantize their scales too. AWQ and GPTQ usually write what
`Quantization(4, 128, symmetric=False)` can hold, but use data to move the weights before or while they round; here
rounding is plain, which they should beat (GPTQ of one embedding model did not). To measure what any tool made, part by
part, take `Interpolation` towards its dequantized weights (Transformers reads a GGUF file so). Not tried: AWQ, HQQ,
quantized activations, quantized scales (NF4 with `compress_statistics`), 1 bit, scales in another dtype than the
weights (`scale_dtype`), and what needs a GPU (`Int4WeightOnlyConfig`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_parcor.corruptions.blocks import by_blocks, check_blocks_of_each, matrices, told_blocks
from hf_parcor.corruptions.corruption import OPTION, Corruption, GradientSource, Strength, named_pieces
from hf_parcor.functional.blocks import Per, check_per, row_width
from hf_parcor.functional.float_formats import FLOAT_FORMATS, check_float_format, quantize_to_float
from hf_parcor.functional.quantization import MOST_BITS, check_bits, check_codes, quantize, quantize_in_turn
from hf_parcor.functional.vectors import one_by_one
from hf_parcor.injection import Pieces


@dataclass(frozen=True)
class Quantization(Corruption):
    """Rounds each selected tensor to n-bit integers, with one scale for each block: `round(W/s) s`.

    The default is the signed integers of paper 2, with one scale for each tensor. The docstring of the module,
    `hf_parcor.corruptions.quantization`, lists which settings are which quantizer of torchao.

    Args:
        bits: n, from 2 to 16.
        per: What shares a scale: "tensor" (the default); "channel", one index of the first dimension; or the size of a
            group of consecutive entries of the last dimension. With these two, vectors stay as they are.
        symmetric: Whether zero has the code zero. Default True. If False, each block has a zero point.
        code_range: For symmetric codes: "restricted" (the default) to ±(2^(n−1) − 1); "full", which also has −2^(n−1)
            and clips the largest positive weight; or "unclipped", with the same codes and a scale that clips nothing.
        zero_point: For asymmetric codes: "integer" (the default), so that zero stays zero, or "float".
        arithmetic: "float32" (the default), or "weight" to compute in the weights' dtype, as some quantizers do.

    Raises:
        TypeError: `bits` or `per` is not a whole number.
        ValueError: `bits` is outside 2..16; settings are unknown, or do not go together; or it is applied to a weight
            whose last dimension is not a multiple of the group.
        NotImplementedError: It is applied to a weight whose channels or groups are split by sharding.

    Examples:
        >>> Quantization(2)({"w": torch.tensor([-1.0, 0.2, 0.6])})
        {'w': tensor([-1.,  0.,  1.])}
        >>> print(Quantization(4), Quantization(4, per=32), Quantization(8, "channel", code_range="full"), sep=", ")
        4-bit quantization, 4-bit quantization per group of 32, 8-bit quantization per channel (full)
        >>> Quantization(2, per="channel")({"w": torch.tensor([[-1.0, 0.2, 0.6], [0.1, 0.04, 0.0]])})["w"]
        tensor([[-1.0000,  0.0000,  1.0000],
                [ 0.1000,  0.0000,  0.0000]])
    """

    bits: int
    per: Per = field(default="tensor", metadata=OPTION)
    symmetric: bool = field(default=True, metadata=OPTION)
    code_range: str = field(default="restricted", metadata=OPTION)
    zero_point: str = field(default="integer", metadata=OPTION)
    arithmetic: str = field(default="float32", metadata=OPTION)
    title: ClassVar[str] = "quantization"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("bits", "bits per weight", "{} bits", weakest=MOST_BITS),)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_bits(self.bits))
        object.__setattr__(self, "per", check_per(self.per))
        check_codes(self.symmetric, self.code_range, self.zero_point, self.arithmetic)

    def __str__(self) -> str:
        details = [
            "" if self.symmetric else "asymmetric",
            {"restricted": ""}.get(self.code_range, self.code_range),
            {"integer": ""}.get(self.zero_point, f"{self.zero_point} zero"),
            {"float32": ""}.get(self.arithmetic, f"{self.arithmetic} arithmetic"),
        ]
        told = ", ".join(filter(None, details))
        return f"{self.bits}-bit quantization{told_blocks(self.per)}" + (f" ({told})" if told else "")

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error for matrices that do not consist of whole blocks."""
        check_blocks_of_each(weights, self.per)

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        if self == Quantization(self.bits):
            rounded = one_by_one(quantize_in_turn(list(weights.values()), self.bits))
            return Pieces(named_pieces(weights, rounded), replaces=True)
        changed = weights if self.per == "tensor" else matrices(weights)
        return Pieces(by_blocks(changed, self._row_width, self._rounded), replaces=True)

    def _row_width(self, weight: Tensor) -> int | None:
        return row_width(weight, self.per)

    def _rounded(self, weight: Tensor) -> Tensor:
        return quantize(
            weight,
            self.bits,
            self.per,
            symmetric=self.symmetric,
            code_range=self.code_range,
            zero_point=self.zero_point,
            arithmetic=self.arithmetic,
        )

    def stored_bits(self, weight: Tensor) -> int:
        """Return the number of bits of a weight: its codes, a scale in its own dtype for each block, and zero points.

        An integer zero point takes a byte, as in torchao; a float zero point takes as much as a scale. Vectors that
        stay as they are take what they take now.

        Examples:
            >>> Quantization(4, per=32).stored_bits(torch.zeros(2, 64)) / 128
            5.0
        """
        blocks = _block_count(weight, self.per)
        if blocks is None:
            return _width(weight) * weight.numel()
        of_zero = 0 if self.symmetric else max(8, self.bits) if self.zero_point == "integer" else _width(weight)
        return self.bits * weight.numel() + (_width(weight) + of_zero) * blocks


@dataclass(frozen=True)
class FloatQuantization(Corruption):
    """Rounds each selected matrix to a floating-point format of 8 or 4 bits, with one scale for each block.

    Vectors stay as they are. The formulas and their sources are in `hf_parcor.functional.quantize_to_float`. A format
    has no strength that could grow or be searched, so `ramp_epochs` and `search_strength` refuse it.

    Args:
        format: "fp8_e4m3", "fp8_e5m2", "mxfp4" (blocks of 32), "nvfp4" (of 16) or "nf4" (of 64).
        per: What shares a scale in FP8: "tensor" (the default), "channel", or the size of a group of consecutive
            entries. The other formats have fixed blocks.

    Raises:
        ValueError: The format is unknown, or does not allow this `per`; or it is applied to a weight whose last
            dimension is not a multiple of the block (that of NF4 may be of any size).
        NotImplementedError: It is applied to a weight whose blocks are split by sharding.

    Examples:
        >>> print(FloatQuantization("mxfp4"), FloatQuantization("fp8_e4m3", "channel"), sep=", ")
        MXFP4, FP8 E4M3 per channel
        >>> FloatQuantization("fp8_e5m2")({"w": torch.tensor([[57344.0, 1.1]])})["w"]
        tensor([[5.7344e+04, 1.0000e+00]])
    """

    format: str
    per: Per | None = None
    title: ClassVar[str] = "float quantization"

    def __post_init__(self) -> None:
        object.__setattr__(self, "per", check_float_format(self.format, self.per))

    def __str__(self) -> str:
        found = FLOAT_FORMATS[self.format]
        assert self.per is not None, "set above"
        return found.title + ("" if found.fixed else told_blocks(self.per))

    @property
    def bits(self) -> int:
        """The number of bits of a code, without scales."""
        return FLOAT_FORMATS[self.format].bits

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error for matrices that do not consist of whole blocks; NF4 allows a short last block."""
        assert self.per is not None, "set above"
        check_blocks_of_each(weights, "channel" if self.format == "nf4" else self.per)

    def _choose(
        self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: torch.Generator | None
    ) -> Pieces:
        return Pieces(by_blocks(matrices(weights), self._row_width, self._rounded), replaces=True)

    def _rounded(self, weight: Tensor) -> Tensor:
        return quantize_to_float(weight, self.format, self.per)

    def _row_width(self, weight: Tensor) -> int | None:
        assert self.per is not None, "set above"
        if FLOAT_FORMATS[self.format].bits_of_tensor:
            return None
        return row_width(weight, self.per, flat=self.format == "nf4")

    def stored_bits(self, weight: Tensor) -> int:
        """Return the number of bits of a weight: its codes, and a scale for each block.

        A scale is float32; that of a block of MXFP4 or NVFP4 takes one byte, and NVFP4 has one of float32 for the
        whole tensor beside them. Vectors take what they take now.

        Examples:
            >>> FloatQuantization("mxfp4").stored_bits(torch.zeros(2, 64)) / 128
            4.25
        """
        assert self.per is not None, "set above"
        if weight.ndim < 2:
            return _width(weight) * weight.numel()
        blocks = _block_count(weight, self.per)
        if blocks is None:  # without entries
            return 0
        found = FLOAT_FORMATS[self.format]
        return self.bits * weight.numel() + found.bits_of_scale * blocks + found.bits_of_tensor


def _block_count(weight: Tensor, per: Per) -> int | None:
    """Return how many blocks of a weight have a scale; None where it stays as it is."""
    if weight.numel() == 0 or (per != "tensor" and weight.ndim < 2):
        return None
    if isinstance(per, int):
        return math.ceil(weight.numel() / per)
    return weight.shape[0] if per == "channel" else 1


def _width(weight: Tensor) -> int:
    return 8 * weight.dtype.itemsize
