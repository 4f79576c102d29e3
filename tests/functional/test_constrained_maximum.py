"""The closed form is the best point of the constraint: against random points, the dual norm, and itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import launches

from hf_parcor.functional import (
    constrained_maximum,
    constrained_maximum_,
    constrained_maximum_value,
    inner_product,
    keep_top_n,
    vector_norm,
)
from hf_parcor.functional.constrained_maximum import constrained_maximum_of_each_

NORMS = [1.0, 1.5, 2.0, 4.0, math.inf]
EPSILON = 0.3

entries = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
vectors = st.lists(st.lists(entries, max_size=5), min_size=1, max_size=4).filter(lambda parts: any(parts))


def tensors_of(parts: list[list[float]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor(part, dtype=dtype) for part in parts]


def feasible_points(generator: np.random.Generator, samples: int, k: int, p: float, n: int | None) -> np.ndarray:
    """Points of S for ε = 1: all kinds of directions and supports, most on the boundary, some inside."""
    points = generator.standard_normal((samples, k))
    points *= np.abs(points) ** generator.uniform(-0.9, 3, (samples, 1))  # from almost sgn to almost one-hot
    allowed = generator.integers(1, (n or k) + 1, (samples, 1))
    points[generator.random((samples, k)).argsort(axis=1) >= allowed] = 0
    norms = np.linalg.norm(points, ord=p, axis=1, keepdims=True)
    points /= np.where(norms > 0, norms, 1)
    points[::10] *= generator.random((len(points[::10]), 1))
    assert np.all(np.linalg.norm(points, ord=p, axis=1) <= 1 + 1e-12)
    assert np.all(np.count_nonzero(points, axis=1) <= (n or k))
    return points


def dual_norm(vector: np.ndarray, p: float, n: int | None) -> float:
    """‖top_n(v)‖_{p/(p−1)} in float64, scaled so that no power leaves the range."""
    kept = np.sort(np.abs(vector))[::-1][:n]
    largest = kept[0]
    if largest == 0 or p == 1:
        return float(largest)
    dual = 1.0 if math.isinf(p) else p / (p - 1)
    return float(largest * ((kept / largest) ** dual).sum() ** (1 / dual))


@pytest.mark.slow
@for_each("p", NORMS)
@for_each("n", [None, 1, 2, 3])
def test_beats_300_000_feasible_points_and_they_come_close(p: float, n: int | None) -> None:
    generator = np.random.default_rng(0)
    v = torch.tensor([2.0, -1.5, 0.5, -0.1], dtype=torch.float64)
    (a,) = constrained_maximum([v], p, 1.0, n)
    reached = float(a @ v)
    best = (feasible_points(generator, 300_000, 4, p, n) @ v.numpy()).max()
    assert best <= reached * (1 + 1e-12)
    assert best >= reached * 0.97  # so the comparison means something


@pytest.mark.slow
@settings(max_examples=75)
@given(p=st.sampled_from(NORMS), parts=vectors, n=st.none() | st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_no_feasible_point_is_better(p: float, parts: list[list[float]], n: int | None, seed: int) -> None:
    v = tensors_of(parts)
    a = constrained_maximum(v, p, EPSILON, n)
    flat = np.concatenate([np.asarray(part, np.float64) for part in parts])
    points = EPSILON * feasible_points(np.random.default_rng(seed), 10_000, len(flat), p, n)
    reached = float(inner_product(a, v))
    assert (points @ flat).max() <= reached * (1 + 1e-5) + 1e-30


@settings(max_examples=75)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    p=st.sampled_from([*NORMS, 1.01, 3.0, 100.0]),
    parts=vectors,
    n=st.none() | st.integers(1, 25),
    epsilon=st.just(0.0) | st.floats(1e-6, 100),
)
def test_is_feasible_and_reaches_the_dual_norm(
    dtype: torch.dtype, p: float, parts: list[list[float]], n: int | None, epsilon: float
) -> None:
    v = tensors_of(parts, dtype)
    a = constrained_maximum(v, p, epsilon, n)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    flat = np.concatenate([np.asarray(part, np.float64) for part in parts])
    expected = epsilon * dual_norm(flat, p, n)
    # A gradient of 1e-45 gives a product of subnormal numbers: some of its digits are not there.
    assert float(constrained_maximum_value(v, p, epsilon, n)) == pytest.approx(expected, rel=tolerance, abs=1e-44)
    assert float(inner_product(a, v)) == pytest.approx(expected, rel=tolerance, abs=1e-44)
    flat_a = torch.cat([part.double() for part in a]).numpy()
    assert np.linalg.norm(flat_a, ord=p) <= epsilon * (1 + tolerance) + 1e-44
    assert np.count_nonzero(flat_a) <= (n or len(flat_a))
    assert [part.shape for part in a] == [part.shape for part in v]
    assert {part.dtype for part in a} == {dtype}


@pytest.mark.slow
@for_each("p", [*NORMS, 1.01])
@for_each("n", [None, 2])
@for_each("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e38])
def test_only_the_direction_counts_at_any_magnitude(p: float, n: int | None, scale: float) -> None:
    v = [torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([-0.5])]
    expected = constrained_maximum(v, p, EPSILON, n)
    scaled = constrained_maximum([part * scale for part in v], p, EPSILON, n)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-7)


@for_each("p", [*NORMS, 1.01])
@for_each("scale", [5e-324, 1e-300, 1e300])
def test_only_the_direction_counts_in_float64(p: float, scale: float) -> None:
    v = torch.tensor([4.0, -4.0, 0.0, 4.0], dtype=torch.float64)
    (scaled,) = constrained_maximum([v * scale], p, EPSILON)
    torch.testing.assert_close(scaled, constrained_maximum([v], p, EPSILON)[0], rtol=1e-12, atol=0)


@for_each("p", NORMS)
@for_each("largest", [1e-45, 1e-38, 3.4e38])
def test_one_tiny_or_huge_entry_takes_all(p: float, largest: float) -> None:
    (a,) = constrained_maximum([torch.tensor([0.0, -largest, 0.0])], p, EPSILON)
    torch.testing.assert_close(a, torch.tensor([0.0, -EPSILON, 0.0]))


@for_each("p", [*NORMS, 1.01, 1e300])
@for_each("n", [None, 1, 3, 100])
def test_zero_gives_exactly_zero(p: float, n: int | None, same_bits) -> None:
    v = [torch.zeros(3, 2), torch.zeros(4)]
    assert same_bits(constrained_maximum(v, p, EPSILON, n), v)
    assert float(constrained_maximum_value(v, p, EPSILON, n)) == 0


@pytest.mark.slow
@for_each("p", NORMS)
@for_each("n", [None, 1, 3])
@for_each("bad", [math.nan, math.inf, -math.inf])
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_entry_that_is_not_finite_gives_all_zero(
    p: float, n: int | None, bad: float, dtype: torch.dtype, same_bits
) -> None:
    v = [torch.tensor([5.0, -1.0], dtype=dtype), torch.tensor([[1.0], [bad]], dtype=dtype)]
    expected = [torch.zeros_like(part, dtype=torch.promote_types(dtype, torch.float32)) for part in v]
    assert same_bits(constrained_maximum(v, p, EPSILON, n), expected)


@for_each("p", NORMS)
@for_each("n", [1, 2, 7, 1000, 1499])
def test_ties_leave_exactly_n_entries_and_always_the_same(p: float, n: int, same_bits) -> None:
    v = [torch.full((10, 50), -2.0), torch.full((1000,), 2.0)]
    a = constrained_maximum(v, p, EPSILON, n)
    expected = 1 if p == 1 else n
    kept = torch.cat([part.reshape(-1) for part in a]).nonzero().squeeze(1)
    assert kept.tolist() == list(range(expected))
    assert same_bits(a, constrained_maximum(v, p, EPSILON, n))
    assert float(vector_norm(a, p)) == pytest.approx(EPSILON, rel=1e-6)


@settings(max_examples=75)
@given(p=st.sampled_from(NORMS), parts=vectors, n=st.none() | st.integers(1, 8), batched=st.booleans())
def test_of_each_is_that_of_each_by_itself(p: float, parts: list[list[float]], n: int | None, batched: bool) -> None:
    tensors = tensors_of(parts)
    with launches(batched):
        constrained_maximum_of_each_(tensors, p, EPSILON, n)
    for found, part in zip(tensors, tensors_of(parts), strict=True):
        (expected,) = constrained_maximum([part], p, EPSILON, n)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-45)


@settings(max_examples=75)
@given(p=st.sampled_from(NORMS), parts=vectors, n=st.none() | st.integers(1, 8))
def test_a_list_is_the_concatenated_vector(p: float, parts: list[list[float]], n: int | None) -> None:
    whole = constrained_maximum([torch.cat(tensors_of(parts))], p, EPSILON, n)
    pieces = constrained_maximum(tensors_of(parts), p, EPSILON, n)
    torch.testing.assert_close(torch.cat(pieces), whole[0], rtol=1e-6, atol=0)


@for_each("p", NORMS)
@for_each("n", [None, 5])
@for_each("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(p: float, n: int | None, dtype: torch.dtype, same_bits) -> None:
    v = [torch.randn(7, 3).to(dtype), torch.randn(11).to(dtype)]
    assert same_bits(constrained_maximum(v, p, 1e-3, n), constrained_maximum([part.float() for part in v], p, 1e-3, n))


@for_each("p", NORMS)
@for_each("n", [None, 2])
def test_empty_tensors_in_the_list(p: float, n: int | None, same_bits) -> None:
    v = torch.tensor([1.0, -3.0, 2.0])
    first, middle, last = constrained_maximum([torch.empty(0), v, torch.empty(2, 0)], p, EPSILON, n)
    assert (first.shape, last.shape) == ((0,), (2, 0))
    assert same_bits([middle], constrained_maximum([v], p, EPSILON, n))
    assert [part.shape for part in constrained_maximum([torch.empty(0)], p, EPSILON, n)] == [(0,)]
    assert constrained_maximum([], p, EPSILON, n) == []
    assert float(constrained_maximum_value([torch.empty(0)], p, EPSILON, n)) == 0
    assert float(constrained_maximum_value([], p, EPSILON, n)) == 0


@for_each("p", NORMS)
@for_each("n", [None, 9])
def test_in_place_on_tensors_that_are_not_contiguous(p: float, n: int | None) -> None:
    v = [torch.randn(6, 4).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(9)[::2]]
    expected = constrained_maximum([part.contiguous() for part in v], p, EPSILON, n)
    overwritten = [part.clone() if part.ndim == 4 else part for part in v]
    strides = [part.stride() for part in overwritten]
    assert not any(part.is_contiguous() for part in overwritten)
    constrained_maximum_(overwritten, p, EPSILON, n)
    torch.testing.assert_close(overwritten, expected, rtol=1e-6, atol=0)
    assert [part.stride() for part in overwritten] == strides


@for_each("p", NORMS)
def test_input_is_only_read_and_parameters_are_welcome(p: float, same_bits) -> None:
    v = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    before = [part.detach().clone() for part in v]
    a = constrained_maximum(v, p, EPSILON, 3)
    assert same_bits(v, before)
    assert not any(part.requires_grad for part in a)


@for_each("p", NORMS)
def test_epsilon_of_zero_allows_nothing(p: float) -> None:
    v = [torch.randn(5), torch.randn(2, 2)]
    assert all(not part.any() for part in constrained_maximum(v, p, 0, 2))
    assert float(constrained_maximum_value(v, p, 0, 2)) == 0


def test_top_n_of_all_entries_is_no_limit(same_bits) -> None:
    v = [torch.randn(5), torch.randn(2, 2)]
    for p in NORMS:
        assert same_bits(constrained_maximum(v, p, EPSILON, 9), constrained_maximum(v, p, EPSILON))
        assert same_bits(constrained_maximum(v, p, EPSILON, 10**12), constrained_maximum(v, p, EPSILON))


def test_norm_orders_close_to_the_limits_approach_them() -> None:
    v = [torch.tensor([1.0, -2.0, 0.0, 1.9])]
    torch.testing.assert_close(constrained_maximum(v, 1.001, EPSILON), constrained_maximum(v, 1, EPSILON))
    for p in (1e6, 1e17, 1e300):
        torch.testing.assert_close(
            constrained_maximum(v, p, EPSILON), constrained_maximum(v, math.inf, EPSILON), rtol=1e-5, atol=0
        )


def test_special_cases_of_the_formula() -> None:
    v = [torch.tensor([3.0, 0.0]), torch.tensor([-4.0])]
    torch.testing.assert_close(constrained_maximum(v, 2, 2.0), [torch.tensor([1.2, 0.0]), torch.tensor([-1.6])])
    torch.testing.assert_close(constrained_maximum(v, math.inf, 2.0), [torch.tensor([2.0, 0.0]), torch.tensor([-2.0])])
    torch.testing.assert_close(constrained_maximum(v, 1, 2.0), [torch.tensor([0.0, 0.0]), torch.tensor([-2.0])])


def test_top_n_is_chosen_before_the_norm(same_bits) -> None:
    v = [torch.randn(50), torch.randn(3, 9)]
    for p in NORMS:
        assert same_bits(constrained_maximum(v, p, EPSILON, 13), constrained_maximum(keep_top_n(v, 13), p, EPSILON))


@for_each(
    ("p", "epsilon", "n", "error", "message"),
    [
        (0.5, 1.0, None, ValueError, r"p: expected 1 <= p <= inf, got 0.5"),
        (math.nan, 1.0, None, ValueError, r"p: .* got NaN"),
        ("2", 1.0, None, TypeError, r"p: .* got '2' of type str"),
        (2, -1e-9, None, ValueError, r"epsilon: expected 0 <= epsilon < inf, got -1e-09"),
        (2, math.nan, None, ValueError, r"epsilon: .* got NaN"),
        (2, math.inf, None, ValueError, r"epsilon: .* got inf"),
        (2, None, None, TypeError, r"epsilon: .* got None"),
        (2, 1.0, 0, ValueError, r"top_n: expected a whole number >= 1, got 0"),
        (2, 1.0, -2, ValueError, r"top_n: expected a whole number >= 1, got -2"),
        (2, 1.0, 2.0, TypeError, r"top_n: expected a whole number >= 1, got 2.0"),
        (1, 1.0, 0, ValueError, r"top_n: expected a whole number >= 1, got 0"),
        (2, 1.0, True, TypeError, r"top_n: expected a whole number >= 1, got True"),
    ],
)
def test_bad_numbers_are_refused_before_anything_changes(p, epsilon, n, error, message, same_bits) -> None:
    v = [torch.randn(3), torch.randn(2)]
    before = [part.clone() for part in v]
    with pytest.raises(error, match=message):
        constrained_maximum_(v, p, epsilon, n)
    assert same_bits(v, before)
    with pytest.raises(error, match=message):
        constrained_maximum(v, p, epsilon, n)
    with pytest.raises(error, match=message):
        constrained_maximum_value(v, p, epsilon, n)
