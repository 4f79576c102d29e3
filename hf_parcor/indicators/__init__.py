"""Measure the indicators of both papers, Δ_max and Δ_ave, how many bit flips break a model, and what formats cost."""

from hf_parcor.indicators.estimators import (
    RandomLossChanges,
    hessian_diagonal,
    hessian_trace,
    random_loss_changes,
)
from hf_parcor.indicators.flips import measure_flips_to_break
from hf_parcor.indicators.format_sensitivity import sensitivity, unscored
from hf_parcor.indicators.loss_over_data import LossOverData
from hf_parcor.indicators.matrix_groups import FORMATS
from hf_parcor.indicators.measure import measure_indicators

__all__ = [
    "FORMATS",
    "LossOverData",
    "RandomLossChanges",
    "hessian_diagonal",
    "hessian_trace",
    "measure_flips_to_break",
    "measure_indicators",
    "random_loss_changes",
    "sensitivity",
    "unscored",
]
