"""Every run of a model has a batch of its own: what it writes there is not measured next."""

from __future__ import annotations

import copy
from collections import UserDict

import torch
from for_each import for_each
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import ClassificationMetric, GenerationMetric, LanguageModelMetric, PredictionMetric


class Careless(nn.Module):
    """Normalises its input in place, shifts its labels, and pops what is nested."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, values, labels, extra):
        values.div_(10)
        labels.sub_(1)
        scale = extra["inner"].pop("scale")
        extra["list"].clear()
        logits = self.head(values) * scale
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch_of(container):
    return container(
        {
            "values": torch.randn(4, 3),
            "labels": torch.tensor([1, 2, 1, 2]),
            "extra": {"inner": {"scale": 2.0}, "list": [torch.ones(1)]},
        }
    )


def leaves(batches):
    return [
        leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves([dict(b) for b in batches])
    ]


@for_each("container", [dict, UserDict, BatchEncoding])
@for_each("kind", [ClassificationMetric, LanguageModelMetric, "predictions"])
def test_two_measurements_are_one_and_the_batches_stay(container, kind):
    batches = [batch_of(container), batch_of(container)]
    before = copy.deepcopy(leaves(batches))
    if kind == "predictions":
        metric = PredictionMetric(batches, lambda predictions, references: sum(predictions))
    else:
        metric = kind(batches)
    model = Careless()
    first = metric(model)
    assert metric(model) == first
    assert leaves(batches) == before


@for_each("reuse_prefix", [False, True])
def test_corruptions_of_no_size_measure_the_clean_value(reuse_prefix):
    batches = [batch_of(dict)]
    evaluator = CorruptionEvaluator(
        Careless(), ClassificationMetric(batches), reuse_prefix=reuse_prefix, progress=False
    )
    record = evaluator.evaluate([GaussianNoise(1e-30), GaussianNoise(1e-30)], trials=2)
    for row in record.corruptions:
        assert set(row.metrics["loss"]) == set(record.clean.metrics["loss"])


def test_generation():
    class Erasing(GPT2LMHeadModel):
        def generate(self, input_ids, attention_mask, **settings):
            input_ids.add_(1)
            attention_mask.zero_()
            return super().generate(input_ids, **settings)

    model = Erasing(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=32)).eval()
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    batch["labels"] = torch.ones(2, 3, dtype=torch.long)
    before = leaves([batch])

    class Numbers:
        def decode(self, row, skip_special_tokens):
            return " ".join(map(str, row))

    seen = []

    def score(predictions, references):
        seen.append((predictions, references))
        return 1.0

    metric = GenerationMetric(Numbers(), [batch], score, max_new_tokens=3, pad_token_id=0)
    metric(model)
    metric(model)
    assert seen[0] == seen[1]
    assert leaves([batch]) == before


def test_labels_are_those_of_the_batch():
    """They are read before the model could write into them."""
    batches = [batch_of(dict)]
    seen = []

    def score(predictions, references):
        seen.append(references)
        return 1.0

    PredictionMetric(batches, score)(Careless())
    assert seen == [[1, 2, 1, 2]]
