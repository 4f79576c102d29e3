"""Quantization against numpy, and against a search for the nearest number that a format has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_parcor.functional import quantize, quantize_to_float
from hf_parcor.functional.quantization import _rounded_in_rows, quantize_in_turn

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


SPECIAL = st.sampled_from([0.0, -0.0, math.inf, math.nan, 1e-45, 3e38, -3e38])


@given(
    dtypes=st.sampled_from([(torch.float32,), (torch.bfloat16,), (torch.float64,), (torch.float32, torch.float16)]),
    values=st.lists(st.lists(st.floats(-2, 2) | SPECIAL, max_size=6), max_size=5),
    bits=st.integers(2, 16),
)
def test_many_together_are_rounded_as_each_by_itself(dtypes, values: list[list[float]], bits: int) -> None:
    tensors = [torch.tensor(entries).to(dtypes[place % len(dtypes)]) for place, entries in enumerate(values)]
    check_rounded(tensors, [tensor for some in quantize_in_turn(tensors, bits) for tensor in some], bits)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if filled and len(dtypes) == 1:
        check_rounded(filled, _rounded_in_rows(filled, bits), bits)


@for_each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@for_each("sizes", [[(700,)], [(3, 300), (256,), (), (513,), (2, 5, 7)]])
def test_in_rows_as_on_a_gpu_they_are_too(dtype, sizes) -> None:
    tensors = [(10.0**place * torch.randn(size)).to(dtype) for place, size in enumerate(sizes)]
    tensors.append(torch.randn(30, 20).to(dtype).t())
    check_rounded(tensors, _rounded_in_rows(tensors, 4), 4)


def check_rounded(tensors: list[torch.Tensor], found: list[torch.Tensor], bits: int) -> None:
    for one, tensor in zip(found, tensors, strict=True):
        expected = quantize(tensor, bits)
        assert (one.dtype, one.shape) == (expected.dtype, expected.shape)
        torch.testing.assert_close(one, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.signbit(), expected.signbit())


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


SCHEMES = {
    "restricted": {},
    "full": {"code_range": "full"},
    "unclipped": {"code_range": "unclipped"},
    "asymmetric": {"symmetric": False},
    "float zero": {"symmetric": False, "zero_point": "float"},
}


def levels_of(row: np.ndarray, bits: int, scheme: str) -> np.ndarray:
    """Return the numbers that a block may be rounded to, in float64."""
    low, high, half = row.min(), row.max(), 2 ** (bits - 1)
    codes = np.arange(-half, half, dtype=float)
    if scheme == "float zero":
        return low + (codes + half) * (high - low) / (2 * half - 1)
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "asymmetric":
        scale = (high - low) / (2 * half - 1)
        return (codes - np.clip(-half - np.rint(low / scale), -half, half - 1)) * scale
    if scheme == "restricted":
        return codes[1:] * max(-low, high) / (half - 1)
    scale = max(-low, high) / (half - 0.5) if scheme == "full" else max(low / -half, high / (half - 1))
    return codes * scale


@for_each("scheme", SCHEMES)
@for_each("bits", [2, 3, 4, 8])
@for_each("arithmetic", ["float32", "weight"])
def test_every_weight_becomes_the_nearest_level_of_its_block(scheme: str, bits: int, arithmetic: str) -> None:
    weights = torch.randn(6, 64, dtype=torch.float64)
    weights[1], weights[2] = weights[1].abs() + 1, -weights[2].abs()
    for per, rows in (("tensor", weights.view(1, -1)), ("channel", weights), (16, weights.view(-1, 16))):
        found = quantize(weights, bits, per, arithmetic=arithmetic, **SCHEMES[scheme]).view(rows.shape)
        for row, mine in zip(rows.numpy(), found.numpy(), strict=True):
            levels = levels_of(row, bits, scheme)
            assert np.abs(mine[:, None] - levels).min(1).max() < 1e-12
            np.testing.assert_allclose(np.abs(mine - row), np.abs(row[:, None] - levels).min(1), atol=1e-12)


@for_each("scheme", SCHEMES)
@for_each("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_do_not_see_each_other(scheme: str, dtype: torch.dtype, same_bits) -> None:
    weights = torch.randn(5, 32).mul(torch.tensor([1e-3, 1.0, 0.0, 30.0, 2.0])[:, None]).to(dtype)
    weights[4, 3] = math.nan
    settings = SCHEMES[scheme]
    by_channel = [quantize(row, 4, **settings) for row in weights]
    assert same_bits([quantize(weights, 4, "channel", **settings)], [torch.stack(by_channel)])
    assert same_bits([quantize(weights.t().contiguous().t(), 4, "channel", **settings)], [torch.stack(by_channel)])
    by_group = [quantize(group, 4, **settings) for group in weights.view(-1, 8)]
    assert same_bits([quantize(weights, 4, 8, **settings)], [torch.stack(by_group).view(5, 32)])
    assert same_bits([weights[4]], [by_channel[4]])  # what is not finite stays
    assert not by_channel[2].any()


@for_each("scheme", SCHEMES)
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@for_each("arithmetic", ["float32", "weight"])
def test_every_number_of_bits_holds_weights_of_every_dtype(scheme: str, dtype: torch.dtype, arithmetic: str) -> None:
    for first, last in ((-1.0, 1.2), (0.0, 5.0), (-5.0, 0.0)):  # of one sign, codes go as far from zero as they can
        weights, largest = torch.linspace(first, last, 64).view(2, 32).to(dtype), max(-first, last)
        for bits in BITS:
            step = 2 * largest / (2**bits - 1) + 4 * largest * torch.finfo(dtype).eps  # products are of this dtype
            for per in ("tensor", "channel", 16):
                found = quantize(weights, bits, per, arithmetic=arithmetic, **SCHEMES[scheme])
                assert float((found.double() - weights.double()).abs().max()) <= 1.2 * step


def test_channels_of_convolutions_are_those_of_the_matrix_below() -> None:
    weights = torch.randn(5, 3, 2, 2)
    assert torch.equal(quantize(weights, 4, "channel").flatten(1), quantize(weights.flatten(1), 4, "channel"))


@for_each("per", ["channel", 2])
def test_vectors_have_no_channels_and_no_groups(per) -> None:
    for vector in (torch.randn(8), torch.tensor(2.0), torch.empty(0)):
        assert torch.equal(quantize(vector, 2, per), vector)
        assert torch.equal(quantize_to_float(vector, "fp8_e5m2", per), vector)


@for_each(
    ("settings", "error", "words"),
    [
        ({"per": "row"}, ValueError, "per: .*channel.*'row'"),
        ({"per": 1}, ValueError, "per: .*2.*got 1"),
        ({"per": 2.0}, TypeError, "per: .*got 2.0"),
        ({"per": 3}, ValueError, r"per: .*divide.*3.*\(4, 8\)"),
        ({"symmetric": 1}, TypeError, "symmetric: .*got 1"),
        ({"symmetric": False, "code_range": "full"}, ValueError, "code_range: .*asymmetric"),
        ({"zero_point": "float"}, ValueError, "zero_point: .*symmetric"),
        ({"code_range": "whole"}, ValueError, "code_range: .*'whole'"),
        ({"arithmetic": "bfloat16"}, ValueError, "arithmetic: .*'bfloat16'"),
    ],
)
def test_settings_that_are_none(settings, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quantize(torch.ones(4, 8), 4, **settings)


E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the nearest of known magnitudes, of two that are as near the one with the even place."""
    distances = np.abs(np.abs(numbers)[:, None] - known)
    ties = np.where(np.arange(len(known)) % 2, 1e-9, 0.0)
    return np.copysign(known[(distances + ties).argmin(1)], numbers)


def float8_magnitudes(dtype: torch.dtype) -> np.ndarray:
    bits = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return np.unique(bits[bits.isfinite()].abs().numpy())


def expected_float(weights: np.ndarray, name: str) -> np.ndarray:
    """Return a matrix in a format, block by block, in float64."""
    if name.startswith("fp8"):
        known = float8_magnitudes({"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name])
        scale = np.abs(weights).max() / known[-1]
        return nearest(weights.ravel() / scale, known).reshape(weights.shape) * scale
    blocks = weights.reshape(-1, 32 if name == "mxfp4" else 16)
    largest = np.abs(blocks).max(1)
    if name == "mxfp4":
        scales = 2.0 ** (np.floor(np.log2(largest)) - 2)
    else:
        shared = largest.max() / (448 * 6)
        wanted = largest / 6 / shared
        scales = nearest(np.maximum(wanted, 2.0**-6), float8_magnitudes(torch.float8_e4m3fn)) * shared
    rounded = [nearest(block / scale, E2M1) * scale for block, scale in zip(blocks, scales, strict=True)]
    return np.stack(rounded).reshape(weights.shape)


@for_each("name", ["fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4"])
def test_the_nearest_number_of_a_float_format(name: str) -> None:
    weights = torch.randn(6, 64, dtype=torch.float64) * torch.logspace(-2, 0, 6, dtype=torch.float64)[:, None]
    weights[0, :8] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], dtype=torch.float64) / 64  # ties of E2M1
    weights[0, 8:] = 1 / 64
    found = quantize_to_float(weights, name).numpy()
    np.testing.assert_allclose(found, expected_float(weights.numpy(), name), rtol=1e-12)


def test_nf4_takes_the_nearest_of_sixteen_numbers() -> None:
    weights = torch.randn(3, 64)
    scales = weights.abs().amax(1, keepdim=True)
    found = quantize_to_float(weights, "nf4") / scales
    levels = torch.unique(quantize_to_float(torch.linspace(-1, 1, 64)[None], "nf4"))
    assert levels.shape == (16,)
    assert levels[[0, -1]].tolist() == [-1, 1]
    assert (levels == 0).any()
    distance = (weights / scales - found).abs()
    best = ((weights / scales)[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close(distance, best, rtol=0, atol=1e-6)


@for_each("name", ["fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4", "nf4"])
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_float_formats_leave_zeros_and_what_is_not_finite(name: str, dtype: torch.dtype, same_bits) -> None:
    weights = torch.randn(4, 64).to(dtype)
    weights[0], weights[1, 5] = 0, math.inf
    per = "channel" if name.startswith("fp8") else None
    found = quantize_to_float(weights, name, per)
    assert found.dtype == dtype
    assert same_bits([found[0]], [weights[0]])
    assert not found[2:].isnan().any()
    assert found[1, 5] == math.inf
    assert name == "nvfp4" or not same_bits([found[2:]], [weights[2:]])  # whose scale of all blocks is infinite


@for_each("name", ["fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4", "nf4"])
@for_each("size", [2e-38, 1e-36, 1e-30, 1e30, 3e38])
def test_float_formats_of_weights_of_any_size_stay_finite_beside_zeros(name: str, size: float) -> None:
    weights = torch.zeros(2, 64)
    weights[0, 0], weights[0, 40] = size, -size / 3
    found = quantize_to_float(weights, name, "channel" if name.startswith("fp8") else None)
    assert found.isfinite().all()
    assert not found[weights == 0].any()
    assert found.abs().max() <= 1.25 * size, "up to half of a step, of four bits at most"


@for_each(
    ("name", "per", "error", "words"),
    [
        ("fp4", None, ValueError, "format: .*mxfp4.*'fp4'"),
        (4, None, TypeError, "format: .*got 4"),
        ("mxfp4", 16, ValueError, "per: .*32.*mxfp4.*16"),
        ("mxfp4", None, ValueError, r"per: .*divide.*32.*\(4, 8\)"),
        ("fp8_e4m3", "row", ValueError, "per: .*'row'"),
    ],
)
def test_float_formats_that_are_none(name, per, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quantize_to_float(torch.ones(4, 8), name, per)
