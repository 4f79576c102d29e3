"""Which part of a model is fragile? One part after the other is corrupted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation.data import EvaluationData
from hf_parcor.evaluation.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.gradients import Batch, Loss, model_loss
from hf_parcor.evaluation.measurement import MEMORY, Measurement
from hf_parcor.evaluation.measuring import Metric
from hf_parcor.evaluation.provenance import described, library_versions, model_name, norm_of, task_of
from hf_parcor.evaluation.reach import OutOfReachError, Reach
from hf_parcor.evaluation.records import EvaluationRecord
from hf_parcor.evaluation.replicas import measurable_model
from hf_parcor.evaluation.sweep_record import SweepRecord
from hf_parcor.evaluation.trials import DEFAULT_TRIALS
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import check_weights, forget_derived
from hf_parcor.metric_info import MetricInfo
from hf_parcor.targets import TargetError, by_layer

logger = logging.get_logger(__name__)


class LayerProbe:
    """Measures a model with one part after the other corrupted, as paper 1, Figures 3 to 5.

    What can be shared is: the clean measurement; one gradient over the data for the closed-form corruptions of all
    parts; one walk through the data for all multi-step corruptions; and, with a metric made batch by batch, what does
    not depend on a part runs once a batch for all corruptions of all parts. The records are those of a
    `CorruptionEvaluator` for each part, also with several processes.

    Args:
        model: Any Transformers model.
        metric: As in `CorruptionEvaluator`.
        batches: As in `CorruptionEvaluator`.
        loss: As in `CorruptionEvaluator`.
        targets: What to corrupt, by the name that it shall have: words, patterns or names as in `select_parameters`.
            `by_layer`, `by_kind`, `by_module` and `by_adapter` make such groups; `{**by_kind(model), "all": "all"}`
            adds the whole model. None, the default, for `by_layer`, without layers that cannot be corrupted, which are
            noted.
        reuse_prefix: As in `CorruptionEvaluator`.
        memory: As in `CorruptionEvaluator`.
        metric_info: As in `CorruptionEvaluator`.
        progress: As in `CorruptionEvaluator`.
        evaluated_on: As in `CorruptionEvaluator`.
        task: As in `CorruptionEvaluator`.

    Raises:
        ValueError: A target matches nothing, or nothing that can be corrupted, there is no target, or the batches can
            be walked through only once.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        batches: Iterable[Batch] | None = None,
        *,
        loss: Loss = model_loss,
        targets: Mapping[str, str | Collection[str]] | None = None,
        reuse_prefix: bool = True,
        memory: int = MEMORY,
        metric_info: Mapping[str, MetricInfo] | None = None,
        progress: bool = True,
        evaluated_on: EvaluationData | None = None,
        task: str = "",
    ) -> None:
        model = measurable_model(model)
        reach = Reach(model)
        self._targets: dict[str, Any] = dict(by_layer(reach.model) if targets is None else targets)
        if not self._targets:
            raise ValueError("targets: expected at least one, got none; name the modules to corrupt")
        selections, left_out = {}, []
        for label, target in list(self._targets.items()):
            try:
                selections[label] = reach.select(target)
            except OutOfReachError as error:  # noqa: PERF203, a selection walks through the model
                if targets is not None:  # what was named is meant
                    raise
                left_out.append(f"{label} was left out: {error.described}")
                del self._targets[label]
        if not selections:
            raise TargetError(
                f"targets: expected parts that can be corrupted, got {'; '.join(left_out)}; load the model in float32 "
                "or bfloat16, without quantization and offloading"
            )
        for sentence in left_out:
            logger.warning(f"{sentence}.")
        self._out_of_reach = {label: (*selection.notes, *left_out) for label, selection in selections.items()}
        self._selections = {label: selection.parameters for label, selection in selections.items()}
        for selection in self._selections.values():
            check_weights(selection)
        self._model = model
        self._evaluated_on, self._task = evaluated_on, task
        self._measurement = Measurement(
            model,
            metric,
            batches,
            loss,
            reuse_prefix=reuse_prefix,
            memory=memory,
            metric_info=metric_info,
            progress=progress,
        )

    def evaluate(
        self,
        corruptions: Sequence[Corruption],
        trials: int = DEFAULT_TRIALS,
        seed: int = 0,
        *,
        checkpoint: str | Path | None = None,
    ) -> SweepRecord:
        """Measure the clean model, then the model under each corruption of each part.

        Args:
            corruptions: What to measure; a constraint bounds the vector of one part.
            trials: Trials of each stochastic corruption. Default 3.
            seed: First seed.
            checkpoint: As in `CorruptionEvaluator.evaluate`: a sweep that was killed goes on from this file.

        Returns:
            The records of all parts, by their names.

        Raises:
            ValueError: As in `CorruptionEvaluator.evaluate`.
            TypeError: As in `CorruptionEvaluator.evaluate`.
            OSError: The checkpoint cannot be read or written.
        """
        forget_derived()
        weights = fingerprint_of_weights(self._model)
        clean, data, records = self._measurement.run(self._selections, corruptions, trials, seed, weights, checkpoint)
        versions, task = library_versions(), self._task or task_of(self._model)
        infos = self._measurement.infos([clean, *(row for of_part in records for row in of_part)])
        of_parts = {
            label: EvaluationRecord(
                model=model_name(self._model),
                target={"target_modules": described(self._targets[label])},
                parameters=numel(list(selection.values())),
                clean=clean,
                corruptions=of_part,
                data=data,
                versions=versions,
                notes=(*self._out_of_reach[label], *self._measurement.notes),
                weights_norm=norm_of(selection.values()),
                weights=weights,
                metric_info=infos,
                evaluated_on=self._evaluated_on,
                task=task,
            )
            for (label, selection), of_part in zip(self._selections.items(), records, strict=True)
        }
        return SweepRecord(of_parts, weights, trials, seed)
