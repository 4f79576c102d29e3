"""What the evaluators of sentence-transformers find of a corrupted model stays out of its card and its files."""

from __future__ import annotations

import copy

import pytest
from local_models import SENTENCES, save_sentence_encoder
from trainings import QUIET

from hf_parcor import CorruptionEvaluator, GaussianNoise, LayerProbe, Quantization
from hf_parcor.evaluation import CheckpointError, RobustnessMixin, TrainerMetric
from hf_parcor.records import MetricInfo

REASON = "an optional dependency of the tests, in the extra dev"
datasets = pytest.importorskip("datasets", reason=REASON)
st = pytest.importorskip("sentence_transformers", reason=REASON)

from sentence_transformers.sentence_transformer import evaluation, losses  # noqa: E402

PAIRS = {"sentence1": SENTENCES, "sentence2": SENTENCES[1:] + SENTENCES[:1], "score": [0.1, 0.9, 0.3, 0.5, 0.2, 0.7]}


class RobustTrainer(RobustnessMixin, st.SentenceTransformerTrainer):
    pass


@pytest.fixture
def encoder(tmp_path):
    return st.SentenceTransformer(save_sentence_encoder(tmp_path), device="cpu")


@pytest.fixture
def evaluator():
    return evaluation.EmbeddingSimilarityEvaluator(*PAIRS.values(), name="pairs")


def noted(model):
    """Return what is noted for a model's card."""
    data = model.model_card_data
    return copy.copy(data.eval_results_dict), copy.deepcopy(data.training_logs)


@pytest.mark.parametrize("kind", [CorruptionEvaluator, LayerProbe])
def test_card_has_the_numbers_of_the_clean_model(kind, encoder, evaluator):
    own = evaluator(encoder)
    before = noted(encoder)
    record = kind(encoder, evaluator).evaluate([Quantization(2)])
    of_records = getattr(record, "records", {"": record}).values()
    assert any(one.rows()[1].mean(evaluator.primary_metric) != own[evaluator.primary_metric] for one in of_records)
    assert noted(encoder) == before


def trainer_of(encoder, evaluator, output):
    arguments = st.SentenceTransformerTrainingArguments(**{**QUIET, "output_dir": str(output)})
    rows, loss = datasets.Dataset.from_dict(PAIRS), losses.CosineSimilarityLoss(encoder)
    return RobustTrainer(model=encoder, args=arguments, eval_dataset=rows, loss=loss, evaluator=evaluator)


def test_trainer_writes_nothing_of_a_corrupted_model(encoder, evaluator, tmp_path):
    """Its own evaluation appends to a table in its output folder."""
    trainer = trainer_of(encoder, evaluator, tmp_path / "out")
    own = trainer.evaluate()
    (table,) = (tmp_path / "out" / "eval").iterdir()
    before = noted(encoder), table.read_text()
    found = TrainerMetric(trainer)(encoder)
    assert found["pairs_spearman_cosine"] == own["eval_pairs_spearman_cosine"]
    trainer.evaluate_robustness([GaussianNoise(1.0)])
    assert (noted(encoder), table.read_text()) == before


def test_an_evaluator_says_what_is_good(encoder, evaluator, tmp_path):
    metric = TrainerMetric(trainer_of(encoder, evaluator, tmp_path / "out"))
    metric(encoder)
    assert metric.info_of(evaluator.primary_metric) == MetricInfo(greater_is_better=True)
    evaluator.greater_is_better = False
    assert metric.info_of(evaluator.primary_metric) == MetricInfo(greater_is_better=False)
    assert metric.info_of("pairs_pearson_cosine") is None


@pytest.mark.parametrize("by_trainer", [True, False])
def test_a_checkpoint_is_of_one_evaluator(by_trainer, encoder, evaluator, tmp_path):
    """It fills lists of its own when it is called: the same one goes on, also after that."""

    def measure(evaluator):
        metric = TrainerMetric(trainer_of(encoder, evaluator, tmp_path / "out")) if by_trainer else evaluator
        path = tmp_path / "checkpoint.jsonl"
        return CorruptionEvaluator(encoder, metric).evaluate([Quantization(2)], checkpoint=path)

    assert measure(evaluator).rows() == measure(evaluator).rows()
    scores = [1 - score for score in PAIRS["score"]]
    other = evaluation.EmbeddingSimilarityEvaluator(PAIRS["sentence1"], PAIRS["sentence2"], scores, name="pairs")
    with pytest.raises(CheckpointError, match="scores"):
        measure(other)
