"""What a measurement, or an ascent, computes before the corrupted parameters come in, tried out before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.utils import logging

from hf_parcor.batches import private_copy
from hf_parcor.buffers import BufferSnapshot
from hf_parcor.evaluation.gradients import trainable
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.replicas import all_batches
from hf_parcor.injection import corrupted
from hf_parcor.prefix import (
    TRIED_PASSES,
    NothingToReuse,
    PrefixError,
    PrefixReuse,
    check_results,
    distance,
    failures_as_prefix_errors,
    leaves_of,
    outputs_of,
    plan_prefix,
    plan_prefix_of_values,
)

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
                model, parameters, lambda: model(**send_to_device(private_copy(batch), device)), trained=parameters
            )

    return _found(plan, "ascent")


def prefix_of_measurements(model: nn.Module, metric: BatchMetric, parameters: _Parameters) -> PrefixReuse | None:
    """Return what does not depend on these parameters when a batch is measured, a generation say.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured; its first batch is tried.
        parameters: What is corrupted.

    Returns:
        None, after saying why, where all of the model must run.
    """
    batch = next(iter(all_batches(metric.batches)), None)
    if batch is None:
        return None

    def run() -> list[Any]:
        return _everything_found(model, lambda: metric.of_batch(model, batch))

    def plan() -> PrefixReuse:
        prefix, found = plan_prefix_of_values(model, parameters, run)
        with failures_as_prefix_errors():
            _try_out(prefix, model, run, parameters, found)
        return prefix

    return _found(plan, "measurement")


def _everything_found(model: nn.Module, run: Callable[[], Any]) -> list[Any]:
    """Return what a run returned, and what the model did: what is missing there may be rounded away in a loss."""
    with outputs_of(model) as found:
        result = run()
    return [*found, *leaves_of(result)]


def _try_out(
    prefix: PrefixReuse,
    model: nn.Module,
    run: Callable[[], list[Any]],
    parameters: _Parameters,
    expected: Sequence[Any],
) -> None:
    """Check that runs with the prefix reused find what full ones find, at other weights too, and leave nothing behind.

    Raises:
        PrefixError: They do not, or they change by themselves: they draw random numbers, or a buffer moves.
    """
    buffers = BufferSnapshot(model.modules())
    other = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    try:
        again = run()
        if buffers.moved():
            raise PrefixError("a buffer of the model moves when it is measured")
        with corrupted(parameters, other):
            expected_at_other = run()
        with prefix.recording(gradients=False):
            run()
        with prefix.replaying():
            found = [distance(run(), again)]
        for _ in range(1, TRIED_PASSES):
            with corrupted(parameters, other), prefix.replaying():
                found.append(distance(run(), expected_at_other))
        check_results("result", max(found), distance(again, expected))
    finally:
        prefix.forget()
        buffers.put_back()


def _found(plan: Callable[[], PrefixReuse], what: str) -> PrefixReuse | None:
    try:
        return plan()
    except NothingToReuse:
        return None
    except PrefixError as error:
        logger.warning(f"Every {what} runs all of the model: {error}. The numbers are right; it takes longer.")
        return None
