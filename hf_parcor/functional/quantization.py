"""Quantization of one tensor to integers, as in paper 2 and as deployed.

A tensor is cut into blocks that share a scale: all of it, its output channels, or groups of consecutive entries.
Each function here rounds the weights to what a format can hold, and returns them in the dtype they came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice, check_count, check_flag
from hf_parcor.devices import in_float64
from hf_parcor.functional.blocks import ROUNDED_TOGETHER, Blocks, Per, as_rows, check_per, divided
from hf_parcor.functional.vectors import in_turn, working_dtype

CODE_RANGES = ("restricted", "full", "unclipped")
ZERO_POINTS = ("integer", "float")
ARITHMETICS = ("float32", "weight")
_ROW = 256  # entries of a row; the last one of a tensor is filled up
_SMALLEST_SCALE = 2.0**-23  # of torchao's 8-bit tensors, whatever the dtype of the weights

MOST_BITS = 16
"""The widest integers; what they change is smaller than the noise of any metric."""


def check_bits(bits: object) -> int:
    """Return the width of a quantized integer, a whole number in 2..16."""
    width = check_count("bits", bits, minimum=2)
    if width > MOST_BITS:
        raise ValueError(
            f"bits: expected a whole number in 2..{MOST_BITS}, got {width}; beyond that nothing visible changes"
        )
    return width


def quantize(
    tensor: Tensor,
    bits: int,
    per: Per = "tensor",
    *,
    symmetric: bool = True,
    code_range: str = "restricted",
    zero_point: str = "integer",
    arithmetic: str = "float32",
) -> Tensor:
    """Return `s (q − z)` with n-bit integers `q = clip(round(w / s) + z)`: one scale s, and zero point z, a block.

    ::

        symmetric, restricted    s = max|w| / (2^(n−1) − 1)                     q in −(2^(n−1) − 1) .. 2^(n−1) − 1
        symmetric, full          s = max|w| / (2^(n−1) − 1/2)                   q in −2^(n−1) .. 2^(n−1) − 1
        symmetric, unclipped     s = max(max w / (2^(n−1) − 1), min w / −2^(n−1))            likewise
        asymmetric, integer z    s = (max(w, 0) − min(w, 0)) / (2^n − 1)                     likewise
                                 z = clip(−2^(n−1) − round(min(w, 0) / s))
        asymmetric, float z      s = (max w − min w) / (2^n − 1)                             likewise
                                 z = −2^(n−1) − min w / s

    Symmetric quantizers have z = 0. The first with one scale a tensor is Eq. A.1 of paper 2. The full range clips the
    largest positive weight by up to half a step. With a float zero point zero is no code, and no code is wasted where
    all weights have one sign. Halves round to even. A block of zeros is returned as it is, and so is one with an entry
    that is not finite.

    Args:
        tensor: `W`, floating point. Of a sharded one the extremes are those of all shards.
        bits: `n`, in 2..16.
        per: Which entries share a scale: those of the "tensor"; those of a "channel", one index of the first
            dimension, an output of a linear layer; or so many consecutive entries of the last dimension. Vectors have
            no channels and no groups: they are returned as they are.
        symmetric: Whether zero has the code zero; else every block has a zero point.
        code_range: Of symmetric quantizers "restricted", "full" or "unclipped", as above.
        zero_point: Of asymmetric quantizers "integer" or "float", as above.
        arithmetic: "float32", rounded once at the end; or "weight", where products are those of the weights' dtype,
            which for bfloat16 changes codes. Scales of other than restricted codes are rounded to the weights' dtype,
            and are at least 2^−23 in "float32", and in "weight" the smallest normal number of the dtype.

    Returns:
        The quantized weights, in the dtype of `tensor`. Computations in float32 are in float64 for such tensors.

    Raises:
        TypeError: `bits` or `per` is no whole number.
        ValueError: `bits` outside 2..16, another setting that is unknown, a `code_range` of asymmetric quantizers or a
            `zero_point` of symmetric ones, or groups that do not divide the last dimension.
        NotImplementedError: Blocks are cut by the sharding.

    Examples:
        >>> quantize(torch.tensor([-1.0, 0.2, 0.4, 0.6]), bits=2)
        tensor([-1.,  0.,  0.,  1.])
        >>> quantize(torch.tensor([[-1.0, 0.2, 0.6], [0.1, 0.04, 0.0]]), bits=2, per="channel")
        tensor([[-1.0000,  0.0000,  1.0000],
                [ 0.1000,  0.0000,  0.0000]])
        >>> quantize(torch.tensor([[1.5, -1.5, 0.6]]), bits=2, per="channel", code_range="full")
        tensor([[ 1., -2.,  1.]])
        >>> quantize(torch.tensor([[0.0, 1.0, 2.0, 2.9, 3.0]]), bits=2, per="channel", symmetric=False)
        tensor([[0., 1., 2., 3., 3.]])
    """
    bits, per = check_bits(bits), check_per(per)
    check_codes(symmetric, code_range, zero_point, arithmetic)
    blocks = Blocks.of(tensor, per)
    if blocks is None:
        return tensor.clone()
    dtype = blocks.rows.dtype if arithmetic == "weight" else blocks.wide
    if symmetric and code_range == "restricted":
        return blocks.joined(*_restricted(blocks, bits, dtype))
    smallest = torch.finfo(dtype).smallest_normal if arithmetic == "weight" else _SMALLEST_SCALE
    if not symmetric and zero_point == "float":
        return blocks.joined(*_between_extremes(blocks, bits, dtype, smallest))
    return blocks.joined(*_affine(blocks, bits, dtype, smallest, code_range if symmetric else None))


def quantize_in_turn(tensors: Sequence[Tensor], bits: int) -> Iterator[list[Tensor]]:
    """Yield what `quantize` returns of tensors with one scale each, to the last bit, small tensors together.

    A GPU is kept waiting by calls, not by numbers: 25 a tensor in `quantize`. Here up to 16 million entries are
    rounded together there, in rows of which each has the scale of its tensor: 64 MiB in float32, some four times.

    Args:
        tensors: `W`s, floating point.
        bits: As in `quantize`.

    Examples:
        >>> list(quantize_in_turn([torch.tensor([-1.0, 0.2]), torch.tensor([0.0])], bits=2))
        [[tensor([-1.,  0.]), tensor([0.])]]
    """
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    for places in in_turn(tensors) if on_cpu else in_turn(tensors, ROUNDED_TOGETHER):
        some = [tensors[place] for place in places]
        yield _quantized_together(some, bits)
        del some


def _quantized_together(tensors: list[Tensor], bits: int) -> list[Tensor]:
    alike = len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
    if not alike or not all(type(tensor.detach()) is Tensor and tensor.numel() for tensor in tensors):
        return [quantize(tensor, bits) for tensor in tensors]
    if tensors[0].device.type != "cpu":
        return _rounded_in_rows(tensors, bits)
    extremes = [torch.aminmax(tensor) for tensor in tensors]
    low, high = torch.stack([one.min for one in extremes]), torch.stack([one.max for one in extremes])
    wide = working_dtype(tensors)
    steps, usable, divisors, last = restricted_scale(torch.maximum(-low, high).to(wide), bits)
    rounded = [
        (tensor.to(wide) / divisor).round_().mul_(step).clamp_(lowest, highest)
        for tensor, divisor, step, lowest, highest in zip(
            tensors, divisors.unbind(), steps.unbind(), (-last).unbind(), last.unbind(), strict=True
        )
    ]
    return [
        torch.where(keeps, values.to(tensor.dtype), tensor)
        for keeps, values, tensor in zip(usable.unbind(), rounded, tensors, strict=True)
    ]


def _rounded_in_rows(tensors: list[Tensor], bits: int) -> list[Tensor]:
    """Do as `_quantized_together` does with tensors of one dtype and device, in as many calls for few as for many."""
    dtype, device = tensors[0].dtype, tensors[0].device
    largest = torch.stack(list(torch._foreach_norm(tensors, math.inf))).to(working_dtype(tensors))
    scales = torch.stack([value.to(largest.dtype) for value in restricted_scale(largest, bits)])
    if len(tensors) == 1:
        rows, places = tensors[0].reshape(1, -1), [slice(None)]
    else:
        counts = [math.ceil(tensor.numel() / _ROW) for tensor in tensors]
        rows, places = as_rows(tensors, _ROW)
        # Pinned, so that the device gets these few numbers without being waited for.
        repeats = torch.tensor(counts, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
        scales = scales.index_select(1, torch.repeat_interleave(repeats, output_size=len(rows)))
    step, usable, divisor, last = scales.unsqueeze(2).unbind()
    rounded = (rows / divisor).round_().mul_(step).clamp_(-last, last).to(dtype)
    chosen = torch.where(usable > 0, rounded, rows).view(-1)
    return [chosen[place].view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)]


def restricted_scale(largest: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scale of symmetric, restricted codes, for the largest magnitude of each block.

    Returns:
        The step `s = max|w| / (2^(n−1) − 1)`; whether it is of use, finite and not 0; the step, or 1 where it is of
        none, to divide by; and the last level. A step at an end of the float range is rounded itself, and no level may
        be ∞.
    """
    levels = 2 ** (bits - 1) - 1
    step = divided(largest, levels)
    usable = torch.isfinite(step) & (step > 0)
    return step, usable, torch.where(usable, step, 1.0), (levels * step).clamp(max=torch.finfo(step.dtype).max)


def check_codes(symmetric: object, code_range: object, zero_point: object, arithmetic: object) -> None:
    """Refuse settings of integer codes that are unknown, or do not go together."""
    symmetric = check_flag("symmetric", symmetric)
    check_choice("code_range", code_range, CODE_RANGES)
    check_choice("zero_point", zero_point, ZERO_POINTS)
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    if not symmetric and code_range != "restricted":
        raise ValueError(
            f"code_range: expected none where codes are asymmetric, got {code_range!r}; these use all 2^n codes"
        )
    if symmetric and zero_point != "integer":
        raise ValueError(
            f"zero_point: expected none where codes are symmetric, got {zero_point!r}; pass symmetric=False"
        )


def _restricted(blocks: Blocks, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    step, usable, divisor, last = restricted_scale(blocks.largest.to(dtype), bits)
    rounded = torch.round(blocks.rows.to(dtype) / divisor) * step
    return rounded.clamp(-last, last), usable


def _affine(
    blocks: Blocks, bits: int, dtype: torch.dtype, smallest: float, code_range: str | None
) -> tuple[Tensor, Tensor]:
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = blocks.low.clamp(max=0), blocks.high.clamp(min=0)
    if code_range is None:
        scale = divided(high - low, highest - lowest)
    elif code_range == "full":
        scale = divided(blocks.largest, (highest - lowest) / 2)
    else:
        scale = torch.maximum(divided(low, lowest), divided(high, highest))
    scale = scale.clamp(min=smallest).to(dtype)
    zero = lowest - torch.round(low.to(dtype) / scale) if code_range is None else torch.zeros_like(scale)
    zero = zero.clamp(lowest, highest)
    codes = (torch.round(blocks.rows.to(dtype) * (1.0 / scale)) + zero).clamp(lowest, highest)
    steps, last = codes - zero, torch.finfo(dtype).max
    if highest - lowest > last:  # 16 bits: float16 ends before 65535
        steps = steps.clamp(-last, last)
    return steps * scale, torch.isfinite(scale)


def _between_extremes(blocks: Blocks, bits: int, dtype: torch.dtype, smallest: float) -> tuple[Tensor, Tensor]:
    scale = divided(blocks.high - blocks.low, 2**bits - 1).clamp(min=smallest).to(dtype)
    middle = 2 ** (bits - 1)  # the number that is kept beside the scale is that of the code in the middle
    kept = blocks.low.to(dtype) + scale * middle
    last = min(2**bits - 1, torch.finfo(dtype).max)  # float16 ends before 65535
    codes = torch.round((blocks.rows.to(dtype) - (kept - scale * middle)) / scale).clamp(0, last)
    values = in_float64(codes - middle) * in_float64(scale) + in_float64(kept)
    return values.to(blocks.wide).to(scale.device), torch.isfinite(scale)
