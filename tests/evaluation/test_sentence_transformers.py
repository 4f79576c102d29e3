"""What the evaluators of sentence-transformers find of a corrupted model stays out of its card and its files."""

from __future__ import annotations

import copy

import pytest
from local_models import SENTENCES, save_sentence_encoder
from trainings import QUIET

from hf_parcor import CorruptionEvaluator, GaussianNoise, LayerProbe, Quantization
from hf_parcor.evaluation import RobustnessMixin, TrainerMetric

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


def test_trainer_writes_nothing_of_a_corrupted_model(encoder, evaluator, tmp_path):
    """Its own evaluation appends to a table in its output folder."""
    output = tmp_path / "out"
    arguments = st.SentenceTransformerTrainingArguments(**{**QUIET, "output_dir": str(output)})
    rows = datasets.Dataset.from_dict(PAIRS)
    trainer = RobustTrainer(
        model=encoder,
        args=arguments,
        eval_dataset=rows,
        loss=losses.CosineSimilarityLoss(encoder),
        evaluator=evaluator,
    )
    own = trainer.evaluate()
    (table,) = (output / "eval").iterdir()
    before = noted(encoder), table.read_text()
    found = TrainerMetric(trainer)(encoder)
    assert found["pairs_spearman_cosine"] == own["eval_pairs_spearman_cosine"]
    trainer.evaluate_robustness([GaussianNoise(1.0)])
    assert (noted(encoder), table.read_text()) == before
