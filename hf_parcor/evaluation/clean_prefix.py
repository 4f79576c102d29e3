"""What a measurement, or an ascent, computes before the corrupted parameters come in, tried out before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from hf_parcor.evaluation.gradients import trainable
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.replicas import all_batches
from hf_parcor.injection import corrupted
from hf_parcor.prefix import NothingToReuse, PrefixError, PrefixReuse, plan_prefix, plan_prefix_of_values

logger = logging.get_logger(__name__)

_Parameters = Mapping[str, nn.Parameter]


def prefix_of_ascents(model: nn.Module, parameters: _Parameters, batches: Iterable[Any]) -> PrefixReuse | None:
    """Return what does not depend on these parameters when the model's loss and its gradient are computed.

    Args:
        model: The model, in evaluation mode.
        parameters: What is corrupted.
        batches: Mappings that the model takes as keyword arguments; the first is tried.

    Returns:
        None, after saying why, where all of the model must run.
    """
    batch = next(iter(batches), None)
    if not isinstance(batch, Mapping):
        return None
    device = next(iter(parameters.values())).device

    def plan() -> PrefixReuse:
        with trainable(parameters.values()):
            return plan_prefix(
                model, parameters, lambda: model(**send_to_device(batch, device)), list(parameters.values())
            )

    return _found(plan, "ascent")


def prefix_of_measurements(
    model: nn.Module, metric: BatchMetric, parameters: _Parameters, tried: PrefixReuse | None = None
) -> PrefixReuse | None:
    """Return what does not depend on these parameters when a batch is measured, a generation say.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured; its first batch is tried.
        parameters: What is corrupted.
        tried: The prefix of ascents, if there is one: what it covers need not be tried out again.

    Returns:
        None, after saying why, where all of the model must run.
    """
    batch = next(iter(all_batches(metric.batches)), None)
    if batch is None:
        return None

    def run() -> Any:
        return metric.of_batch(model, batch)

    def plan() -> PrefixReuse:
        prefix, result = plan_prefix_of_values(model, parameters, run)
        if tried is None or prefix.starts != tried.starts or not set(prefix.prefix) <= set(tried.prefix):
            try:
                _try_out(prefix, run, parameters, result)
            finally:
                prefix.forget()
        return prefix

    return _found(plan, "measurement")


def _try_out(prefix: PrefixReuse, run: Callable[[], Any], parameters: _Parameters, expected: Any) -> None:
    """Check that other weights leave the prefix as it is, and that a run with it finds what one without it finds."""
    other = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    with corrupted(parameters, other), prefix.recording(gradients=False):
        run()
    under_corruption = prefix.recorded
    with prefix.recording(gradients=False):
        run()
    if not _same(_values(prefix.recorded), _values(under_corruption)):
        raise PrefixError("what comes before the corrupted modules depends on their weights, or changes by itself")
    with prefix.replaying():
        found = run()
    if not _same(tree_leaves(found), tree_leaves(expected)):
        raise PrefixError("the result differs where the prefix is reused, or changes by itself")


def _values(recorded: Mapping[Any, tuple[list[Any], Any]]) -> list[Any]:
    return [part for parts, _ in recorded.values() for part in parts]


def _same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(_equal(*pair) for pair in zip(found, expected, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _found(plan: Callable[[], PrefixReuse], what: str) -> PrefixReuse | None:
    try:
        return plan()
    except NothingToReuse:
        return None
    except PrefixError as error:
        logger.warning(f"Every {what} runs all of the model: {error}. The numbers are right; it takes longer.")
        return None
