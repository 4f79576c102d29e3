"""Corrupt, measure, restore: how far do a model's metrics fall, and which of its parts is fragile?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.gradients import Batch, Loss, model_loss
from hf_parcor.evaluation.identity import described, library_versions, model_name, norm_of, task_of
from hf_parcor.evaluation.measurement import MEMORY, Measurement, Metric, Plan
from hf_parcor.evaluation.reach import Reach, Selection, target_of
from hf_parcor.evaluation.replicas import measurable_model
from hf_parcor.evaluation.trials import DEFAULT_TRIALS
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import Device, check_weights, forget_derived
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.evaluation import EvaluationRecord, SweepRecord
from hf_parcor.records.metric_info import MetricInfo

logger = logging.get_logger(__name__)

_ALL = ""  # the name of the only group of an evaluator


def _several(corruptions: Corruption | Sequence[Corruption]) -> tuple[Corruption, ...]:
    return (corruptions,) if isinstance(corruptions, Corruption) else tuple(corruptions)


class _Evaluator:
    """Measures a model with groups of its weights corrupted, one after the other.

    Args:
        model: As in `CorruptionEvaluator`; what is not named here, too.
        targets: The targets of each group, by its name, as keyword arguments of `select_parameters`; or a word of
            `GROUPINGS`, whose groups are left out where they cannot be corrupted.
        settings: For `Measurement`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Mapping[str, Any]] | str,
        evaluated_on: EvaluationData | None,
        task: str,
        **settings: Any,
    ) -> None:
        if not callable(settings["metric"]):
            raise TypeError(
                "metric: expected a function from a model to numbers by name, got one of type "
                f"{type(settings['metric']).__name__}; pass ClassificationMetric(batches), say"
            )
        self._model = measurable_model(model)
        self._targets = targets
        self._without_gradients = self._select(gradients=False)
        self._evaluated_on, self._task = evaluated_on, task
        self._measurement = Measurement(self._model, **settings)

    def _select(self, *, gradients: bool) -> tuple[dict[str, Selection], Mapping[str, Mapping[str, Any]]]:
        selections, targets = Reach(self._model, gradients=gradients).select_groups(self._targets)
        if not selections:
            raise ValueError("targets: expected at least one, got none; name the modules to corrupt")
        for selection in selections.values():
            check_weights(selection.parameters)
        return selections, targets

    def _selected(
        self, corruptions: Iterable[Corruption]
    ) -> tuple[dict[str, Selection], Mapping[str, Mapping[str, Any]]]:
        """Return the groups by name, and their targets: all corruptions of one call are of the same weights."""
        selections, targets = self._without_gradients
        needed = any(getattr(corruption, "uses_gradients", False) for corruption in corruptions)
        if needed and any(selection.is_elsewhere for selection in selections.values()):
            return self._select(gradients=True)
        return selections, targets

    def check(self, corruptions: Corruption | Sequence[Corruption]) -> None:
        """Refuse what `evaluate` would refuse for the weights' sake, and measure nothing.

        Args:
            corruptions: As in `evaluate`.

        Raises:
            ValueError: A corruption cannot be applied to a weight, such as groups that do not divide a matrix.
            NotImplementedError: It cannot be, by the way in which the weight is sharded.
        """
        several = _several(corruptions)
        selections, _ = self._selected(several)
        plan = Plan(several, trials=1, seed=0, groups=len(selections))
        plan.check(selection.parameters for selection in selections.values())

    def _records(
        self,
        given: Corruption | Sequence[Corruption],
        trials: int,
        seed: int,
        checkpoint: str | Path | None,
        known: Mapping[str, float] | None = None,
    ) -> dict[str, EvaluationRecord]:
        forget_derived()
        corruptions = _several(given)
        weights = fingerprint_of_weights(self._model)
        selections, targets = self._selected(corruptions)
        groups = {label: selection.parameters for label, selection in selections.items()}
        clean, data, found = self._measurement.run(groups, corruptions, trials, seed, weights, checkpoint, clean=known)
        versions, task = library_versions(), self._task or task_of(self._model)
        infos = self._measurement.infos([clean, *(row for rows in found for row in rows)])
        return {
            label: EvaluationRecord(
                model=model_name(self._model),
                target={key: described(value) for key, value in targets[label].items() if value is not None},
                parameters=numel(list(selection.parameters.values())),
                clean=clean,
                corruptions=rows,
                data=data,
                versions=versions,
                notes=(*selection.notes, *self._measurement.notes),
                weights_norm=norm_of(selection.parameters.values()),
                weights=weights,
                metric_info=infos,
                evaluated_on=self._evaluated_on,
                task=task,
            )
            for (label, selection), rows in zip(selections.items(), found, strict=True)
        }


class CorruptionEvaluator(_Evaluator):
    """Measures a model with its weights as they are and under corruptions, and gives every bit back.

    The model is never copied. It is measured in evaluation mode, and its training flags are put back; so is the state
    of PyTorch's global generator on the CPU.

    Under `torchrun` or `accelerate launch` all processes measure together (let all of them call `evaluate`, and one
    save), and each returns the record of one process:
    to the last bit on the same kind of device and number of threads, but for what follows from the gradient over the
    data, which is summed in another order (to rounding, and a weight whose gradient is nothing but rounding, such as
    a bias of attention keys, may count as changed in one and not in the other). Each process measures every n-th
    batch, and what they counted is gathered batch by batch; the gradient over the data is reduced once; multi-step
    ascents are spread as a whole.
    Data is spread, and not corruptions, since there are more batches than corruptions, a prefix is shared by all
    corruptions of a batch, and a metric that itself gathers over processes, as `Trainer.evaluate` does, needs all of
    them at the same corruption. If one process fails, all raise, unless they wait inside of such a metric.

    Where FSDP2 shards the model, weights are corrupted on the shards, and every pass is one of all processes: one
    without a batch in the last round runs a batch that another counts, all climb every multi-step ascent on the same
    batches, and no prefix is reused. Noise, bit flips and quantization are those of one process to the last bit (what
    is random is drawn for one whole tensor at a time); the others to rounding, since their norms are summed shard by
    shard. If a process fails inside a pass, the others wait until their group's timeout. For FSDP2 `generate` is no
    pass: call PyTorch's `register_fsdp_forward_method(model, "generate")`, and generate with `synced_gpus=True`.

    Args:
        model: Any PyTorch model; with several processes, each has all of it, bare or under DDP, or FSDP2 shards it.
        metric: `metric(model)` returns numbers by name; a lambda around `Trainer.evaluate`, around a pipeline or an
            evaluator of `evaluate` will do. What tells how long it took is left out. With several processes all of
            them call it at the same time, and what the first got is kept; a `BatchMetric` is spread, and needs the
            same batches in each of them. What it says of itself in `notes` goes into the record.
        batches: Data for the corruptions that need gradients, a list or a `DataLoader` that does not shuffle. None,
            the default, for those of the metric if it is a `BatchMetric`, else for none. They, and those of a metric,
            have to be the same in every walk: unless they are a list, they are walked through twice before anything is
            measured. With several processes each has all of it: the evaluator spreads the batches itself, also those
            of a loader that Accelerate prepared.
        loss: `loss(model, batch)` returns the mean loss of a batch; the default takes the model's own.
        target_modules: Which modules may be corrupted, as in `select_parameters`. None, the default, for all
            parameters that can be trained (all, if none can), as in the Trainer: fixed tables such as sinusoidal
            positions are no result of training. Of a PEFT model these are the adapters alone, which the record notes:
            name "all" for the weights under them too.
            Weights that cannot be corrupted (quantized or packed ones, offloaded ones that lie on the disk or where a
            corruption needs gradients, see `Reach`) are left as they are, counted, logged as a warning and noted in
            the record.
        exclude_modules: As in `select_parameters`.
        module_types: As in `select_parameters`.
        layers: As in `select_parameters`.
        reuse_prefix: Whether what does not depend on the targets runs once a batch for all corruptions, where the
            metric is made batch by batch (a `BatchMetric`, such as `ClassificationMetric`). The numbers are the same.
            To seek it takes seven runs of a batch, and six for the steps of multi-step corruptions: it is not sought
            where that is more than it saves, as of a few corruptions on one batch.
        memory: How many bytes the corruptions that are measured, or chosen, together may take. Default 1 GiB.
        metric_info: What the metric's numbers mean, by their names: `{"score": MetricInfo(greater_is_better=False,
            unit="points")}`. None, the default, for what the metric states itself, as our own and those of `evaluate`
            do (see `hf_parcor.records.metric_info.info_of`); what nobody states is guessed from the names, and called
            a guess.
        progress: Whether to show a progress bar. Default True.
        saved_on: Where the bits of corrupted weights are kept while they are corrupted: "cpu" (in pinned memory
            where there is CUDA) leaves the accelerator to the model. None, the default, for each weight's own device.
        evaluated_on: What the data of the metric are called, for the record; None if they have no name.
        task: The Hub's name of the task, for the record; "" for the one that the model's class is for.

    Raises:
        ValueError: The targets match nothing, or nothing that can be corrupted, or the batches can be walked through
            only once. Or FSDP1 or tensor parallelism has split the weights.

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
        memory: int = MEMORY,
        metric_info: Mapping[str, MetricInfo] | None = None,
        progress: bool = True,
        saved_on: Device = None,
        evaluated_on: EvaluationData | None = None,
        task: str = "",
    ) -> None:
        target = target_of(target_modules, exclude_modules, module_types, layers)
        super().__init__(
            model,
            {_ALL: target},
            evaluated_on,
            task,
            metric=metric,
            batches=batches,
            loss=loss,
            reuse_prefix=reuse_prefix,
            memory=memory,
            metric_info=metric_info,
            progress=progress,
            saved_on=saved_on,
        )

    def evaluate(
        self,
        corruptions: Corruption | Sequence[Corruption],
        trials: int = DEFAULT_TRIALS,
        seed: int = 0,
        *,
        checkpoint: str | Path | None = None,
    ) -> EvaluationRecord:
        """Measure the clean model, then the model under each corruption.

        Trial t of a stochastic corruption draws from a generator seeded `seed + t`, on the CPU, so that a seed means
        the same noise on every device. Other corruptions have one trial.

        Args:
            corruptions: What to measure, one or several; results come in this order.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            checkpoint: A file for what is finished, written on the way. Called again with it, after a kill at any
                moment, the measurement goes on, and the record is that of one without interruption, to the last bit on
                the same machine; a metric that draws random numbers itself has to care for that. The settings of
                metric and loss count, also those that a function closes over; what they reach otherwise, such as a
                file, an `identity` method says (see `Identified`). Every 16 corruptions are written at once. None,
                the default, for no file.

        Returns:
            The record. A metric that is NaN or no number is kept as NaN, noted in the record, and logged as a warning;
            a corruption that changed no weight is noted too, such as one along a gradient that was not finite.

        Raises:
            ValueError: A corruption needs gradients and there are no batches or an empty data set, or quantized
                layers pass none back; or weights or data differ between processes, or data from walk to walk; before
                any weight is touched. Or the checkpoint is of another run, or none, or damaged. Or an accelerator has
                less memory free than gradients and saved bits need (`NotEnoughMemoryError`), which says the way out.
            OSError: The checkpoint cannot be read or written.
            TypeError: Something that is no `Corruption`, or a metric that returns no mapping.
            ProcessError: Another process failed.
        """
        return self._records(corruptions, trials, seed, checkpoint)[_ALL]


class LayerProbe(_Evaluator):
    """Measures a model with one part after the other corrupted: layers, kinds of modules, or named targets.

    Paper 1, Figures 3 to 5. What can be shared is: the clean measurement; one gradient over the data for the closed-
    form corruptions of all parts; one walk through the data for all multi-step corruptions; and, with a metric made
    batch by batch, what does not depend on a part runs once a batch for all corruptions of all parts. The records are
    those of a `CorruptionEvaluator` for each part, also with several processes.

    Args:
        model: Any Transformers model.
        metric: As in `CorruptionEvaluator`.
        batches: As in `CorruptionEvaluator`.
        loss: As in `CorruptionEvaluator`.
        targets: "layers", "kinds", "modules" or "adapters"; or what to corrupt, by the name that it shall have: words,
            patterns or names as in `select_parameters`. `by_layer`, `by_kind`, `by_module` and `by_adapter` make such
            groups; `{**by_kind(model), "all": "all"}` adds the whole model. None, the default, for layers, without
            those that cannot be corrupted, which are noted.
        reuse_prefix: As in `CorruptionEvaluator`; to seek all parts' takes about five runs of a batch, and half a run
            for each part.
        memory: As in `CorruptionEvaluator`.
        metric_info: As in `CorruptionEvaluator`.
        progress: As in `CorruptionEvaluator`.
        saved_on: As in `CorruptionEvaluator`.
        evaluated_on: As in `CorruptionEvaluator`.
        task: As in `CorruptionEvaluator`.

    Raises:
        ValueError: A target matches nothing, or nothing that can be corrupted, there is no target, or the batches can
            be walked through only once.

    Examples:
        >>> from hf_parcor import Quantization
        >>> model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
        >>> probe = LayerProbe(
        ...     model,
        ...     lambda m: {"output": m(m[0].weight.new_ones(2)).item()},
        ...     targets={"first": ["0"], "second": ["1"]},
        ...     progress=False,
        ... )
        >>> sweep = probe.evaluate([Quantization(4), Quantization(2)])
        >>> for part, record in sweep.records.items():
        ...     print(part, [row.label for row in record.corruptions])
        first ['4-bit quantization', '2-bit quantization']
        second ['4-bit quantization', '2-bit quantization']
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        batches: Iterable[Batch] | None = None,
        *,
        loss: Loss = model_loss,
        targets: Mapping[str, str | Collection[str]] | str | None = None,
        reuse_prefix: bool = True,
        memory: int = MEMORY,
        metric_info: Mapping[str, MetricInfo] | None = None,
        progress: bool = True,
        saved_on: Device = None,
        evaluated_on: EvaluationData | None = None,
        task: str = "",
    ) -> None:
        if targets is None:
            targets = "layers"
        elif not isinstance(targets, (str, Mapping)):
            raise TypeError(
                f"targets: expected the parts by name, or a word such as 'layers', got {targets!r}; pass "
                "{'attention': ['attention']}, say"
            )
        self._grouping = targets if isinstance(targets, str) else ""
        super().__init__(
            model,
            targets
            if isinstance(targets, str)
            else {label: {"target_modules": target} for label, target in targets.items()},
            evaluated_on,
            task,
            metric=metric,
            batches=batches,
            loss=loss,
            reuse_prefix=reuse_prefix,
            memory=memory,
            metric_info=metric_info,
            progress=progress,
            saved_on=saved_on,
        )

    def evaluate(
        self,
        corruptions: Corruption | Sequence[Corruption],
        trials: int = DEFAULT_TRIALS,
        seed: int = 0,
        *,
        checkpoint: str | Path | None = None,
        clean: Mapping[str, float] | None = None,
    ) -> SweepRecord:
        """Measure the clean model, then the model under each corruption of each part.

        Args:
            corruptions: What to measure; a constraint bounds the vector of one part.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            checkpoint: As in `CorruptionEvaluator.evaluate`: a sweep that was killed goes on from this file.
            clean: What the metric finds on the model as it is, where that is known, as of a `WithDivergence` that was
                just made; None, the default, to measure it.

        Returns:
            The records of all parts, by their names.

        Raises:
            ValueError: As in `CorruptionEvaluator.evaluate`.
            TypeError: As in `CorruptionEvaluator.evaluate`.
            OSError: The checkpoint cannot be read or written.
        """
        records = self._records(corruptions, trials, seed, checkpoint, clean)
        return SweepRecord(records, next(iter(records.values())).weights, trials, seed, self._grouping)
