"""All corruptions by the name that records and command lines use: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

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
