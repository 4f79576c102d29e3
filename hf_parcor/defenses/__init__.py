"""What a training step minimises. Modules here know no Trainer."""

from hf_parcor.defenses.acrt import ACRT
from hf_parcor.defenses.awp import AWP
from hf_parcor.defenses.catalogue import DEFENSES
from hf_parcor.defenses.corruption_risk import CorruptionRisk
from hf_parcor.defenses.defense import ConstrainedDefense, Defense, check_defense
from hf_parcor.defenses.gradient_penalty import GradientPenalty
from hf_parcor.defenses.multi_step_risk import MultiStepRisk
from hf_parcor.defenses.projected_ascent import ProjectedAscent
from hf_parcor.defenses.sam import SAM
from hf_parcor.defenses.step import DefendedStep, Objective

__all__ = [
    "ACRT",
    "AWP",
    "DEFENSES",
    "SAM",
    "ConstrainedDefense",
    "CorruptionRisk",
    "DefendedStep",
    "Defense",
    "GradientPenalty",
    "MultiStepRisk",
    "Objective",
    "ProjectedAscent",
    "check_defense",
]
