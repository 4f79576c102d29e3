"""Metrics and evaluators of the library `evaluate`, without a network; and our measures as its metrics."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from for_each import for_each
from local_models import word_tokenizer
from transformers import TextClassificationPipeline

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import PredictionMetric
from hf_parcor.metric_modules import metric_module
from hf_parcor.records.curves import area_under_curve, epsilon_at_half

evaluate = pytest.importorskip("evaluate", reason="needs the extra 'examples'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHARE = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        right = [one == other for one, other in zip(predictions, references)]
        return {"share": sum(right) / len(right), "of_each": right}
"""


def base():
    """Return the module of their task evaluators: the function `evaluator` hides it from an import."""
    return sys.modules["evaluate.evaluator.base"]


@pytest.fixture
def share(tmp_path):
    """Return a metric of `evaluate`, loaded from a local folder."""
    folder = tmp_path / "share_of_right_answers"
    folder.mkdir()
    (folder / "share_of_right_answers.py").write_text(SHARE)
    return evaluate.load(str(folder))


class TestTheirs:
    def test_a_metric_from_a_local_folder(self, classifier, batches, share):
        metric = PredictionMetric(batches, share.compute)
        evaluator = CorruptionEvaluator(classifier, metric, target_modules=["classifier"], progress=False)
        record = evaluator.evaluate([GaussianNoise(0.5)], trials=2)
        with torch.no_grad():
            right = [(classifier.eval()(b["input_ids"]).logits.argmax(-1) == b["labels"]).tolist() for b in batches]
        assert record.clean.metrics == {"share": (pytest.approx(sum(sum(part) for part in right) / 10),)}
        assert record.clean.notes == ()

    def test_a_lambda_around_a_task_evaluator(self, classifier, share, monkeypatch):
        # evaluate 0.4.6 asks for a class that Transformers 5 no longer has. Transformers replaces its own module while
        # it is imported: who came earlier has another.
        monkeypatch.setattr(base().transformers, "TFPreTrainedModel", type(None), raising=False)
        datasets = pytest.importorskip("datasets")
        tokenizer = word_tokenizer(["[UNK]", "good", "bad", "film"])
        classify = TextClassificationPipeline(
            model=classifier, tokenizer=tokenizer, task="text-classification", device="cpu"
        )
        rows = {"text": ["good film", "bad film", "film"], "label": [1, 0, 1]}
        data, labels = datasets.Dataset.from_dict(rows), {"LABEL_0": 0, "LABEL_1": 1}
        task = evaluate.evaluator("text-classification")
        record = CorruptionEvaluator(
            classifier,
            lambda _: task.compute(classify, data, metric=share, label_mapping=labels),
            progress=False,
        ).evaluate([GaussianNoise(0.5)], trials=2)
        assert set(record.clean.metrics) == {"share", "of_each"}, "no times"
        answers = [labels[answer["label"]] for answer in classify(rows["text"])]
        right = sum(one == other for one, other in zip(answers, rows["label"], strict=True))
        assert record.clean.mean("share") == pytest.approx(right / 3)


CURVE = {"epsilons": [0.5, 0.1, 1.0], "values": [0.5, 0.75, 0.25], "clean": 0.875}


class TestOurs:
    @for_each(
        ("name", "inputs", "expected"),
        [
            ("metric_drop", {"clean": [0.75, 0.5], "corrupted": [0.5, 0.5]}, 0.125),
            ("metric_drop", {"clean": [0.5], "corrupted": [2.0], "greater_is_better": False}, 1.5),
            ("metric_drop", {"clean": [0.5, 0.5], "corrupted": [math.inf, -math.inf]}, math.nan),
            ("area_under_robustness_curve", CURVE, area_under_curve(**CURVE)),
            ("epsilon_at_half", CURVE, epsilon_at_half(**CURVE)),
            ("epsilon_at_half", {**CURVE, "values": [0.8] * 3}, math.inf),
            ("epsilon_at_half", {**CURVE, "values": [1.0, 1.0, 2.0], "greater_is_better": False}, 0.875),
        ],
    )
    def test_loaded_without_a_network(self, name, inputs, expected):
        assert evaluate.load(metric_module(name)).compute(**inputs) == {name: pytest.approx(expected, nan_ok=True)}

    def test_collected_point_by_point(self):
        metric = evaluate.load(metric_module("area_under_robustness_curve"))
        for epsilon, value in zip(CURVE["epsilons"], CURVE["values"], strict=True):
            metric.add(epsilons=epsilon, values=value)
        assert metric.compute(clean=CURVE["clean"])["area_under_robustness_curve"] == pytest.approx(
            area_under_curve(**CURVE)
        )

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="expected one of area_under_robustness_curve, epsilon_at_half, metric_"):
            metric_module("drop")
