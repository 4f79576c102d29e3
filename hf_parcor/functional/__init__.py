"""Pure functions on tensors, or on lists of tensors seen as one vector: the mathematics of both papers."""

from hf_parcor.functional.bits import field_bits, flip_bits, flip_random_bits, sample_positions
from hf_parcor.functional.constrained_maximum import (
    constrained_maximum,
    constrained_maximum_,
    constrained_maximum_value,
)
from hf_parcor.functional.float_formats import quantize_to_float
from hf_parcor.functional.noise import conductance_drift, gaussian_noise, random_signs, relative, uniform_noise
from hf_parcor.functional.norms import inner_product, max_magnitude, vector_norm
from hf_parcor.functional.projections import project, project_
from hf_parcor.functional.pruning import prune, prune_together
from hf_parcor.functional.quantization import quantize
from hf_parcor.functional.top_n import keep_top_n, keep_top_n_
from hf_parcor.functional.worst_bits import BitFlip, largest_of_kernels, worst_flip

__all__ = [
    "BitFlip",
    "conductance_drift",
    "constrained_maximum",
    "constrained_maximum_",
    "constrained_maximum_value",
    "field_bits",
    "flip_bits",
    "flip_random_bits",
    "gaussian_noise",
    "inner_product",
    "keep_top_n",
    "keep_top_n_",
    "largest_of_kernels",
    "max_magnitude",
    "project",
    "project_",
    "prune",
    "prune_together",
    "quantize",
    "quantize_to_float",
    "random_signs",
    "relative",
    "sample_positions",
    "uniform_noise",
    "vector_norm",
    "worst_flip",
]
