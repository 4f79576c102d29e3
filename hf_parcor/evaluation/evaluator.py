"""Corrupt, measure, restore: how far do a model's metrics fall?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.evaluation.fingerprint import fingerprint
from hf_parcor.evaluation.gradients import Batch, DatasetGradients, Loss, check_repeatable, model_loss
from hf_parcor.evaluation.provenance import described, library_versions, model_name
from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord
from hf_parcor.functional.arguments import check_count
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import CorruptionSize, check_weights, corrupted
from hf_parcor.targets import select_trainable

logger = logging.get_logger(__name__)

Metric = Callable[[nn.Module], Mapping[str, float]]


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
        self._progress = progress

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
        with evaluation_mode(self._model), torch.random.fork_rng(devices=[]):
            gradients = self._gradients(corruptions)
            data = "" if self._batches is None else fingerprint(self._batches)
            clean = self._measure("none", "no corruption", {}, [(seed, None)])
            total = sum(trials if corruption.stochastic else 1 for corruption in corruptions)
            records = []
            with tqdm(total=total, desc="corruptions", disable=not self._progress) as bar:
                for name, corruption in zip(names, corruptions, strict=True):
                    bar.set_postfix_str(str(corruption))
                    seeds = range(seed, seed + trials) if corruption.stochastic else (seed,)
                    chosen = self._choose(corruption, gradients, seeds, bar)
                    records.append(self._measure(name, str(corruption), corruption.settings(), chosen))
        return EvaluationRecord(
            model=model_name(self._model),
            target={key: described(value) for key, value in self._target.items() if value is not None},
            parameters=numel(list(self._parameters.values())),
            clean=clean,
            corruptions=tuple(records),
            data=data,
            versions=library_versions(),
        )

    def _gradients(self, corruptions: Sequence[Corruption]) -> DatasetGradients | None:
        needing = [corruption for corruption in corruptions if corruption.uses_gradients]
        if not needing:
            return None
        if self._batches is None:
            raise ValueError(f"batches: expected data for {needing[0]}, got None; pass batches=, such as a DataLoader")
        return DatasetGradients(self._model, self._parameters, self._batches, self._loss, progress=self._progress)

    def _choose(
        self, corruption: Corruption, gradients: DatasetGradients | None, seeds: Iterable[int], bar: tqdm[Any]
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        for seed in seeds:
            if gradients is not None:
                gradients.restart()
            yield seed, corruption(self._parameters, gradients, torch.Generator().manual_seed(seed))
            bar.update()

    def _measure(
        self,
        name: str,
        label: str,
        settings: Mapping[str, Any],
        chosen: Iterable[tuple[int, Mapping[str, Tensor] | None]],
    ) -> CorruptionRecord:
        seeds: list[int] = []
        trials: list[Mapping[str, object]] = []
        sizes: list[CorruptionSize] = []
        for seed, corruption in chosen:
            seeds.append(seed)
            if corruption is None:
                trials.append(self._metrics())
                continue
            with corrupted(self._parameters, corruption) as injection:
                sizes.append(injection.size())
                trials.append(self._metrics())
        keys = dict.fromkeys(key for trial in trials for key in trial)
        metrics = {key: tuple(_number(trial.get(key)) for trial in trials) for key in keys}
        notes = (
            *(f"no weight changed with seed {at}" for at, size in zip(seeds, sizes, strict=False) if not size.changed),
            *(
                f"{key} was {trials[index].get(key)!r} with seed {seeds[index]}"
                for key, values in metrics.items()
                for index, value in enumerate(values)
                if not math.isfinite(value)
            ),
        )
        for note in notes:
            logger.warning(f"{label}: {note}; it is kept in the record.")
        return CorruptionRecord(
            corruption=name,
            label=label,
            settings=dict(settings),
            seeds=tuple(seeds),
            metrics=metrics,
            changed=statistics.fmean(size.changed for size in sizes) if sizes else 0.0,
            norm=statistics.fmean(size.norm for size in sizes) if sizes else 0.0,
            notes=notes,
        )

    def _metrics(self) -> Mapping[str, object]:
        with evaluation_mode(self._model):  # a metric may leave the model in training mode
            metrics = self._metric(self._model)
        if not isinstance(metrics, Mapping) or not metrics:
            raise TypeError(
                f"metric: expected numbers by name, such as {{'accuracy': 0.9}}, got {metrics!r}; return a dict"
            )
        return metrics


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


def _number(value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, Real) else math.nan
