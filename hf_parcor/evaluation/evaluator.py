"""Corrupt, measure, restore: how far do a model's metrics fall?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.evaluation.fingerprint import fingerprint
from hf_parcor.evaluation.gradients import Batch, DatasetGradients, Loss, check_repeatable, model_loss
from hf_parcor.evaluation.metrics import BatchMetric
from hf_parcor.evaluation.provenance import described, library_versions, model_name
from hf_parcor.evaluation.records import EvaluationRecord
from hf_parcor.evaluation.sharing import choose_together, find_prefix, measure_together
from hf_parcor.evaluation.trials import Trial, checked_metrics, record_of
from hf_parcor.functional.arguments import check_count
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import check_weights, corrupted
from hf_parcor.prefix import PrefixReuse
from hf_parcor.targets import select_trainable

Metric = Callable[[nn.Module], Mapping[str, float]]
_Job = tuple[int, int]  # which corruption, and its seed
_MEMORY = 1 << 30


class CorruptionEvaluator:
    """Measures a model with its weights as they are and under corruptions, and gives every bit back.

    The model is never copied. It is measured in evaluation mode, and its training flags are put back; so is the state
    of PyTorch's global generator on the CPU.

    Args:
        model: Any PyTorch model.
        metric: `metric(model)` returns numbers by name; a lambda around `Trainer.evaluate` or around an `evaluate`
            pipeline will do.
        batches: Data for the corruptions that need gradients, a list or a `DataLoader` that does not shuffle; None if
            none of them does.
        loss: `loss(model, batch)` returns the mean loss of a batch; the default takes the model's own.
        target_modules: Which modules may be corrupted, as in `select_parameters`. None, the default, for all
            parameters that can be trained (all, if none can), as in the Trainer: fixed tables such as sinusoidal
            positions are no result of training. Frozen weights, such as those under an adapter, can be named.
        exclude_modules: As in `select_parameters`.
        module_types: As in `select_parameters`.
        layers: As in `select_parameters`.
        reuse_prefix: Whether what does not depend on the targets runs once a batch for all corruptions, where the
            metric is made batch by batch (a `BatchMetric`, such as `ClassificationMetric`). The numbers are the same.
        memory: How many bytes the corruptions that are measured together may take. Default 1 GiB.
        progress: Whether to show a progress bar. Default True.

    Raises:
        ValueError: The targets match nothing, or the batches can be walked through only once.
        TypeError: A target is not floating point.

    Examples:
        >>> from hf_parcor import Quantization
        >>> model = nn.Linear(2, 1, bias=False)
        >>> evaluator = CorruptionEvaluator(model, lambda m: {"sum": m.weight.sum().item()}, progress=False)
        >>> record = evaluator.evaluate([Quantization(2)])
        >>> record.corruptions[0].label
        '2-bit quantization'
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        batches: Iterable[Batch] | None = None,
        *,
        loss: Loss = model_loss,
        target_modules: str | Collection[str] | None = None,
        exclude_modules: str | Collection[str] | None = None,
        module_types: Any = None,
        layers: int | Iterable[int] | None = None,
        reuse_prefix: bool = True,
        memory: int = _MEMORY,
        progress: bool = True,
    ) -> None:
        self._target = {
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "module_types": module_types,
            "layers": list(layers) if isinstance(layers, Iterator) else layers,
        }
        self._parameters = select_trainable(model, **self._target)
        check_weights(self._parameters)
        if batches is not None:
            check_repeatable(batches)
        self._model, self._metric, self._batches, self._loss = model, metric, batches, loss
        maybe: Any = metric
        self._by_batch: BatchMetric | None = maybe if reuse_prefix and isinstance(maybe, BatchMetric) else None
        self._memory, self._progress = memory, progress

    def evaluate(self, corruptions: Sequence[Corruption], trials: int = 3, seed: int = 0) -> EvaluationRecord:
        """Measure the clean model, then the model under each corruption.

        Trial t of a stochastic corruption draws from a generator seeded `seed + t`, on the CPU, so that a seed means
        the same noise on every device. Other corruptions have one trial.

        Args:
            corruptions: What to measure; results come in this order.
            trials: Trials of each stochastic corruption.
            seed: First seed.

        Returns:
            The record. A metric that is NaN or no number is kept as NaN, noted in the record, and logged as a warning;
            a corruption that changed no weight is noted too, such as one along a gradient that was not finite.

        Raises:
            ValueError: A corruption needs gradients and there are no batches or an empty data set; before any weight
                is touched.
            TypeError: Something that is no `Corruption`, or a metric that returns no mapping.
        """
        check_count("trials", trials)
        check_count("seed", seed, minimum=0)
        corruptions = tuple(corruptions)
        names = [_catalogue_name(corruption) for corruption in corruptions]
        jobs = [
            (index, seed + trial)
            for index, corruption in enumerate(corruptions)
            for trial in range(trials if corruption.stochastic else 1)
        ]
        with evaluation_mode(self._model), torch.random.fork_rng(devices=[]):
            prefix = self._find_prefix()
            gradients = self._gradients(corruptions, prefix)
            data = "" if self._batches is None else fingerprint(self._batches)
            clean = record_of("none", "no corruption", {}, [Trial(seed, self._metrics())])
            found: list[list[Trial]] = [[] for _ in corruptions]
            with tqdm(total=len(jobs), desc="corruptions", disable=not self._progress) as bar:
                for group in self._groups(jobs, prefix):
                    bar.set_postfix_str(str(corruptions[group[0][0]]))
                    measured = self._measure([(corruptions[i], at) for i, at in group], gradients, prefix)
                    for (index, _), trial in zip(group, measured, strict=True):
                        found[index].append(trial)
                    bar.update(len(group))
            records = [
                record_of(name, str(corruption), corruption.settings(), of_corruption)
                for name, corruption, of_corruption in zip(names, corruptions, found, strict=True)
            ]
        return EvaluationRecord(
            model=model_name(self._model),
            target={key: described(value) for key, value in self._target.items() if value is not None},
            parameters=numel(list(self._parameters.values())),
            clean=clean,
            corruptions=tuple(records),
            data=data,
            versions=library_versions(),
        )

    def _find_prefix(self) -> PrefixReuse | None:
        if self._by_batch is None:
            return None
        return find_prefix(self._model, self._parameters, self._by_batch.batches)

    def _groups(self, jobs: list[_Job], prefix: PrefixReuse | None) -> Iterator[list[_Job]]:
        """Yield what is measured together: alone, or as many as the memory for corruptions admits."""
        bytes_each = 4 * numel(list(self._parameters.values()))
        size = 1 if prefix is None else max(1, self._memory // bytes_each)
        for start in range(0, len(jobs), size):
            yield jobs[start : start + size]

    def _gradients(self, corruptions: Sequence[Corruption], prefix: PrefixReuse | None) -> DatasetGradients | None:
        needing = [corruption for corruption in corruptions if corruption.uses_gradients]
        if not needing:
            return None
        if self._batches is None:
            raise ValueError(f"batches: expected data for {needing[0]}, got None; pass batches=, such as a DataLoader")
        return DatasetGradients(
            self._model, self._parameters, self._batches, self._loss, prefix=prefix, progress=self._progress
        )

    def _measure(
        self,
        group: Sequence[tuple[Corruption, int]],
        gradients: DatasetGradients | None,
        prefix: PrefixReuse | None,
    ) -> list[Trial]:
        chosen = choose_together(group, self._parameters, gradients)
        sizes = []
        metrics: list[Mapping[str, object]] = []
        for corruption in chosen:
            with corrupted(self._parameters, corruption) as injection:
                sizes.append(injection.size())
                if prefix is None:
                    metrics.append(self._metrics())
        if prefix is not None and self._by_batch is not None:
            together = measure_together(self._model, self._by_batch, prefix, self._parameters, chosen)
            metrics = [checked_metrics(found) for found in together]
        seeds = [seed for _, seed in group]
        return [Trial(*of_trial) for of_trial in zip(seeds, metrics, sizes, strict=True)]

    def _metrics(self) -> Mapping[str, object]:
        with evaluation_mode(self._model):  # a metric may leave the model in training mode
            return checked_metrics(self._metric(self._model))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module's own training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _catalogue_name(corruption: Corruption) -> str:
    if not isinstance(corruption, Corruption):
        raise TypeError(f"corruptions: expected Corruption objects, got {corruption!r}; pass GaussianNoise(0.01), say")
    for name, kind in CORRUPTIONS.items():
        if type(corruption) is kind:
            return name
    return type(corruption).__name__
