"""What numbers are stored as: bit patterns of IEEE floats, or two's-complement codes of quantized weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_parcor.distributed.dtensors import local_part, sharded_as
from hf_parcor.functional.norms import max_magnitude
from hf_parcor.functional.quantization import check_bits, restricted_scale
from hf_parcor.functional.vectors import INTEGER_OF_SIZE

MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INTEGER = re.compile(r"int(\d+)")


def mantissa_bits(dtype: torch.dtype) -> int:
    """Return the bits of a float's mantissa; refuse, with a `TypeError`, what is no IEEE float of 16 to 64 bits."""
    if dtype not in MANTISSA_BITS:
        known = ", ".join(str(name).removeprefix("torch.") for name in MANTISSA_BITS)
        raise TypeError(f"dtype: expected one of {known}, got {dtype}; select floating-point parameters only")
    return MANTISSA_BITS[dtype]


def check_format(of: object) -> str | None:
    """Return the name of what weights are stored as, or None for their own dtype.

    "float32", "bfloat16", "float16", or "int2" to "int16": `round(W/w0)`, the n-bit codes of `quantize`, in two's
    complement.

    Raises:
        ValueError: It is none of these.

    Examples:
        >>> check_format("int8")
        'int8'
    """
    if of is None or of in FLOATS:
        return None if of is None else str(of)
    found = _INTEGER.fullmatch(of) if isinstance(of, str) else None
    if found is None:
        raise ValueError(
            f"of: expected {', '.join(FLOATS)}, int2 to int16, or None, got {of!r}; name what weights are stored as"
        )
    return f"int{check_bits(int(found[1]))}"


def integer_width(of: str | None) -> int | None:
    """Return the bits of an integer format; None for floats.

    Examples:
        >>> integer_width("int8"), integer_width("float16")
        (8, None)
    """
    return int(of.removeprefix("int")) if of is not None and of.startswith("int") else None


@dataclass(frozen=True)
class StoredNumbers:
    """A tensor as bit patterns: of a sharded one, those of this rank.

    Attributes:
        bits: One pattern an entry, as signed integers: a float's own bits, or the lowest `width` bits of a code. They
            may share memory with the tensor: they are only read.
        width: Bits of a pattern.
        like: The tensor.
        step: w0 of integer codes; None for floats.
        dtype: What a pattern is read as: the floats that are stored, or the dtype of the step.
    """

    bits: Tensor
    width: int
    like: Tensor
    step: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def has_bits(tensor: Tensor, of: str | None) -> bool:
        """Return whether a tensor has patterns: there are no integer codes of zeros, nor of what is not finite."""
        mantissa_bits(tensor.dtype)  # there are no patterns of others
        width = integer_width(of)
        return width is None or (tensor.numel() > 0 and _step(tensor, width) is not None)

    @classmethod
    def of(cls, tensor: Tensor, of: str | None = None) -> StoredNumbers | None:
        """Return what a tensor is stored as.

        Args:
            tensor: Floating point, any shape.
            of: The format, as in `check_format`; all entries are rounded to it.

        Returns:
            None for integer codes of a tensor without a step.

        Raises:
            TypeError: The tensor is not of float16, bfloat16, float32 or float64.
            ValueError: There is no such format, or the tensor's dtype cannot hold its numbers.

        Examples:
            >>> StoredNumbers.of(torch.tensor([-1.0, 0.25, 1.0]), "int3").bits  # codes -3, 1, 3
            tensor([5, 1, 3], dtype=torch.int32)
        """
        here, mantissa = local_part(tensor).detach(), mantissa_bits(tensor.dtype)
        width = integer_width(check_format(of))
        if width is None:
            dtype = tensor.dtype if of is None else FLOATS[of]
            if MANTISSA_BITS[dtype] > mantissa or (torch.finfo(dtype).max > torch.finfo(tensor.dtype).max):
                raise ValueError(
                    f"of: expected a format whose numbers {tensor.dtype} holds, got {of}; load the weights in float32"
                )
            bits = here.to(dtype).contiguous().view(-1).view(INTEGER_OF_SIZE[dtype.itemsize])
            return cls(bits, dtype.itemsize * 8, tensor, None, dtype)
        step = _step(tensor, width) if tensor.numel() else None
        if step is None:
            return None
        weights = (here if tensor.dtype == torch.float64 else here.float()).contiguous().view(-1)
        levels = 2 ** (width - 1) - 1
        codes = torch.round(weights / step).clamp(-levels, levels).to(torch.int32)
        return cls(codes & (2**width - 1), width, tensor, step, step.dtype)

    def values(self, bits: Tensor) -> Tensor:
        """Return the numbers that some patterns stand for, in `dtype`.

        A code of all ones but the last level, `−2^(n−1)`, is none that rounding makes, but one that a flip does.
        """
        if self.step is None:
            return bits.view(self.dtype)
        top = 1 << (self.width - 1)
        largest = torch.finfo(self.like.dtype).max
        return (((bits ^ top) - top).to(self.dtype) * self.step).clamp(-largest, largest)

    def tensor(self, bits: Tensor) -> Tensor:
        """Return a tensor as the stored one, with these patterns in place of its own."""
        return sharded_as(self.values(bits).to(self.like.dtype).view(local_part(self.like).shape), self.like)


def _step(tensor: Tensor, width: int) -> Tensor | None:
    """Return `w0 = max|W| / (2^(n−1) − 1)`, as `quantize`; None where there is none."""
    step, usable, _, _ = restricted_scale(max_magnitude([tensor]), width)
    return step if bool(usable) else None
