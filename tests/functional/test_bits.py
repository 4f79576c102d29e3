"""Bit flips against the bytes that `struct` reads and writes."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_parcor.functional import field_bits, flip_bits, flip_random_bits, sample_positions

MANTISSA = {torch.float32: 23, torch.float64: 52, torch.bfloat16: 7, torch.float16: 10}
DTYPES = list(MANTISSA)
FORMATS = {torch.float32: "<f", torch.float64: "<d", torch.float16: "<e"}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
VALUES = (0.0, -0.0, 1.0, -2.25, 0.04, 1e-7, 60000.0, math.inf, -math.inf, math.nan)


def pattern(value: float, dtype: torch.dtype) -> int:
    """The bits of a number of this dtype, as an unsigned integer."""
    if dtype == torch.bfloat16:
        return int.from_bytes(struct.pack("<f", value), "little") >> 16
    return int.from_bytes(struct.pack(FORMATS[dtype], value), "little")


def number(bits: int, dtype: torch.dtype) -> float:
    if dtype == torch.bfloat16:
        return float(struct.unpack("<f", (bits << 16).to_bytes(4, "little"))[0])
    return float(struct.unpack(FORMATS[dtype], bits.to_bytes(dtype.itemsize, "little"))[0])


def patterns(tensor: torch.Tensor) -> np.ndarray:
    integers = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.dtype.itemsize]).numpy()
    return integers.view(f"u{tensor.dtype.itemsize}")


def differing(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> int:
    """How many bits differ."""
    return sum(int(np.bitwise_count(patterns(a) ^ patterns(b)).sum()) for a, b in zip(before, after, strict=True))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestOneFlip:
    @pytest.mark.slow
    @for_each("dtype", DTYPES)
    @for_each("value", VALUES)
    def test_every_position_against_struct(self, dtype: torch.dtype, value: float) -> None:
        tensor = torch.tensor([7.0, value, -3.0], dtype=dtype)
        for position in range(dtype.itemsize * 8):
            flipped = flip_bits(tensor, torch.tensor([1]), torch.tensor([position]))
            bits = pattern(float(tensor[1]), dtype) ^ (1 << position)
            assert int(patterns(flipped)[1]) == bits
            expected = number(bits, dtype)
            assert float(flipped[1]) == expected or (math.isnan(expected) and math.isnan(flipped[1]))
            assert (float(flipped[0]), float(flipped[2])) == (7, -3)
            assert flipped.dtype == dtype
            assert differing([tensor], [flipped]) == 1

    @for_each("dtype", DTYPES)
    def test_twice_restores_every_bit(self, dtype: torch.dtype, same_bits) -> None:
        tensor = torch.tensor(VALUES, dtype=dtype)
        elements = torch.arange(len(VALUES)).repeat_interleave(dtype.itemsize * 8)
        positions = torch.arange(dtype.itemsize * 8).repeat(len(VALUES))
        once = flip_bits(tensor, elements, positions)
        assert differing([tensor], [once]) == len(elements)  # all bits of all entries at once
        assert same_bits([flip_bits(once, elements, positions)], [tensor])

    def test_meaning(self) -> None:
        one = torch.tensor([1.0])
        at = {"sign": 31, "highest exponent": 30, "lowest exponent": 23, "highest mantissa": 22}
        flipped = {name: float(flip_bits(one, torch.tensor([0]), torch.tensor([bit]))) for name, bit in at.items()}
        assert flipped == {
            "sign": -1.0,
            "highest exponent": math.inf,
            "lowest exponent": 0.5,
            "highest mantissa": 1.5,
        }

    @settings(max_examples=150)
    @given(
        dtype=st.sampled_from(DTYPES), pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 15)), max_size=40)
    )
    def test_many_flips_in_any_order_and_repeated(self, dtype: torch.dtype, pairs: list[tuple[int, int]]) -> None:
        tensor = torch.linspace(-1, 2, 6).to(dtype).view(2, 3)
        elements, positions = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(dim=1)
        expected = patterns(tensor).tolist()
        for element, position in set(pairs):  # a pair given twice flips once
            expected[element] ^= 1 << position
        flipped = flip_bits(tensor, elements, positions)
        assert patterns(flipped).tolist() == expected
        assert flipped.shape == tensor.shape

    def test_indices_are_row_major_whatever_the_strides(self) -> None:
        tensor = torch.arange(1.0, 7.0).view(2, 3).t()
        flipped = flip_bits(tensor, torch.tensor([1]), torch.tensor([31]))
        assert flipped.tolist() == [[1, -4], [2, 5], [3, 6]]

    def test_input_is_only_read_and_parameters_are_welcome(self) -> None:
        for tensor in (torch.nn.Parameter(torch.ones(3)), torch.ones(3), torch.ones(6)[::2]):
            flipped = flip_bits(tensor, torch.tensor([0]), torch.tensor([31]))
            assert tensor.tolist() == [1, 1, 1]
            assert flipped.tolist() == [-1, 1, 1]
            assert not flipped.requires_grad

    @for_each(
        ("elements", "positions", "message"),
        [
            ([3], [0], r"elements: expected indices in 0..2, got 3..3"),
            ([-1], [0], r"elements: expected indices in 0..2, got -1..-1"),
            ([0, 1], [31, 32], r"positions: expected indices in 0..31, got 31..32"),
            ([0], [-1], r"positions: expected indices in 0..31, got -1..-1"),
            ([0, 1], [3], r"elements, positions: expected two vectors of one length, got shapes \(2,\) and \(1,\)"),
        ],
    )
    def test_indices_out_of_range(self, elements: list[int], positions: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            flip_bits(torch.ones(3), torch.tensor(elements), torch.tensor(positions))

    def test_integers_have_no_such_fields(self) -> None:
        with pytest.raises(TypeError, match=r"dtype: expected one of float64, .*, got torch.int32"):
            flip_bits(torch.ones(3, dtype=torch.int32), torch.tensor([0]), torch.tensor([0]))


class TestFields:
    @for_each("dtype", DTYPES)
    def test_they_divide_the_width(self, dtype: torch.dtype) -> None:
        width, mantissa = dtype.itemsize * 8, MANTISSA[dtype]
        assert list(field_bits(dtype)) == list(range(width))
        assert list(field_bits(dtype, "mantissa")) == list(range(mantissa))
        assert list(field_bits(dtype, "exponent")) == list(range(mantissa, width - 1))
        assert list(field_bits(dtype, "sign")) == [width - 1]

    @for_each("dtype", DTYPES)
    def test_they_mean_what_ieee_says(self, dtype: torch.dtype) -> None:
        x = torch.tensor([1.25], dtype=dtype)
        for position in field_bits(dtype, "mantissa"):
            flipped = flip_bits(x, torch.tensor([0]), torch.tensor([position]))
            assert float(torch.frexp(flipped.double())[1]) == float(torch.frexp(x.double())[1])
            assert flipped > 0
        for position in field_bits(dtype, "exponent"):
            flipped = flip_bits(x, torch.tensor([0]), torch.tensor([position])).double()
            significand = float(torch.frexp(flipped)[0])
            assert significand == 0.625 or not math.isfinite(flipped) or 0 < float(flipped) < 1e-4
        assert float(flip_bits(x, torch.tensor([0]), torch.tensor([dtype.itemsize * 8 - 1]))) == -1.25

    @for_each("field", ["Sign", "", "all", 3, None])
    def test_unknown_names(self, field) -> None:
        with pytest.raises(ValueError, match=r"bits: expected one of any, sign, exponent, mantissa, got"):
            field_bits(torch.float32, field)

    @for_each("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=r"dtype: expected one of float64, float32, float16, bfloat16"):
            field_bits(dtype)


class TestSampledPositions:
    @settings(max_examples=100)
    @given(total=st.integers(0, 60), share=st.floats(0, 1), seed=st.integers(0, 1000))
    def test_distinct_sorted_and_as_many_as_asked(self, total: int, share: float, seed: int) -> None:
        count = round(share * total)
        chosen = sample_positions(total, count, seeded(seed)).tolist()
        assert len(chosen) == count
        assert chosen == sorted(set(chosen))
        assert all(0 <= position < total for position in chosen)
        assert chosen == sample_positions(total, count, seeded(seed)).tolist()

    @pytest.mark.slow
    @for_each("count", [2, 3, 4])
    def test_every_subset_is_equally_likely(self, count: int) -> None:
        generator = seeded(0)
        tally = dict.fromkeys(itertools.combinations(range(6), count), 0)
        for _ in range(3000):
            tally[tuple(sample_positions(6, count, generator).tolist())] += 1
        assert stats.chisquare(list(tally.values())).pvalue > 1e-3

    @for_each("total", [10**5, 3 * 2**29, 3 * 2**30, 10**12])
    def test_uniform_over_large_ranges(self, total: int) -> None:
        # 32-bit numbers modulo 3 · 2^30 would fall into the first third half of the time.
        chosen = sample_positions(total, 30_000, seeded(0)).double() / total
        assert stats.kstest(chosen.numpy(), stats.uniform.cdf).pvalue > 1e-3

    @for_each("total", [10_000, 10_001])
    def test_dense(self, total: int) -> None:
        for count in (total // 2, total // 2 + 1, total - 1, total):
            chosen = sample_positions(total, count, seeded(0))
            assert len(chosen.unique()) == count

    @for_each("count", [-1, 11])
    def test_more_than_there_are(self, count: int) -> None:
        with pytest.raises(ValueError, match=rf"count: expected 0 <= count <= 10, got {count}"):
            sample_positions(10, count)


class TestRandomFlips:
    @pytest.fixture
    def tensors(self) -> list[torch.Tensor]:
        return [
            torch.randn(40, 30),
            torch.empty(0),
            torch.randn(500).bfloat16(),
            torch.randn(300, dtype=torch.float64),
            torch.randn(7, 9).half().t(),
        ]

    @for_each("field", ["any", "sign", "exponent", "mantissa"])
    @for_each("share", [0.0, 0.3, 0.5, 0.51, 1.0])
    def test_exactly_as_many_bits_as_asked_and_only_in_the_field(
        self, tensors: list[torch.Tensor], field: str, share: float
    ) -> None:
        total = sum(tensor.numel() * len(field_bits(tensor.dtype, field)) for tensor in tensors)
        count = max(1, round(share * total))
        flipped = flip_random_bits(tensors, field, count=count, generator=seeded(0))
        assert differing(tensors, flipped) == count
        for before, after in zip(tensors, flipped, strict=True):
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
            allowed = sum(1 << position for position in field_bits(before.dtype, field))
            assert not ((patterns(before) ^ patterns(after)) & np.uint64(~allowed % 2**64)).any()

    def test_input_is_only_read(self, tensors: list[torch.Tensor], same_bits) -> None:
        before = [tensor.clone() for tensor in tensors]
        flip_random_bits(tensors, count=1000, generator=seeded(0))
        assert same_bits(tensors, before)

    @for_each("amount", [{"count": 300}, {"rate": 0.02}, {"rate": 0.7}])
    def test_seeds(self, tensors: list[torch.Tensor], amount: dict, same_bits) -> None:
        first = flip_random_bits(tensors, **amount, generator=seeded(1))
        assert same_bits(first, flip_random_bits(tensors, **amount, generator=seeded(1)))
        assert not same_bits(first, flip_random_bits(tensors, **amount, generator=seeded(2)))
        before = torch.get_rng_state()
        flip_random_bits(tensors, **amount, generator=seeded(1))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.slow
    @for_each("rate", [1e-4, 0.01, 0.5, 0.9])
    def test_a_rate_gives_binomial_counts(self, rate: float) -> None:
        tensors = [torch.zeros(100), torch.zeros(25)]
        total = 125 * 32
        counts = [
            differing(tensors, flip_random_bits(tensors, rate=rate, generator=seeded(seed))) for seed in range(400)
        ]
        deviation = math.sqrt(total * rate * (1 - rate))
        assert np.mean(counts) == pytest.approx(total * rate, abs=5 * deviation / math.sqrt(len(counts)))
        assert np.var(counts) == pytest.approx(deviation**2, rel=0.4)

    def test_a_rate_of_a_large_vector_hits_every_bit_and_entry_alike(self) -> None:
        tensor = torch.zeros(100_000)
        (flipped,) = flip_random_bits([tensor], rate=0.01, generator=seeded(0))
        bits = patterns(flipped)
        per_position = [int(((bits >> position) & 1).sum()) for position in range(32)]
        assert sum(per_position) == pytest.approx(32_000, abs=5 * math.sqrt(32_000))
        assert stats.chisquare(per_position).pvalue > 1e-3
        assert stats.chisquare(np.bitwise_count(bits).reshape(100, 1000).sum(axis=1)).pvalue > 1e-3
        per_entry = np.bincount(np.bitwise_count(bits), minlength=33)
        expected = 100_000 * stats.binom(32, 0.01).pmf(np.arange(4))
        assert stats.chisquare(per_entry[:4], expected * per_entry[:4].sum() / expected.sum()).pvalue > 1e-3

    def test_every_tensor_gets_its_share(self) -> None:
        tensors = [torch.zeros(30_000), torch.zeros(10_000)]
        first, second = flip_random_bits(tensors, count=4000, generator=seeded(0))
        in_first = differing(tensors[:1], [first])
        assert differing(tensors[1:], [second]) == 4000 - in_first
        assert in_first == pytest.approx(3000, abs=5 * math.sqrt(4000 * 0.75 * 0.25))

    @settings(max_examples=60)
    @given(
        sizes=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(DTYPES)), min_size=1, max_size=12),
        field=st.sampled_from(["any", "sign", "exponent", "mantissa"]),
        share=st.floats(0.01, 1),
        seed=st.integers(0, 100),
    )
    def test_against_a_walk_through_every_bit(self, sizes, field: str, share: float, seed: int) -> None:
        tensors = [torch.ones(size, dtype=dtype) for size, dtype in sizes]
        bits = [
            (number, entry, position)
            for number, tensor in enumerate(tensors)
            for entry in range(len(tensor))
            for position in field_bits(tensor.dtype, field)
        ]
        count = round(share * len(bits))
        if not count:
            return
        expected = [patterns(tensor).tolist() for tensor in tensors]
        for index in sample_positions(len(bits), count, seeded(seed)).tolist():
            number, entry, position = bits[index]
            expected[number][entry] ^= 1 << position
        found = flip_random_bits(tensors, field, count=count, generator=seeded(seed))
        assert [patterns(tensor).tolist() for tensor in found] == expected

    def test_cost_does_not_grow_with_tensors_times_flips(self, entries_made) -> None:
        joined = [torch.zeros(40_000)]
        pieces = list(joined[0].split(100))

        def work(tensors: list[torch.Tensor]) -> int:
            return entries_made(lambda: flip_random_bits(tensors, count=5000, generator=seeded(0)))

        assert work(pieces) < 1.5 * work(joined)

    def test_the_ends_of_the_range_of_rates(self, tensors: list[torch.Tensor], same_bits) -> None:
        assert same_bits(flip_random_bits(tensors, rate=0.0), tensors)
        all_of_them = flip_random_bits(tensors, rate=1.0)
        assert differing(tensors, all_of_them) == sum(tensor.nbytes * 8 for tensor in tensors)
        assert same_bits(flip_random_bits(all_of_them, rate=1), tensors)

    def test_no_tensors(self) -> None:
        assert flip_random_bits([], rate=0.5) == []
        assert flip_random_bits([torch.empty(0)], rate=1.0)[0].shape == (0,)

    @for_each(
        ("amount", "error", "message"),
        [
            ({}, ValueError, r"expected one of rate and count, got rate=None and count=None; give one"),
            ({"rate": 0.1, "count": 3}, ValueError, r"expected one of rate and count, got rate=0.1 and count=3"),
            ({"rate": -0.1}, ValueError, r"rate: expected 0 <= rate <= 1, got -0.1"),
            ({"rate": 1.1}, ValueError, r"rate: expected 0 <= rate <= 1, got 1.1"),
            ({"rate": math.nan}, ValueError, r"rate: .* got NaN"),
            ({"rate": "0.1"}, TypeError, r"rate: .* got '0.1'"),
            ({"count": 0}, ValueError, r"count: expected a whole number >= 1, got 0"),
            ({"count": 2.0}, TypeError, r"count: expected a whole number >= 1, got 2.0"),
            ({"count": 65}, ValueError, r"count: expected at most 64 bits \(all that were selected\), got 65"),
            ({"count": 3, "field": "sign"}, ValueError, r"count: expected at most 2 bits .*, got 3"),
            ({"count": 1, "field": "signs"}, ValueError, r"bits: expected one of any, .*, got 'signs'"),
        ],
    )
    def test_bad_amounts(self, amount: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            flip_random_bits([torch.ones(2)], **amount)

    @for_each("bad", [0.0, math.nan, math.inf])
    def test_what_has_no_codes_has_no_bits_to_flip(self, bad: float) -> None:
        tensors = [torch.full((2,), bad), torch.ones(1)]
        assert float(flip_random_bits(tensors, count=8, of="int8")[1]) == pytest.approx(-128 / 127)  # 127 is 0111 1111
        with pytest.raises(ValueError, match=r"at most 8 bits .*no int8 codes\), got 9"):
            flip_random_bits(tensors, count=9, of="int8")

    @for_each("dtype", DTYPES)
    @for_each("of", ["int2", "int4", "int8", "int16"])
    def test_flipped_codes_of_the_largest_numbers_stay_finite(self, dtype: torch.dtype, of: str) -> None:
        largest = torch.finfo(dtype).max
        flipped = flip_random_bits([torch.tensor([largest, -largest, 0.0], dtype=dtype)], "sign", rate=1.0, of=of)
        assert float(flipped[0][2]) == -largest  # the code below the last level
        assert torch.isfinite(flipped[0]).all()

    @for_each("of", [None, "float16", "int8"])
    @for_each("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
    def test_other_dtypes_are_refused_whatever_they_are_said_to_be_stored_as(self, dtype, of: str | None) -> None:
        tensor = torch.ones(2).to(dtype)
        with pytest.raises(TypeError, match=f"dtype: expected .* got {dtype}"):
            flip_random_bits([torch.ones(2), tensor], count=1, of=of)
        with pytest.raises(TypeError, match=f"dtype: expected .* got {dtype}"):
            flip_bits(tensor, torch.tensor([0]), torch.tensor([0]), of)
