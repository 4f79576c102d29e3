"""All corruptions by the name that records and command lines use: one line each; and those of Table 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions.bit_flips import BitFlips
from hf_parcor.corruptions.corruption import Corruption
from hf_parcor.corruptions.gradient import GradientCorruption
from hf_parcor.corruptions.multi_step import MultiStepCorruption
from hf_parcor.corruptions.noise import GaussianNoise, UniformNoise
from hf_parcor.corruptions.quantization import Quantization
from hf_parcor.corruptions.random import RandomCorruption

CORRUPTIONS: Mapping[str, type[Corruption]] = MappingProxyType(
    {
        "random": RandomCorruption,
        "gradient": GradientCorruption,
        "multi_step": MultiStepCorruption,
        "gaussian": GaussianNoise,
        "uniform": UniformNoise,
        "quantization": Quantization,
        "bit_flips": BitFlips,
    }
)


def corruptions_of_table_1() -> list[Corruption]:
    """Return the kinds of corruption of paper 2, Table 1, and bit flips, at strengths that break a small BERT.

    Examples:
        >>> print(*corruptions_of_table_1()[:2], sep=", ")
        random L2 ε=20, gradient-based L2 ε=0.1
    """
    return [
        RandomCorruption(CorruptionConstraint(p=2, epsilon=20.0)),
        *(GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in (0.1, 0.2, 0.5)),
        *(GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=epsilon)) for epsilon in (2e-4, 5e-4)),
        MultiStepCorruption(CorruptionConstraint(p=2, epsilon=0.1)),
        MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=2e-4)),
        *(GaussianNoise(std) for std in (0.01, 0.02)),
        *(UniformNoise(bound) for bound in (0.02, 0.04)),
        *(Quantization(bits) for bits in (6, 5, 4)),
        *(BitFlips(rate=rate) for rate in (1e-8, 1e-7)),
    ]
