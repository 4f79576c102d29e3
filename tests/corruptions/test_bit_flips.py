"""Bit flips over all weights together."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each

from hf_parcor import BitFlips, Quantization, corrupted
from hf_parcor.functional import flip_random_bits


def changed_bits(before: torch.Tensor, after: torch.Tensor) -> int:
    patterns = before.detach().contiguous().view(torch.int32) ^ after.contiguous().view(torch.int32)
    return sum(int(((patterns >> bit) & 1).sum()) for bit in range(32))


@for_each("settings", [{"rate": 0.05}, {"count": 17}, {"rate": 0.5, "bits": "exponent"}])
def test_is_the_pure_function(settings: dict, weights) -> None:
    found = BitFlips(**settings)(weights, generator=torch.Generator().manual_seed(7))
    field = settings.get("bits", "any")
    amount = {name: value for name, value in settings.items() if name != "bits"}
    expected = flip_random_bits(list(weights.values()), field, **amount, generator=torch.Generator().manual_seed(7))
    for a, b in zip(found.values(), expected, strict=True):
        assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_a_count_is_exact_over_all_weights_together(weights) -> None:
    for count in (1, 5, 300, 34 * 32):
        result = BitFlips(count=count)(weights)
        assert sum(changed_bits(weights[name], value) for name, value in result.items()) == count


def test_sign_flips_negate(weights) -> None:
    result = BitFlips(rate=1.0, bits="sign")(weights)
    assert all(torch.equal(value, -weights[name]) for name, value in result.items())


def test_injected_exactly_where_a_difference_would_not_be() -> None:
    weights = {"w": torch.randn(10_000)}
    values = BitFlips(rate=0.2, bits="exponent")(weights)
    by_difference = weights["w"] + (values["w"] - weights["w"])
    assert not torch.equal(by_difference, values["w"])
    with corrupted(weights, values):
        torch.testing.assert_close(weights["w"], values["w"], rtol=0, atol=0, equal_nan=True)


def test_exponent_flips_can_break_a_model_and_it_comes_back(weights) -> None:
    clean = {name: weight.detach().clone() for name, weight in weights.items()}
    with corrupted(weights, BitFlips(rate=0.5, bits="exponent")(weights)) as injection:
        assert max(float(weight.detach().abs().max()) for weight in weights.values()) > 1e9
        assert injection.size().norm > 1e9
    assert all(torch.equal(weight, clean[name]) for name, weight in weights.items())


@for_each(("bits", "available"), [("sign", 34), ("exponent", 34 * 8), ("any", 34 * 32)])
def test_more_than_there_are(bits: str, available: int, weights) -> None:
    with pytest.raises(ValueError, match=rf"count: expected at most {available} bits .* got {available + 1}"):
        BitFlips(count=available + 1, bits=bits)(weights)


@for_each(
    ("settings", "error", "message"),
    [
        ({}, ValueError, r"expected one of rate and count, got rate=None and count=None; give one"),
        ({"rate": 0.1, "count": 1}, ValueError, r"expected one of rate and count, got rate=0.1 and count=1"),
        ({"rate": -0.1}, ValueError, r"rate: expected 0 <= rate <= 1, got -0.1"),
        ({"rate": 1.01}, ValueError, r"rate: expected 0 <= rate <= 1, got 1.01"),
        ({"rate": math.nan}, ValueError, r"rate: .* got NaN"),
        ({"rate": True}, TypeError, r"rate: .* got True"),
        ({"count": 0}, ValueError, r"count: expected a whole number >= 1, got 0"),
        ({"count": 1.5}, TypeError, r"count: .* got 1.5"),
        ({"count": 1, "bits": "fraction"}, ValueError, r"bits: expected one of any, sign, exponent, mantissa, got"),
        ({"count": 1, "of": Quantization(8, "channel")}, ValueError, r"of: expected one scale a tensor"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitFlips(**settings)


def test_shown() -> None:
    assert str(BitFlips(rate=1e-4)) == "bit flips rate=0.0001 (any)"
    assert str(BitFlips(count=3, bits="sign")) == "bit flips count=3 (sign)"
