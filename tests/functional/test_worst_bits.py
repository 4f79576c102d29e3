"""What is stored against NumPy's integers, and the worst bit against all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from for_each import for_each

from hf_parcor.functional import field_bits, flip_bits, flip_random_bits, largest_of_kernels, quantize, worst_flip
from hf_parcor.functional.stored_numbers import StoredNumbers, check_format

FORMATS = [None, "float32", "bfloat16", "float16", "int8", "int4", "int2", "int16"]
AWKWARD = [0.0, -0.0, 1.0, 1.9999999, -2.0, 1e-40, 3e38, -3.4028234e38, 0.04, -5e-7]


def codes(tensor: torch.Tensor, bits: int) -> tuple[np.ndarray, np.float32]:
    """The integer codes by NumPy, whose signed integers are two's complement."""
    weights = tensor.numpy()
    step = np.float32(np.abs(weights).max() / np.float32(2 ** (bits - 1) - 1))
    return np.round(weights / step).astype(np.int16), step


def test_the_sign_of_float64_that_is_flipped_already():
    """Its mask is the largest of 64 bits, which no signed integer holds."""
    weight, sign = np.float64(1.5), np.uint64(1) << np.uint64(63)
    now = weight.view(np.uint64) ^ sign
    with np.errstate(all="ignore"):
        gains = [-((now ^ (np.uint64(1) << np.uint64(at))).view(np.float64) + weight) for at in range(63)]
    best = max(gain for gain in gains if np.isfinite(gain))
    found = worst_flip(torch.tensor([weight]), torch.tensor([-1.0], dtype=torch.float64), flipped={0: 1 << 63})
    assert found == (best, 0, gains.index(best))


class TestIntegerCodes:
    def test_a_single_weight_has_a_code(self) -> None:
        (flipped,) = flip_random_bits([torch.tensor([0.5])], count=1, of="int8")
        assert flipped.item() != 0.5

    @for_each("bits", [8, 16])
    def test_flips_are_those_of_numpys_integers(self, bits: int) -> None:
        tensor = torch.randn(40)
        found, step = codes(tensor, bits)
        native = found.astype(f"i{bits // 8}").view(f"u{bits // 8}")
        for position in range(bits):
            flipped = flip_bits(tensor, torch.arange(40), torch.full((40,), position), of=f"int{bits}")
            expected = (native ^ native.dtype.type(1 << position)).view(f"i{bits // 8}")
            np.testing.assert_array_equal(flipped.numpy(), expected.astype(np.float32) * step)

    @for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @for_each("bits", [2, 3, 4, 8, 16])
    def test_without_flips_they_are_the_quantized_weights(self, dtype: torch.dtype, bits: int) -> None:
        none = torch.empty(0, dtype=torch.int64)
        for tensor in (torch.randn(6, 7).to(dtype).t(), torch.zeros(3, dtype=dtype), torch.empty(0, 2, dtype=dtype)):
            assert torch.equal(flip_bits(tensor, none, none, of=f"int{bits}"), quantize(tensor, bits))

    def test_a_step_at_an_end_of_the_range(self) -> None:
        none = torch.empty(0, dtype=torch.int64)
        for scale in (1e-44, 3e38):
            tensor = torch.tensor([1.0, -0.7, 0.3]) * scale
            assert torch.equal(flip_bits(tensor, none, none, of="int8"), quantize(tensor, 8))

    def test_random_flips_change_so_many_codes(self) -> None:
        tensors = [torch.randn(5, 6), torch.zeros(9), torch.randn(11)]
        for count in (1, 7, 8 * 41):
            flipped = flip_random_bits(tensors, count=count, of="int8")
            assert not flipped[1].any(), "zeros have no codes"
            changed = 0
            for before, after in ((tensors[0], flipped[0]), (tensors[2], flipped[2])):
                found, step = codes(before, 8)
                now = np.round(after.numpy() / step).astype(np.int8)
                changed += int(np.bitwise_count(found.astype(np.int8).view("u1") ^ now.view("u1")).sum())
            assert changed == count
        with pytest.raises(ValueError, match="at most 328 bits"):
            flip_random_bits(tensors, count=8 * 41 + 1, of="int8")


@for_each(
    ("of", "message"),
    [
        ("int1", "2"),
        ("int17", "2..16"),
        ("int8x", "int2 to int16"),
        ("fp8", "int2"),
        (8, "int2"),
        (torch.int8, "int2"),
    ],
)
def test_unknown_formats(of: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_format(of)


@for_each(("dtype", "of"), [(torch.bfloat16, "float16"), (torch.float16, "bfloat16"), (torch.bfloat16, "float32")])
def test_formats_that_a_dtype_cannot_hold(dtype: torch.dtype, of: str) -> None:
    with pytest.raises(ValueError, match="holds"):
        StoredNumbers.of(torch.ones(2, dtype=dtype), of)


@for_each(("of", "field"), [("int8", "exponent"), ("int4", "mantissa"), ("bfloat16", "fraction")])
def test_fields_that_a_format_does_not_have(of: str, field: str) -> None:
    with pytest.raises(ValueError, match="bits: expected"):
        field_bits(of, field)


def all_gains(tensor: torch.Tensor, gradient: torch.Tensor, of: str | None) -> dict[tuple[int, int], float]:
    """g·Δw of every bit of every entry whose flip is finite, bit by bit."""
    none, all_of_them = torch.empty(0, dtype=torch.int64), torch.arange(tensor.numel())
    start = flip_bits(tensor, none, none, of).double()
    found = {}
    for position in field_bits(of or tensor.dtype):
        after = flip_bits(tensor, all_of_them, torch.full_like(all_of_them, position), of).double()
        gains = (gradient.double() * (after - start)).reshape(-1).tolist()
        found |= {(element, position): gain for element, gain in enumerate(gains) if math.isfinite(gain)}
    return found


class TestWorstFlip:
    @for_each("of", FORMATS)
    @for_each("sign", [1, -1])
    def test_no_bit_of_an_entry_gains_more(self, of: str | None, sign: int) -> None:
        """Entry by entry, for numbers of every kind: the search has no freedom in which to be right by chance."""
        awkward = [] if of is not None and of.startswith("int") else AWKWARD
        values = [0.0, *(v for v in awkward if of in (None, "float32") or abs(v) < 6e4), *torch.randn(8).tolist()]
        tensor = torch.tensor(values)
        gains = all_gains(tensor, torch.full_like(tensor, 0.5 * sign), of)
        for entry in range(len(values)):
            gradient = torch.zeros_like(tensor)
            gradient[entry] = 0.5 * sign
            best = max(gain for (element, _), gain in gains.items() if element == entry)
            found = worst_flip(tensor, gradient, of)
            assert found is not None
            assert found.gain == pytest.approx(max(best, 0.0), rel=1e-6)
            if best > 0:
                assert gains[entry, found.position] == pytest.approx(best, rel=1e-6)
                assert found.element == entry

    @for_each("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_of_other_dtypes(self, dtype: torch.dtype) -> None:
        tensor, gradient = torch.randn(4, 5).to(dtype).t(), torch.randn(5, 4)
        gains = all_gains(tensor, gradient, None)
        found = worst_flip(tensor, gradient)
        assert found is not None
        assert (found.element, found.position) == max(gains, key=gains.__getitem__)

    def test_bits_that_are_flipped_are_not_flipped_back(self) -> None:
        tensor, gradient = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.1])
        sign = {1: 1 << 31}
        found = worst_flip(tensor, torch.tensor([0.0, -1.0]), None, sign)  # at +2 the sign would gain 4
        assert found is not None
        assert (found.element, found.gain) == (0, 0.0)
        found = worst_flip(tensor, gradient, None, sign)
        assert found is not None
        after = flip_bits(tensor, torch.tensor([1, found.element]), torch.tensor([31, found.position]))
        assert found.gain == pytest.approx(float((gradient * (after - torch.tensor([1.0, 2.0]))).sum()))

    @for_each("entry", [math.nan, math.inf])
    def test_what_is_not_finite_is_left_out(self, entry: float) -> None:
        found = worst_flip(torch.tensor([entry, 1.0]), torch.tensor([1e9, -1.0]))
        assert found is not None
        assert found.element == 1
        assert worst_flip(torch.tensor([1.0, 2.0]), torch.tensor([entry, entry])) is None

    def test_nothing_to_flip(self) -> None:
        assert worst_flip(torch.empty(0), torch.empty(0)) is None
        assert worst_flip(torch.zeros(2), torch.ones(2), "int8") is None

    def test_weights_are_only_read(self) -> None:
        tensor = torch.randn(9)
        before, version = tensor.clone(), tensor._version
        worst_flip(tensor, torch.randn(9), None, {2: 1 << 30})
        assert torch.equal(tensor, before)
        assert tensor._version == version


def test_large_tensors_piece_by_piece() -> None:
    tensor, gradient = torch.full((1 << 20 | 5,), 0.5), torch.full((1 << 20 | 5,), -1.0)
    gradient[-2] = -3.0
    found = worst_flip(tensor, gradient)
    assert found == (3.0, (1 << 20) + 3, 31)
    again = worst_flip(tensor, gradient, None, {found.element: 1 << 31})  # at -1/2 it is to shrink further
    assert again is not None
    assert (again.element, again.position) == (found.element, 30)


@for_each("shape", [(6, 7), (3, 4, 2, 2), (9,)])
def test_one_a_kernel(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    tensor.view(-1)[0] = math.nan
    rows = tensor.reshape(-1, 1 if len(shape) == 1 else math.prod(shape[2:] or shape[1:])).numpy()
    expected = sorted(
        (
            (-float(abs(row[column])), index * len(row) + int(column))
            for index, row in enumerate(rows)
            if not np.isnan(row).all()
            for column in [np.nanargmax(abs(row))]
        )
    )[:4]
    sizes, places = largest_of_kernels(tensor, 4)
    assert places.tolist() == [place for _, place in expected]
    assert sizes.tolist() == pytest.approx([-size for size, _ in expected])
