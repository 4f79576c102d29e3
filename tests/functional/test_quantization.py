"""Quantization against ten lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_parcor.functional import quantize

BITS = range(2, 17)
TINY = 1e-30  # below it the step of 16 bits is subnormal

entries = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda value: value == 0 or abs(value) > TINY)


def reference(weights: np.ndarray, bits: int) -> np.ndarray:
    """Eq. A.1 of paper 2, in the precision of its input."""
    largest = np.abs(weights).max(initial=0)
    if largest == 0:
        return weights
    step = largest / weights.dtype.type(2 ** (bits - 1) - 1)
    return np.rint(weights / step) * step


@settings(max_examples=200)
@given(dtype=st.sampled_from([np.float32, np.float64]), values=st.lists(entries, max_size=20), bits=st.integers(2, 16))
def test_against_the_reference(dtype: type, values: list[float], bits: int) -> None:
    weights = np.array(values, dtype)
    found = quantize(torch.from_numpy(weights), bits).numpy()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, reference(weights, bits))


@for_each("dtype", [torch.bfloat16, torch.float16])
@for_each("bits", BITS)
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype, bits: int) -> None:
    weights = (0.04 * torch.randn(50, 20)).to(dtype)
    expected = torch.from_numpy(reference(weights.float().numpy(), bits)).to(dtype)
    found = quantize(weights, bits)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.slow
@for_each("bits", BITS)
@for_each("scale", [1e-44, 1e-38, 1e-20, 1.0, 1e20, 3.4e38])
def test_levels_and_errors(bits: int, scale: float) -> None:
    weights = scale * (2 * torch.rand(200_000) - 1)
    found = quantize(weights, bits)
    largest = float(weights.abs().max())
    step = largest / (2 ** (bits - 1) - 1)
    assert torch.isfinite(found).all()
    assert len(found.unique()) <= 2**bits - 1
    if scale == 1.0 and bits <= 12:
        assert len(found.unique()) == 2**bits - 1  # with so many entries every level is met
    rounding = largest * 2**-22 + (0 if scale > 1e-30 else math.inf)  # a subnormal step is itself rounded
    assert float((found.double() - weights.double()).abs().max()) <= step / 2 + rounding


@for_each("bits", BITS)
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_idempotent(bits: int, dtype: torch.dtype) -> None:
    once = quantize(torch.randn(5000).to(dtype), bits)
    assert torch.equal(quantize(once, bits), once)


@for_each("bits", BITS)
def test_the_largest_entry_and_zero_stay(bits: int) -> None:
    weights = torch.cat([torch.randn(1000), torch.zeros(3), torch.tensor([-9.0])])
    found = quantize(weights, bits)
    assert float(found[-1]) == pytest.approx(-9, rel=1e-6)
    assert not found[1000:1003].any()
    assert float((found - weights).abs().max()) > 0


def test_odd() -> None:
    weights = torch.randn(1000)
    assert torch.equal(quantize(-weights, 5), -quantize(weights, 5))


def test_two_bits_are_three_levels_and_halves_go_to_even() -> None:
    assert quantize(torch.tensor([-1.0, -0.5, 0.2, 0.5, 0.51, 1.0]), 2).tolist() == [-1, 0, 0, 0, 1, 1]
    assert quantize(torch.tensor([3.0, 1.5, 2.5, 0.5]), 3).tolist() == [3, 2, 2, 0]


@for_each("weights", [torch.zeros(4), torch.tensor([0.0, -0.0]), torch.tensor([1e-45, 0.0])])
def test_zeros_and_the_smallest_number_stay(weights: torch.Tensor, same_bits) -> None:
    assert same_bits([quantize(weights, 8)], [weights])


@for_each("bad", [math.nan, math.inf, -math.inf])
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tensor_that_is_not_finite_stays(bad: float, dtype: torch.dtype, same_bits) -> None:
    weights = torch.tensor([1.0, bad, 0.3], dtype=dtype)
    assert same_bits([quantize(weights, 4)], [weights])


def test_shapes_strides_and_empty_tensors() -> None:
    for weights in (torch.randn(4, 6).t(), torch.empty(0), torch.empty(3, 0), torch.tensor(2.0)):
        found = quantize(weights, 4)
        assert found.shape == weights.shape
        assert torch.equal(found, quantize(weights.contiguous(), 4))


def test_the_result_is_a_new_tensor() -> None:
    for weights in (torch.randn(5), torch.zeros(5), torch.empty(0), torch.randn(5).bfloat16()):
        before = weights.clone()
        quantize(weights, 4).add_(1)
        assert torch.equal(weights, before)


@for_each("bits", [1, 0, -4, 17, 32])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits: expected a whole number .*2.*, got {bits}"):
        quantize(torch.ones(2), bits)


@for_each("bits", [4.0, True, "4", None, torch.tensor(4)])
def test_bits_that_are_not_whole(bits) -> None:
    with pytest.raises(TypeError, match=r"bits: expected a whole number >= 2, got .*"):
        quantize(torch.ones(2), bits)
