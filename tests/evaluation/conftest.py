"""One corruption of every kind, for what must hold for all of them."""

from __future__ import annotations

import math

import pytest

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    UniformNoise,
)
from hf_parcor.corruptions import CORRUPTIONS, Corruption

ROWS = {
    "random": RandomCorruption(CorruptionConstraint(epsilon=2.0)),
    "gradient": GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=0.1)),
    "multi_step": MultiStepCorruption(CorruptionConstraint(epsilon=1.0)),
    "gaussian": GaussianNoise(0.1),
    "uniform": UniformNoise(0.2),
    "quantization": Quantization(2),
    "bit_flips": BitFlips(count=5, bits="exponent"),
}


@pytest.fixture
def one_of_each() -> dict[str, Corruption]:
    """Return one corruption of every kind in the catalogue, by name."""
    assert list(ROWS) == list(CORRUPTIONS), "a new corruption needs a row here"
    return ROWS


@pytest.fixture(params=list(CORRUPTIONS))
def corruption(request: pytest.FixtureRequest, one_of_each: dict[str, Corruption]) -> Corruption:
    """Return each of them in turn."""
    return one_of_each[request.param]
