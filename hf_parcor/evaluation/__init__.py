"""How far do metrics fall when weights are corrupted? Evaluators and their records."""

from hf_parcor.distributed.processes import ProcessError
from hf_parcor.evaluation.callback import RobustnessCallback
from hf_parcor.evaluation.embeddings import embedding_loss
from hf_parcor.evaluation.evaluator import CorruptionEvaluator, LayerProbe
from hf_parcor.evaluation.losses import model_loss
from hf_parcor.evaluation.metrics import (
    BatchMetric,
    ClassificationMetric,
    CTCMetric,
    DetectionMetric,
    EmbeddingMetric,
    EntityScore,
    GenerationMetric,
    Identified,
    Informed,
    LanguageModelMetric,
    LmEvalMetric,
    NotFiniteError,
    PredictionMetric,
    Question,
    QuestionAnsweringMetric,
    SacrebleuScore,
    TrainerMetric,
    TranscriptScore,
)
from hf_parcor.evaluation.mixin import (
    DEFAULT_CORRUPTIONS,
    RobustnessArguments,
    RobustnessMixin,
    measure_robustness,
    robustness_metrics,
)
from hf_parcor.evaluation.passes.gradients import DatasetGradients
from hf_parcor.evaluation.placement.memory import NotEnoughMemoryError
from hf_parcor.evaluation.resume import CheckpointError
from hf_parcor.evaluation.trials import DEFAULT_TRIALS

__all__ = [
    "DEFAULT_CORRUPTIONS",
    "DEFAULT_TRIALS",
    "BatchMetric",
    "CTCMetric",
    "CheckpointError",
    "ClassificationMetric",
    "CorruptionEvaluator",
    "DatasetGradients",
    "DetectionMetric",
    "EmbeddingMetric",
    "EntityScore",
    "GenerationMetric",
    "Identified",
    "Informed",
    "LanguageModelMetric",
    "LayerProbe",
    "LmEvalMetric",
    "NotEnoughMemoryError",
    "NotFiniteError",
    "PredictionMetric",
    "ProcessError",
    "Question",
    "QuestionAnsweringMetric",
    "RobustnessArguments",
    "RobustnessCallback",
    "RobustnessMixin",
    "SacrebleuScore",
    "TrainerMetric",
    "TranscriptScore",
    "embedding_loss",
    "measure_robustness",
    "model_loss",
    "robustness_metrics",
]
