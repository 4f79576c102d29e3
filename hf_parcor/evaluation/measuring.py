"""One measurement by several processes: batch by batch, each its share; or by a callable that all of them call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.processes import Processes
from hf_parcor.evaluation.replicas import all_batches
from hf_parcor.evaluation.trials import checked_metrics

logger = logging.get_logger(__name__)

Metric = Callable[[nn.Module], Mapping[str, float]]
_CLOSE = 1e-2  # relative; kernels of different processes round differently, data of different processes differ more


def measure(model: nn.Module, metric: Metric, processes: Processes) -> Mapping[str, object]:
    """Return the metrics of a model, the same in every process.

    Args:
        model: The model, in evaluation mode.
        metric: A `BatchMetric` is made from what each process finds on its share of the batches. Any other is called
            in all processes at the same time, so that it may gather over them, as `Trainer.evaluate` does; what the
            first process got is returned.
        processes: Those that measure together.

    Raises:
        TypeError: The metric returned no mapping, or an empty one.
    """
    maybe: Any = metric
    if processes.count > 1 and isinstance(maybe, BatchMetric):
        found = processes.each(partial(maybe.of_batch, model), all_batches(maybe.batches))
        return checked_metrics(maybe.combine(found))
    metrics = checked_metrics(metric(model))
    if processes.count == 1:
        return metrics
    of_processes = processes.gather({name: _plain(value) for name, value in metrics.items()})
    _warn_of_differences(of_processes)
    return of_processes[0]


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _warn_of_differences(found: Sequence[Mapping[str, object]]) -> None:
    first = found[0]
    differing = [name for name, value in first.items() if any(_differs(value, other.get(name)) for other in found[1:])]
    if differing:
        name = differing[0]
        logger.warning_once(
            f"metric: expected the same {name!r} in every process, got {[other.get(name) for other in found]}; the "
            "first is kept. Let the metric gather over processes, as Trainer.evaluate does, or make it batch by batch."
        )


def _differs(value: object, other: object) -> bool:
    if not isinstance(value, Real) or not isinstance(other, Real):
        return type(value) is not type(other)
    if math.isnan(value) and math.isnan(other):
        return False
    return not math.isclose(value, other, rel_tol=_CLOSE)
