"""The indicators of both papers, Δ_max and Δ_ave, of a model's loss over data."""

from hf_parcor.indicators.estimate import Estimate
from hf_parcor.indicators.hessian import hessian_trace
from hf_parcor.indicators.loss import LossOverData
from hf_parcor.indicators.measure import measure_indicators
from hf_parcor.indicators.random_changes import RandomLossChanges, random_loss_changes
from hf_parcor.indicators.record import ConstraintIndicators, IndicatorRecord

__all__ = [
    "ConstraintIndicators",
    "Estimate",
    "IndicatorRecord",
    "LossOverData",
    "RandomLossChanges",
    "hessian_trace",
    "measure_indicators",
    "random_loss_changes",
]
