"""What is not finite is never a right answer, and whoever says how well a model holds says so."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sklearn.metrics
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from trainings import QUIET
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from hf_parcor import CorruptionEvaluator, EvaluationRecord, GaussianNoise, LayerProbe, RobustnessReport, UniformNoise
from hf_parcor.evaluation import (
    ClassificationMetric,
    GenerationMetric,
    LanguageModelMetric,
    PredictionMetric,
    TrainerMetric,
    robustness_metrics,
)
from hf_parcor.evaluation.outputs import NOT_FINITE

nan, inf = math.nan, math.inf


class Given(nn.Module):
    """Answers with the batch's own logits, and the loss of Transformers' classifiers."""

    def __init__(self, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(**config) if config else None

    def forward(self, logits, labels):
        logits = logits + self.weight
        flat = logits.flatten(0, -2), labels.flatten()
        loss = nn.functional.cross_entropy(*flat) if not labels.is_floating_point() else logits.square().mean()
        return SimpleNamespace(loss=loss, logits=logits)


def accuracy(predictions, references):
    return {"accuracy": sklearn.metrics.accuracy_score(references, predictions)}


METRICS = {
    "classification": ClassificationMetric,
    "language model": LanguageModelMetric,  # of a model that does not shift
    "predictions": lambda batches: PredictionMetric(batches, accuracy),
}

# Logits of one prediction whose label is 0: does it count as right, and as finite?
ROWS = {
    "finite": ([2.0, 1.0, 0.0], True, True),
    "finite and wrong": ([0.0, 1.0, 0.0], False, True),
    "others are ruled out": ([0.0, -inf, -inf], True, True),
    "it is ruled out": ([-inf, 0.0, -inf], False, True),
    "all NaN": ([nan, nan, nan], False, False),
    "NaN elsewhere": ([2.0, 1.0, nan], False, False),
    "NaN there": ([nan, 1.0, 0.0], False, False),
    "all ruled out": ([-inf, -inf, -inf], False, False),
    "infinite": ([inf, 1.0, 0.0], False, False),
    "infinite twice": ([inf, inf, 0.0], False, False),
    "infinite elsewhere": ([0.0, 1.0, inf], False, False),
}


@for_each("metric", METRICS)
@for_each("row", ROWS)
def test_a_row_beside_a_right_one_a_wrong_one_and_one_that_does_not_count(metric, row):
    logits, right, finite = ROWS[row]
    batch = {
        "logits": torch.tensor([logits, [0.0, 3.0, 1.0], [0.0, 1.0, 0.0], [nan, nan, nan]])[None],
        "labels": torch.tensor([[0, 1, 2, -100]]),
    }
    found = METRICS[metric]([batch])(Given())
    assert found["accuracy"] == pytest.approx((1 + right) / 3)
    assert found.get(NOT_FINITE, 0.0) == pytest.approx((not finite) / 3)


@for_each("metric", METRICS)
@for_each("label", [0, 1, 2])
@for_each("broken", [nan, inf, -inf])
def test_a_model_that_is_broken_is_never_right(metric, label, broken):
    batch = {"logits": torch.full((4, 3), broken), "labels": torch.full((4,), label)}
    found = METRICS[metric]([batch])(Given())
    assert found["accuracy"] == 0
    assert found[NOT_FINITE] == 1


@settings(max_examples=20)
@given(
    pairs=st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=2, max_size=8),
    lost=st.integers(0, 7),
)
def test_losing_a_prediction_raises_no_f1(pairs, lost):
    def f1(predictions, references):
        assert set(predictions) <= {0, 1}, "a class that the score does not know"
        common = {"y_true": references, "y_pred": predictions, "zero_division": 0.0}
        binary = sklearn.metrics.f1_score(**common)
        macro = sklearn.metrics.f1_score(**common, average="macro", labels=[0, 1])
        return {"binary": binary, "macro": macro}

    logits = nn.functional.one_hot(torch.tensor([predicted for predicted, _ in pairs]), 2).float()
    batch = {"logits": logits, "labels": torch.tensor([label for _, label in pairs])}
    broken = logits.index_fill(0, torch.tensor([lost % len(pairs)]), nan)
    whole, found = (PredictionMetric([{**batch, "logits": some}], f1)(Given()) for some in (logits, broken))
    assert found.pop(NOT_FINITE) == pytest.approx(1 / len(pairs))
    assert all(found[name] <= whole[name] + 1e-12 for name in whole)


def test_labels_that_are_not_finite():
    """A label whose logit is NaN or +∞ is wrong whatever the truth; −∞ rules it out."""
    logits = torch.tensor([[1.0, -1.0, 1.0], [nan, 1.0, -inf], [-1.0, inf, nan]])
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    found = ClassificationMetric([{"logits": logits, "labels": truth}])(
        Given(problem_type="multi_label_classification")
    )
    said = [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(truth.int(), said, average="micro"))
    assert found[NOT_FINITE] == pytest.approx(3 / 9)


@for_each("broken", [nan, inf])
def test_numbers_that_are_not_finite_leave_no_number(broken):
    batch = {"logits": torch.tensor([[1.0], [broken], [3.0]]), "labels": torch.tensor([1.0, 2.0, 3.0])}
    found = ClassificationMetric([batch])(Given())
    assert not math.isfinite(found["mse"])
    assert math.isnan(found["pearson"])
    assert found[NOT_FINITE] == pytest.approx(1 / 3)


def test_a_perplexity_is_not_made_good_by_an_infinite_loss():
    part = {"correct": 0, "labels": 1, "not_finite": 0}
    found = [LanguageModelMetric.combine(None_, [{**part, "loss": loss}]) for loss in (nan, -inf, inf)]
    assert [math.isnan(one["perplexity"]) for one in found] == [True, True, False]


None_ = LanguageModelMetric([{"labels": torch.zeros(1, 1)}])
SIZE = {"vocab_size": 12, "pad_token_id": 0, "bos_token_id": 1}


class Words:
    """A tokenizer of numbers."""

    def decode(self, row, skip_special_tokens):
        return " ".join(["", *(str(token) for token in row if token > 1)])


def of_family(family):
    torch.manual_seed(0)
    if family == "t5":
        config = T5Config(
            d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=11, **SIZE
        )
        return T5ForConditionalGeneration(config).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, eos_token_id=11, **SIZE)).eval()


def rows_broken(model, rows):
    """Let these rows of the batch of three have no finite score, in one of their beams."""

    def hook(module, inputs, output):
        output.logits = output.logits.clone()
        width = len(output.logits) // 3
        for row in rows:
            output.logits[row * width] = nan
        return output

    return model.register_forward_hook(hook)


@pytest.mark.slow
@for_each("family", ["t5", "gpt2"])
@for_each(
    "generation", [{}, {"num_beams": 2}, {"do_sample": True}, {"min_new_tokens": 2}, {"return_dict_in_generate": True}]
)
def test_texts(family, generation):
    model = of_family(family)
    seen = []

    def exact(predictions, references):
        seen.append(predictions)
        return sum(pair[0] == pair[1] for pair in zip(predictions, references, strict=True))

    inputs = torch.randint(2, 11, (3, 4))
    inputs[:, 1] = 11  # the end of an earlier text is not that of what is generated
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": torch.full((3, 1), -100)}
    metric = GenerationMetric(Words(), [batch], exact, max_new_tokens=4, **generation)
    torch.manual_seed(0)
    whole = metric(model)
    torch.manual_seed(0)
    with rows_broken(model, []):
        assert metric(model) == whole
    assert seen[0] == seen[1] == [text.strip() for text in seen[0]]
    assert NOT_FINITE not in whole
    with rows_broken(model, [1]):
        assert metric(model)[NOT_FINITE] == pytest.approx(1 / 3)
    if "do_sample" not in generation:
        assert seen[2] == [seen[0][0], "\ufffd", seen[0][2]]
    with rows_broken(model, [0, 1, 2]):
        assert metric(model) == {"score": 0.0, NOT_FINITE: 1.0}, "an empty reference is no hit either"


def test_what_follows_the_end_of_a_text_is_not_read():
    model = of_family("t5")
    model.lm_head.weight.data.zero_()
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        output.logits = torch.zeros_like(output.logits)
        output.logits[0, :, 11 if len(calls) == 1 else 5] = 1.0  # the first text ends at once
        output.logits[1:, :, 5] = 1.0
        if len(calls) > 1:
            output.logits[0] = nan
        return output

    model.register_forward_hook(hook)
    batch = {"input_ids": torch.full((2, 3), 5), "labels": torch.full((2, 1), 5)}
    found = GenerationMetric(Words(), [batch], lambda predictions, references: len(predictions), max_new_tokens=3)
    assert found(model) == {"score": 2.0, "predictions_cut": 0.5}


def test_a_lost_text_is_not_forgotten_when_finished_rows_leave_the_batch():
    class Shrinking(GPT2LMHeadModel):
        def generate(self, input_ids, logits_processor, **settings):
            for rows, broken in ((3, 1), (2, 2)):
                scores = torch.zeros(rows, 12)
                scores[broken:2] = nan
                logits_processor(input_ids[:rows], scores)
            return torch.cat([input_ids, input_ids], 1)

    model = Shrinking(of_family("gpt2").config).eval()
    batch = {"input_ids": torch.full((3, 2), 5), "labels": torch.full((3, 1), 5)}
    metric = GenerationMetric(Words(), [batch], lambda predictions, references: 1.0, max_new_tokens=2)
    assert metric(model) == {"score": 1.0, NOT_FINITE: 1.0}


class TestRecordsAndVerdicts:
    @pytest.fixture
    def model(self, classifier):
        """Return a classifier that is right where the label is 0, clean and, by the place of its NaN, broken."""
        classifier.classifier.weight.data.zero_()
        classifier.classifier.bias.data = torch.tensor([1.0, 0.0])
        return classifier.eval()

    @pytest.fixture
    def batches(self):
        return [{"input_ids": torch.randint(1, 20, (4, 6)), "labels": torch.tensor([0, 0, 0, 1])}]

    def test_the_record_says_it_with_the_seed(self, model, batches, tmp_path):
        evaluator = CorruptionEvaluator(model, ClassificationMetric(batches), progress=False)
        record = evaluator.evaluate([GaussianNoise(1e39)], trials=2, checkpoint=tmp_path / "trials")
        (row,) = record.corruptions
        assert record.clean.metrics["accuracy"] == (0.75,)
        assert record.clean.not_finite == ()
        assert row.metrics["accuracy"] == (0.0, 0.0)
        assert row.not_finite == (1.0, 1.0)
        assert "100 % of the predictions were not finite with seed 1; they count as wrong" in row.notes
        assert NOT_FINITE not in row.metrics, "records that are compared have the same metrics"
        assert EvaluationRecord.from_json(record.to_json()).to_json() == record.to_json()
        resumed = evaluator.evaluate([GaussianNoise(1e39)], trials=2, checkpoint=tmp_path / "trials")
        assert resumed.to_json() == record.to_json()

    def test_the_mean_size_of_corruptions_that_only_just_fit(self):
        weight = nn.Linear(1, 1, bias=False).double()
        evaluator = CorruptionEvaluator(weight, lambda model: {"loss": 1.0}, progress=False)
        (row,) = evaluator.evaluate(UniformNoise(1.7e308), trials=8).corruptions
        assert 4e307 < row.norm < 1.7e308, "their sum is beyond the largest float"

    @for_each(
        ("values", "mean"), [((1e308, 1.5e308), 1.25e308), ((inf, 0.0), inf), ((inf, -inf), nan), ((nan, 1.0), nan)]
    )
    def test_a_training_that_broke_goes_on(self, record_with, values, mean):
        broken = [record_with({"accuracy": 0.9, "loss": value}) for value in values]
        record = replace(broken[0], corruptions=tuple(row for one in broken for row in one.corruptions))
        metrics = robustness_metrics(record, ["first", "second"])
        assert metrics["eval_robustness_loss"] == pytest.approx(mean, nan_ok=True)

    def test_some_predictions_though_the_accuracy_holds(self, record_with, verdict):
        record = record_with({"accuracy": 0.899}, not_finite=(0.01,))
        text = verdict(record)
        assert "not all predictions are finite at ε=1" in text
        assert "stays within" not in text

    def test_a_library_score(self, model, batches):
        metric = PredictionMetric(batches, accuracy)
        record = CorruptionEvaluator(model, metric, progress=False).evaluate([GaussianNoise(1e39)])
        (text,) = RobustnessReport(record).verdict
        assert "accuracy falls from 75.0 % to 0.0 %" in text
        assert "Not all predictions are finite at σ=1e+39; these count as wrong." in text

    def test_the_users_own_accuracy_beside_a_loss_that_is_nan(self, model, batches, tmp_path):
        """`argmax` in compute_metrics takes the place of the first NaN for a class; the loss tells."""
        rows = [
            {"input_ids": row, "labels": label}
            for row, label in zip(batches[0]["input_ids"], batches[0]["labels"], strict=True)
        ]
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), **QUIET),
            eval_dataset=rows,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )
        record = CorruptionEvaluator(model, TrainerMetric(trainer), progress=False).evaluate([GaussianNoise(1e39)])
        assert record.corruptions[0].mean("accuracy") == 0.75, "or this tests nothing"
        (text,) = RobustnessReport(record).verdict
        assert "the model breaks at σ=1e+39: loss is not a finite number there, so accuracy says nothing" in text
        other = replace(record, weights="of another model")
        first, second, _ = RobustnessReport.compare({"plain": record, "defended": other}).verdict
        assert "cannot be told in any of 1 comparison" in first
        assert "loss is not a finite number, so accuracy says nothing" in second

    def test_a_probe_names_what_it_did_not_rank(self, record_with, verdict):
        text = verdict(
            {
                "a": record_with({"accuracy": 0.9, "loss": nan}),
                "b": record_with({"accuracy": 0.9, "loss": 0.31}),
                "c": record_with({"accuracy": 0.895}, not_finite=(0.001,)),
            }
        )
        assert "no group that can be ranked loses more than 1 %" in text
        assert "not all that the model returns is finite" in text
        assert "Not ranked, since loss is not a finite number: a." in text
        assert "Not all predictions are finite with c corrupted" in text
        assert "none is fragile" not in text

    def test_a_probe_ranks_what_counts_as_wrong(self, model, batches):
        probe = LayerProbe(
            model,
            ClassificationMetric(batches),
            targets={"head": "classifier", "norms": "layer-norm", "none": "bert.pooler"},
            progress=False,
        )
        (text,) = RobustnessReport(probe.evaluate([GaussianNoise(1e39)], trials=1)).verdict
        assert "Not ranked" not in text
        assert "Not all predictions are finite with head" in text

    def test_a_comparison_names_what_it_cannot_tell(self, record_with):
        models = {
            name: [record_with({"accuracy": value + shift, "loss": 1.0}) for shift in (-0.01, 0.0, 0.01)]
            for name, value in (("plain", 0.5), ("defended", 0.5))
        }
        models["defended"][1] = record_with({"accuracy": nan, "loss": 1.0})
        first, second, _ = RobustnessReport.compare(models).verdict
        assert "cannot be told in any of 1 comparison, since not all is finite" in first
        assert "accuracy is not a finite number" in second

    @pytest.fixture
    def verdict(self):
        def of(records):
            (text,) = RobustnessReport(records).verdict
            return text

        return of

    @pytest.fixture
    def record_with(self):
        from hf_parcor import CorruptionRecord

        def build(metrics, *, not_finite=()):
            clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,), "loss": (0.3,)})
            values = {name: (value,) for name, value in {"loss": 0.3, **metrics}.items()}
            settings = {"p": 2.0, "epsilon": 1.0, "top_n": None}
            row = CorruptionRecord("gradient", "gradient L2 ε=1", settings, (0,), values, not_finite=not_finite)
            return EvaluationRecord("bert", {"target_modules": "all"}, 10, clean, (row,))

        return build
