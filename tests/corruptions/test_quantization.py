"""Quantization takes every tensor by itself."""

from __future__ import annotations

import pytest
import torch
from for_each import for_each

from hf_parcor import Quantization, corrupted
from hf_parcor.functional import quantize


@for_each("bits", [2, 4, 8, 16])
def test_every_tensor_has_its_own_step(bits: int, weights) -> None:
    with torch.no_grad():
        weights["mix"].mul_(1000)
    result = Quantization(bits)(weights)
    assert all(torch.equal(result[name], quantize(weight, bits)) for name, weight in weights.items())
    assert len(result["matrix"].unique()) > 1


@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_injected_as_it_is(dtype: torch.dtype) -> None:
    weights = {"w": torch.randn(10_000).to(dtype)}
    values = Quantization(8)(weights)
    with corrupted(weights, values):
        assert torch.equal(weights["w"], values["w"])
        assert len(weights["w"].unique()) <= 255


def test_twice_is_once(weights) -> None:
    once = Quantization(5)(weights)
    assert all(torch.equal(twice, once[name]) for name, twice in Quantization(5)(once).items())


@for_each(("bits", "error"), [(1, ValueError), (17, ValueError), (4.0, TypeError), (True, TypeError)])
def test_bad_widths_are_refused_at_once(bits, error: type[Exception]) -> None:
    with pytest.raises(error, match="bits: expected a whole number"):
        Quantization(bits)


def test_shown() -> None:
    assert str(Quantization(4)) == "4-bit quantization"
