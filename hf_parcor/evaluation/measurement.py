"""The loops of a measurement: clean, then every corruption of every part, and every bit back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_parcor.corruptions import CORRUPTIONS, Corruption, MultiStepCorruption
from hf_parcor.evaluation.clean_prefix import prefix_of_ascents, prefix_of_measurements
from hf_parcor.evaluation.fingerprint import fingerprint
from hf_parcor.evaluation.gradients import Batch, DatasetGradients, Loss, check_repeatable
from hf_parcor.evaluation.measuring import Metric, measure
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.processes import Processes
from hf_parcor.evaluation.records import CorruptionRecord
from hf_parcor.evaluation.replicas import all_batches, check_same_data, check_same_weights
from hf_parcor.evaluation.sharing import Job, Part, choose_together, measure_together
from hf_parcor.evaluation.trials import Trial, checked_metrics, record_of
from hf_parcor.functional.arguments import check_count
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import corrupted
from hf_parcor.modes import evaluation_mode
from hf_parcor.prefix import PrefixReuse

MEMORY = 1 << 30
_Parameters = Mapping[str, nn.Parameter]


class Measurement:
    """A model, a metric and data, to be measured under corruptions of parts of the model, by one process or several.

    Args:
        model: Any PyTorch model.
        metric: `metric(model)` returns numbers by name.
        batches: Data for the corruptions that need gradients, or None.
        loss: `loss(model, batch)` returns the mean loss of a batch.
        reuse_prefix: Whether what does not depend on a part runs once a batch for all its corruptions.
        memory: How many bytes the corruptions that are measured together may take.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The batches can be walked through only once.
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
        progress: bool,
    ) -> None:
        if batches is not None:
            check_repeatable(batches)
            batches = all_batches(batches)
        maybe: Any = metric
        self._by_batch: BatchMetric | None = maybe if reuse_prefix and isinstance(maybe, BatchMetric) else None
        self._model, self._metric, self._batches, self._loss = model, metric, batches, loss
        self._memory = memory
        self._processes = Processes.launched()
        self._progress = progress and self._processes.index == 0

    def run(
        self, selections: Sequence[_Parameters], corruptions: Sequence[Corruption], trials: int, seed: int
    ) -> tuple[CorruptionRecord, str, list[tuple[CorruptionRecord, ...]]]:
        """Return the clean record, the fingerprint of the data, and the records of each selection's corruptions.

        Args:
            selections: The parameters of each part.
            corruptions: What to measure, for each part in this order.
            trials: Trials of each stochastic corruption.
            seed: First seed.
        """
        check_count("trials", trials)
        check_count("seed", seed, minimum=0)
        corruptions = tuple(corruptions)
        names = [_catalogue_name(corruption) for corruption in corruptions]
        times = [trials if corruption.stochastic else 1 for corruption in corruptions]
        with (
            self._processes.failing_together(),
            evaluation_mode(self._model),
            torch.random.fork_rng(devices=[]),
        ):
            parts = self._parts(selections, corruptions)
            data = "" if self._batches is None else fingerprint(self._batches)
            self._check_replicas(data)
            clean = record_of("none", "no corruption", {}, [Trial(seed, self._metrics())])
            jobs = [
                Job(part, corruption, seed + trial)
                for part in parts
                for corruption, count in zip(corruptions, times, strict=True)
                for trial in range(count)
            ]
            found: list[Trial] = []
            with tqdm(total=len(jobs), desc="corruptions", disable=not self._progress) as bar:
                for group in self._groups(jobs):
                    bar.set_postfix_str(str(group[0].corruption))
                    found += self._measure(group)
                    bar.update(len(group))
        in_order = iter(found)
        records = [
            tuple(
                record_of(name, str(corruption), corruption.settings(), list(islice(in_order, count)))
                for name, corruption, count in zip(names, corruptions, times, strict=True)
            )
            for _ in parts
        ]
        return clean, data, records

    @property
    def notes(self) -> tuple[str, ...]:
        """What the metric says of itself, if it has `notes`, such as the signature of a score."""
        return tuple(getattr(self._metric, "notes", ()))

    def _check_replicas(self, data: str) -> None:
        """Refuse what would be silently wrong on several processes."""
        if self._processes.count == 1:
            return
        check_same_weights(self._model, self._processes)
        check_same_data("batches", data, self._processes)
        metric: Any = self._metric
        if isinstance(metric, BatchMetric):
            check_same_data("metric", fingerprint(all_batches(metric.batches)), self._processes)

    def _parts(self, selections: Sequence[_Parameters], corruptions: Sequence[Corruption]) -> list[Part]:
        gradients: list[DatasetGradients | None] = [None] * len(selections)
        needing = [corruption for corruption in corruptions if corruption.uses_gradients]
        if needing:
            if self._batches is None:
                raise ValueError(
                    f"batches: expected data for {needing[0]}, got None; pass batches=, such as a DataLoader"
                )
            together = {name: parameter for selection in selections for name, parameter in selection.items()}
            whole = DatasetGradients(
                self._model,
                together,
                self._batches,
                self._loss,
                progress=self._progress,
                processes=self._processes,
            )
            gradients = [whole.of_part(selection) for selection in selections]
        climbs = any(isinstance(corruption, MultiStepCorruption) for corruption in corruptions)
        parts = []
        for selection, of_part in zip(selections, gradients, strict=True):
            climbing = self._prefix_of_ascents(selection) if climbs else None
            parts.append(Part(selection, of_part, climbing, self._prefix_of_measurements(selection, climbing)))
        # What is measured together must be the same everywhere, also where a rounding decides.
        found = self._processes.gather([part.measuring is not None for part in parts])
        return [
            part if all(everywhere) else replace(part, measuring=None)
            for part, everywhere in zip(parts, zip(*found, strict=True), strict=True)
        ]

    def _prefix_of_ascents(self, selection: _Parameters) -> PrefixReuse | None:
        if self._by_batch is None or self._batches is None:
            return None
        return prefix_of_ascents(self._model, selection, self._batches)

    def _prefix_of_measurements(self, selection: _Parameters, tried: PrefixReuse | None) -> PrefixReuse | None:
        if self._by_batch is None:
            return None
        return prefix_of_measurements(self._model, self._by_batch, selection, tried)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Yield what is measured together: alone, or as many as the memory for corruptions admits."""
        group: list[Job] = []
        taken = 0
        for job in jobs:
            size = 4 * numel(list(job.part.parameters.values()))
            if group and (not self._go_together(job, group[-1]) or taken + size > self._memory):
                yield group
                group, taken = [], 0
            group.append(job)
            taken += size
        if group:
            yield group

    def _go_together(self, job: Job, other: Job) -> bool:
        """Whether two corruptions share a prefix run, or are at least chosen at the same time by several processes."""
        if job.part.measuring is None and other.part.measuring is None:
            return self._processes.count > 1
        return job.part.measuring is not None and other.part.measuring is not None

    def _measure(self, group: Sequence[Job]) -> list[Trial]:
        together = self._by_batch if group[0].part.measuring is not None else None
        chosen = choose_together(group, self._processes)
        sizes = []
        metrics: list[Mapping[str, object]] = []
        for job, corruption in zip(group, chosen, strict=True):
            with corrupted(job.part.parameters, corruption) as injection:
                sizes.append(injection.size())
                if together is None:
                    metrics.append(self._metrics())
        if together is not None:
            measured = measure_together(self._model, together, group, chosen, self._processes)
            metrics = [checked_metrics(found) for found in measured]
        seeds = [job.seed for job in group]
        return [Trial(*of_trial) for of_trial in zip(seeds, metrics, sizes, strict=True)]

    def _metrics(self) -> Mapping[str, object]:
        with evaluation_mode(self._model):  # a metric may leave the model in training mode
            return measure(self._model, self._metric, self._processes)


def _catalogue_name(corruption: Corruption) -> str:
    if not isinstance(corruption, Corruption):
        raise TypeError(f"corruptions: expected Corruption objects, got {corruption!r}; pass GaussianNoise(0.01), say")
    for name, kind in CORRUPTIONS.items():
        if type(corruption) is kind:
            return name
    return type(corruption).__name__
