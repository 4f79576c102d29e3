"""Norms and products of tensors seen as one vector, against exact sums over the concatenation."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_parcor.functional import inner_product, max_magnitude, vector_norm
from hf_parcor.functional.norms import (
    _norm_in_float64,
    euclidean_norm,
    vector_norm_of_unit_scale,
)

NORMS = [1.0, 1.01, 1.5, 2.0, 3.0, 10.0, math.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

entries = st.floats(allow_nan=False, allow_infinity=False, width=32)
vectors = st.lists(st.lists(entries, max_size=6), min_size=1, max_size=4)


def norm_by_fsum(values: list[float], p: float) -> float:
    """‖v‖_p with exact sums; only the powers are rounded."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0 or math.isinf(p):
        return largest
    return largest * math.fsum((abs(value) / largest) ** p for value in values) ** (1 / p)


class TestVectorNorm:
    @settings(max_examples=180)
    @given(p=st.sampled_from(NORMS), parts=vectors)
    def test_against_exact_sums_over_the_whole_range(self, p: float, parts: list[list[float]]) -> None:
        expected = norm_by_fsum([value for part in parts for value in part], p)
        assert float(vector_norm([torch.tensor(part, dtype=torch.float64) for part in parts], p)) == pytest.approx(
            expected, rel=1e-13
        )
        found = float(vector_norm([torch.tensor(part) for part in parts], p))
        largest = float(torch.finfo(torch.float32).max)
        assert found == pytest.approx(expected if expected < largest else math.inf, rel=1e-6, abs=1e-45) or (
            expected == pytest.approx(largest, rel=1e-6)
        )

    @for_each("p", NORMS)
    @for_each("dtype", DTYPES)
    def test_against_torch_over_the_concatenation(self, p: float, dtype: torch.dtype, joined) -> None:
        tensors = [torch.randn(33, 77).to(dtype), torch.randn(5000).to(dtype).view(50, 100).t(), torch.randn(1)]
        expected = torch.linalg.vector_norm(joined(tensors), p)
        found = vector_norm(tensors, p)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.ndim == 0
        assert float(found) == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.slow
    @for_each("norm", [vector_norm, vector_norm_of_unit_scale])
    @for_each("p", [1.0, 1.5, 2.0, 4.0])
    def test_long_vectors_keep_their_digits(self, norm, p: float) -> None:
        # Summing one after another in float32 loses 9 % of this L1 norm, and more of longer ones.
        value, size = 0.1, 10_000_000
        tensor = torch.full((size,), value)
        expected = float(tensor[0].double()) * size ** (1 / p)
        assert float(norm([tensor[:7], tensor[7:]], p)) == pytest.approx(expected, rel=3e-5)

    def test_of_low_precision_is_added_in_float32(self) -> None:
        ones = torch.ones(100_000, dtype=torch.float16)  # the sum is beyond float16
        tiny = torch.full((1000,), 1 + 2**-7, dtype=torch.bfloat16)
        assert float(vector_norm_of_unit_scale([ones], 1)) == 100_000
        assert float(vector_norm_of_unit_scale([tiny], 1)) == 1000 * (1 + 2**-7)
        assert vector_norm_of_unit_scale([tiny], 2).dtype == torch.float32

    @for_each("p", NORMS)
    @for_each("largest", [1e-45, 1e-38, 1e-20, 1e20, 1e38])
    def test_extremes(self, p: float, largest: float) -> None:
        tensor = torch.tensor([largest, -largest, 0.0])
        expected = float(tensor[0].double()) * (1 if math.isinf(p) else 2 ** (1 / p))
        assert float(vector_norm([tensor], p)) == pytest.approx(expected, rel=1e-6, abs=1e-45)

    @for_each("p", NORMS)
    def test_not_finite(self, p: float) -> None:
        assert float(vector_norm([torch.tensor([1.0]), torch.tensor([math.inf, 2.0])], p)) == math.inf
        assert float(vector_norm([torch.tensor([1.0, -math.inf])], p)) == math.inf
        assert math.isnan(vector_norm([torch.tensor([1.0]), torch.tensor([math.nan, 2.0])], p))

    @for_each("p", NORMS)
    def test_nothing_has_norm_zero(self, p: float) -> None:
        for tensors in ([], [torch.empty(0)], [torch.empty(2, 0), torch.zeros(3)], [torch.tensor([0.0, -0.0])]):
            assert float(vector_norm(tensors, p)) == 0
            assert float(vector_norm_of_unit_scale(tensors, p)) == 0

    def test_mixed_precisions_in_the_widest(self) -> None:
        tensors = [torch.ones(3, dtype=torch.bfloat16), torch.ones(6, dtype=torch.float64)]
        assert vector_norm(tensors).dtype == torch.float64
        assert float(vector_norm(tensors)) == pytest.approx(3, rel=1e-15)

    @for_each("p", [0.5, 0, -1, math.nan])
    def test_bad_orders(self, p: float) -> None:
        with pytest.raises(ValueError, match=r"p: expected 1 <= p <= inf, got"):
            vector_norm([torch.ones(2)], p)


class TestMaxMagnitude:
    @settings(max_examples=60)
    @given(parts=vectors, dtype=st.sampled_from(DTYPES))
    def test_against_python(self, parts: list[list[float]], dtype: torch.dtype) -> None:
        tensors = [torch.tensor(part).to(dtype) for part in parts]
        expected = max((abs(value) for tensor in tensors for value in tensor.tolist()), default=0.0)
        assert float(max_magnitude(tensors)) == expected

    def test_nan_wins(self) -> None:
        assert math.isnan(max_magnitude([torch.tensor([math.inf]), torch.tensor([1.0, math.nan])]))


class TestInnerProduct:
    @settings(max_examples=60)
    @given(pairs=st.lists(st.tuples(entries, entries), max_size=10), cut=st.integers(0, 10))
    def test_against_exact_sums(self, pairs: list[tuple[float, float]], cut: int) -> None:
        first, second = torch.tensor(pairs).reshape(-1, 2).unbind(dim=1)
        found = inner_product([first[:cut], first[cut:]], [second[:cut], second[cut:]])
        assert found.dtype == torch.float64
        scale = math.fsum(abs(a * b) for a, b in pairs)
        assert float(found) == pytest.approx(math.fsum(a * b for a, b in pairs), rel=0, abs=1e-14 * scale)

    def test_shapes_and_strides_do_not_matter(self) -> None:
        a, b = torch.randn(4, 6), torch.randn(4, 6)
        expected = float((a.double() * b.double()).sum())
        assert float(inner_product([a.t()], [b.t().contiguous()])) == pytest.approx(expected, rel=1e-12)

    def test_lists_of_different_length_are_refused(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            inner_product([torch.ones(2)], [])


class TestEuclideanNorm:
    @settings(max_examples=120)
    @given(norm=st.sampled_from([euclidean_norm, _norm_in_float64]), parts=vectors.filter(lambda parts: any(parts)))
    def test_of_float32_of_any_size(self, norm, parts: list[list[float]]) -> None:
        expected = norm_by_fsum([value for part in parts for value in part], 2)
        found = norm([torch.tensor(part) for part in parts])
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(expected, rel=1e-6, abs=0)

    def test_ordinary_entries_are_read_once(self, entries_made) -> None:
        assert entries_made(lambda: euclidean_norm([torch.ones(1_000_000)])) < 1_000_000 + 10_000

    def test_many_small_entries_count_beside_a_large_one(self) -> None:
        tensors = [torch.full((100_000,), 1e-23), torch.tensor([1e-22])]
        assert float(euclidean_norm(tensors)) == pytest.approx(math.sqrt(1e5 * 1e-46 + 1e-44), rel=1e-6)
