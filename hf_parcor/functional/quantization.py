"""Uniform symmetric quantization of one tensor (paper 2, Eq. A.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_parcor.arguments import check_count
from hf_parcor.distributed.dtensors import local_part, sharded_as
from hf_parcor.functional.vectors import max_magnitude

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


def quantize(tensor: Tensor, bits: int) -> Tensor:
    """Return `round(W/w0) · w0` with the step `w0 = max|W| / (2^(n−1) − 1)`: n-bit signed integers, one scale.

    Halves round to even. A tensor of zeros is returned as it is, and so is one with an entry that is not finite.

    Args:
        tensor: `W`, floating point, any shape; of a sharded one the maximum is that of all shards.
        bits: `n`, in 2..16; n bits hold `2^n − 1` levels from `−max|W|` to `max|W|`.

    Returns:
        The quantized weights, in the dtype of `tensor`; the step is computed in float32 (or float64).

    Raises:
        ValueError: `bits` outside 2..16.

    Examples:
        >>> quantize(torch.tensor([-1.0, 0.2, 0.4, 0.6]), bits=2)
        tensor([-1.,  0.,  0.,  1.])
    """
    bits = check_bits(bits)
    if tensor.numel() == 0:
        return tensor.clone()
    here = local_part(tensor)
    weights = here if tensor.dtype == torch.float64 else here.float()
    levels = 2 ** (bits - 1) - 1
    step = max_magnitude([tensor]) / levels
    usable = torch.isfinite(step) & (step > 0)
    rounded = torch.round(weights / torch.where(usable, step, 1.0)) * step
    # A step at an end of the float range is rounded itself: no level may be ∞, or lie beyond the last one.
    last = (levels * step).clamp(max=torch.finfo(step.dtype).max)
    rounded = rounded.clamp(-last, last)
    return sharded_as(torch.where(usable, rounded.to(tensor.dtype), here), tensor)
