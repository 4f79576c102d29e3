"""What classifiers of sequences, tokens and images share: labels, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from hf_parcor.evaluation import BatchMetric, ClassificationMetric, PredictionMetric
from hf_parcor.input_error import InputError
from hf_parcor.tasks.classes import class_numbers, classes_of
from hf_parcor.tasks.library_metric import library_score
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Processed, Task


class Classification(Task):
    """A task whose labels are classes of the model."""

    metrics = ("accuracy", "loss")

    def head_settings(self, parts: Sequence[tuple[Rows, Mapping[str, str]]]) -> dict[str, Any]:
        """Return the classes that the data has."""
        names = classes_of([(rows, columns["label"]) for rows, columns in parts])
        numbers = {name: number for number, name in enumerate(names)}
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return accuracy and loss, or a metric of `evaluate`."""
        if name in self.metrics:
            return ClassificationMetric(batches)
        return PredictionMetric(batches, library_score(name, self.metrics))

    @staticmethod
    def _labels(rows: Rows, columns: Mapping[str, str], processed: Processed) -> list[Any]:
        config = processed.model.config
        problem = getattr(config, "problem_type", None)
        if problem is None and len(config.label2id) == 1:  # as Transformers infers it
            problem = "regression"
        if problem not in (None, "single_label_classification"):
            raise InputError(
                f"model: expected a classifier of one class for each label, got one for {problem}; measure it from "
                "Python: ClassificationMetric knows its scores"
            )
        return class_numbers(rows, columns["label"], config.label2id)
