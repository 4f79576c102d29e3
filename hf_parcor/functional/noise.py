"""Random vectors in the shape of given tensors, drawn on the generator's device so that a seed means one vector.

Of sharded tensors each rank draws all, one after the other, and keeps its part: the seed means the same vector there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice, check_radius
from hf_parcor.distributed.dtensors import cut_as, has_whole_rows, local_part, sharded_as, shared_generator
from hf_parcor.functional.norms import max_magnitude
from hf_parcor.functional.vectors import working_dtype

_BLOCK = 1 << 20  # entries that a thread draws; a multiple of 16
REFERENCES = ("tensor", "channel", "weight")
_Fill = Callable[[Tensor, torch.Generator | None], Tensor]


def _drawn(tensors: Sequence[Tensor], generator: torch.Generator | None, fill: _Fill) -> Iterator[Tensor]:
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
    scale = check_radius("std", std)
    return _scaled(tensors, generator, lambda noise, source: noise.normal_(0.0, 1.0, generator=source), scale)


def _scaled(
    tensors: Sequence[Tensor], generator: torch.Generator | None, fill: _Fill, scale: float
) -> Iterator[Tensor]:
    def filled(noise: Tensor, source: torch.Generator | None) -> Tensor:
        drawn = _filled(noise, source, fill)
        return drawn if scale == 1 else drawn.mul_(scale)

    return _drawn(tensors, generator, filled)


def _filled(noise: Tensor, source: torch.Generator | None, fill: _Fill) -> Tensor:
    """Do as `fill(noise, source)` does, to the last bit: a large tensor on a CPU in threads.

    The CPU's generator gives one number of 32 bits after another, and 16 entries of float32 are made of 16 of them.
    The states at which blocks begin are found by drawing integers of two each; the blocks are filled beside.
    """
    threads, large = torch.get_num_threads(), noise.dtype == torch.float32 and noise.numel() >= 2 * _BLOCK
    if threads == 1 or not large or noise.device.type != "cpu":
        return fill(noise, source)
    source = source or torch.default_generator
    *blocks, last = noise.view(-1).tensor_split(list(range(_BLOCK, noise.numel() - _BLOCK + 1, _BLOCK)))
    passed_over = torch.empty(_BLOCK // 2, dtype=torch.int64, device=noise.device)
    with ThreadPoolExecutor(threads) as pool:
        filled = []
        for block in blocks:
            filled.append(pool.submit(_fill, block, source.get_state(), fill))
            passed_over.random_(generator=source)
        fill(last, source)  # `normal_` draws anew for the end of a size that is no multiple of 16
        for one in filled:
            one.result()
    return noise


def _fill(block: Tensor, state: Tensor, fill: _Fill) -> None:
    source = torch.Generator()
    source.set_state(state)
    with torch.inference_mode(block.is_inference()):  # each thread has its own
        fill(block, source)


def drawn_uniform(
    tensors: Sequence[Tensor], bound: float, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield what `uniform_noise` returns, each tensor drawn when it is asked for."""
    scale = check_radius("bound", bound)
    return _scaled(tensors, generator, lambda noise, source: noise.uniform_(-1.0, 1.0, generator=source), scale)


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


def relative(noise: Tensor, tensor: Tensor, to: str | None) -> Tensor:
    """Return `a_i = m_i n_i`: noise in units of the largest weight of the tensor or channel, or of each weight.

    ::

        tensor     m_i = max |w|
        channel    m_i = max |w| over the entries with the index of i in the first dimension
        weight     m_i = |w_i|: multiplicative noise; of symmetric n it is distributed as w_i (1 + n_i), and to first
                   order as the log-normal w_i exp(n_i)

    An entry of a vector is a channel of its own.

    Args:
        noise: `n`, overwritten.
        tensor: `w`, of the same shape, and sharded alike.
        to: "tensor", "channel" or "weight"; None for `a = n`.

    Raises:
        ValueError: `to` is none of these.
        NotImplementedError: Channels are cut by the sharding.

    Examples:
        >>> relative(torch.ones(2, 2), torch.tensor([[1.0, -4.0], [0.5, 0.0]]), "channel")
        tensor([[4.0000, 4.0000],
                [0.5000, 0.5000]])
    """
    if to is None or not tensor.numel():
        return noise
    here = local_part(tensor).detach()
    if check_choice("relative_to", to, REFERENCES) == "tensor":
        magnitudes = max_magnitude([tensor])
    elif to == "channel" and here.ndim > 1:
        if not has_whole_rows(tensor):
            raise NotImplementedError(
                "relative_to: expected a tensor that is cut along its first dimension alone, got one whose channels "
                'are cut; take "tensor" or "weight", or shard the first dimension'
            )
        magnitudes = here.abs().amax(dim=tuple(range(1, here.ndim)), keepdim=True)
    else:
        magnitudes = here.abs()
    local_part(noise).mul_(magnitudes.to(working_dtype([here])))
    return noise


def conductance_drift(
    tensors: Sequence[Tensor], ratio: float, mean: float, std: float, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield `w_i ρ^(−ν_i)` with exponents `ν_i = |N(mean, std²)|`, each tensor when it is asked for.

    Args:
        tensors: `w`.
        ratio: `ρ ≥ 1`, how often the time of the first reading has passed.
        mean: Mean of the exponents before their sign is dropped.
        std: Their standard deviation, `≥ 0`.
        generator: Source of randomness; None for PyTorch's global one.

    Yields:
        A tensor of the shape and dtype of each.

    Raises:
        ValueError: `std` is negative, infinite or NaN.

    Examples:
        >>> list(conductance_drift([torch.tensor([3.0, -1.0])], 16.0, mean=0.5, std=0.0))
        [tensor([ 0.7500, -0.2500])]
    """
    drawn = drawn_gaussian(tensors, std, generator)
    for tensor in tensors:
        exponents = local_part(next(drawn)).add_(mean).abs_()
        here = local_part(tensor).detach()
        yield sharded_as((here * ratio**-exponents).to(here.dtype), tensor)
        del exponents
