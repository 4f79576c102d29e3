"""Measuring many corruptions on each batch: what they all have in common runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from hf_parcor.prefix import NothingToReuse, PrefixError, PrefixReuse, plan_prefix, recording_together

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


@dataclass(frozen=True)
class Part:
    """Parameters that are corrupted together, their gradients, and what does not depend on them."""

    parameters: Mapping[str, nn.Parameter]
    gradients: DatasetGradients | None
    prefix: PrefixReuse | None

    def sharing(self) -> AbstractContextManager[None]:
        """Let the prefix return what was recorded."""
        return nullcontext() if self.prefix is None else self.prefix.replaying()


@dataclass(frozen=True)
class Job:
    """One corruption of one part, chosen with one seed."""

    part: Part
    corruption: Corruption
    seed: int


def choose_together(jobs: Sequence[Job]) -> list[Mapping[str, Tensor]]:
    """Return what each corruption chooses, as if called alone; multi-step ones walk through the data together."""
    climbed = iter(_climb([job for job in jobs if type(job.corruption) is MultiStepCorruption]))
    corruptions: list[Mapping[str, Tensor]] = []
    for job in jobs:
        if type(job.corruption) is MultiStepCorruption:
            corruptions.append(next(climbed))
            continue
        generator = torch.Generator().manual_seed(job.seed)
        if job.part.gradients is not None:
            job.part.gradients.restart()
        corruptions.append(job.corruption(job.part.parameters, job.part.gradients, generator))
    return corruptions


@torch.no_grad()
def _climb(jobs: Sequence[Job]) -> list[dict[str, Tensor]]:
    if not jobs:
        return []
    sources = [cast(DatasetGradients, job.part.gradients) for job in jobs]
    walk = sources[0]
    walk.restart()

    def gradients_at(climbing: Mapping[int, Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        batch = walk.next_batch()
        prefixes = _prefixes(jobs[index].part for index in climbing)
        _record(prefixes, lambda: walk.run(batch))
        for index, corruption in climbing.items():
            with jobs[index].part.sharing():
                gradient = sources[index].on_batch(batch, corruption)
            yield gradient
        _forget(prefixes)

    corruptions = [cast(MultiStepCorruption, job.corruption) for job in jobs]
    ascents = [
        corruption.ascent(job.part.parameters, len(walk)) for corruption, job in zip(corruptions, jobs, strict=True)
    ]
    return climb_together(ascents, gradients_at)


def measure_together(
    model: nn.Module, metric: BatchMetric, jobs: Sequence[Job], chosen: Sequence[Mapping[str, Tensor]]
) -> list[Mapping[str, float]]:
    """Return the metrics under each corruption; what does not depend on it runs once a batch.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured.
        jobs: The corruptions.
        chosen: What they chose.
    """
    prefixes = _prefixes(job.part for job in jobs)
    parts: list[list[Any]] = [[] for _ in jobs]
    for batch in metric.batches:
        _record(prefixes, partial(metric.of_batch, model, batch))
        for job, corruption, of_job in zip(jobs, chosen, parts, strict=True):
            with corrupted(job.part.parameters, corruption), job.part.sharing():
                of_job.append(metric.of_batch(model, batch))
        _forget(prefixes)
    return [metric.combine(of_job) for of_job in parts]


def _prefixes(parts: Iterable[Part]) -> list[PrefixReuse]:
    return list({id(part.prefix): part.prefix for part in parts if part.prefix is not None}.values())


def _record(prefixes: Sequence[PrefixReuse], run: Callable[[], Any]) -> None:
    if prefixes:
        with recording_together(prefixes):
            run()


def _forget(prefixes: Sequence[PrefixReuse]) -> None:
    for prefix in prefixes:
        prefix.forget()
