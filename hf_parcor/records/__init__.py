"""What was measured, as files: plain frozen data, JSON in and out. Nothing here needs PyTorch."""

from hf_parcor.records.data import OF_ROWS, EvaluationData, same_data
from hf_parcor.records.evaluation import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.records.flips import FlipRecord
from hf_parcor.records.indicators import ConstraintIndicators, Estimate, IndicatorRecord
from hf_parcor.records.metric_info import MetricInfo
from hf_parcor.records.recipe import Choice, PairCost, RecipeRecord
from hf_parcor.records.search import SearchRecord, SearchTrial
from hf_parcor.records.sensitivity import FormatScore, SensitivityRecord, WeightGroup
from hf_parcor.records.stored import StoredRecord

__all__ = [
    "OF_ROWS",
    "Choice",
    "ConstraintIndicators",
    "CorruptionRecord",
    "Estimate",
    "EvaluationData",
    "EvaluationRecord",
    "FlipRecord",
    "FormatScore",
    "IndicatorRecord",
    "MetricInfo",
    "PairCost",
    "RecipeRecord",
    "SearchRecord",
    "SearchTrial",
    "SensitivityRecord",
    "StoredRecord",
    "SweepRecord",
    "WeightGroup",
    "same_data",
]
