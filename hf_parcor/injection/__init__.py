"""Write corruptions into weights and restore their exact bits; no other part writes weights."""

from hf_parcor.injection.corruptible import Device, check_device, check_weights, obstacle
from hf_parcor.injection.forms import Multiple, Pieces, Replacement
from hf_parcor.injection.writing import (
    CorruptionNorm,
    CorruptionSize,
    Injection,
    corrupted,
    forget_derived,
    is_swallowed,
)

__all__ = [
    "CorruptionNorm",
    "CorruptionSize",
    "Device",
    "Injection",
    "Multiple",
    "Pieces",
    "Replacement",
    "check_device",
    "check_weights",
    "corrupted",
    "forget_derived",
    "is_swallowed",
    "obstacle",
]
