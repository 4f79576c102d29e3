"""Measure the indicators of both papers, Δ_max and Δ_ave, and how many bit flips break a model."""

from hf_parcor.indicators.estimators import RandomLossChanges, hessian_trace, random_loss_changes
from hf_parcor.indicators.flips import measure_flips_to_break
from hf_parcor.indicators.loss import LossOverData
from hf_parcor.indicators.measure import measure_indicators

__all__ = [
    "LossOverData",
    "RandomLossChanges",
    "hessian_trace",
    "measure_flips_to_break",
    "measure_indicators",
    "random_loss_changes",
]
