"""Corrupt, measure, restore: how far do a model's metrics fall, and which of its parts is fragile?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.identity.provenance import described, library_versions, model_name, norm_of, task_of
from hf_parcor.evaluation.losses import Batch, Loss, model_loss
from hf_parcor.evaluation.measurement import MEMORY, Measurement, Metric, Plan
from hf_parcor.evaluation.placement.reach import Reach, Selection, target_of
from hf_parcor.evaluation.placement.replicas import measurable_model
from hf_parcor.evaluation.trials import DEFAULT_TRIALS
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import Device, check_weights, forget_derived
from hf_parcor.records.data import EvaluationData
from hf_parcor.records.evaluation import EvaluationRecord, SweepRecord
from hf_parcor.records.metric_info import MetricInfo

logger = logging.get_logger(__name__)

_ALL = ""  # the name of the only group of an evaluator


def several(corruptions: Corruption | Sequence[Corruption]) -> tuple[Corruption, ...]:
    """Return corruptions; one alone is a list of one."""
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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {model!r}; load it, with from_pretrained, say")
        if not callable(settings["metric"]):
            raise TypeError(
                "metric: expected a function from a model to numbers by name, got one of type "
                f"{type(settings['metric']).__name__}; pass ClassificationMetric(batches), say"
            )
        self._model = measurable_model(model)
        self._targets = targets
        self._select(gradients=False)  # refuses what cannot be corrupted, before anything is measured
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
        """Return the groups by name, and their targets: all corruptions of one call are of the same weights.

        Before each call anew: between two of them a model may get other parameters, or train another adapter.
        """
        needed = any(getattr(corruption, "uses_gradients", False) for corruption in corruptions)
        return self._select(gradients=needed)

    def check(self, corruptions: Corruption | Sequence[Corruption]) -> None:
        """Check that corruptions can be applied to the weights, without measuring anything.

        Args:
            corruptions: As in `evaluate`.

        Raises:
            ValueError: A corruption cannot be applied to a weight, for example because groups do not divide a matrix.
            NotImplementedError: A corruption cannot be applied to a weight because of how it is sharded.
        """
        given = several(corruptions)
        selections, _ = self._selected(given)
        plan = Plan(given, trials=1, seed=0, groups=len(selections))
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
        corruptions = several(given)
        weights = fingerprint_of_weights(self._model)
        selections, targets = self._selected(corruptions)
        groups = {label: selection.parameters for label, selection in selections.items()}
        clean, data, found = self._measurement.run(groups, corruptions, trials, seed, weights, checkpoint, clean=known)
        versions, task = library_versions(), self._task or task_of(self._model)
        infos = self._measurement.infos([clean, *(row for rows in found for row in rows)])
        return {
            label: EvaluationRecord(
                model=model_name(self._model),
                target=described(targets[label]),
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
    """Measures a model as it is and under corruptions of its weights, and restores every bit.

    The model is never copied. It is measured in evaluation mode. Its training flags and the state of PyTorch's global
    CPU generator are restored afterwards.

    Under `torchrun` or `accelerate launch` all processes measure together: call `evaluate` in all of them, and save
    the record in one. Each process returns the record of a single process, bit for bit on the same kind of device and
    number of threads. Only results that depend on the gradient over the data differ by rounding, because the gradient
    is summed in another order. A weight whose gradient is only rounding error, such as a bias of attention keys, may
    therefore count as changed in one record and not in the other. With a `BatchMetric`, each process measures every
    n-th batch, and the results are gathered batch by batch. The gradient over the data is reduced once. Each
    multi-step ascent runs as a whole on one process. A metric that gathers over processes itself, such as
    `Trainer.evaluate`, is called by all processes at the same corruption. If one process fails, all of them raise,
    except those that wait inside such a metric.

    If FSDP2 shards the model, weights are corrupted on the shards, and all processes take part in every pass: one
    without a batch in the last round runs a batch that another counts, all climb every multi-step ascent on the same
    batches, and no prefix is reused. Noise, bit flips and quantization equal those of a single process bit for bit,
    because random numbers are drawn for one whole tensor at a time. Other corruptions are equal up to rounding,
    because their norms are summed shard by shard. If a process fails inside a pass, the others wait for the timeout
    of their group. FSDP2 does not treat `generate` as a forward pass: call PyTorch's
    `register_fsdp_forward_method(model, "generate")`, and generate with `synced_gpus=True`.

    Args:
        model: Any PyTorch model. With several processes, each holds all of it, bare or under DDP, or FSDP2 shards it.
            Of what `torch.compile` returns, the model inside is measured; `model.compile()` keeps it compiled.
        metric: `metric(model)` returns numbers by name, for example a lambda around `Trainer.evaluate`, a pipeline, or
            an evaluator of `evaluate`. Times, speeds and the epoch are dropped. With several processes, all of
            them call it at the same time, and the numbers of the first are kept; the batches of a `BatchMetric` are
            spread over the processes, and must be the same in each. Its `notes`, if it has any, go into the record.
        batches: Data for the corruptions that need gradients: a list, or a `DataLoader` that does not shuffle. By
            default, those of the metric if it is a `BatchMetric`, otherwise none. Every walk through these batches,
            and through those of a metric, must give the same data: unless they are a list, they are walked through
            twice before anything is measured. With several processes, pass all batches to each: the evaluator spreads
            them itself, also those of a loader that Accelerate prepared.
        loss: `loss(model, batch)` returns the mean loss of a batch. By default, the model's own loss.
        target_modules: Which modules may be corrupted, as in `select_parameters`. By default, all parameters that can
            be trained (all, if none can), as in the Trainer: fixed tables such as sinusoidal positions are not a
            result of training. In a PEFT model these are only the adapters, which the record notes; pass "all" to
            include the weights under them.
            Weights that cannot be corrupted stay as they are, and are counted, logged as a warning and noted in the
            record: quantized or packed weights, weights offloaded to the disk, and, if a corruption needs gradients,
            all offloaded weights (see `Reach`).
        exclude_modules: As in `select_parameters`.
        module_types: As in `select_parameters`.
        layers: As in `select_parameters`.
        reuse_prefix: Whether to run the part of the model that does not depend on the targets once a batch for all
            corruptions. This needs a `BatchMetric`, such as `ClassificationMetric`. The numbers are the same. Finding
            this part takes seven runs of a batch, and six more for the steps of multi-step corruptions. It is not
            attempted if it would save less than that, for example for a few corruptions on one batch.
        memory: How many bytes the corruptions that are measured, or chosen, together may take. Default 1 GiB.
        metric_info: What the metric's numbers mean, by their names: `{"score": MetricInfo(greater_is_better=False,
            unit="points")}`. By default, what the metric states itself, as our metrics and those of `evaluate` do (see
            `hf_parcor.records.metric_info.info_of`). What is not stated is guessed from the names, and marked as a
            guess.
        progress: Whether to show a progress bar. Default True.
        saved_on: Where the original bits of corrupted weights are kept meanwhile. "cpu" (pinned memory if there is
            CUDA) leaves the accelerator's memory to the model. By default, each weight's own device.
        evaluated_on: The name of the metric's data, for the record. None if they have no name.
        task: The Hub's name of the task, for the record. By default, the task of the model's class.

    Raises:
        ValueError: The targets match nothing, or nothing that can be corrupted; the batches can be walked through only
            once; or FSDP1 or tensor parallelism has split the weights.

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

        Trial t of a stochastic corruption draws from a CPU generator seeded `seed + t`, so that a seed gives the same
        noise on every device. Other corruptions have one trial.

        Args:
            corruptions: One or several corruptions. Results come in this order.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            checkpoint: A file that finished results are written to during the measurement. After an interruption at
                any moment, the same call goes on from this file, and the record equals that of an uninterrupted
                measurement, bit for bit on the same machine; a metric that draws random numbers itself has to ensure
                that. A checkpoint belongs to the settings of metric and loss, including the variables that a function
                closes over and the public attributes of objects of yours. If the numbers depend on anything else, such
                as a file, name it in an `identity` method (see `Identified`). Up to 16 corruptions are written
                at once. By default, no file.

        Returns:
            The record. A metric that is NaN or not a number is kept as NaN, noted in the record, and logged as a
            warning. A corruption that changed no weight is noted too, for example if its gradient was not finite.

        Raises:
            ValueError: A corruption needs gradients, but there are no batches, the data set is empty, or quantized
                layers pass no gradient back; weights or data differ between processes, or data between walks (all
                before any weight is touched); the checkpoint is damaged, of another run, or not a checkpoint; or an
                accelerator has less free memory than gradients and saved bits need (`NotEnoughMemoryError`, whose
                message says what to do).
            OSError: The checkpoint cannot be read or written.
            TypeError: Something is not a `Corruption`, or the metric does not return a mapping.
            ProcessError: Another process failed.
        """
        return self._records(corruptions, trials, seed, checkpoint)[_ALL]


class LayerProbe(_Evaluator):
    """Measures a model with one part corrupted at a time: layers, kinds of modules, or named targets.

    Paper 1, Figures 3 to 5. The records equal those of a `CorruptionEvaluator` for each part, also with several
    processes, but parts share work: the clean measurement; one gradient over the data for the closed-form corruptions
    of all parts; one walk through the data for all multi-step corruptions; and, with a `BatchMetric`, one run a batch
    of what does not depend on a part, for all corruptions of all parts.

    Args:
        model: As in `CorruptionEvaluator`.
        metric: As in `CorruptionEvaluator`.
        batches: As in `CorruptionEvaluator`.
        loss: As in `CorruptionEvaluator`.
        targets: "layers", "kinds", "modules" or "adapters", without the parts that cannot be corrupted, which are
            noted; or a mapping from names of your choice to words, patterns or names as in `select_parameters`.
            `by_layer`, `by_kind`, `by_module` and `by_adapter` make such mappings; `{**by_kind(model), "all": "all"}`
            adds the whole model. Default "layers".
        reuse_prefix: As in `CorruptionEvaluator`. Finding what all parts share takes about five runs of a batch, plus
            half a run for each part.
        memory: As in `CorruptionEvaluator`.
        metric_info: As in `CorruptionEvaluator`.
        progress: As in `CorruptionEvaluator`.
        saved_on: As in `CorruptionEvaluator`.
        evaluated_on: As in `CorruptionEvaluator`.
        task: As in `CorruptionEvaluator`.

    Raises:
        ValueError: There is no target, one matches nothing, or nothing that can be corrupted, or the batches can be
            walked through only once.

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
            corruptions: One or several corruptions. A constraint bounds the vector of one part.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            checkpoint: As in `CorruptionEvaluator.evaluate`: an interrupted sweep goes on from this file.
            clean: The metric's numbers on the model as it is, if they are known, for example from a `WithDivergence`
                that was just made. By default, they are measured.

        Returns:
            The records of all parts, by their names.

        Raises:
            ValueError: As in `CorruptionEvaluator.evaluate`.
            TypeError: As in `CorruptionEvaluator.evaluate`.
            OSError: The checkpoint cannot be read or written.
        """
        records = self._records(corruptions, trials, seed, checkpoint, clean)
        return SweepRecord(records, next(iter(records.values())).weights, trials, seed, self._grouping)
