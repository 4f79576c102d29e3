"""How a corruption is chosen: numbers in, numbers out. Modules here know no model."""

from hf_parcor.corruptions.bit_flips import BitFlips
from hf_parcor.corruptions.catalogue import CORRUPTIONS, corruptions_of_table_1
from hf_parcor.corruptions.corruption import RADIUS, Corruption, GradientSource, Strength
from hf_parcor.corruptions.drift import ConductanceDrift
from hf_parcor.corruptions.gradient import GradientCorruption
from hf_parcor.corruptions.interpolation import Interpolation
from hf_parcor.corruptions.multi_step import MultiStepCorruption
from hf_parcor.corruptions.noise import GaussianNoise, UniformNoise
from hf_parcor.corruptions.pruning import Pruning
from hf_parcor.corruptions.quantization import FloatQuantization, Quantization
from hf_parcor.corruptions.random import RandomCorruption
from hf_parcor.corruptions.worst_bit_flips import WorstBitFlips
from hf_parcor.injection import Pieces, Replacement

__all__ = [
    "CORRUPTIONS",
    "RADIUS",
    "BitFlips",
    "ConductanceDrift",
    "Corruption",
    "FloatQuantization",
    "GaussianNoise",
    "GradientCorruption",
    "GradientSource",
    "Interpolation",
    "MultiStepCorruption",
    "Pieces",
    "Pruning",
    "Quantization",
    "RandomCorruption",
    "Replacement",
    "Strength",
    "UniformNoise",
    "WorstBitFlips",
    "corruptions_of_table_1",
]
