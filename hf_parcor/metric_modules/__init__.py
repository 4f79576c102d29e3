"""Our measures as metrics of the library `evaluate`: folders that `evaluate.load` reads, without a network."""

from hf_parcor.metric_modules.folders import metric_module

__all__ = ["metric_module"]
