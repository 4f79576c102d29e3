"""Tensors seen as one vector: copied, scaled, added, each by itself and on several devices."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from for_each import for_each
from launches import launches
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_parcor.functional import constrained_maximum, inner_product, max_magnitude, project, project_, vector_norm
from hf_parcor.functional.constrained_maximum import constrained_maximum_in_turn
from hf_parcor.functional.norms import (
    euclidean_norm,
    euclidean_norms_of_each,
    norms_of_each,
)
from hf_parcor.functional.vectors import (
    Factor,
    _add_multiple_unread_,
    _scaled_unread,
    add_multiple_,
    clones,
    divide_,
    numel,
    scale_each_,
    scaled,
    widened,
    working_copy,
    working_dtype,
    write_sums_,
)
from hf_parcor.injection import Injection, Pieces

NORMS = [1.0, 1.01, 1.5, 2.0, 3.0, 10.0, math.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


SPECIAL = (0.0, -0.0, 1.5, -1e-7, math.inf, -math.inf, math.nan, -math.nan)


def scaled_unread(tensors, factor, *, overwrite: bool = False) -> list[torch.Tensor]:
    """Scale as where values must not be waited for."""
    return _scaled_unread(tensors, Factor(factor), overwrite=overwrite)


SCALED = [scaled, scaled_unread]


class TestScaled:
    @for_each("scaled", SCALED)
    @for_each("overwrite", [False, True])
    @for_each("dtype", DTYPES)
    def test_one_keeps_every_bit_and_zero_none(self, scaled, overwrite, dtype: torch.dtype, same_bits) -> None:
        for factor in (1.0, 0.0):
            tensors = [
                torch.tensor(SPECIAL, dtype=dtype)[: 6 if factor else None],  # a NaN may become another
                torch.randn(4, 3).to(dtype).t(),
                torch.empty(0, dtype=dtype),
            ]
            before = [tensor.clone() for tensor in tensors]
            found = scaled(tensors, torch.tensor(factor), overwrite=overwrite)
            assert same_bits(found, before if factor else [torch.zeros_like(tensor) for tensor in before])
            assert same_bits(tensors, found if overwrite else before)
            shared = [a.data_ptr() == b.data_ptr() for a, b in zip(found, tensors, strict=True) if a.numel()]
            assert shared == [overwrite] * 2

    @for_each("scaled", SCALED)
    @for_each("overwrite", [False, True])
    @for_each("factor", [1e-70, 1e-44, 1e-20, 0.3, 7.0, 1e20, 1e44, 1e70])
    def test_factors_that_float32_cannot_hold(self, scaled, overwrite, factor: float) -> None:
        for entry in (1e-45, 1e-30, -1.0, 1e30, 3e38):
            expected = float(torch.tensor(entry).double()) * factor
            if 1e-30 < abs(expected) < 3e38:
                (found,) = scaled(
                    [torch.tensor([entry])], torch.tensor(factor, dtype=torch.float64), overwrite=overwrite
                )
                assert float(found) == pytest.approx(expected, rel=1e-6)

    @for_each("scaled", SCALED)
    @for_each("overwrite", [False, True])
    def test_mixed_precisions_and_no_tensors(self, scaled, overwrite) -> None:
        tensors = [torch.tensor(SPECIAL, dtype=dtype) for dtype in DTYPES]
        assert not any(tensor.any() for tensor in scaled(tensors, torch.tensor(0.0), overwrite=overwrite))
        assert scaled([], torch.tensor(0.0), overwrite=overwrite) == []
        assert scaled([], torch.tensor(2.0), overwrite=overwrite) == []


@pytest.fixture(params=[False, True], ids=["one by one", "batched"])
def batched(request) -> Iterator[bool]:
    """Take the way of a CPU, and that of devices where launches cost."""
    with launches(request.param):
        yield request.param


class TestEach:
    """Every tensor by itself, as the functions of one vector do it."""

    @for_each("p", NORMS)
    def test_norms(self, batched, p: float) -> None:
        tensors = [
            torch.randn(3),
            torch.empty(0),
            torch.randn(5, 2).to(torch.bfloat16).t(),
            torch.randn(4).double(),
            torch.tensor(7.0),
            torch.tensor([1.0, math.nan]),
            torch.tensor([3e38, -3e38]),
        ]
        for norm, tensor in zip(norms_of_each(tensors, p), tensors, strict=True):
            assert norm.shape == ()
            torch.testing.assert_close(norm, vector_norm([tensor], p), rtol=1e-6, atol=0, equal_nan=True)
        for norm, tensor in zip(euclidean_norms_of_each(tensors), tensors, strict=True):
            assert norm.dtype == torch.float64
            torch.testing.assert_close(norm, euclidean_norm([tensor]), rtol=1e-6, atol=0, equal_nan=True)
        assert norms_of_each([], p) == []

    def test_factors(self, batched, same_bits) -> None:
        factors = [torch.tensor(factor).double() for factor in (1.0, 0.0, 0.25, 1e44, 1.0, 0.0)]
        tensors = [
            torch.tensor(SPECIAL[:6]),
            torch.tensor(SPECIAL),
            torch.randn(4, 3).t(),
            torch.tensor([1e-44]),
            torch.tensor(SPECIAL[:6], dtype=torch.bfloat16),
            torch.tensor(SPECIAL, dtype=torch.float64),
        ]
        expected = [scaled([tensor.clone()], factor)[0] for tensor, factor in zip(tensors, factors, strict=True)]
        scale_each_(tensors, factors)
        assert float(tensors.pop(3)) == pytest.approx(float(expected.pop(3)), rel=1e-6)
        assert same_bits(tensors[:2] + tensors[3:], expected[:2] + expected[3:])
        torch.testing.assert_close(tensors[2], expected[2], rtol=1e-6, atol=0)
        scale_each_([], [])

    @for_each("dtype", DTYPES)
    def test_sums_are_rounded_once(self, batched, monkeypatch, same_bits, dtype: torch.dtype) -> None:
        monkeypatch.setattr(sys.modules["hf_parcor.functional.vectors"], "_ALONE", 40)
        monkeypatch.setattr(sys.modules["hf_parcor.functional.vectors"], "TOGETHER", 12)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = [(3,), (0,), (6, 7), (2, 5), (), (9,)]
        weights = [torch.randn(shape).to(dtype) for shape in shapes]
        weights[3] = weights[3].t()
        changes = [torch.randn(weight.shape, dtype=wide) / 100 for weight in weights]
        expected = [(weight.to(wide) + change).to(dtype) for weight, change in zip(weights, changes, strict=True)]
        elsewhere = [torch.empty_like(weight) for weight in weights]
        write_sums_(elsewhere, changes, weights)
        write_sums_(weights, changes, weights)
        assert same_bits(weights, expected)
        assert same_bits(elsewhere, expected)

    def test_what_is_wide_stays_itself(self) -> None:
        given = [torch.randn(2), torch.randn(3).to(torch.bfloat16)]
        found = widened(given, torch.float32)
        assert found[0] is given[0]
        assert torch.equal(found[1], given[1].float())
        assert found[1].dtype == torch.float32


def test_clones_keep_every_bit_and_share_no_memory(same_bits) -> None:
    patterns = torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, 999, dtype=np.int32))
    tensors = [patterns.view(torch.float32), torch.tensor(SPECIAL).bfloat16(), torch.randn(3, 4).t()]
    copies = clones(tensors)
    assert same_bits(copies, tensors)
    assert all(copy.data_ptr() != tensor.data_ptr() for copy, tensor in zip(copies, tensors, strict=True))
    assert clones([]) == []


@for_each("dtype", DTYPES)
def test_working_copies_are_wide_fresh_and_detached(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype).requires_grad_()
    (copy,) = working_copy([tensor])
    assert copy.dtype == working_dtype([tensor]) == torch.promote_types(dtype, torch.float32)
    assert not copy.requires_grad
    assert copy.data_ptr() != tensor.data_ptr()
    assert torch.equal(copy, tensor.detach().to(copy.dtype))


def test_scaling_and_counting() -> None:
    tensors = [torch.tensor([1.0, 2.0]), torch.empty(0), torch.tensor([[-4.0]], dtype=torch.float64)]
    assert numel(tensors) == 3
    divide_(tensors, torch.tensor(2.0))
    assert [tensor.tolist() for tensor in tensors] == [[0.5, 1.0], [], [[-2.0]]]
    assert [tensor.dtype for tensor in tensors] == [torch.float32, torch.float32, torch.float64]


def test_division_where_the_inverse_leaves_the_range() -> None:
    tensor = torch.tensor([1e-45, -1e-45])
    divide_([tensor], torch.tensor(1e-45))
    assert tensor.tolist() == [1, -1]


FACTORS = {"ordinary": (0.037, 1.0), "one": (1.0, 1.0), "beyond float32": (1e42, 1e-42), "tiny": (1e-42, 1e36)}


def like_weights(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of many layouts, one of them empty."""
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = [torch.randn(70), torch.randn(()), torch.empty(0), torch.randn(5, 7).t(), torch.randn(8)[::2], image]
    return [tensor.to(dtype) for tensor in found]


@for_each("dtype", DTYPES)
@for_each(("factor", "size"), FACTORS.values())
def test_a_multiple_is_added_in_one_rounding(dtype, factor, size):
    weights, others = like_weights(dtype), [size * tensor.float() for tensor in like_weights(dtype)]
    if dtype in (torch.float32, torch.float64) or size == 1:  # float16 has no 1e36
        others = [tensor.to(dtype) for tensor in others]
    exact = [w.double() + factor * v.double() for w, v in zip(weights, others, strict=True)]
    kept = [v.clone() for v in others]
    add_multiple_(weights, others, torch.tensor(factor, dtype=torch.float64))
    digits = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for found, expected in zip(weights, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=digits, atol=1e-6 if size == 1 else 1e-3)
    assert all(torch.equal(v, before) for v, before in zip(others, kept, strict=True))


def test_a_factor_of_zero_adds_nothing_of_what_is_not_finite():
    for factor, expected in ((0.0, [1.0, 2.0, 3.0]), (0.5, [math.nan, math.inf, 3.5])):
        for add in (add_multiple_, _add_multiple_unread_):
            weights = [torch.tensor([1.0, 2.0, 3.0])]
            add(weights, [torch.tensor([math.nan, math.inf, 1.0])], torch.tensor(factor, dtype=torch.float64))
            torch.testing.assert_close(weights[0], torch.tensor(expected), equal_nan=True)


def test_unread_a_multiple_is_the_same_in_float32():
    """What runs on a GPU, on a CPU; there with any factor that float32 holds, and the largest of those beyond."""
    for factor in (1e-30, 0.037, 1e30):
        read, unread, others = ([torch.randn(1000)] for _ in range(3))
        unread = [read[0].clone()]
        add_multiple_(read, others, torch.tensor(factor, dtype=torch.float64))
        _add_multiple_unread_(unread, others, torch.tensor(factor, dtype=torch.float64))
        torch.testing.assert_close(read, unread, rtol=2e-7, atol=1e-7)
    tiny = [torch.zeros(2)]
    _add_multiple_unread_(tiny, [torch.tensor([1e-45, 0.0])], torch.tensor(1e44, dtype=torch.float64))
    assert 0 < float(tiny[0][0]) < 1
    assert float(tiny[0][1]) == 0


SPREAD = {
    "a multiple": lambda tensors: add_multiple_(
        tensors, [t.clone() for t in tensors], torch.ones((), dtype=torch.float64, device="cuda:1")
    ),
    "max_magnitude": max_magnitude,
    "vector_norm": partial(vector_norm, p=2),
    "vector_norm, p = 3": partial(vector_norm, p=3),
    "inner_product": lambda tensors: inner_product(tensors, tensors),
    "clones": clones,
    "working_copy": working_copy,
    "scaled": lambda tensors: scaled(tensors, torch.ones((), dtype=torch.float64, device="cuda:1"), overwrite=True),
    **{f"maximum, p = {p:g}": partial(constrained_maximum, p=p, epsilon=0.1) for p in (1.5, 2, math.inf)},
    "maximum in turn": lambda tensors: list(constrained_maximum_in_turn(tensors, 2, 0.1)),
    **{f"projection, p = {p:g}": partial(project, p=p, epsilon=0.1) for p in (2, math.inf)},
}


@for_each("function", SPREAD.values())
def test_a_vector_may_be_spread_over_devices(function) -> None:
    """Tensors that know their shapes, dtypes and devices alone refuse what mixes devices, as those of two GPUs do."""
    sizes = {"cuda:0": 3000, "cuda:1": 2000, "cuda": 9}
    with FakeTensorMode():
        function([torch.empty(size, device=device) for device, size in sizes.items()])


@for_each("saved_on", [None, "cpu"])
def test_and_be_corrupted_there(saved_on, monkeypatch) -> None:
    # Which refuses what has no memory.
    monkeypatch.setattr("hf_parcor.injection.writing.check_weights", lambda weights: None)
    monkeypatch.setattr(Injection, "_moved", lambda injection, places: [])  # which looks where that is
    with FakeTensorMode():
        weights = {
            f"{dtype} on {device}": torch.empty(50, device=f"cuda:{device}", dtype=dtype)
            for device in (0, 1)
            for dtype in (torch.float32, torch.bfloat16)
        }
        injection = Injection(weights, saved_on=saved_on)
        injection.write(Pieces((name, torch.empty(50)) for name in weights), p=2)
        kept = {saved.device for saved in injection._saved.values()}
        injection.withdraw(2)
        update = {name: torch.empty(50, device=weight.device) for name, weight in weights.items()}
        for _ in range(2):
            injection.displace(update, lambda tensors: project_(tensors, 2, 0.1))
        injection.withdraw(2)
    assert kept == {weight.device for weight in weights.values()} if saved_on is None else {torch.device(saved_on)}
