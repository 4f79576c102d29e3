"""Measuring many corruptions on each batch: what they all have in common runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from operator import length_hint
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_parcor.corruptions import Corruption, MultiStepCorruption
from hf_parcor.corruptions.multi_step import climb_together
from hf_parcor.distributed.processes import ALONE, MeasuringProcesses
from hf_parcor.evaluation.gradients import DatasetGradients, corrupted_model, trainable, unsaved
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.outputs import called, own_batch
from hf_parcor.evaluation.replicas import all_batches
from hf_parcor.functional.vectors import working_dtype
from hf_parcor.injection import Device, Pieces, Replacement, corrupted, obstacle
from hf_parcor.model_state import BufferSnapshot
from hf_parcor.prefix import (
    TRIED_PASSES,
    CalledAgain,
    NothingToReuse,
    PrefixError,
    PrefixReuse,
    before_calls,
    check_results,
    distance,
    failures_as_prefix_errors,
    leaves_of,
    outputs_of,
    plan_prefix,
    plan_prefixes_of_values,
    recording_together,
)

logger = logging.get_logger(__name__)

_Parameters = Mapping[str, nn.Parameter]
RUNS_TO_PLAN = 4 + TRIED_PASSES  # of one batch, for one part, by `prefixes_of_measurements`; a test counts them
RUNS_TO_PLAN_ASCENTS = 3 + TRIED_PASSES  # by `prefix_of_ascents`, most of them backward too


@dataclass(frozen=True)
class Group:
    """Parameters that are corrupted together, their gradients, and what does not depend on them.

    A measurement may run the model in another way than an ascent does, so each has its own prefix. It is sought, which
    takes a few runs of the model, when it is first asked for: a sweep that is killed often still gets on.

    Args:
        parameters: By their names.
        gradients: Theirs; None if no corruption needs them.
        seek_climbing: Seeks the prefix of ascents.
        seek_measuring: Seeks that of measurements.
    """

    parameters: _Parameters
    gradients: DatasetGradients | None
    seek_climbing: Callable[[], PrefixReuse | None]
    seek_measuring: Callable[[], PrefixReuse | None]

    @cached_property
    def climbing(self) -> PrefixReuse | None:
        """The prefix of the runs of an ascent: what is computed before these parameters are used."""
        return self.seek_climbing()

    @cached_property
    def measuring(self) -> PrefixReuse | None:
        """The prefix of the runs of a measurement, as `climbing`; with several processes, all must ask for it."""
        return self.seek_measuring()


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

    def of_jobs(batch: Mapping[str, Any]) -> list[Any]:
        _record(prefixes, partial(metric.of_batch, model, batch))
        found = []
        for job, corruption in zip(jobs, chosen, strict=True):
            injected = corrupted_model(model, job.group.parameters, corruption, saved_on)
            with injected:
                found.append(_measured(job.group.measuring, partial(metric.of_batch, model, batch)))
        _forget(prefixes)
        if rounds:
            advance(len(jobs) / rounds)
        return found

    of_batches = processes.each(of_jobs, all_batches(metric.batches))
    return [metric.combine(list(of_job)) for of_job in zip(*of_batches, strict=True)]


def _different(prefixes: Iterable[PrefixReuse | None]) -> list[PrefixReuse]:
    return list(dict.fromkeys(prefix for prefix in prefixes if prefix is not None))


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

    try:
        with trainable(parameters.values()):
            return plan_prefix(model, parameters, lambda: called(model, own_batch(batch, model)), trained=parameters)
    except NothingToReuse:
        pass
    except PrefixError as error:
        _say("ascent", error)
    return None


def prefixes_of_measurements(
    model: nn.Module, metric: BatchMetric, parts: Sequence[_Parameters], memory: int, saved_on: Device = None
) -> list[PrefixReuse | None]:
    """Return what does not depend on each of some parts when a batch is measured, a generation say.

    The runs that watch the model, and see whether it repeats itself, are the same for all parts. For each there is one
    more, from where its prefix ends.

    Args:
        model: The model, in evaluation mode.
        metric: What is measured; its first batch is tried.
        parts: What is corrupted, each by itself.
        memory: How many bytes the bits of corrupted weights may take; those of one part are held in any case.
        saved_on: Where they are kept; None for their own device.

    Returns:
        None for a part, after saying why, where all of the model must run.
    """
    batch = next(iter(all_batches(metric.batches)), None)
    if batch is None:
        return [None] * len(parts)
    run = partial(_everything_found, model, partial(metric.of_batch, model, batch))
    try:
        prefixes, errors, found = plan_prefixes_of_values(model, parts, run)
        with failures_as_prefix_errors():
            errors += _try_out(prefixes, model, run, parts, found, memory, saved_on) if prefixes else []
    except PrefixError as error:
        if isinstance(error, _UsedEarlyError) and len(parts) > 1:  # by which part?
            return [one for part in parts for one in prefixes_of_measurements(model, metric, [part], memory, saved_on)]
        prefixes, errors = {}, [error]
    for reason in dict.fromkeys(str(error) for error in errors if not isinstance(error, NothingToReuse)):
        _say("measurement", reason)
    return [prefixes.get(index) for index in range(len(parts))]


def _everything_found(model: nn.Module, run: Callable[[], Any]) -> list[Any]:
    """Return what a run returned, and what the model did: what is missing there may be rounded away in a loss."""
    with outputs_of(model) as found:
        result = run()
    return [*found, *leaves_of(result)]


class _UsedEarlyError(PrefixError):
    """Some weights are used before a module that holds them is called."""


def _try_out(
    prefixes: dict[int, PrefixReuse],
    model: nn.Module,
    run: Callable[[], list[Any]],
    parts: Sequence[_Parameters],
    expected: Sequence[Any],
    memory: int,
    saved_on: Device,
) -> list[PrefixError]:
    """Check that runs which reuse a prefix find what full ones find; prefixes that fail leave the mapping.

    That no prefix depends on the part that it is for shows in a run in which each part has other weights until the
    first module that holds it is called. That nothing behind a cut depends on more than the prefix hands on shows
    where all before it is replayed, after a run at other weights has overwritten what modules may have left behind.

    Args:
        prefixes: By the index of their part, in the order in which the parts come in.
        model: The model.
        run: Runs it on one batch.
        parts: What is corrupted, each by itself.
        expected: What a run found.
        memory: As in `prefixes_of_measurements`.
        saved_on: As there.

    Returns:
        Why some cannot be reused.

    Raises:
        PrefixError: None can: two runs differ, or a buffer moves.
        _UsedEarlyError: A part is used before its start, it is unknown which one.
    """
    buffers = BufferSnapshot(model.modules())
    errors: list[PrefixError] = []
    try:
        again = run()
        if buffers.moved():
            raise PrefixError("a buffer of the model moves when it is measured")
        apart = distance(again, expected)
        check_results("result", 0.0, apart)
        for some in _disjoint(prefixes, parts, memory):
            try:
                with failures_as_prefix_errors(), _other_until_called(model, prefixes, some, saved_on):
                    found = distance(run(), again)
                check_results("result", found, apart)
            except PrefixError as error:
                raise _UsedEarlyError(str(error)) from error
        _record(list(prefixes.values()), run)
        first = next(iter(prefixes))
        early = _at_most(memory, [*_parameters_of(prefixes[first].prefix), *parts[first].values()])
        with corrupted_model(model, early, _other_than(early), saved_on):
            run()
        # From the last on: what is computed in a trial was not yet computed, at these weights, for those that follow.
        deepest_first = list(reversed(prefixes))
        for index in [*deepest_first[:1], *deepest_first]:  # what is wrong from the second replay on
            if index in prefixes:
                try:
                    with failures_as_prefix_errors(), prefixes[index].replaying():
                        found = distance(run(), again)
                    check_results("result", found, apart)
                except PrefixError as error:
                    errors.append(error)
                    prefixes.pop(index).forget()
    finally:
        _forget(list(prefixes.values()))
        buffers.put_back()
    return errors


def _parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if obstacle(parameter) is None]


def _at_most(memory: int, weights: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the first weights, by names made up, as many as the memory for their bits admits, and at least one."""
    some: dict[str, Tensor] = {}
    for weight in dict.fromkeys(weights):
        memory -= weight.nbytes
        if some and memory < 0:
            break
        some[str(len(some))] = weight
    return some


def _other_than(weights: Mapping[str, Tensor]) -> Pieces:
    """Return 1 − w for each weight w: a normalization behind it takes away neither the sign nor, of zeros, the one."""
    return Pieces(((name, 1 - weight.detach()) for name, weight in weights.items()), replaces=True)


@contextmanager
def _other_until_called(
    model: nn.Module,
    prefixes: Mapping[int, PrefixReuse],
    some: Iterable[tuple[int, Mapping[str, Tensor]]],
    saved_on: Device,
) -> Iterator[None]:
    """Let parts have other weights inside a `with` block, each until the first of its prefix's starts is called."""
    with unsaved(model), ExitStack() as corruptions, ExitStack() as hooks:
        for index, weights in some:
            corruption = corruptions.enter_context(ExitStack())
            corruption.enter_context(corrupted(weights, _ones(weights), saved_on=saved_on))
            for module in prefixes[index].starts:
                before_calls(hooks, module, partial(_close, corruption))
        yield


def _close(stack: ExitStack, module: nn.Module, arguments: Any) -> None:
    stack.close()


def _ones(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a one for each weight, in no memory."""
    return {name: torch.ones((), dtype=w.dtype, device=w.device).expand(w.shape) for name, w in weights.items()}


def _disjoint(
    prefixes: Iterable[int], parts: Sequence[_Parameters], memory: int
) -> Iterator[list[tuple[int, Mapping[str, Tensor]]]]:
    """Yield as many parts as the memory for their bits admits; a weight of several belongs to the last to come in."""
    seen: set[int] = set()
    some: list[tuple[int, Mapping[str, Tensor]]] = []
    taken = 0
    for index in reversed(list(prefixes)):
        weights = {name: weight for name, weight in parts[index].items() if id(weight) not in seen}
        seen |= {id(weight) for weight in weights.values()}
        size = sum(weight.nbytes for weight in weights.values())
        if some and taken + size > memory:
            yield some
            some, taken = [], 0
        if weights:
            some.append((index, weights))
            taken += size
    if some:
        yield some


def _say(what: str, reason: object) -> None:
    logger.warning(f"Every {what} runs all of the model: {reason}. The numbers are right; it takes longer.")
