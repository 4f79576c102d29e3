"""The loops of a measurement: clean, then every corruption of every group, and every bit back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice, product
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_parcor.arguments import check_count
from hf_parcor.corruptions import Corruption, MultiStepCorruption
from hf_parcor.corruptions.catalogue import catalogue_name
from hf_parcor.distributed.fsdp import is_sharded
from hf_parcor.distributed.processes import MeasuringProcesses
from hf_parcor.evaluation.identity.repeated_batches import RepeatedBatches, check_repeatable
from hf_parcor.evaluation.identity.run import identity_of_run
from hf_parcor.evaluation.losses import Batch, Loss
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.passes.gradients import DatasetGradients, corrupted_model
from hf_parcor.evaluation.passes.prefixes import PrefixSearch
from hf_parcor.evaluation.passes.together import Group, Job, choose_together, measure_together
from hf_parcor.evaluation.placement.memory import check_memory
from hf_parcor.evaluation.placement.replicas import all_batches, check_same_data, check_same_weights
from hf_parcor.evaluation.resume import append_to_checkpoint, begin_checkpoint
from hf_parcor.evaluation.trials import Trial, checked_metrics, record_of, warn_of_notes
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import Device, check_device
from hf_parcor.model_state import BufferSnapshot, devices_of, evaluation_mode
from hf_parcor.overriding import undoing_left
from hf_parcor.randomness import random_states_kept
from hf_parcor.records.evaluation import CorruptionKind, CorruptionRecord
from hf_parcor.records.metric_info import MetricInfo, checked_infos, info_of

logger = logging.get_logger(__name__)

Metric = Callable[[nn.Module], Mapping[str, float]]
_CLOSE = 1e-2  # relative; kernels of different processes round differently, data of different processes differ more


def measure(model: nn.Module, metric: Metric, processes: MeasuringProcesses) -> Mapping[str, object]:
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
    of_processes = processes.gather(checked_metrics(metric(model)))
    _warn_of_differences(of_processes)
    return of_processes[0]


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


@dataclass(frozen=True)
class Plan:
    """All trials of all corruptions of all groups, numbered from 1 in this order.

    Args:
        corruptions: What each group is measured under.
        trials: Trials of each stochastic corruption; others have one.
        seed: First seed.
        groups: How many groups there are.
        cells: Which corruptions of which groups are measured, by their indices; None, the default, for all. The others
            keep their numbers, so that a checkpoint serves a later run with more cells.

    Raises:
        TypeError: Something is no `Corruption`.
    """

    corruptions: tuple[Corruption, ...]
    trials: int
    seed: int
    groups: int
    cells: frozenset[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        for corruption in self.corruptions:
            if not isinstance(corruption, Corruption):
                raise TypeError(
                    f"corruptions: expected Corruption objects, got {corruption!r}; pass GaussianNoise(0.01), say"
                )

    @cached_property
    def draws(self) -> dict[int, tuple[int, Corruption, int]]:
        """The trials that are measured, by their numbers: the index of the group, the corruption, and the seed."""
        of_group = [
            (index, one, self.seed + trial)
            for index, one in enumerate(self.corruptions)
            for trial in range(self._times(one))
        ]
        every = enumerate(product(range(self.groups), of_group), start=1)
        return {number: (group, one, seed) for number, (group, (index, one, seed)) in every if self._has(group, index)}

    def _has(self, group: int, corruption: int) -> bool:
        return self.cells is None or (group, corruption) in self.cells

    def check(self, groups: Iterable[Mapping[str, nn.Parameter]]) -> None:
        """Refuse groups that a corruption of theirs cannot be applied to."""
        for group, parameters in enumerate(groups):
            for index, corruption in enumerate(self.corruptions):
                if self._has(group, index):
                    corruption.check(parameters)

    def trials_of(self, group: int) -> int:
        """Return how many trials of a group are measured."""
        return sum(self._times(one) for index, one in enumerate(self.corruptions) if self._has(group, index))

    def steps_of(self, group: int, batches: int) -> int:
        """Return how many steps all ascents of a group take, on so many batches."""
        return sum(
            batches if one.steps is None else one.steps
            for index, one in enumerate(self.corruptions)
            if type(one) is MultiStepCorruption and self._has(group, index)
        )

    def records(self, found: Mapping[int, Trial]) -> list[tuple[CorruptionRecord, ...]]:
        """Return the records of each group, from all trials by their number."""
        in_order = (found[number] for number in self.draws)
        return [
            tuple(
                record_of(
                    catalogue_name(corruption) or type(corruption).__name__,
                    str(corruption),
                    corruption.settings(),
                    list(islice(in_order, self._times(corruption))),
                    CorruptionKind(**corruption.kind(corruption.settings())),
                )
                for index, corruption in enumerate(self.corruptions)
                if self._has(group, index)
            )
            for group in range(self.groups)
        ]

    def _times(self, corruption: Corruption) -> int:
        return self.trials if corruption.stochastic else 1


# Many that are measured together are parts of one done after each batch: what is left is known from the first.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
MEMORY = 1 << 30
BETWEEN_WRITES = 16  # corruptions that a kill may cost; more would share a prefix run that is a few percent of them
_Parameters = Mapping[str, nn.Parameter]


class Measurement:
    """A model, a metric and data, to be measured under corruptions of groups of the model, by one process or several.

    Args:
        model: Any PyTorch model.
        metric: `metric(model)` returns numbers by name.
        batches: Data for the corruptions that need gradients; None for those of the metric, if it has any.
        loss: `loss(model, batch)` returns the mean loss of a batch.
        reuse_prefix: Whether what does not depend on a group runs once a batch for all its corruptions.
        memory: How many bytes the corruptions that are measured together may take, with what the metric keeps of each.
        metric_info: What the metric's numbers mean, by their names; None for what it says itself.
        progress: Whether to show a progress bar.
        saved_on: Where the bits of corrupted weights are kept; None for their own device.

    Raises:
        ValueError: The batches can be walked through only once.
        TypeError: `metric_info` is no mapping to `MetricInfo`.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        batches: Iterable[Batch] | None,
        loss: Loss,
        *,
        reuse_prefix: bool,
        memory: int,
        metric_info: Mapping[str, MetricInfo] | None,
        progress: bool,
        saved_on: Device = None,
    ) -> None:
        self._saved_on = check_device("saved_on", saved_on)
        self._infos = checked_infos(metric_info)
        maybe: Any = metric
        if batches is None and isinstance(maybe, BatchMetric):
            batches = maybe.batches
        if batches is not None:
            check_repeatable(batches)
        sharded = is_sharded(model)  # there every module that is called gathers, and every pass must end
        reuses = reuse_prefix and not sharded and isinstance(maybe, BatchMetric)
        self._by_batch: BatchMetric | None = maybe if reuses else None
        self._model, self._metric, self._given, self._loss = model, metric, batches, loss
        self._batches: RepeatedBatches | None = None
        self._memory = memory
        self._clean: tuple[str, ...] = ()  # what the metric finds without corruption, by name
        self._processes = MeasuringProcesses.launched(in_step=sharded)
        self._progress = progress and self._processes.index == 0

    @undoing_left()
    def run(
        self,
        groups: Mapping[str, _Parameters],
        corruptions: Sequence[Corruption],
        trials: int,
        seed: int,
        weights: str,
        checkpoint: str | Path | None = None,
        cells: frozenset[tuple[int, int]] | None = None,
        clean: Mapping[str, float] | None = None,
    ) -> tuple[CorruptionRecord, str, list[tuple[CorruptionRecord, ...]]]:
        """Return the clean record, what records keep of the data, and the records of each selection's corruptions.

        Args:
            groups: The parameters of each group, by its name.
            corruptions: What to measure, for each group in this order.
            trials: Trials of each stochastic corruption.
            seed: First seed.
            weights: Fingerprint of the weights.
            checkpoint: Where finished trials are kept; the first process reads and writes it.
            cells: As in `Plan`.
            clean: What the metric found on the model as it is, where that is known; None to measure it.
        """
        check_count("trials", trials)
        check_count("seed", seed, minimum=0)
        plan = Plan(tuple(corruptions), trials, seed, len(groups), cells)
        plan.check(groups.values())
        path = None if checkpoint is None or self._processes.index else Path(checkpoint)
        self._buffers = BufferSnapshot(self._model.modules())
        with (
            self._processes.failing_together(),
            evaluation_mode(self._model),
            torch.random.fork_rng(devices=[]),
        ):
            self._check_batches(corruptions)
            measured_on = self._walk_twice()
            data, batches = ("", "") if self._batches is None else (self._batches.data(), self._batches.fingerprint())
            self._check_replicas(batches, measured_on)
            found: dict[int, Trial] = {}  # number 0 is the clean model's
            if checkpoint is not None:
                run = identity_of_run(
                    self._model,
                    weights,
                    self._metric,
                    self._loss,
                    batches,
                    "" if measured_on is None else measured_on.fingerprint(),
                    groups,
                    corruptions,
                    trials,
                    seed,
                )
                found = {} if path is None else begin_checkpoint(path, run)
            found = self._processes.gather(found)[0]
            left = [number for number in plan.draws if number not in found]
            limit = len(left) if checkpoint is None else BETWEEN_WRITES
            ready = self._ready(list(groups.values()), corruptions if left else (), plan, left, limit)
            self._clean = ()
            if 0 not in found:  # after the groups, whose making refuses data that will not do
                found |= _kept(path, {0: Trial.of(seed, self._metrics() if clean is None else checked_metrics(clean))})
            self._clean = tuple(found[0].metrics)
            draws = (plan.draws[number] for number in left)
            jobs = [Job(ready[group], corruption, own_seed) for group, corruption, own_seed in draws]
            numbers = iter(left)
            total = len(plan.draws)
            done = total - len(left)
            with tqdm(
                total=total, initial=done, desc="corruptions", bar_format=_BAR, disable=not (self._progress and total)
            ) as bar:

                def advance(jobs: float) -> None:  # shares of a job, added up, may be a rounding error more than it
                    bar.update(min(jobs, total - bar.n))

                for some in self._in_turn(jobs, limit):
                    bar.set_postfix_str(str(some[0].corruption))
                    measured = self._measure(some, advance)
                    found |= _kept(path, dict(zip(islice(numbers, len(some)), measured, strict=True)))
                    done += len(some)
                    bar.update(done - bar.n)
        of_clean = record_of("none", "no corruption", {}, [found[0]])
        of_groups = plan.records(found)
        warn_of_notes([of_clean, *chain(*of_groups)])
        return of_clean, data, of_groups

    def _check_batches(self, corruptions: Sequence[Corruption]) -> None:
        needing = [corruption for corruption in corruptions if corruption.uses_gradients]
        if needing and self._given is None:
            raise ValueError(f"batches: expected data for {needing[0]}, got None; pass batches=, such as a DataLoader")

    def _walk_twice(self) -> RepeatedBatches | None:
        """Check that all data is the same in every walk, and return that of the metric, if it is made batch by batch.

        Before each run anew: between two of them a caller may have changed the data.
        """
        self._batches = None if self._given is None else RepeatedBatches(self._given)
        metric: Any = self._metric
        of_metric = metric.batches if isinstance(metric, BatchMetric) else None
        measured_on = self._batches if of_metric is self._given else None
        if of_metric is not None and measured_on is None:
            measured_on = RepeatedBatches(of_metric, "metric")
        for batches in {id(one): one for one in (self._batches, measured_on) if one is not None}.values():
            batches.check()
        return measured_on

    @property
    def notes(self) -> tuple[str, ...]:
        """What the metric says of itself, if it has `notes`, such as the signature of a score."""
        return tuple(getattr(self._metric, "notes", ()))

    def infos(self, rows: Sequence[CorruptionRecord]) -> dict[str, MetricInfo]:
        """Return what the numbers of each metric mean: as was given, else as the metric says, else by their names."""
        names = list(rows[0].metrics)
        unknown = [name for name in self._infos if name not in names]
        if unknown:
            logger.warning(
                f"metric_info: expected names out of {', '.join(names)}, got {', '.join(unknown)}, which the "
                "metric does not return; name those that it does."
            )
        values = {name: [value for row in rows for value in row.metrics.get(name, ())] for name in names}
        return {name: self._infos.get(name) or info_of(self._metric, name, values[name]) for name in names}

    def _check_replicas(self, batches: str, measured_on: RepeatedBatches | None) -> None:
        """Refuse what would be silently wrong on several processes."""
        if self._processes.count == 1:
            return
        check_same_weights(self._model, self._processes)
        check_same_data("batches", batches, self._processes)
        if measured_on is not None:
            check_same_data("metric", measured_on.fingerprint(), self._processes)

    def _ready(
        self,
        groups: Sequence[_Parameters],
        corruptions: Sequence[Corruption],
        plan: Plan,
        left: Sequence[int],
        limit: int,
    ) -> list[Group]:
        """Return the groups; what costs a run of the model is done when it is needed.

        The gradient is taken with respect to all groups, whatever is left, so that its last bits are the same.
        """
        whole: DatasetGradients | None = None
        if self._batches is not None and any(corruption.uses_gradients for corruption in corruptions):
            together = {name: parameter for selection in groups for name, parameter in selection.items()}
            whole = DatasetGradients(
                self._model,
                together,
                self._batches,
                self._loss,
                progress=self._progress,
                processes=self._processes,
                saved_on=self._saved_on,
            )
            check_memory(groups, corruptions, self._saved_on)
        every, batches = range(len(groups)), 0 if whole is None else len(whole)
        prefixes: PrefixSearch | None = None
        if self._by_batch is not None:
            waiting = dict.fromkeys(plan.draws[number][0] for number in left)
            prefixes = PrefixSearch(
                self._model,
                self._by_batch,
                self._batches or (),
                groups,
                trials=[plan.trials_of(index) for index in every],
                steps=[plan.steps_of(index, batches) for index in every],
                shared=[index for index in waiting if 2 * _size(groups[index]) <= self._memory],  # two at a time
                limit=limit,  # as many as are written down at once, so that a sweep that is killed often gets on
                memory=self._memory,
                processes=self._processes,
                saved_on=self._saved_on,
            )
        return [
            Group(selection, None if whole is None else whole.of_group(selection), prefixes, index)
            for index, selection in enumerate(groups)
        ]

    def _in_turn(self, jobs: Sequence[Job], limit: int) -> Iterator[list[Job]]:
        """Yield what is measured together: alone, or as many as the limit and the memory for corruptions admit."""
        some: list[Job] = []
        taken = 0
        kept = int(getattr(self._metric, "kept_bytes", 0))  # known from the clean model
        for job in jobs:
            size = _size(job.group.parameters) + kept
            full = len(some) == limit or taken + size > self._memory
            if some and (full or not self._go_together(job, some[-1])):
                yield some
                some, taken = [], 0
            some.append(job)
            taken += size
        if some:
            yield some

    def _go_together(self, job: Job, other: Job) -> bool:
        """Whether two corruptions share a prefix run, or are at least chosen at the same time by several processes."""
        if other.group.measuring is None:  # the next group is not made ready before its turn
            return self._processes.count > 1 and job.group.measuring is None
        return job.group.measuring is not None

    def _measure(self, some: Sequence[Job], advance: Callable[[float], object]) -> list[Trial]:
        # One alone has nothing to share a prefix with, and is written once: tensor by tensor.
        together = self._by_batch if len(some) > 1 and some[0].group.measuring is not None else None
        # A walk of a `DataLoader` draws a number: the metric begins with the same ones whatever was walked through.
        with self._buffers.undone(), random_states_kept(devices_of(self._model)):
            chosen = choose_together(some, self._processes, whole=together is not None)
        sizes = []
        metrics: list[Mapping[str, object]] = []
        for job, corruption in zip(some, chosen, strict=True):
            with corrupted_model(self._model, job.group.parameters, corruption, self._saved_on, p=2) as injection:
                sizes.append(injection.size())
                if together is None:
                    metrics.append(self._metrics())
        if together is not None:
            with random_states_kept(devices_of(self._model)):
                measured = measure_together(
                    self._model, together, some, chosen, self._processes, self._saved_on, advance
                )
            metrics = [checked_metrics(found) for found in measured]
        seeds = [job.seed for job in some]
        return [Trial.of(*of_trial) for of_trial in zip(seeds, metrics, sizes, strict=True)]

    def _metrics(self) -> Mapping[str, object]:
        """Return what the metric finds; NaN where a function refuses what a corrupted model returns.

        Several processes stop there: others may wait for this one.
        """
        # A metric may leave the model in training mode.
        with evaluation_mode(self._model), self._buffers.undone(), random_states_kept(devices_of(self._model)):
            try:
                return measure(self._model, self._metric, self._processes)
            except (ValueError, ArithmeticError) as error:
                if not self._clean or self._processes.count > 1 or isinstance(self._metric, BatchMetric):
                    raise
                said = str(error).partition("\n")[0]
                logger.warning(f"metric: failed, and did not without corruption, so all it finds is NaN: {said}")
                return dict.fromkeys(self._clean, math.nan)


def _size(selection: _Parameters) -> int:
    """Return how many bytes a corruption of these weights takes as a whole."""
    return 4 * numel(list(selection.values()))


def _kept(path: Path | None, trials: dict[int, Trial]) -> dict[int, Trial]:
    """Write finished trials down, where there is a checkpoint, and return them."""
    if path is not None:
        append_to_checkpoint(path, trials)
    return trials
