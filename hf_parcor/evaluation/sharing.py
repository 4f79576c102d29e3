"""Measuring many corruptions on each batch: what they all have in common runs once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils import logging

from hf_parcor.corruptions import Corruption, MultiStepCorruption
from hf_parcor.corruptions.multi_step import climb_together
from hf_parcor.evaluation.gradients import DatasetGradients, trainable
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.injection import corrupted
from hf_parcor.prefix import NothingToReuse, PrefixError, PrefixReuse, plan_prefix

logger = logging.get_logger(__name__)


def find_prefix(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Any]
) -> PrefixReuse | None:
    """Return what does not depend on these parameters; None, after saying why, where all of the model must run.

    Args:
        model: The model, in evaluation mode.
        parameters: What is corrupted.
        batches: Mappings that the model takes as keyword arguments; the first is tried.
    """
    batch = next(iter(batches), None)
    if not isinstance(batch, Mapping):
        return None
    device = next(iter(parameters.values())).device
    try:
        with trainable(parameters.values()):
            return plan_prefix(
                model, parameters, lambda: model(**send_to_device(batch, device)), list(parameters.values())
            )
    except NothingToReuse:
        return None
    except PrefixError as error:
        logger.warning(f"Every measurement runs all of the model: {error}. The numbers are right; it takes longer.")
        return None


def choose_together(
    group: Sequence[tuple[Corruption, int]],
    parameters: Mapping[str, nn.Parameter],
    gradients: DatasetGradients | None,
) -> list[Mapping[str, Tensor]]:
    """Return what each corruption chooses with its seed; multi-step ones walk through the data together.

    Args:
        group: Corruptions and their seeds.
        parameters: What is corrupted.
        gradients: For those that need them.
    """
    climbing = [index for index, (corruption, _) in enumerate(group) if type(corruption) is MultiStepCorruption]
    chosen: dict[int, Mapping[str, Tensor]] = {}
    if gradients is not None and climbing:
        gradients.restart()
        multi_step = [cast(MultiStepCorruption, group[index][0]) for index in climbing]
        with torch.no_grad():
            ascents = [corruption.ascent(parameters, len(gradients)) for corruption in multi_step]
            ends = climb_together(ascents, gradients.on_next_batch_at)
        chosen.update(zip(climbing, ends, strict=True))
    for index, (corruption, seed) in enumerate(group):
        if index not in chosen:
            if gradients is not None:
                gradients.restart()
            chosen[index] = corruption(parameters, gradients, torch.Generator().manual_seed(seed))
    return [chosen[index] for index in range(len(group))]


def measure_together(
    model: nn.Module,
    metric: BatchMetric,
    prefix: PrefixReuse,
    parameters: Mapping[str, nn.Parameter],
    chosen: Sequence[Mapping[str, Tensor]],
) -> list[Mapping[str, object]]:
    """Return the metrics under each corruption; the prefix runs once a batch.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured.
        prefix: What does not depend on the parameters.
        parameters: What is corrupted.
        chosen: The corruptions.
    """
    parts: list[list[Any]] = [[] for _ in chosen]
    for batch in metric.batches:
        with prefix.recording(gradients=False):
            metric.of_batch(model, batch)
        for corruption, of_corruption in zip(chosen, parts, strict=True):
            with corrupted(parameters, corruption), prefix.replaying():
                of_corruption.append(metric.of_batch(model, batch))
        prefix.forget()
    return [metric.combine(of_corruption) for of_corruption in parts]
