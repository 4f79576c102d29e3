"""What a metric's numbers mean: stated by those that measure, known of libraries, or a guess that says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import (
    CorruptionEvaluator,
    EvaluationRecord,
    GaussianNoise,
    LayerProbe,
    MetricInfo,
    SensitivityRecord,
    SweepRecord,
)
from hf_parcor.evaluation import ClassificationMetric, LanguageModelMetric, PredictionMetric, SacrebleuScore
from hf_parcor.records.metric_info import (
    LABEL_UNITS,
    NATS,
    POINTS,
    SHARE,
    SQUARED_LABEL_UNITS,
    agreed,
    direction_by_name,
    info_by_name,
    stated_by,
)

NOISE = [GaussianNoise(0.1)]


class Fixed(nn.Module):
    """Answers logits that it was given, with a loss that is smaller the nearer they are to the labels."""

    def __init__(self, logits, problem_type=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.logits, self.config = logits, SimpleNamespace(problem_type=problem_type, is_encoder_decoder=False)

    def forward(self, inputs, labels):
        if self.config.problem_type == "regression":
            loss = nn.functional.mse_loss(self.logits.squeeze(-1), labels)
        elif labels.is_floating_point():
            loss = nn.functional.binary_cross_entropy_with_logits(self.logits, labels)
        else:
            loss = nn.functional.cross_entropy(self.logits.flatten(0, -2), labels.flatten())
        return {"loss": loss, "logits": self.logits}


CLASSES = torch.tensor([0, 1, 1, 0])
MANY = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
NUMBERS = torch.tensor([1.0, 2.0, 4.0])
ONE_HOT = nn.functional.one_hot(CLASSES).float()

# A metric, labels, a right answer and a wrong one.
OURS = {
    "classes": (ClassificationMetric, CLASSES, 9 * ONE_HOT, -9 * ONE_HOT, None),
    "any number of classes": (ClassificationMetric, MANY, 18 * MANY - 9, 9 - 18 * MANY, None),
    "numbers": (ClassificationMetric, NUMBERS, NUMBERS[:, None], -NUMBERS[:, None], "regression"),
    "language model": (LanguageModelMetric, CLASSES[None], 9 * ONE_HOT[None], -9 * ONE_HOT[None], None),
}


@for_each(("kind", "labels", "right", "wrong", "problem"), OURS.values())
def test_ours_state_the_direction_and_the_unit_that_their_numbers_have(kind, labels, right, wrong, problem):
    metric = kind([{"inputs": torch.zeros(len(labels)), "labels": labels}])
    best, worst = (metric(Fixed(logits, problem)) for logits in (right, wrong))
    for name, value in best.items():
        info = metric.info_of(name)
        assert info.guessed == ()
        assert info.greater_is_better == (value > worst[name]), name
        assert (info.unit == SHARE) == (name in ("accuracy", "f1")), name
        if info.unit == SHARE:
            assert (value, worst[name]) == (1.0, 0.0)
        if info.unit == NATS:
            assert best["perplexity"] == pytest.approx(math.exp(value))
    assert metric.info_of("another") is None


@pytest.mark.parametrize("kind", ["bleu", "chrf", "ter"])
def test_scores_of_sacrebleu_are_points_of_100(kind):
    pytest.importorskip("sacrebleu")
    score, texts = SacrebleuScore(kind), ["a dog runs through the deep snow"]
    right, wrong = (score(predictions=found, references=texts)[kind] for found in (texts, ["no"]))
    info = score.info_of(kind)
    assert info == MetricInfo(right > wrong, POINTS)
    assert score.info_of("another") is None
    assert max(right, wrong) == pytest.approx(100)


def test_bleu_of_tokens_too():
    pytest.importorskip("sacrebleu")
    from hf_parcor.translation import BleuScores

    scores = BleuScores(tokenize=str)
    assert {scores.info_of(name) for name in ("bleu", "tokenized_bleu")} == {MetricInfo(True, POINTS)}
    assert scores.info_of("another") is None


class TestOfEvaluate:
    """Metrics of `evaluate`, known by the name of their class, with which it calls them."""

    @staticmethod
    def module(class_name, found):
        evaluate = pytest.importorskip("evaluate")
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        info = evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
        methods = {"_info": lambda self: info, "_compute": lambda self, predictions, references: found}
        return type(class_name, (evaluate.Metric,), methods)()

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @for_each(
        ("class_name", "found", "name", "info"),
        [
            ("Mse", {"mse": 0.1}, "mse", MetricInfo(False, SQUARED_LABEL_UNITS)),
            ("Mae", {"mae": 0.1}, "mae", MetricInfo(False, LABEL_UNITS)),
            ("WER", 0.5, "wer", MetricInfo(False, SHARE)),
            ("CER", 0.5, "cer", MetricInfo(False, SHARE)),
            ("Ter", {"score": 50.0, "num_edits": 3}, "score", MetricInfo(False, POINTS)),
            ("ChrF", {"score": 0.9, "char_order": 6}, "score", MetricInfo(True, POINTS)),
            ("Sacrebleu", {"score": 7.4}, "score", MetricInfo(True, POINTS)),
            ("Bleu", {"bleu": 0.07}, "bleu", MetricInfo(True, SHARE)),
            ("Rouge", {"rougeL": 0.3}, "rougeL", MetricInfo(True, SHARE)),
            ("Perplexity", {"mean_perplexity": 9.0}, "mean_perplexity", MetricInfo(False)),
            ("Squad", {"exact_match": 1.0, "f1": 0.9}, "f1", MetricInfo(True, POINTS)),
            ("SquadV2", {"exact": 1.0}, "exact", MetricInfo(True, POINTS)),
            ("MatthewsCorrelation", {"matthews_correlation": 0.4}, "matthews_correlation", MetricInfo(True)),
            ("r_squared", 0.4, "r_squared", MetricInfo(True)),
            ("BrierScore", {"brier_score": 0.4}, "brier_score", MetricInfo(False)),
            ("Mine", {"mine": 0.4}, "mine", MetricInfo(True, "", ("greater_is_better",))),
        ],
    )
    def test_the_record_has_it(self, class_name, found, name, info):
        compute = self.module(class_name, found).compute
        metric = PredictionMetric([{"inputs": torch.zeros(4), "labels": CLASSES}], compute)
        record = CorruptionEvaluator(Fixed(ONE_HOT), metric, progress=False).evaluate(NOISE, trials=1)
        assert record.metric_info[name] == info


@for_each(
    ("name", "greater"),
    [
        *[(name, True) for name in ("accuracy", "eval_f1", "f1_macro", "top_5_accuracy", "rougeL", "val/bleu", "r2")],
        *[(name, False) for name in ("loss", "eval_mse", "wer", "cer", "perplexity", "train_loss", "accuracy_loss")],
        *[(name, False) for name in ("mean_squared_error", "error_rate", "ter", "mae", "eval_rmse")],
        *[(name, True) for name in ("neg_mean_squared_error", "eval_neg_mean_squared_error", "val/neg_rmse")],
        *[(name, True) for name in ("eval_log_likelihood", "negative_f1", "negative_recall")],  # of that class
        *[(name, False) for name in ("negative_log_likelihood", "eval_neg_log_likelihood", "nll")],
        *[(name, None) for name in ("score", "character", "x", "lossless", "", "distance")],
    ],
)
def test_names_that_everybody_uses_alike(name, greater):
    assert direction_by_name(name) is greater
    info = info_by_name(name, [0.5])
    assert info.direction_guessed is (greater is None)
    assert info.greater_is_better is (greater is not False)


@for_each(
    ("name", "values", "unit"),
    [
        ("accuracy", [0.9, math.nan, math.inf], SHARE),
        ("accuracy", [0.9, 85.0], ""),
        ("f1", [-0.1], ""),
        *[(name, [0.9], "") for name in ("chrf", "bleu", "mse", "loss", "score", "pearson", "wer")],
    ],
)
def test_only_an_accuracy_is_guessed_to_be_a_share(name, values, unit):
    info = info_by_name(name, values)
    assert info.unit == unit
    assert (
        ("unit" in info.guessed) == any(name in said for said in info.guesses(name) if "unit" in said) == (unit != "")
    )


class TestWhatUsersState:
    class Distance:
        primary_metric, greater_is_better, unit = "distance", False, "steps"

        def __call__(self, model):
            return {"distance": 0.5, "accuracy": 0.5, "score": 0.5}

    def test_attributes_as_sentence_transformers_has_them(self):
        record = CorruptionEvaluator(nn.Linear(1, 1), self.Distance(), progress=False).evaluate(NOISE, trials=1)
        assert record.info("distance") == MetricInfo(False, "steps")
        assert record.info("accuracy").guessed == ("unit",)
        assert record.info("score").guessed == ("greater_is_better",)

    @for_each("kind", [CorruptionEvaluator, LayerProbe])
    def test_an_argument_goes_before(self, kind):
        given = {"distance": MetricInfo(True, POINTS), "score": MetricInfo(False)}
        options = {"targets": {"all": "all"}} if kind is LayerProbe else {}
        measuring = kind(nn.Linear(1, 1), self.Distance(), metric_info=given, progress=False, **options)
        record = measuring.evaluate(NOISE, trials=1)
        assert {name: record.info(name) for name in given} == given
        assert type(record).from_json(record.to_json()) == record

    def test_a_name_that_the_metric_does_not_return_is_told(self, monkeypatch):
        told = []
        monkeypatch.setattr("hf_parcor.evaluation.measurement.logger.warning", told.append)
        given = {"f2": MetricInfo(False)}
        record = CorruptionEvaluator(nn.Linear(1, 1), self.Distance(), metric_info=given, progress=False).evaluate([])
        assert "f2" not in record.metric_info
        assert [text for text in told if "f2" in text] == told != []

    @for_each("wrong", [{"score": True}, {"score": {"unit": ""}}, ["score"]])
    def test_anything_else_is_refused_before_measuring(self, wrong):
        with pytest.raises(TypeError, match="metric_info: expected MetricInfo by the name"):
            CorruptionEvaluator(nn.Linear(1, 1), self.Distance(), metric_info=wrong)

    @for_each("wrong", [{"greater_is_better": 1}, {"greater_is_better": True, "unit": None}])
    def test_types(self, wrong):
        with pytest.raises(TypeError, match="expected a"):
            MetricInfo(**wrong)

    def test_stating_takes_the_guess_away(self):
        info = info_by_name("score", [0.5])
        assert info.stating(greater_is_better=True) == MetricInfo(True)
        assert info.stating(unit=SHARE).guessed == ("greater_is_better",)
        assert info.stating() == info

    def test_nothing_is_stated_by_what_states_nothing(self):
        assert stated_by(lambda model: {}, "accuracy") is None
        assert stated_by(self.Distance(), "accuracy") is None


class TestRecordsOfBefore:
    def test_are_read_and_their_guesses_said(self, tmp_path):
        metric = {"accuracy": 0.5, "mse": 0.5, "score": 0.5}
        probe = LayerProbe(nn.Linear(1, 1), lambda model: metric, targets={"all": "all"}, progress=False)
        sweep = probe.evaluate(NOISE, trials=1)
        plain = json.loads(sweep.to_json())
        for record in plain["records"].values():
            del record["metric_info"]
        old = SweepRecord.from_plain(plain)
        assert [old.info(name) for name in metric] == [sweep.info(name) for name in metric]
        assert [old.info(name).guessed for name in metric] == [("unit",), (), ("greater_is_better",)]
        old_record = EvaluationRecord.from_plain(plain["records"]["all"])
        stated = old_record.stating("accuracy", unit=SHARE)
        assert stated.info("accuracy") == MetricInfo(True, SHARE)
        assert EvaluationRecord.from_json(stated.to_json()) == stated
        with pytest.raises(ValueError, match="got 'f1'"):
            old.info("f1")


def test_a_metric_that_scores_lack_is_refused():
    scores = SensitivityRecord("m", {}, {}, (), {"loss": 1.0}, "loss")
    assert not scores.info("loss").greater_is_better
    for refusing in (scores.info, scores.stating):
        with pytest.raises(ValueError, match="expected one of loss, got 'f1'"):
            refusing("f1")


class TestAgreement:
    def test_what_one_states_the_others_need_not(self):
        stated, guess = MetricInfo(False, POINTS), info_by_name("score", [0.5])
        for infos in ([stated, guess], [guess, stated], [stated, stated]):
            assert agreed(infos, "score") == stated
        assert agreed([guess, guess], "score") == guess

    def test_guesses_that_differ_are_none(self):
        share, other = info_by_name("accuracy", [0.5]), info_by_name("accuracy", [50.0])
        assert agreed([share, other], "accuracy") == MetricInfo(True)

    @for_each(("other", "message"), [({"unit": SHARE}, "unit"), ({"greater_is_better": False}, "greater_is_better")])
    def test_statements_that_differ_are_refused(self, other, message):
        stated = MetricInfo(True, POINTS)
        with pytest.raises(ValueError, match=f"one {message}"):
            agreed([stated, replace(stated, **other)], "bleu")
