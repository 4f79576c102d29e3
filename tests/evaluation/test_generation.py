"""Corrupted decoders that generate: the encoder runs once a batch, and every token is the same."""

from __future__ import annotations

import pytest
import tiny
import torch
from for_each import for_each
from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
)

ENDS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None}
FAMILIES = {
    "marian": lambda: MarianMTModel(MarianConfig(**{**tiny.seq2seq(24, 16), **ENDS})),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**tiny.t5(24, 16), eos_token_id=1)),
}
CORRUPTIONS = [
    *(GaussianNoise(std) for std in (0.3, 1.0)),
    GradientCorruption(CorruptionConstraint(epsilon=3.0)),
    MultiStepCorruption(CorruptionConstraint(epsilon=3.0), steps=2),
]


class Translations:
    """Which tokens a model generates: a number that differs where any token does."""

    def __init__(self, batches, **settings):
        self.batches, self.settings = batches, {"max_new_tokens": 4, "do_sample": False, **settings}

    def __call__(self, model):
        return self.combine([self.of_batch(model, batch) for batch in self.batches])

    def of_batch(self, model, batch):
        tokens = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **self.settings)
        return [row.tolist() for row in tokens]

    def combine(self, parts):
        text = str(parts)
        return {"checksum": float(sum(ord(letter) * (place + 1) for place, letter in enumerate(text)))}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        tokens = torch.randint(2, 24, (3, 5), generator=generator)
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens})
    return made


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


def computed(module):
    """Count how often a module's own forward runs; one that is replayed does not run it."""
    forward, calls = module.forward, []

    def counting(*arguments, **settings):
        calls.append(1)
        return forward(*arguments, **settings)

    module.forward = counting
    return calls


def assert_same(one, other):
    for row, expected in zip(one.rows(), other.rows(), strict=True):
        assert (row.label, row.metrics, row.changed) == (expected.label, expected.metrics, expected.changed)
        assert row.norm == pytest.approx(expected.norm, rel=1e-6)  # an ascent's gradients are summed in another order


@pytest.mark.slow
@for_each(
    "target, settings",
    [
        *(("last-decoder-layer", settings) for settings in ({}, {"num_beams": 3}, {"use_cache": False})),
        (["decoder"], {"num_beams": 3}),
    ],
)
def test_translations_are_identical(model, batches, settings, target):
    metric = Translations(batches, **settings)
    records = [
        CorruptionEvaluator(
            model, metric, batches, target_modules=target, reuse_prefix=reuse, progress=False
        ).evaluate(CORRUPTIONS, trials=2)
        for reuse in (True, False)
    ]
    assert_same(*records)
    assert len({value for row in records[0].rows() for value in row.metrics["checksum"]}) > 3, "they do something"


@pytest.mark.slow
def test_the_encoder_runs_once_a_batch(model, batches):
    encoder = computed(model.get_encoder())
    corruptions = [GaussianNoise(std) for std in (0.1, 0.2, 0.3, 0.4)]
    evaluator = CorruptionEvaluator(model, Translations(batches), target_modules="last-decoder-layer", progress=False)
    evaluator.evaluate(corruptions, trials=3)
    tried, clean = 5, len(batches)  # watched, run again, twice at other weights, recorded
    assert len(encoder) == tried + clean + len(batches)


@pytest.mark.slow
def test_a_probe_of_decoder_layers_equals_single_evaluators(model, batches):
    stack = "model.decoder.layers" if hasattr(model, "model") else "decoder.block"
    targets = {f"layer {index}": [f"{stack}.{index}"] for index in range(2)}
    metric = Translations(batches)
    together = LayerProbe(model, metric, batches, targets=targets, progress=False).evaluate(CORRUPTIONS, trials=1)
    for label, target in targets.items():
        evaluator = CorruptionEvaluator(
            model, metric, batches, target_modules=target, reuse_prefix=False, progress=False
        )
        assert_same(together.records[label], evaluator.evaluate(CORRUPTIONS, trials=1))


@pytest.mark.slow
def test_a_decoder_that_goes_on_where_the_clean_one_ends_at_once(model, batches):
    """Its lower layer is called once by the clean one, and has nothing of the first token where that is replayed."""
    for parameter in model.parameters():  # weights of the usual size hardly notice what came before
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = {name: rows[:1] for name, rows in batches[0].items()}
    (first,) = Translations([batch], max_new_tokens=1).of_batch(model, batch)
    metric = Translations([batch], max_new_tokens=8, eos_token_id=first[-1])
    noises = [GaussianNoise(std) for std in (0.1, 0.3, 1.0)]

    def measured(reuse):
        settings = {"reuse_prefix": reuse, "progress": False}
        evaluator = CorruptionEvaluator(model, metric, target_modules="last-decoder-layer", **settings)
        probe = LayerProbe(model, metric, targets={"last": "last-decoder-layer"}, **settings)
        return [evaluator.evaluate(noises, trials=5), probe.evaluate(noises, trials=5).records["last"]]

    expected, _ = measured(reuse=False)
    assert len({value for row in expected.rows() for value in row.metrics["checksum"]}) > 3, "some go on"
    for found in measured(reuse=True):
        assert_same(found, expected)


@pytest.mark.slow
def test_a_corrupted_encoder_is_not_reused(model, batches):
    encoder = computed(model.get_encoder())
    evaluator = CorruptionEvaluator(model, Translations(batches), target_modules="last-encoder-layer", progress=False)
    evaluator.evaluate([GaussianNoise(0.1)], trials=4)
    assert len(encoder) >= 5 * len(batches)
