"""Labels that are not one class: any number of them, or numbers; measured, and what a new head is made for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import transformers
from for_each import for_each
from local_models import save_bert

from hf_parcor.errors import InputError
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows

TASK = TASKS["text-classification"]
TEXTS = ["good film", "bad film", "a bad bad film", "good good"]
ONE_CLASS = "single_label_classification"
SEVERAL = {"problem_type": "multi_label_classification", "num_labels": 3}


def rows_of(labels):
    entries = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=False)]
    return Rows("rows", entries, ("text", "label"))


def processed_of(folder, **settings):
    folder = save_bert(folder, **{"initializer_range": 1.0, **settings})
    return Processed(TASK.load_model(folder).eval(), TASK.load_processor(folder), Encoding())


def measured(processed, rows, metric=None):
    """Return what the task measures, and the logits of each row alone."""
    examples = TASK.examples(rows, TASK.find_columns(rows, {}), processed)
    batches = TASK.batches(examples, processed, 3)
    usual, _ = TASK.usual_metric(processed, batches)
    found = TASK.metric(metric or usual, processed, batches)(processed.model)
    assert TASK.shown(usual, found) == usual
    with torch.no_grad():
        logits = [processed.model(**processed.processor(text, return_tensors="pt")).logits[0] for text in TEXTS]
    return usual, found, torch.stack(logits)


@for_each(
    "labels", [[[0, 2], [1], [], [0, 1, 2]], [["a", "c"], ["b"], [], ["C", "b", "a"]], [["a", 2], "b", [], [2, 1, 0]]]
)
def test_any_number_of_classes(labels, tmp_path):
    """By their names or numbers; a row of one may have it without a list."""
    names = {"a": 0, "b": 1, "c": 2}
    processed = processed_of(
        tmp_path, **SEVERAL, label2id=names, id2label={number: name for name, number in names.items()}
    )
    usual, found, logits = measured(processed, rows_of(labels))
    truth = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    chosen = (logits > 0).float()
    assert usual == "f1"
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(truth, chosen, average="micro"))
    assert found["accuracy"] == pytest.approx((truth == chosen).all(-1).float().mean().item())
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)


@for_each("labels", [[0.5, 2, -1.25, 3], ["0.5", "2.0", "-1.25", " 3 "], [[0.5], [2], [-1.25], [3]]])
def test_numbers(labels, tmp_path):
    usual, found, logits = measured(processed_of(tmp_path, num_labels=1), rows_of(labels))
    truth = np.array([0.5, 2, -1.25, 3])
    predicted = logits[:, 0].double().numpy()
    assert usual == "pearson"
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(predicted, truth).statistic, rel=1e-5)
    assert found["mse"] == pytest.approx(((predicted - truth) ** 2).mean(), rel=1e-5)


def test_several_numbers(tmp_path):
    processed = processed_of(tmp_path, num_labels=2, problem_type="regression")
    truth = [[0.5, 1], [2, -1], [-1.25, 0], [3, 4]]
    _, found, logits = measured(processed, rows_of(truth))
    assert found["mse"] == pytest.approx((logits - torch.tensor(truth)).square().mean().item(), rel=1e-5)


@for_each(
    ("settings", "labels", "said"),
    [
        ({"num_labels": 1}, [0.5, "much"], "expected a number in each row.* got 'much' in column 'label', row 2"),
        ({"num_labels": 1}, [0.5, float("nan")], "expected a number in each row"),
        ({"num_labels": 1}, [True, 1.5], "expected a number in each row.* got True"),
        (
            {"num_labels": 2, "problem_type": "regression"},
            [[1, 2], [3]],
            r"expected 2 numbers in each row.* got \[3\]",
        ),
        (SEVERAL, [[0], [7]], "expected a label of the model"),
        (SEVERAL, [[2], [1.0, 0.0, 1.0]], r"names or numbers, got \[1.0, 0.0, 1.0\] .* row 2; write \[0, 2\]"),
        ({"num_labels": 2}, [[0], [0, 1]], "expected one label in each row, got 2"),
    ],
)
def test_labels_that_the_model_does_not_take(settings, labels, said, tmp_path):
    rows = rows_of(labels)
    with pytest.raises(InputError, match=said):
        TASK.examples(rows, TASK.find_columns(rows, {}), processed_of(tmp_path, **settings))


@for_each("of_names", [None, {"LABEL_0": 0, "LABEL_1": 1}, {"bad": "0", "good": "1"}, {"bad": 1, "good": 0}])
def test_classes_have_the_names_that_the_model_gives_its_answers(of_names, tmp_path):
    """Whatever the other way round says, which a configuration may lack."""
    processed = processed_of(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"id2label": {"0": "bad", "1": "good"}, "label2id": of_names}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    processed = Processed(TASK.load_model(str(tmp_path)), processed.processor, Encoding())
    rows = rows_of(["good", "bad", "BAD", 1])
    assert [one["labels"] for one in TASK.examples(rows, TASK.find_columns(rows, {}), processed)] == [1, 0, 0, 1]


def test_a_kind_that_nobody_knows(tmp_path):
    processed = processed_of(tmp_path)
    processed.model.config.problem_type = "ranking"
    with pytest.raises(InputError, match=r"problem_type: expected one of .*, got 'ranking'"):
        TASK.usual_metric(processed, [])


@for_each(("settings", "own"), [(SEVERAL, "f1, accuracy, loss"), ({"num_labels": 1}, "pearson, mse, loss")])
def test_a_metric_of_another_kind_of_labels(settings, own, tmp_path):
    with pytest.raises(InputError, match=f"metric: expected one of {own} for a model of .*, got 'matthews'"):
        TASK.metric("matthews", processed_of(tmp_path, **settings), [])


def test_words_have_one_class_each(tmp_path):
    task, folder = (
        TASKS["token-classification"],
        save_bert(tmp_path, transformers.BertForTokenClassification, **SEVERAL),
    )
    rows = Rows("rows", [{"tokens": ["good"], "tags": [0]}], ("tokens", "tags"))
    processed = Processed(task.load_model(folder), task.load_processor(folder))
    with pytest.raises(InputError, match="expected a classifier of one class for each word, got one for multi_label"):
        task.examples(rows, task.find_columns(rows, {}), processed)


@for_each(
    ("labels", "problem", "count"),
    [
        ([0, 1, 0, 2], ONE_CLASS, 3),
        (["0", "1.0"], ONE_CLASS, 2),
        ([0.5, 1, 2], "regression", 1),
        (["3.8", "5.0"], "regression", 1),
        ([[0.5], ["1"]], "regression", 1),
        (["3.8", "good"], ONE_CLASS, 2),
        ([[0], [1]], ONE_CLASS, 2),
        ([[0], [1, 2]], "multi_label_classification", 3),
        ([["a"], []], "multi_label_classification", 1),
    ],
)
def test_what_a_new_head_is_made_for(labels, problem, count):
    settings = TASK.head_settings([(rows_of(labels), {"label": "label"})])
    assert (settings["problem_type"], settings["num_labels"]) == (problem, count)
    assert ("id2label" in settings) is (problem != "regression")
    words = TASKS["token-classification"].head_settings([(rows_of([["a"], ["a", "b"]]), {"label": "label"})])
    assert words["problem_type"] == ONE_CLASS


@for_each("before", ["regression", "multi_label_classification"])
def test_a_new_head_is_not_for_what_the_model_was_trained_before(before, tmp_path):
    """A model that was saved without its head keeps what that was for."""
    folder = save_bert(tmp_path, transformers.BertModel, problem_type=before, num_labels=1)
    rows = rows_of(["a", "b", "a", "c"])
    columns = TASK.find_columns(rows, {})
    processed = Processed(
        TASK.load_model(folder, **TASK.head_settings([(rows, columns)])), TASK.load_processor(folder)
    )
    assert [example["labels"] for example in TASK.examples(rows, columns, processed)] == [0, 1, 0, 2]


def test_a_new_head_for_one_class_is_refused():
    """Transformers takes a head with one label for a regression."""
    with pytest.raises(InputError, match="expected two classes or more, got 'good' alone in column 'label'"):
        TASK.head_settings([(rows_of(["good", "good"]), {"label": "label"})])
