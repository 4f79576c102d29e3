"""Metrics: callables from a model to numbers by name, and those made batch by batch."""

from hf_parcor.evaluation.metrics.classification import ClassificationMetric
from hf_parcor.evaluation.metrics.protocol import BatchMetric
from hf_parcor.evaluation.metrics.trainer import TrainerMetric

__all__ = ["BatchMetric", "ClassificationMetric", "TrainerMetric"]
