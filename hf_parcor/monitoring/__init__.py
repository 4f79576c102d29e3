"""The robustness of a Trainer's model, measured by the Trainer's own evaluation, also while it trains."""

from hf_parcor.monitoring.callback import RobustnessCallback
from hf_parcor.monitoring.evaluation import DEFAULT_CORRUPTIONS, measure_robustness
from hf_parcor.monitoring.mixin import RobustnessMixin
from hf_parcor.monitoring.names import robustness_metrics

__all__ = [
    "DEFAULT_CORRUPTIONS",
    "RobustnessCallback",
    "RobustnessMixin",
    "measure_robustness",
    "robustness_metrics",
]
