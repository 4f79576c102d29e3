"""Random vectors in the shape of given tensors, drawn on the generator's device so that a seed means one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_parcor.functional.arguments import check_radius


def _drawn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    device = like.device if generator is None else generator.device
    return torch.empty(like.shape, dtype=dtype, device=device)


def gaussian_noise(tensors: Sequence[Tensor], std: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return independent entries `a_i ~ N(0, σ²)`.

    Args:
        tensors: Give shapes, devices and whether the noise is float64; their values are not read.
        std: σ, the standard deviation, `σ ≥ 0`.
        generator: Source of randomness; None for PyTorch's global one.

    Returns:
        Tensors of the shapes of `tensors`, in float32 (or float64).

    Raises:
        ValueError: `std` is negative, infinite or NaN.

    Examples:
        >>> noise = gaussian_noise([torch.zeros(10_000)], 0.5, torch.Generator().manual_seed(0))
        >>> round(noise[0].std().item(), 2)
        0.5
    """
    std = check_radius("std", std)
    return [
        _drawn(tensor, generator).normal_(0.0, 1.0, generator=generator).mul_(std).to(tensor.device)
        for tensor in tensors
    ]


def uniform_noise(tensors: Sequence[Tensor], bound: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return independent entries `a_i ~ U(−b, b)`.

    Args:
        tensors: Give shapes, devices and whether the noise is float64; their values are not read.
        bound: b, the largest magnitude, `b ≥ 0`.
        generator: Source of randomness; None for PyTorch's global one.

    Returns:
        Tensors of the shapes of `tensors`, in float32 (or float64).

    Raises:
        ValueError: `bound` is negative, infinite or NaN.

    Examples:
        >>> noise = uniform_noise([torch.zeros(10_000)], 0.5, torch.Generator().manual_seed(0))
        >>> bool(noise[0].abs().max() <= 0.5)
        True
    """
    bound = check_radius("bound", bound)
    return [
        _drawn(tensor, generator).uniform_(-1.0, 1.0, generator=generator).mul_(bound).to(tensor.device)
        for tensor in tensors
    ]
