"""All defenses by the name that command lines and settings files use: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hf_parcor.defenses.acrt import ACRT
from hf_parcor.defenses.awp import AWP
from hf_parcor.defenses.corruption_risk import CorruptionRisk
from hf_parcor.defenses.defense import Defense
from hf_parcor.defenses.gradient_penalty import GradientPenalty
from hf_parcor.defenses.multi_step_risk import MultiStepRisk
from hf_parcor.defenses.sam import SAM

DEFENSES: Mapping[str, type[Defense]] = MappingProxyType(
    {
        "multi_step_risk": MultiStepRisk,
        "acrt": ACRT,
        "sam": SAM,
        "awp": AWP,
        "gradient_penalty": GradientPenalty,
        "corruption": CorruptionRisk,
    }
)
