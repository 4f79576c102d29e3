"""What a training step minimises. Modules here know no Trainer."""

from hf_parcor.defenses.catalogue import DEFENSES
from hf_parcor.defenses.defense import Defense
from hf_parcor.defenses.multi_step_risk import MultiStepRisk
from hf_parcor.defenses.step import DefendedStep

__all__ = ["DEFENSES", "DefendedStep", "Defense", "MultiStepRisk"]
