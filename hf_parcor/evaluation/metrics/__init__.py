"""Metrics: callables from a model to numbers by name, and those made batch by batch."""

from hf_parcor.evaluation.metrics.classification import ClassificationMetric, PredictionMetric
from hf_parcor.evaluation.metrics.ctc import CTCMetric
from hf_parcor.evaluation.metrics.detection import DetectionMetric
from hf_parcor.evaluation.metrics.divergence import NotFiniteError, WithDivergence
from hf_parcor.evaluation.metrics.embedding import EmbeddingMetric
from hf_parcor.evaluation.metrics.generation import GenerationMetric
from hf_parcor.evaluation.metrics.language_model import LanguageModelMetric
from hf_parcor.evaluation.metrics.lm_eval import LmEvalMetric
from hf_parcor.evaluation.metrics.over_batches import BatchMetric, Identified, Informed, OverBatches
from hf_parcor.evaluation.metrics.question_answering import Question, QuestionAnsweringMetric
from hf_parcor.evaluation.metrics.scores import EntityScore, SacrebleuScore, TranscriptScore
from hf_parcor.evaluation.metrics.trainer import TrainerMetric
from hf_parcor.evaluation.outputs import own_batch, share_not_finite

__all__ = [
    "BatchMetric",
    "CTCMetric",
    "ClassificationMetric",
    "DetectionMetric",
    "EmbeddingMetric",
    "EntityScore",
    "GenerationMetric",
    "Identified",
    "Informed",
    "LanguageModelMetric",
    "LmEvalMetric",
    "NotFiniteError",
    "OverBatches",
    "PredictionMetric",
    "Question",
    "QuestionAnsweringMetric",
    "SacrebleuScore",
    "TrainerMetric",
    "TranscriptScore",
    "WithDivergence",
    "own_batch",
    "share_not_finite",
]
