"""Parameter corruption and adversarial parameter defense for Hugging Face Transformers.

How fragile are a model's weights? `CorruptionEvaluator` measures it. `ParameterDefenseTrainer` trains models whose
weights are not.
"""

from hf_parcor.constraints import CorruptionConstraint
from hf_parcor.corruptions import (
    BitFlips,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    UniformNoise,
)
from hf_parcor.defenses import ACRT, AWP, SAM, GradientPenalty, MultiStepRisk
from hf_parcor.evaluation import CorruptionEvaluator, CorruptionRecord, EvaluationRecord, LayerProbe, SweepRecord
from hf_parcor.injection import corrupted
from hf_parcor.monitoring import RobustnessCallback
from hf_parcor.report import RobustnessReport
from hf_parcor.search import SearchRecord, search_epsilon
from hf_parcor.targets import by_adapter, by_kind, by_layer, by_module, select_parameters
from hf_parcor.training import (
    DefenseConfig,
    ParameterDefenseMixin,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    Seq2SeqParameterDefenseTrainer,
    Seq2SeqParameterDefenseTrainingArguments,
    defended_backward,
)

__all__ = [
    "ACRT",
    "AWP",
    "SAM",
    "BitFlips",
    "CorruptionConstraint",
    "CorruptionEvaluator",
    "CorruptionRecord",
    "DefenseConfig",
    "EvaluationRecord",
    "GaussianNoise",
    "GradientCorruption",
    "GradientPenalty",
    "LayerProbe",
    "MultiStepCorruption",
    "MultiStepRisk",
    "ParameterDefenseMixin",
    "ParameterDefenseTrainer",
    "ParameterDefenseTrainingArguments",
    "Quantization",
    "RandomCorruption",
    "RobustnessCallback",
    "RobustnessReport",
    "SearchRecord",
    "Seq2SeqParameterDefenseTrainer",
    "Seq2SeqParameterDefenseTrainingArguments",
    "SweepRecord",
    "UniformNoise",
    "by_adapter",
    "by_kind",
    "by_layer",
    "by_module",
    "corrupted",
    "defended_backward",
    "search_epsilon",
    "select_parameters",
]
