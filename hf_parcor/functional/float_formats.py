"""Quantization of one tensor to floats of 4 and 8 bits, as they are deployed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice
from hf_parcor.distributed.dtensors import has_whole_rows, local_part, sharded_as
from hf_parcor.functional.blocks import Blocks, Per, check_per, divided, extremes
from hf_parcor.functional.vectors import working_dtype


class FloatFormat(NamedTuple):
    """A floating-point format of weights.

    Attributes:
        per: What shares a scale, where nobody says.
        fixed: Whether the format says it.
        title: How it is written.
        bits: Of a code.
        bits_of_scale: As it is stored.
        bits_of_tensor: Those of a second scale, that of the whole tensor; 0 where there is none.
    """

    per: Per
    fixed: bool
    title: str
    bits: int
    bits_of_scale: int
    bits_of_tensor: int = 0


FLOAT_FORMATS = {
    "fp8_e4m3": FloatFormat("tensor", False, "FP8 E4M3", 8, 32),
    "fp8_e5m2": FloatFormat("tensor", False, "FP8 E5M2", 8, 32),
    "mxfp4": FloatFormat(32, True, "MXFP4", 4, 8),
    "nvfp4": FloatFormat(16, True, "NVFP4", 4, 8, 32),
    "nf4": FloatFormat(64, True, "NF4", 4, 32),
}
_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_E2M1_LARGEST = 6.0
# Quantiles of N(0, 1) as the paper on QLoRA publishes them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def check_float_format(name: object, per: object = None) -> Per:
    """Return what shares a scale in a floating-point format, which is known and allows it; None for its default."""
    found = FLOAT_FORMATS[check_choice("format", name, FLOAT_FORMATS)]
    if per is None:
        return found.per
    per = check_per(per)
    if found.fixed and per != found.per:
        raise ValueError(f"per: expected {found.per}, which {name} fixes, got {per!r}; leave it out")
    return per


def quantize_to_float(tensor: Tensor, format: str, per: Per | None = None) -> Tensor:  # noqa: A002
    """Return `s v` with v the nearest numbers of a floating-point format, and one scale s a block.

    ::

        fp8_e4m3, fp8_e5m2    s = max|w| / 448,  max|w| / 57344: the largest finite numbers of these formats
        mxfp4                 blocks of 32, s = 2^(⌊log2 max|w|⌋ − 2), v in ±{0, 1/2, 1, 3/2, 2, 3, 4, 6}
        nvfp4                 blocks of 16, the same v, s = t · e4m3(max|w| / (6 t)), t = max of the tensor / (448 · 6)
        nf4                   blocks of 64, s = max|w|, v in 16 quantiles of the normal distribution

    FP8: Micikevicius et al. 2022, arXiv:2209.05433. MXFP4: OCP Microscaling Formats 1.0, section 6.3. NVFP4: NVIDIA's
    format of two scales. NF4: Dettmers et al. 2023, arXiv:2305.14314. Scales of FP8 are rounded to the dtype of the
    weights. Ties go to the even mantissa, those of NF4 to the lower number; what lies beyond the largest number
    becomes it. A block of zeros is returned as it is, and so is one with an entry that is not finite or so small that
    its scale, or one over it, is none of the dtype's numbers, and vectors, which no tool rounds.

    Args:
        tensor: Floating point, any shape.
        format: "fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4" or "nf4". The blocks of the last run over the rows of a tensor
            as they lie in memory, the others end at the last dimension.
        per: Which entries share a scale in FP8, as in `quantize`: by default those of the tensor.

    Returns:
        The rounded weights, in the dtype of `tensor`.

    Raises:
        ValueError: An unknown format, a `per` that it does not allow, or blocks that do not divide the last dimension.
        NotImplementedError: Blocks are cut by the sharding.

    Examples:
        >>> quantize_to_float(torch.tensor([[448.0, 17.0, -1.06]]), "fp8_e4m3")
        tensor([[448.,  16.,  -1.]])
        >>> quantize_to_float(torch.tensor([[5.9, 2.4, 0.3, -0.2] * 8]), "mxfp4")[0, :4]
        tensor([6.0000, 2.0000, 0.5000, -0.0000])
    """
    per = check_float_format(format, per)
    if tensor.ndim < 2 or tensor.numel() == 0:
        return tensor.clone()
    if format == "nf4":
        return _normal_float(tensor, int(per))
    blocks = Blocks.of(tensor, per)
    assert blocks is not None, "neither empty nor a vector"
    weights = blocks.rows.to(blocks.wide)
    if format in _FP8:
        largest = torch.finfo(_FP8[format]).max
        scale = divided(blocks.largest, largest).to(blocks.wide)
        usable = torch.isfinite(scale) & (scale > 0)
        held = (weights / scale).clamp(-largest, largest).to(_FP8[format])
        return blocks.joined(held.to(blocks.wide) * scale, usable)
    magnitudes = blocks.largest.to(blocks.wide)
    usable = torch.isfinite(magnitudes) & (magnitudes > 0)
    if format == "mxfp4":
        mantissas = torch.frexp(magnitudes).mantissa  # in [1/2, 1): the quotient is a power of two, without rounding
        scale = (magnitudes / 8 / mantissas).clamp(2.0**-126, 2.0**127)
        return blocks.joined(_e2m1(weights / scale) * scale, usable)
    low, high = extremes(tensor)
    shared = divided(torch.maximum(-low, high).to(blocks.wide), 448.0 * _E2M1_LARGEST)
    smallest = torch.finfo(torch.float8_e4m3fn).smallest_normal
    own = (divided(magnitudes, _E2M1_LARGEST) / shared).clamp(smallest, 448.0)
    own = own.to(torch.float8_e4m3fn).to(blocks.wide)
    inverse = (1.0 / shared) / own  # infinite for the smallest numbers of a dtype
    usable = usable & torch.isfinite(shared) & torch.isfinite(inverse)
    return blocks.joined(_e2m1(weights * inverse) * (shared * own), usable)


def _e2m1(numbers: Tensor) -> Tensor:
    """Return the nearest of ±{0, 1/2, 1, 3/2, 2, 3, 4, 6}."""
    magnitudes = numbers.abs()
    step = 0.5 * (1 + (magnitudes >= 2).to(numbers.dtype) + 2 * (magnitudes >= 4).to(numbers.dtype))
    return (torch.round(numbers / step) * step).clamp(-_E2M1_LARGEST, _E2M1_LARGEST)


def _normal_float(tensor: Tensor, size: int) -> Tensor:
    """Return a tensor in NF4: blocks of its entries in a row, the last one shorter."""
    here = local_part(tensor)
    if here is not tensor and (tensor.shape[-1] % size or not has_whole_rows(tensor)):
        raise NotImplementedError(
            f"nf4: expected shards of whole blocks of {size}, got a sharded tensor of shape {tuple(tensor.shape)}; "
            "quantize it before it is sharded"
        )
    wide = working_dtype([here])
    flat = here.reshape(-1)
    rows = torch.constant_pad_nd(flat, (0, -len(flat) % size)).view(-1, size)
    largest = rows.abs().amax(dim=1, keepdim=True).to(wide)
    inverse = 1.0 / largest
    usable = torch.isfinite(largest) & torch.isfinite(inverse)
    numbers = torch.tensor(_NF4, dtype=torch.float32, device=here.device)
    bounds = (numbers[:-1] + numbers[1:]) / 2
    places = torch.bucketize(rows.to(wide) * inverse, bounds.to(wide))
    rounded = (numbers.to(wide)[places] * largest).to(here.dtype)
    chosen = torch.where(usable, rounded, rows).reshape(-1)[: len(flat)]
    return sharded_as(chosen.view(here.shape), tensor)
