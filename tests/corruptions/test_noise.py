"""Noise and drift on weights: the pure functions, with names."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from scipy import stats

from hf_parcor import ConductanceDrift, GaussianNoise, UniformNoise
from hf_parcor.functional import conductance_drift, gaussian_noise, uniform_noise


@for_each(("kind", "function"), [(GaussianNoise, gaussian_noise), (UniformNoise, uniform_noise)])
def test_is_the_pure_function(kind, function, weights) -> None:
    found = kind(0.3)(weights, generator=torch.Generator().manual_seed(7))
    expected = function(list(weights.values()), 0.3, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


@for_each(
    ("noise", "distribution"),
    [(GaussianNoise(0.05), stats.norm(0, 0.05)), (UniformNoise(0.05), stats.uniform(-0.05, 0.1))],
)
def test_does_not_depend_on_the_weights(noise, distribution) -> None:
    weights = {"large": torch.full((50_000,), 1e6), "small": torch.zeros(50_000, dtype=torch.bfloat16)}
    for drawn in noise(weights, generator=torch.Generator().manual_seed(0)).values():
        assert stats.kstest(drawn.numpy(), distribution.cdf).pvalue > 1e-3


@for_each("kind", [GaussianNoise, UniformNoise])
def test_no_noise(kind, weights) -> None:
    assert not any(drawn.any() for drawn in kind(0)(weights).values())


@for_each(("kind", "name"), [(GaussianNoise, "std"), (UniformNoise, "bound")])
@for_each("size", [-1e-9, math.nan, math.inf])
def test_bad_sizes_are_refused_at_once(kind, name: str, size: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected 0 <= {name} < inf, got"):
        kind(size)
    with pytest.raises(TypeError, match=rf"{name}: .* got '0.1'"):
        kind("0.1")
    with pytest.raises(TypeError, match=rf"{name}: .* got True"):
        kind(True)


def test_shown() -> None:
    assert (str(GaussianNoise(0.02)), str(UniformNoise(5e-4))) == ("Gaussian σ=0.02", "uniform b=0.0005")


@for_each("kind", [GaussianNoise, UniformNoise])
def test_relative_to_the_weights(kind, weights) -> None:
    def drawn(relative_to):
        return kind(0.3, relative_to)(weights, generator=torch.Generator().manual_seed(7))

    absolute = drawn(None)
    for name, weight in weights.items():
        rows = weight.detach().abs().flatten(1).amax(1, keepdim=True) if weight.ndim > 1 else weight.abs()
        for relative_to, magnitude in (("tensor", weight.abs().max()), ("channel", rows), ("weight", weight.abs())):
            torch.testing.assert_close(drawn(relative_to)[name], absolute[name] * magnitude.detach())
    with pytest.raises(ValueError, match=r"relative_to: .*'layer'"):
        kind(0.1, relative_to="layer")
    assert kind(0.1).settings().keys().isdisjoint({"relative_to"}), "records of before"
    assert kind(0.1, "weight").settings()["relative_to"] == "weight"
    assert len({str(kind(0.1, relative_to)) for relative_to in (None, "tensor", "channel", "weight")}) == 4


def test_drift_is_the_pure_function(weights) -> None:
    found = ConductanceDrift(980, 0.06, 0.02)(weights, generator=torch.Generator().manual_seed(7))
    expected = conductance_drift(list(weights.values()), 50.0, 0.06, 0.02, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    assert all(torch.equal(ConductanceDrift(0)(weights)[name], weight) for name, weight in weights.items())


@for_each("name", ["seconds", "nu_mean", "nu_std", "t_0"])
def test_bad_drifts_are_refused_at_once(name: str) -> None:
    for size in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name}: "):
            ConductanceDrift(**{"seconds": 1.0, name: size})
