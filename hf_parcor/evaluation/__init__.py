"""How far do metrics fall when weights are corrupted? Evaluators and their records."""

from hf_parcor.evaluation.checkpoint import CheckpointError
from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.evaluation.evaluator import CorruptionEvaluator
from hf_parcor.evaluation.gradients import DatasetGradients, model_loss
from hf_parcor.evaluation.metrics import (
    BatchMetric,
    ClassificationMetric,
    GenerationMetric,
    Identified,
    Informed,
    LanguageModelMetric,
    PredictionMetric,
    SacrebleuScore,
    TrainerMetric,
)
from hf_parcor.evaluation.probe import LayerProbe
from hf_parcor.evaluation.processes import ProcessError
from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord
from hf_parcor.evaluation.sweep_record import SweepRecord
from hf_parcor.evaluation.trials import DEFAULT_TRIALS

__all__ = [
    "DEFAULT_TRIALS",
    "BatchMetric",
    "CheckpointError",
    "ClassificationMetric",
    "CorruptionEvaluator",
    "CorruptionRecord",
    "DatasetGradients",
    "EvaluationData",
    "EvaluationRecord",
    "GenerationMetric",
    "Identified",
    "Informed",
    "LanguageModelMetric",
    "LayerProbe",
    "PredictionMetric",
    "ProcessError",
    "SacrebleuScore",
    "SweepRecord",
    "TrainerMetric",
    "model_loss",
]
