"""sentence-transformers' Trainers behind the mixin."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as tf
from local_models import word_tokenizer
from longhand import longhand
from trainings import logs_of

from hf_parcor import SAM, CorruptionConstraint, GradientPenalty, MultiStepRisk, ParameterDefenseMixin
from hf_parcor.cards.mixin import PublishingMixin

REASON = "an optional dependency of the tests, in the extra dev"
datasets = pytest.importorskip("datasets", reason=REASON)
st = pytest.importorskip("sentence_transformers", reason=REASON)

from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402

EPSILON, STEPS = 0.3, 2
L2 = CorruptionConstraint(epsilon=EPSILON)
DEFENSE = MultiStepRisk(L2, steps=STEPS)


class DefendedSentenceTransformerTrainer(ParameterDefenseMixin, st.SentenceTransformerTrainer):
    pass


PAIRS = {"anchor": ["a b c", "d e", "f g h i", "j k"], "positive": ["a b", "d e f", "g h", "j k l m"]}
SCORED = {**PAIRS, "label": [0.9, 0.1, 0.4, 0.7]}
CLASSIFIED = {**PAIRS, "label": [0, 2, 1, 2]}


def ranking(model):
    return losses.MultipleNegativesRankingLoss(model)


def cached_ranking(model):
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


class SquaredError(torch.nn.Module):
    """Of outputs in float64 and scores in float32, for which that of PyTorch 2.11 has no gradient."""

    def forward(self, outputs, scores):
        return (outputs - scores).square().mean()


def cosine(model):
    return losses.CosineSimilarityLoss(model, SquaredError())


def softmax(model):
    """A loss with a classifier of its own."""
    tf.set_seed(1)
    return losses.SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=3)


class TwoParts(torch.nn.Module):
    """A loss of two parts, which the Trainer logs by name."""

    def __init__(self, model):
        super().__init__()
        self.model, self.first, self.second = model, ranking(model), cosine(model)

    def forward(self, features, labels):
        score = torch.ones(len(features[0]["input_ids"]), device=self.model.device)
        return {
            "ranking": self.first([dict(part) for part in features], None),
            "cosine": self.second([dict(part) for part in features], score),
        }


LOSSES = {  # each with data for it
    "ranking": (ranking, PAIRS),
    "cached ranking": (cached_ranking, PAIRS),
    "cosine": (cosine, SCORED),
    "softmax": (softmax, CLASSIFIED),
    "two parts": (TwoParts, PAIRS),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("encoder"))
    words = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    word_tokenizer(words, pad_token="[PAD]").save_pretrained(path)
    config = tf.BertConfig(**tiny.encoder(30, 16, inner=24), **tiny.STILL, initializer_range=0.3)
    tf.set_seed(0)
    tf.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture
def encoder(saved):
    def build(dtype=torch.float32):
        transformer = modules.Transformer(saved)
        return st.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu").to(dtype)

    return build


@pytest.fixture
def train_encoder(arguments, encoder):
    def run(trainer_class, name, model=None, options=None, **extra):
        build, rows = LOSSES[name]
        model = encoder() if model is None else model
        trainer = trainer_class(
            model=model,
            args=arguments(st.SentenceTransformerTrainingArguments, **{"max_steps": 2, **(options or {})}),
            train_dataset=datasets.Dataset.from_dict(rows),
            loss=build(model),
            **extra,
        )
        trainer.train()
        return trainer

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_without_steps_it_is_the_stock_trainer_bit_for_bit(name, train_encoder):
    stock = train_encoder(st.SentenceTransformerTrainer, name)
    ours = train_encoder(DefendedSentenceTransformerTrainer, name, defense=MultiStepRisk(L2, steps=0))
    assert logs_of(ours) == logs_of(stock) != []
    for (key, weight), other in zip(stock.loss.named_parameters(), ours.loss.parameters(), strict=True):
        assert torch.equal(weight, other), key


class Keep(tf.TrainerCallback):
    """Keeps what the loss was given, and the gradients of all that it holds."""

    def __init__(self):
        self.given, self.gradient = [], {}

    def watch(self, loss):
        self.loss = loss
        loss.register_forward_pre_hook(
            lambda module, given: self.given.append(([dict(p) for p in given[0]], given[1]))
        )
        return loss

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradient = {name: p.grad.clone() for name, p in self.loss.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_risk(name, arguments, encoder):
    """Of the model and of the loss; the corruption is of the model alone."""
    (build, rows), keep = LOSSES[name], Keep()
    model = encoder(torch.float64)
    trainer = DefendedSentenceTransformerTrainer(
        model=model,
        args=arguments(st.SentenceTransformerTrainingArguments, max_steps=1, max_grad_norm=0.0, learning_rate=0.0),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=keep.watch(build(model).double()),
        callbacks=[keep],
        defense=DEFENSE,
    )
    trainer.train()
    assert trainer.defended_parameters().keys() == dict(model.named_parameters()).keys()
    # The cached loss runs its own backward; it is to give what the plain one gives.
    reference = (ranking if name == "cached ranking" else build)(encoder(torch.float64)).double()
    features, labels = keep.given[0]

    def loss_of(call):
        parts = call([dict(part) for part in features], labels)
        return sum(parts.values()) if isinstance(parts, dict) else parts

    of_the_model = [key for key, _ in reference.named_parameters() if key.startswith("model.")]
    expected = longhand(reference, loss_of, [1 / (STEPS + 1)] * (STEPS + 1), EPSILON, of_the_model)
    assert keep.gradient.keys() <= expected.keys()
    for key, wanted in expected.items():
        actual = keep.gradient.get(key, torch.zeros_like(wanted))
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("defense", [DEFENSE, SAM(L2)])
def test_parts_of_the_loss_are_those_of_the_first_pass(defense, train_encoder):
    options = {"learning_rate": 0.0}
    plain = logs_of(train_encoder(st.SentenceTransformerTrainer, "two parts", options=options))
    logs = logs_of(train_encoder(DefendedSentenceTransformerTrainer, "two parts", options=options, defense=defense))
    assert len(logs) == len(plain) == 2
    for ours, stock in zip(logs, plain, strict=True):
        assert (ours["ranking"], ours["cosine"]) == (stock["ranking"], stock["cosine"])
        assert ours["loss_clean"] == pytest.approx(stock["ranking"] + stock["cosine"], abs=1e-3)
        assert ours["loss_corrupted"] > ours["loss_clean"]


def test_a_cached_loss_has_no_second_derivative(train_encoder):
    """The gradient penalty needs one: it stops at the first step, not to train without a penalty in silence."""
    penalty = GradientPenalty(weight=0.1)
    (entry, _) = logs_of(train_encoder(DefendedSentenceTransformerTrainer, "ranking", defense=penalty))
    assert entry["loss"] > entry["loss_clean"]
    with pytest.raises(RuntimeError, match="got one that runs a backward of its own, as cached losses do"):
        train_encoder(DefendedSentenceTransformerTrainer, "cached ranking", defense=penalty)


def test_the_card_is_theirs_and_then_ours(train_encoder, tmp_path):
    class Publishing(ParameterDefenseMixin, PublishingMixin, st.SentenceTransformerTrainer):
        pass

    trainer = train_encoder(Publishing, "ranking", defense=DEFENSE)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_bytes().decode()
    theirs, ours = card.split("<!-- hf_parcor:begin")
    assert "\n## Training Details\n" in theirs
    assert "sentence-transformers" in theirs.partition("\n---\n")[0]
    assert "defended in training by `multi_step_risk`" in ours

    changed = card.replace("## Usage", "## How I use it", 1)
    (tmp_path / "README.md").write_bytes(changed.encode())
    trainer.create_model_card()
    again = (tmp_path / "README.md").read_bytes().decode()
    assert again.split("<!-- hf_parcor:begin")[0] == changed.split("<!-- hf_parcor:begin")[0]
    assert "\n### Training Details\n" in again.split("<!-- hf_parcor:begin")[1]
