"""Which part of a model is fragile? One part after the other is corrupted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation.gradients import Batch, Loss, model_loss
from hf_parcor.evaluation.measurement import MEMORY, Measurement
from hf_parcor.evaluation.measuring import Metric
from hf_parcor.evaluation.provenance import described, library_versions, model_name
from hf_parcor.evaluation.records import EvaluationRecord
from hf_parcor.evaluation.replicas import whole_model
from hf_parcor.functional.vectors import numel
from hf_parcor.injection import check_weights
from hf_parcor.targets import find_stacks, select_trainable


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
            None, the default, for each block of each stack.
        reuse_prefix: As in `CorruptionEvaluator`.
        memory: As in `CorruptionEvaluator`.
        progress: As in `CorruptionEvaluator`.

    Raises:
        ValueError: A target matches nothing, there is no target, or the batches can be walked through only once.
        TypeError: A target is not floating point.
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
        progress: bool = True,
    ) -> None:
        model = whole_model(model)
        self._targets: dict[str, Any] = dict(blocks(model) if targets is None else targets)
        if not self._targets:
            raise ValueError("targets: expected at least one, got none; name the modules to corrupt")
        self._selections = {
            label: select_trainable(model, target_modules=target) for label, target in self._targets.items()
        }
        for selection in self._selections.values():
            check_weights(selection)
        self._model = model
        self._measurement = Measurement(
            model, metric, batches, loss, reuse_prefix=reuse_prefix, memory=memory, progress=progress
        )

    def evaluate(
        self, corruptions: Sequence[Corruption], trials: int = 3, seed: int = 0
    ) -> dict[str, EvaluationRecord]:
        """Measure the clean model, then the model under each corruption of each part.

        Args:
            corruptions: What to measure; a constraint bounds the vector of one part.
            trials: Trials of each stochastic corruption.
            seed: First seed.

        Returns:
            A record for each part, by its name.

        Raises:
            ValueError: As in `CorruptionEvaluator.evaluate`.
            TypeError: As in `CorruptionEvaluator.evaluate`.
        """
        selections = list(self._selections.values())
        clean, data, records = self._measurement.run(selections, corruptions, trials, seed)
        return {
            label: EvaluationRecord(
                model=model_name(self._model),
                target={"target_modules": described(self._targets[label])},
                parameters=numel(list(selection.values())),
                clean=clean,
                corruptions=of_part,
                data=data,
                versions=library_versions(),
                notes=self._measurement.notes,
            )
            for (label, selection), of_part in zip(self._selections.items(), records, strict=True)
        }


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """Return each block of each stack of a model as a target, by its full name.

    Raises:
        ValueError: The model has no stack.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise ValueError(
            f"targets: expected a model with stacks of blocks, got {type(model).__name__} without any; pass targets="
        )
    return {f"{stack.name}.{index}": [f"{stack.name}.{index}"] for stack in stacks for index in range(len(stack))}
