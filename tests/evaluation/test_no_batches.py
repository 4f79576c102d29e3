"""What is passed in the place of batches: rows of a data set, one batch, tuples. It is refused before a model runs."""

from __future__ import annotations

import pytest
import torch
from for_each import for_each
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, default_data_collator

from hf_parcor import CorruptionConstraint, CorruptionEvaluator, GradientCorruption
from hf_parcor.evaluation import (
    ClassificationMetric,
    DetectionMetric,
    GenerationMetric,
    LanguageModelMetric,
    PredictionMetric,
)
from hf_parcor.evaluation.metrics.loss import LossMetric
from hf_parcor.evaluation.metrics.over_batches import OverBatches

ROWS = [{"input_ids": [1, 2, 3], "labels": index % 2} for index in range(4)]
TEXTS = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
BATCH = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])}
METRICS = {
    "classes": ClassificationMetric,
    "tokens": LanguageModelMetric,
    "predictions": lambda batches: PredictionMetric(batches, lambda predictions, references: 1.0),
    "texts": lambda batches: GenerationMetric(None, batches, lambda predictions, references: 1.0, max_length=3),
    "boxes": DetectionMetric,
    "loss": LossMetric,
}


def dataset(rows, **form):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows).with_format(**form)


NO_BATCHES = {
    "a list of rows": lambda: ROWS,
    "rows of tensors": lambda: [{name: torch.tensor(value) for name, value in row.items()} for row in ROWS],
    "rows of tagged words": lambda: [{"input_ids": [1, 2, 3], "labels": [0, 1, 0]}],
    "rows with an image": lambda: [{"pixel_values": torch.rand(3, 4, 4), "labels": 1}],
    "a data set": lambda: dataset(ROWS),
    "a data set of tensors": lambda: dataset(ROWS, type="torch"),
    "texts": lambda: TEXTS,
    "a data set of texts": lambda: dataset(TEXTS),
    "lists that no collator saw": lambda: [{"input_ids": [[1, 2], [3]], "labels": [0, 1]}],
    "a loader that does not collate": lambda: DataLoader(ROWS, batch_size=None, collate_fn=lambda row: row),
    "one batch": lambda: BATCH,
    "one batch of a tokenizer": lambda: BatchEncoding(BATCH),
    "splits": lambda: {"train": [BATCH], "test": [BATCH]},
}


@for_each("metric", METRICS)
@for_each("given", NO_BATCHES)
def test_rows_and_mappings_are_refused_at_once(metric, given):
    with pytest.raises(ValueError, match=r"^batches: expected .*, got .*; "):
        METRICS[metric](NO_BATCHES[given]())


@for_each("metric", [name for name in METRICS if name != "loss"])
def test_tuples_have_no_names(metric):
    loader = DataLoader(TensorDataset(BATCH["input_ids"], BATCH["labels"]), batch_size=2)
    with pytest.raises(TypeError, match=r"^batches: expected mappings .*, got list; "):
        METRICS[metric](loader)


@for_each("metric", METRICS)
@for_each("given", [7, nn.Linear(2, 2)])
def test_what_cannot_be_walked_through(metric, given):
    with pytest.raises(TypeError, match=rf"^batches: expected .*, got {type(given).__name__}; "):
        METRICS[metric](given)


@for_each(
    "given",
    [
        lambda: [BATCH],
        lambda: [BatchEncoding(BATCH)],
        lambda: DataLoader(ROWS, batch_size=2, collate_fn=default_data_collator),
        lambda: DataLoader(dataset(ROWS, type="torch"), batch_size=2),
        lambda: dataset(ROWS).batch(2).with_format("torch"),  # a data set whose rows are batches
    ],
)
def test_batches_are_measured_as_before(given, tiny_bert):
    assert set(ClassificationMetric(given())(tiny_bert().eval())) == {"accuracy", "loss"}


def test_a_metric_and_a_loss_of_ones_own_may_take_anything(tiny_bert):
    class Count(OverBatches):
        def of_batch(self, model, batch):
            return len(batch[0])

        def combine(self, parts):
            return {"rows": sum(parts)}

    assert Count([(torch.ones(3), torch.ones(3)), (torch.ones(2), torch.ones(2))])(nn.Identity()) == {"rows": 5}
    square = LossMetric([torch.ones(2, 1)], lambda model, batch: model(batch).square().mean())
    assert square(nn.Identity()) == {"loss": 1.0}


def test_gradients_are_not_taken_over_rows(tiny_bert, bits_of):
    model = tiny_bert()
    before, called = bits_of(model), []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    evaluator = CorruptionEvaluator(model, lambda model: {"one": 1.0}, batches=ROWS, progress=False)
    with pytest.raises(ValueError, match=r"^batches: expected .*, got one example.*; "):
        evaluator.evaluate(GradientCorruption(CorruptionConstraint(epsilon=0.1)))
    assert not called
    assert bits_of(model) == before
