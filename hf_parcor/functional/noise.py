"""Random vectors in the shape of given tensors, drawn on the generator's device so that a seed means one vector.

Of sharded tensors each rank draws all, one after the other, and keeps its part: the seed means the same vector there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_parcor.arguments import check_radius
from hf_parcor.distributed.dtensors import cut_as, local_part, shared_generator


def _drawn(
    tensors: Sequence[Tensor],
    generator: torch.Generator | None,
    fill: Callable[[Tensor, torch.Generator | None], Tensor],
) -> Iterator[Tensor]:
    source = shared_generator(tensors, generator)
    for like in tensors:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        home = local_part(like).device
        noise = fill(torch.empty(like.shape, dtype=dtype, device=home if source is None else source.device), source)
        part = cut_as(noise.to(home), like)
        del noise
        yield part
        del part


def drawn_gaussian(
    tensors: Sequence[Tensor], std: float, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield what `gaussian_noise` returns, each tensor drawn when it is asked for; the first call draws none."""
    std = check_radius("std", std)
    return _drawn(tensors, generator, lambda noise, source: noise.normal_(0.0, 1.0, generator=source).mul_(std))


def drawn_uniform(
    tensors: Sequence[Tensor], bound: float, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield what `uniform_noise` returns, each tensor drawn when it is asked for."""
    bound = check_radius("bound", bound)
    return _drawn(tensors, generator, lambda noise, source: noise.uniform_(-1.0, 1.0, generator=source).mul_(bound))


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
    return list(drawn_gaussian(tensors, std, generator))


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
    return list(drawn_uniform(tensors, bound, generator))


def random_signs(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return independent entries of −1 and 1, each with probability ½ (Rademacher's distribution).

    Args:
        tensors: Give shapes, devices and whether the signs are float64; their values are not read.
        generator: Source of randomness; None for PyTorch's global one.

    Returns:
        Tensors of the shapes of `tensors`, in float32 (or float64).

    Examples:
        >>> random_signs([torch.zeros(4)], torch.Generator().manual_seed(0))
        [tensor([-1., -1.,  1., -1.])]
    """
    return list(
        _drawn(tensors, generator, lambda signs, source: signs.bernoulli_(0.5, generator=source).mul_(2).sub_(1))
    )
