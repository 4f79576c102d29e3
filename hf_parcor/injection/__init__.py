"""The only place where weights are written, and the place that gives their exact bits back.

Weights come back by copying saved bits, never by subtracting what was added: `w + a − a` leaves up to a tenth of
the float32 weights of a model changed in their last bit.
"""

from hf_parcor.injection.checks import check_weights, obstacle
from hf_parcor.injection.corrupted import Replacement, corrupted
from hf_parcor.injection.injection import CorruptionNorm, CorruptionSize, Injection, forget_derived

__all__ = [
    "CorruptionNorm",
    "CorruptionSize",
    "Injection",
    "Replacement",
    "check_weights",
    "corrupted",
    "forget_derived",
    "obstacle",
]
