"""Quantization of one tensor: to integers as in paper 2 and as deployed, and to floats of 4 and 8 bits.

A tensor is cut into blocks that share a scale: all of it, its output channels, or groups of consecutive entries.
Each function here rounds the weights to what a format can hold, and returns them in the dtype they came in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hf_parcor.arguments import check_choice, check_count, check_flag
from hf_parcor.devices import in_float64
from hf_parcor.distributed.dtensors import ShardedVector, has_whole_rows, local_part, one_vector, sharded_as
from hf_parcor.functional.vectors import in_turn, working_dtype

Per = str | int
"""What shares a scale: "tensor", "channel", or so many consecutive entries of the last dimension."""

CODE_RANGES = ("restricted", "full", "unclipped")
ZERO_POINTS = ("integer", "float")
ARITHMETICS = ("float32", "weight")
ROUNDED_TOGETHER = 1 << 24  # entries that a GPU rounds in one call
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


def check_per(per: object) -> Per:
    """Return what shares a scale: "tensor", "channel", or the size of a group, at least 2."""
    return check_choice("per", per, ("tensor", "channel")) if isinstance(per, str) else check_count("per", per, 2)


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
    blocks = _Blocks.of(tensor, per)
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
        rows, places = _as_rows(tensors, _ROW)
        # Pinned, so that the device gets these few numbers without being waited for.
        repeats = torch.tensor(counts, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
        scales = scales.index_select(1, torch.repeat_interleave(repeats, output_size=len(rows)))
    step, usable, divisor, last = scales.unsqueeze(2).unbind()
    rounded = (rows / divisor).round_().mul_(step).clamp_(-last, last).to(dtype)
    chosen = torch.where(usable > 0, rounded, rows).view(-1)
    return [chosen[place].view(tensor.shape) for place, tensor in zip(places, tensors, strict=True)]


def _as_rows(tensors: list[Tensor], width: int) -> tuple[Tensor, list[slice]]:
    """Return a matrix that holds tensors of one dtype and device, each from a row of its own on, and where each lies.

    What fills up the last row of a tensor is anything.
    """
    ends = list(accumulate((math.ceil(tensor.numel() / width) for tensor in tensors), initial=0))
    places = [slice(width * end, width * end + t.numel()) for end, t in zip(ends, tensors, strict=False)]
    rows = torch.empty(ends[-1], width, dtype=tensors[0].dtype, device=tensors[0].device)
    parts = [rows.view(-1)[place].view(t.shape) for place, t in zip(places, tensors, strict=True)]
    torch._foreach_copy_(parts, tensors)
    return rows, places


def row_width(tensor: Tensor, per: Per, *, flat: bool = False) -> int | None:
    """Return how many entries of a tensor share a scale, in rows that `in_rows` can join; None where it cannot.

    Args:
        tensor: Any tensor.
        per: As in `quantize`.
        flat: Whether groups run over the rows of a tensor, as those of NF4. Default False.

    Examples:
        >>> row_width(torch.zeros(2, 3, 4), "channel"), row_width(torch.zeros(2, 12), 4), row_width(torch.zeros(8), 4)
        (12, 4, None)
    """
    if per == "tensor" or type(tensor.detach()) is not Tensor or tensor.ndim < 2 or not tensor.numel():
        return None
    if isinstance(per, int):
        return None if (tensor.numel() if flat else tensor.shape[-1]) % per else per
    return tensor.numel() // tensor.shape[0]


def in_rows(
    tensors: Mapping[str, Tensor],
    width: Callable[[Tensor], int | None],
    rounded: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return what `rounded` makes of tensors whose rows do not know of each other: those of one width in one call.

    A GPU is kept waiting by calls, not by numbers. Tensors that gain nothing are left out: those without a width, the
    only ones of theirs, and those of 16 million entries and more, of which a copy would cost more than it saves.

    Args:
        tensors: By name.
        width: Says how long the rows of a tensor are; None where it is no row after row.
        rounded: Returns a matrix in which each row is made from that row alone.

    Examples:
        >>> found = in_rows(
        ...     {"a": torch.ones(1, 2, 2), "b": torch.zeros(3), "c": torch.eye(2)},
        ...     lambda tensor: None if tensor.ndim < 2 else 2,
        ...     lambda rows: rows.cumsum(1),
        ... )
        >>> found["a"], found["c"], len(found)
        (tensor([[[1., 2.],
                 [1., 2.]]]), tensor([[1., 1.],
                [0., 1.]]), 2)
    """
    alike: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        entries = width(tensor) if tensor.numel() < ROUNDED_TOGETHER else None
        if entries is not None:
            alike.setdefault((entries, tensor.dtype, tensor.device), []).append(name)
    found: dict[str, Tensor] = {}
    for (entries, _, _), names in alike.items():
        if len(names) > 1:
            rows, places = _as_rows([tensors[name] for name in names], entries)
            flat = rounded(rows).view(-1)
            found |= {n: flat[place].view(tensors[n].shape) for n, place in zip(names, places, strict=True)}
    return found


def restricted_scale(largest: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scale of symmetric, restricted codes, for the largest magnitude of each block.

    Returns:
        The step `s = max|w| / (2^(n−1) − 1)`; whether it is of use, finite and not 0; the step, or 1 where it is of
        none, to divide by; and the last level. A step at an end of the float range is rounded itself, and no level may
        be ∞.
    """
    levels = 2 ** (bits - 1) - 1
    step = _divided(largest, levels)
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


class _Blocks(NamedTuple):
    """The local part of a tensor as rows that share a scale each; its extremes are those of whole blocks."""

    tensor: Tensor
    rows: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, tensor: Tensor, per: Per) -> _Blocks | None:
        """Return the blocks; None for tensors that stay as they are: empty ones, and vectors but for one scale."""
        if per != "tensor" and tensor.ndim > 1:
            check_blocks(tensor, per)
        if tensor.numel() == 0 or (per != "tensor" and tensor.ndim < 2):
            return None
        here = local_part(tensor)
        if per == "tensor":
            low, high = _extremes(tensor)
            return cls(tensor, here.reshape(1, -1), low, high)
        width = math.prod(here.shape[1:]) if isinstance(per, str) else per
        rows = here.reshape(here.numel() // width, width)
        low, high = torch.aminmax(rows, dim=1, keepdim=True)
        return cls(tensor, rows, low, high)

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each block, in the dtype of the weights."""
        return torch.maximum(-self.low, self.high)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of computations: float32, or float64."""
        return working_dtype([self.rows])

    def joined(self, rounded: Tensor, usable: Tensor) -> Tensor:
        """Return the tensor of the rounded rows, of finite numbers; those whose scale is of no use stay."""
        largest = torch.finfo(self.rows.dtype).max
        rows = torch.where(usable, rounded.clamp_(-largest, largest).to(self.rows.dtype), self.rows)
        return sharded_as(rows.reshape(local_part(self.tensor).shape), self.tensor)


def check_blocks(tensor: Tensor, per: Per) -> None:
    """Refuse a matrix that has no whole blocks.

    Raises:
        ValueError: The size of a group does not divide its last dimension.
        NotImplementedError: Its shards cut blocks.
    """
    if isinstance(per, int) and tensor.shape[-1] % per:
        raise ValueError(
            f"per: expected groups that divide the last dimension, got groups of {per} for a tensor of shape "
            f"{tuple(tensor.shape)}; take a size that divides it, or leave the tensor out (exclude_modules)"
        )
    if not has_whole_rows(tensor):
        raise NotImplementedError(
            f"per: expected a tensor that is cut along its first dimension alone, got placements "
            f"{tensor.placements}; quantize per tensor, or shard the first dimension"  # type: ignore[attr-defined]
        )


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest entry of a whole tensor, in its dtype; NaN if any is."""
    vector = one_vector([tensor])
    if not isinstance(vector, ShardedVector):
        low, high = torch.aminmax(tensor)
    else:
        low = vector.gather(partial(_extreme, largest=False)).amin()
        high = vector.gather(partial(_extreme, largest=True)).amax()
    return low.to(tensor.dtype).reshape(1, 1), high.to(tensor.dtype).reshape(1, 1)


def _extreme(parts: list[Tensor], largest: bool) -> Tensor:
    (part,) = parts
    dtype = working_dtype(parts)
    if not part.numel():
        return torch.full((), -math.inf if largest else math.inf, dtype=dtype, device=part.device)
    return (part.amax() if largest else part.amin()).to(dtype)


def _divided(numbers: Tensor, by: float) -> Tensor:
    """Return a quotient, rounded once: a GPU would multiply by the rounded reciprocal of what is no tensor there."""
    wide = numbers.to(working_dtype([numbers]))
    return (wide / torch.full_like(wide, by)).to(numbers.dtype)


def _restricted(blocks: _Blocks, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    step, usable, divisor, last = restricted_scale(blocks.largest.to(dtype), bits)
    rounded = torch.round(blocks.rows.to(dtype) / divisor) * step
    return rounded.clamp(-last, last), usable


def _affine(
    blocks: _Blocks, bits: int, dtype: torch.dtype, smallest: float, code_range: str | None
) -> tuple[Tensor, Tensor]:
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = blocks.low.clamp(max=0), blocks.high.clamp(min=0)
    if code_range is None:
        scale = _divided(high - low, highest - lowest)
    elif code_range == "full":
        scale = _divided(blocks.largest, (highest - lowest) / 2)
    else:
        scale = torch.maximum(_divided(low, lowest), _divided(high, highest))
    scale = scale.clamp(min=smallest).to(dtype)
    zero = lowest - torch.round(low.to(dtype) / scale) if code_range is None else torch.zeros_like(scale)
    zero = zero.clamp(lowest, highest)
    codes = (torch.round(blocks.rows.to(dtype) * (1.0 / scale)) + zero).clamp(lowest, highest)
    return (codes - zero) * scale, torch.isfinite(scale)


def _between_extremes(blocks: _Blocks, bits: int, dtype: torch.dtype, smallest: float) -> tuple[Tensor, Tensor]:
    scale = _divided(blocks.high - blocks.low, 2**bits - 1).clamp(min=smallest).to(dtype)
    middle = 2 ** (bits - 1)  # the number that is kept beside the scale is that of the code in the middle
    kept = blocks.low.to(dtype) + scale * middle
    last = min(2**bits - 1, torch.finfo(dtype).max)  # float16 ends before 65535
    codes = torch.round((blocks.rows.to(dtype) - (kept - scale * middle)) / scale).clamp(0, last)
    values = in_float64(codes - middle) * in_float64(scale) + in_float64(kept)
    return values.to(blocks.wide).to(scale.device), torch.isfinite(scale)


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
    format of two scales. NF4: Dettmers et al. 2023, arXiv:2305.14314. Ties go to the even mantissa, those of NF4 to
    the lower number; what lies beyond the largest number becomes it. A block of zeros is returned as it is, and so is
    one with an entry that is not finite or so small that its scale, or one over it, is none of the dtype's numbers,
    and vectors, which no tool rounds.

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
    blocks = _Blocks.of(tensor, per)
    assert blocks is not None, "neither empty nor a vector"
    weights = blocks.rows.to(blocks.wide)
    if format in _FP8:
        largest = torch.finfo(_FP8[format]).max
        scale = _divided(blocks.largest, largest).to(blocks.wide)
        usable = torch.isfinite(scale) & (scale > 0)
        held = (weights / scale).clamp(-largest, largest).to(_FP8[format])
        return blocks.joined(held.to(blocks.wide) * scale, usable)
    magnitudes = blocks.largest.to(blocks.wide)
    usable = torch.isfinite(magnitudes) & (magnitudes > 0)
    if format == "mxfp4":
        mantissas = torch.frexp(magnitudes).mantissa  # in [1/2, 1): the quotient is a power of two, without rounding
        scale = (magnitudes / 8 / mantissas).clamp(2.0**-126, 2.0**127)
        return blocks.joined(_e2m1(weights / scale) * scale, usable)
    low, high = _extremes(tensor)
    shared = _divided(torch.maximum(-low, high).to(blocks.wide), 448.0 * _E2M1_LARGEST)
    smallest = torch.finfo(torch.float8_e4m3fn).smallest_normal
    own = (_divided(magnitudes, _E2M1_LARGEST) / shared).clamp(smallest, 448.0)
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
