"""Measuring many corruptions on each batch: what they all have in common runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_parcor.corruptions import Corruption, MultiStepCorruption
from hf_parcor.corruptions.multi_step import climb_together
from hf_parcor.distributed.processes import ALONE, MeasuringProcesses
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.passes.gradients import DatasetGradients, corrupted_model
from hf_parcor.evaluation.passes.prefixes import PrefixSearch
from hf_parcor.evaluation.placement.replicas import all_batches
from hf_parcor.functional.vectors import working_dtype
from hf_parcor.injection import Device, Pieces, Replacement
from hf_parcor.model_state import devices_of
from hf_parcor.prefix import CalledAgain, PrefixReuse, recording_together
from hf_parcor.randomness import RandomStates

_Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Group:
    """Parameters that are corrupted together, their gradients, and what does not depend on them.

    Args:
        parameters: By their names.
        gradients: Theirs; None if no corruption needs them.
        prefixes: Seeks those of all groups; None if all of the model is to run.
        index: Which of these groups it is.
    """

    parameters: _Parameters
    gradients: DatasetGradients | None
    prefixes: PrefixSearch | None
    index: int

    @property
    def climbing(self) -> PrefixReuse | None:
        """The prefix of the runs of an ascent."""
        return None if self.prefixes is None else self.prefixes.of_ascents(self.index)

    @property
    def measuring(self) -> PrefixReuse | None:
        """The prefix of the runs of a measurement; with several processes, all must ask for it."""
        return None if self.prefixes is None else self.prefixes.of_measurements(self.index)


@dataclass(frozen=True)
class Job:
    """One corruption of one group, chosen with one seed."""

    group: Group
    corruption: Corruption
    seed: int


def choose_together(
    jobs: Sequence[Job], processes: MeasuringProcesses = ALONE, *, whole: bool = True
) -> list[Mapping[str, Tensor] | Pieces]:
    """Return what each corruption chooses, as if called alone; multi-step ones walk through the data together.

    Each process climbs whole ascents: they need no word from the others, and end where one process would. In step,
    all processes climb all of them.

    Args:
        jobs: The corruptions.
        processes: Those that choose together.
        whole: Return each as a mapping, to be written again and again; else those that come as `Pieces` as such.
    """
    if len(jobs) == 1 and processes.count == 1 and not whole:
        remembered = _climb_remembered(jobs[0])
        if remembered is not None:
            return [remembered]
    ascents = [job for job in jobs if type(job.corruption) is MultiStepCorruption]
    if processes.in_step:
        climbed = iter(_climb(ascents))
    else:
        climbed = _handed_round(ascents, _climb(list(processes.share(ascents))), processes)
    corruptions: list[Mapping[str, Tensor] | Pieces] = []
    for job in jobs:
        if type(job.corruption) is MultiStepCorruption:
            corruptions.append(next(climbed))
            continue
        generator = torch.Generator().manual_seed(job.seed)
        if job.group.gradients is not None:
            job.group.gradients.restart()
        chosen: Any = job.corruption.pieces(job.group.parameters, job.group.gradients, generator)
        if job.corruption.rounding_decides and processes.count > 1:  # all take what the first one found
            found = _of_first(chosen.whole(), job.group.parameters, processes)
            chosen = Replacement(processes.hand_round(found, 0))
        elif whole:
            chosen = chosen.whole()
        corruptions.append(chosen)
    return corruptions


def _of_first(found: Mapping[str, Tensor], weights: _Parameters, processes: MeasuringProcesses) -> dict[str, Tensor]:
    """Return tensors for all that the first process found: each process may have chosen other weights."""
    names = processes.gather(list(found))[0]
    return {name: found[name] if name in found else torch.empty_like(weights[name]) for name in names}


def _handed_round(
    jobs: Sequence[Job], share: Sequence[dict[str, Tensor]], processes: MeasuringProcesses
) -> Iterator[dict[str, Tensor]]:
    """Yield where all ascents ended, from those of each process."""
    own = iter(share)
    for index, job in enumerate(jobs):
        owner = processes.owner(index)
        weights = job.group.parameters
        dtype = working_dtype(list(weights.values()))
        ended = (
            next(own)
            if owner == processes.index
            else {name: torch.empty_like(weight, dtype=dtype) for name, weight in weights.items()}
        )
        yield processes.hand_round(ended, owner)


@torch.no_grad()
def _climb_remembered(job: Job) -> Pieces | None:
    """Climb alone, and return the pieces of where it ends, where the ascent is remembered by its gradients."""
    corruption = job.corruption
    if type(corruption) is not MultiStepCorruption or corruption.steps is None:
        return None
    ascent = corruption.remembered(job.group.parameters)
    if ascent is None:
        return None
    source = cast(DatasetGradients, job.group.gradients)
    source.restart()
    for _ in range(corruption.steps):
        gradient = source.on_batch(source.next_batch(), Pieces(ascent.pieces()))
        ascent.climb(gradient, corruption.step_size_of(corruption.steps))
    return Pieces(ascent.pieces())


@torch.no_grad()
def _climb(jobs: Sequence[Job]) -> list[dict[str, Tensor]]:
    if not jobs:
        return []
    sources = [cast(DatasetGradients, job.group.gradients) for job in jobs]
    walk = sources[0]
    walk.restart()
    alone = len(jobs) == 1  # has nothing to share a prefix with

    def prefix_of(index: int) -> PrefixReuse | None:
        return None if alone else jobs[index].group.climbing

    def gradients_at(climbing: Mapping[int, Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
        batch = walk.next_batch()
        prefixes = _different(map(prefix_of, climbing))
        _record(prefixes, lambda: walk.loss_on(batch))
        for index, corruption in climbing.items():
            with _replaying(prefix_of(index)):
                gradient = sources[index].on_batch(batch, corruption)
            yield gradient
            del gradient  # before the next one
        _forget(prefixes)

    corruptions = [cast(MultiStepCorruption, job.corruption) for job in jobs]
    ascents = [
        corruption.ascent(job.group.parameters, len(walk)) for corruption, job in zip(corruptions, jobs, strict=True)
    ]
    return climb_together(ascents, gradients_at)


def measure_together(
    model: nn.Module,
    metric: BatchMetric,
    jobs: Sequence[Job],
    chosen: Sequence[Mapping[str, Tensor] | Pieces],
    processes: MeasuringProcesses,
    saved_on: Device,
    advance: Callable[[float], object],
) -> list[Mapping[str, float]]:
    """Return the metrics under each corruption; what does not depend on it runs once a batch.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured.
        jobs: The corruptions.
        chosen: What they chose, as mappings: each is written for every batch.
        processes: Those that measure together, each every n-th batch.
        saved_on: Where the bits of corrupted weights are kept; None for their own device.
        advance: Told after each batch how many of the jobs that was worth, if the number of batches is known.
    """
    rounds = processes.size(length_hint(metric.batches))
    prefixes = _different(job.group.measuring for job in jobs)
    devices = devices_of(model)
    left_off: dict[int, RandomStates] = {}  # each draws as if it were alone

    def of_jobs(batch: Mapping[str, Any]) -> list[Any]:
        now = RandomStates(devices)
        _record(prefixes, partial(metric.of_batch, model, batch))
        found = []
        for place, (job, corruption) in enumerate(zip(jobs, chosen, strict=True)):
            injected = corrupted_model(model, job.group.parameters, corruption, saved_on)
            run = partial(_drawing_from, left_off.get(place, now), partial(metric.of_batch, model, batch))
            with injected:
                found.append(_measured(job.group.measuring, run))
            left_off[place] = RandomStates(devices)
        now.put_back()
        _forget(prefixes)
        if rounds:
            advance(len(jobs) / rounds)
        return found

    of_batches = processes.each(of_jobs, all_batches(metric.batches))
    return [metric.combine(list(of_job)) for of_job in zip(*of_batches, strict=True)]


def _different(prefixes: Iterable[PrefixReuse | None]) -> list[PrefixReuse]:
    return list(dict.fromkeys(prefix for prefix in prefixes if prefix is not None))


def _drawing_from(states: RandomStates, run: Callable[[], Any]) -> Any:
    states.put_back()
    return run()


def _measured(prefix: PrefixReuse | None, run: Callable[[], Any]) -> Any:
    try:
        with _replaying(prefix):
            return run()
    except CalledAgain:
        return run()


def _replaying(prefix: PrefixReuse | None) -> AbstractContextManager[None]:
    return nullcontext() if prefix is None else prefix.replaying()


def _record(prefixes: Sequence[PrefixReuse], run: Callable[[], Any]) -> None:
    if prefixes:
        with recording_together(prefixes):
            run()


def _forget(prefixes: Sequence[PrefixReuse]) -> None:
    for prefix in prefixes:
        prefix.forget()
