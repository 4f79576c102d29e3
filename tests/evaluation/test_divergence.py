"""The divergence of answers is SciPy's relative entropy, over the predictions that count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from for_each import for_each
from local_models import word_tokenizer
from scipy.special import rel_entr, softmax
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import ClassificationMetric, GenerationMetric, LanguageModelMetric, NotFiniteError
from hf_parcor.evaluation.metrics import WithDivergence
from hf_parcor.evaluation.metrics.loss import LossMetric

SHAPE = tiny.encoder()
IDS = torch.arange(12).reshape(2, 6) % 20
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def classifier():
    return BertForSequenceClassification(BertConfig(**SHAPE)), ClassificationMetric, {"labels": torch.tensor([0, 1])}


def tagger():
    labels = torch.tensor([[0, 1, -100, 1, 0, 1], [1, 0, -100, -100, -100, -100]])
    return BertForTokenClassification(BertConfig(**SHAPE)), ClassificationMetric, {"labels": labels}


def language_model():
    config = GPT2Config(**tiny.gpt2())
    answers = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]])  # after prompts, which do not count
    return GPT2LMHeadModel(config), LanguageModelMetric, {"labels": IDS.masked_fill(answers == 0, -100)}


def segmenter():
    """The classes of each pixel lie along the second dimension."""
    sizes = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "num_attention_heads": [1], "mlp_ratios": [2]}
    shape = {"hidden_sizes": [8], "patch_sizes": [3], "strides": [2], "decoder_hidden_size": 8, "num_labels": 3}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, **shape))
    return model, LossMetric, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.randint(0, 3, (2, 8, 8))}


def translator():
    """Generates, and is asked what it would say after each token of the reference."""
    model = T5ForConditionalGeneration(T5Config(**tiny.t5(), initializer_factor=5.0))
    labels = torch.tensor([[3, 4, 5, 1], [6, 1, -100, -100]])
    return model, generating, {"labels": labels}


def generating(batches):
    tokenizer = word_tokenizer([f"w{number}" for number in range(20)], unk_token="w0")
    return GenerationMetric(tokenizer, batches, TokensRight(), max_new_tokens=3)


class TokensRight:
    def __call__(self, *, predictions, references):
        return {"right": sum(one == other for one, other in zip(predictions, references, strict=True))}


def unlabelled():
    def squares(batches):
        return LossMetric(batches, lambda model, batch: model(**batch).logits.square().mean())

    return BertForTokenClassification(BertConfig(**SHAPE)), squares, {}


@for_each("make", [classifier, tagger, language_model, segmenter, translator, unlabelled])
def test_it_is_the_relative_entropy_of_what_counts(make) -> None:
    model, kind, labels = make()
    model.eval()
    batch = labels if make is segmenter else {"input_ids": IDS, "attention_mask": MASK, **labels}
    classes = 1 if make is segmenter else -1
    metric = WithDivergence(kind([batch, batch]), model)
    with torch.no_grad():
        before = softmax(model(**batch).logits.double().numpy(), classes)
        assert metric(model) == metric.clean
        assert metric.clean["divergence"] == 0
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        after = softmax(model(**batch).logits.double().numpy(), classes)
    of_tokens = batch.get("labels", MASK.masked_fill(MASK == 0, -100))
    counts = (of_tokens != -100).numpy() if of_tokens.ndim > 1 else np.ones(2, bool)
    if make is segmenter:  # labels of pixels, predictions of a quarter as many
        counts = np.ones((2, 4, 4), bool)
    if make is language_model:
        counts = np.array([[False, False, False, True, True, False], [True, True, False, False, False, False]])
    assert metric(model)["divergence"] == pytest.approx(rel_entr(before, after).sum(classes)[counts].mean(), rel=1e-5)
    assert {name: value for name, value in metric(model).items() if name != "divergence"} == kind([batch] * 2)(model)


@for_each(("make", "target"), [(classifier, "last-encoder-layer"), (translator, "last-decoder-layer")])
def test_a_prefix_that_is_reused_gives_the_same(make, target) -> None:
    model, kind, labels = make()
    model.eval()
    metric = WithDivergence(kind([{"input_ids": IDS, **labels}] * 3), model)
    found = [
        CorruptionEvaluator(model, metric, target_modules=target, reuse_prefix=reuse, progress=False).evaluate(
            [GaussianNoise(0.5), GaussianNoise(1.0)]
        )
        for reuse in (True, False)
    ]
    one, other = ([row.mean("divergence") for row in record.rows()] for record in found)
    assert one == pytest.approx(other)
    assert one[0] == 0 < one[1] < one[2]
    assert not found[0].info("divergence").greater_is_better


def test_frames_of_padding_do_not_count() -> None:
    """Of a short recording those beside it in a batch, whose labels are as many as its text has letters."""
    convolutions = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (10,), "feat_extract_norm": "layer"}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**SHAPE, **convolutions, **places, pad_token_id=0)).eval()
    mask = (torch.arange(80) < torch.tensor([[80], [40]])).long()
    batch = {"input_values": torch.randn(2, 80) * mask, "attention_mask": mask, "labels": torch.tensor([[3], [4]])}
    metric = WithDivergence(LossMetric([batch]), model)
    with torch.no_grad():
        before = softmax(model(**batch).logits.double().numpy(), -1)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        after = softmax(model(**batch).logits.double().numpy(), -1)
    of_frames = rel_entr(before, after).sum(-1)
    assert metric(model)["divergence"] == pytest.approx(
        np.concatenate([of_frames[0], of_frames[1, :4]]).mean(), rel=1e-5
    )


@for_each(
    "problem, labels",
    [("regression", torch.rand(2)), ("multi_label_classification", torch.tensor([[0.0, 1.0], [1.0, 1.0]]))],
)
def test_logits_that_are_no_distribution_are_left_alone(problem, labels) -> None:
    config = BertConfig(**SHAPE, problem_type=problem, num_labels=2 if labels.ndim == 2 else 1)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": IDS, "labels": labels}
    assert "divergence" not in WithDivergence(ClassificationMetric([batch]), model)(model)
    bare, batch = nn.Linear(3, labels.reshape(2, -1).shape[1]), {"input": torch.randn(2, 3), "labels": labels}
    assert "divergence" not in WithDivergence(ClassificationMetric([batch]), bare)(bare)


def test_any_loss_over_any_batches_goes_through() -> None:
    plain = LossMetric([torch.ones(2, 2)], lambda model, batch: model(batch).square().mean())
    model = nn.Linear(2, 2)
    assert WithDivergence(plain, model)(model) == {**plain(model), "divergence": 0.0}


def test_what_does_not_fit_into_memory_is_said() -> None:
    model, kind, labels = classifier()
    model.eval()
    batches = [{"input_ids": (IDS + index) % 20, **labels} for index in range(3)]
    of_one = 2 * 2 * 4
    for data in (batches, [batches[0], batches[0], batches[1]]):
        metric = WithDivergence(kind(data), model, memory=of_one * 2)
        assert "first 2 batches" in metric.notes[-1]
        assert metric.clean is None
        assert metric(model)["divergence"] == 0
    assert not model._forward_hooks
    none = WithDivergence(kind(batches), model, memory=of_one - 1)
    assert "There is no divergence" in none.notes[-1]
    assert "divergence" not in none(model)


class Answering(nn.Module):
    """Gives the logits that it is told to."""

    logits: torch.Tensor

    def forward(self, **_: object) -> dict[str, torch.Tensor]:
        return {"logits": self.logits}


def test_answers_that_are_not_finite_diverge_and_classes_that_are_ruled_out_do_not() -> None:
    """0 log 0 is 0: what was impossible costs nothing; NaN, or to rule out what was possible, is not."""
    model, batch = Answering(), {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    model.logits = torch.tensor([[0.5, 1.5, -math.inf], [2.0, -1.0, 0.0]])
    metric = WithDivergence(ClassificationMetric([batch]), model)
    before = softmax(model.logits.double().numpy(), -1)
    model.logits = torch.tensor([[0.0, 1.0, 0.5], [2.0, -1.0, 1.0]])
    after = softmax(model.logits.double().numpy(), -1)
    assert metric(model)["divergence"] == pytest.approx(rel_entr(before, after).sum(-1).mean(), rel=1e-6)
    for place, value in ((1, math.nan), (0, math.nan), (0, -math.inf)):
        model.logits = torch.tensor([[0.5, 1.5, -math.inf], [2.0, -1.0, 0.0]])
        model.logits[place, 1] = value
        assert not math.isfinite(metric(model)["divergence"])


def test_what_was_as_good_as_impossible_costs_nothing_either() -> None:
    model, batch = Answering(), {"input_ids": IDS[:1], "labels": torch.tensor([0])}
    model.logits = torch.tensor([[0.0, -2000.0]])
    metric = WithDivergence(ClassificationMetric([batch]), model)
    model.logits = torch.tensor([[0.0, -math.inf]])
    assert metric(model)["divergence"] == 0


@for_each("value", [math.nan, math.inf])
def test_a_model_whose_own_answers_are_not_finite_is_refused(value) -> None:
    model, batches = Answering(), [{"input_ids": IDS + 0 * at, "labels": torch.tensor([0, 1])} for at in range(2)]
    model.logits = torch.tensor([[0.5, value], [2.0, -1.0]])
    with pytest.raises(NotFiniteError, match=r"expected finite answers, got .*batch 1"):
        WithDivergence(ClassificationMetric(batches), model)
    ignored = [{**batch, "labels": torch.tensor([-100, 1])} for batch in batches]
    assert WithDivergence(ClassificationMetric(ignored), model).clean
