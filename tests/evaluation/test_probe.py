"""One part after the other: the records of single evaluators, with much less computed."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import peft
import pytest
import tiny
import torch
import transformers as tf
from for_each import for_each
from operations import count_operations
from torch import nn
from transformers.utils import ModelOutput

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    RandomCorruption,
    SweepRecord,
    sensitivity,
)
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.targets import GROUPINGS, TargetError

SIX_LAYERS = {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 64, "initializer_range": 0.3}
CORRUPTIONS = [
    kind(CorruptionConstraint(epsilon=epsilon))
    for epsilon in (0.1, 0.2, 0.5, 1.0, 2.0)
    for kind in (GradientCorruption, MultiStepCorruption)
]


@pytest.fixture
def six_layers(tiny_bert):
    return tiny_bert(**SIX_LAYERS).eval()


@pytest.fixture
def long_batches():
    return [{"input_ids": torch.randint(1, 20, (4, 12)), "labels": torch.randint(0, 2, (4,))} for _ in range(3)]


def single(model, batches, target, corruptions, **options):
    evaluator = CorruptionEvaluator(
        model, ClassificationMetric(batches), batches, target_modules=target, progress=False, **options
    )
    return evaluator.evaluate(corruptions, trials=2)


TARGETS = {"middle": ["encoder.layer.1"], "norms": "layer-norm", "head": ["classifier"], "all": "all"}


@pytest.fixture
def every_corruption(one_of_each):
    return [*one_of_each.values(), CORRUPTIONS[1]]


@pytest.fixture
def three_layers(tiny_bert):
    return tiny_bert(**{**SIX_LAYERS, "num_hidden_layers": 3}).eval()


@pytest.fixture
def alone(three_layers, long_batches, every_corruption):
    """Return the records of single evaluators, which do not depend on what a sweep shares."""
    return {
        label: single(three_layers, long_batches, target, every_corruption, reuse_prefix=False).to_json()
        for label, target in TARGETS.items()
    }


@pytest.mark.slow
@for_each("memory, reuse", [(1, True), (40_000, True), (1 << 30, True), (40_000, False)])
def test_records_are_those_of_single_evaluators(
    three_layers, long_batches, every_corruption, alone, bits_of, memory, reuse
):
    before, metric = bits_of(three_layers), ClassificationMetric(long_batches)
    probe = LayerProbe(
        three_layers, metric, long_batches, targets=TARGETS, memory=memory, reuse_prefix=reuse, progress=False
    )
    records = probe.evaluate(every_corruption, trials=2).records
    assert {label: record.to_json() for label, record in records.items()} == alone  # in JSON, NaN equals NaN
    assert list(records) == list(TARGETS)
    assert bits_of(three_layers) == before
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in three_layers.modules())


def test_each_block_is_a_target_by_default(batches):
    config = tf.BartConfig(**{**tiny.seq2seq(), "decoder_layers": 3}, num_labels=2)
    model = tf.BartForSequenceClassification(config)
    for batch in batches:
        batch["input_ids"][:, -1] = 2
        batch["input_ids"][:, :-1].clamp_(min=3)
    records = (
        LayerProbe(model, ClassificationMetric(batches), progress=False)
        .evaluate([GaussianNoise(0.1)], trials=1)
        .records
    )
    assert list(records) == [
        *(f"model.encoder.layers.{index}" for index in range(2)),
        *(f"model.decoder.layers.{index}" for index in range(3)),
    ]
    for label, record in records.items():
        block = model.get_submodule(label)
        assert record.parameters == record.corruptions[0].changed == sum(p.numel() for p in block.parameters())


def test_a_module_that_is_called_before_and_behind_a_target(batches):
    """What it returns behind the target depends on it, and must not be that of the clean model."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, input_ids, labels):
            hidden = self.shared(torch.tanh(self.first(self.shared(input_ids / 20))))
            logits = self.last(torch.tanh(hidden))
            return ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    model, corruptions = Twice(), [GaussianNoise(0.5), *CORRUPTIONS[-2:]]
    probe = LayerProbe(
        model, ClassificationMetric(batches), batches, targets={"a": ["first"], "b": ["last"]}, progress=False
    )
    records = probe.evaluate(corruptions, trials=2).records
    for label, target in (("a", ["first"]), ("b", ["last"])):
        assert records[label] == single(model, batches, target, corruptions, reuse_prefix=False)


@pytest.mark.slow
def test_operations_of_a_sweep(six_layers, long_batches):
    """Six layers, five radii, gradient-based and multi-step: at most 0.6 of what a plain loop computes."""
    found, long_batches = {}, long_batches[:2]

    def probe():
        found.update(
            LayerProbe(six_layers, ClassificationMetric(long_batches), long_batches, progress=False)
            .evaluate(CORRUPTIONS)
            .records
        )

    def plain(label):  # of the first radius: the others take as many
        for row, corruption in zip(found[label].corruptions[:2], CORRUPTIONS, strict=False):
            alone = single(six_layers, long_batches, [label], [corruption], reuse_prefix=False)
            assert alone.corruptions == (row,)

    shared = count_operations(probe)
    assert list(found) == [f"bert.encoder.layer.{index}" for index in range(6)]
    # One layer lower, and a gradient takes one layer more: the two ends make the mean of all.
    ends = [count_operations(partial(plain, label)) for label in (list(found)[0::5])]
    assert shared <= 0.6 * 6 * 5 * sum(ends) / 2


@pytest.mark.slow
def test_bit_for_bit_after_an_interrupt(six_layers, long_batches, bits_of):
    class Failing(ClassificationMetric):
        calls = 0

        def of_batch(self, model, batch):
            Failing.calls += 1
            if Failing.calls == 20:
                raise KeyboardInterrupt
            return super().of_batch(model, batch)

    before = bits_of(six_layers)
    probe = LayerProbe(six_layers, Failing(long_batches), long_batches, progress=False)
    with pytest.raises(KeyboardInterrupt):
        probe.evaluate(CORRUPTIONS)
    assert bits_of(six_layers) == before


def test_a_sweep_says_how_it_was_measured(six_layers):
    probe = LayerProbe(six_layers, lambda model: {"x": 0.0}, targets={"head": ["classifier"]}, progress=False)
    sweep = probe.evaluate([GaussianNoise(0.1)], trials=2, seed=5)
    assert (sweep.trials, sweep.seed, sweep.weights) == (2, 5, sweep.records["head"].weights)
    assert sweep.records["head"].corruptions[0].seeds == (5, 6)


@pytest.mark.slow
@for_each("word", [*GROUPINGS, None])
def test_a_word_is_its_grouping(word, six_layers):
    """The record keeps it, also where it was saved, so that a page can name the command that measures the same."""
    model = deepcopy(six_layers)
    if word == "adapters":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    targets = GROUPINGS[word or "layers"](model)

    def measured(targets):
        return LayerProbe(model, lambda model: {"x": 0.0}, targets=targets, progress=False).evaluate(
            [GaussianNoise(1)]
        )

    by_word, by_name = measured(word), measured(targets)
    assert (by_word.grouping, by_name.grouping) == (word or "layers", "")
    assert SweepRecord.from_json(by_word.to_json()) == by_word == replace(by_name, grouping=word or "layers")


def test_a_setting_is_the_same_in_every_call():
    """Each lists them all, which `help` and type checkers read: with the same types and defaults."""
    of_evaluator = inspect.signature(CorruptionEvaluator).parameters
    selecting = {"target_modules", "exclude_modules", "module_types", "layers"}
    for call, apart in ((LayerProbe, selecting), (sensitivity, {*selecting, "reuse_prefix"})):
        settings = inspect.signature(call).parameters
        assert of_evaluator.keys() - settings.keys() == apart
        for name in settings.keys() & of_evaluator.keys() - {"metric"}:
            mine, others = settings[name], of_evaluator[name]
            assert (mine.annotation, mine.default) == (others.annotation, others.default), (call, name)


class TestBadInput:
    def test_no_target(self, six_layers):
        with pytest.raises(ValueError, match="targets: expected at least one, got none"):
            LayerProbe(six_layers, lambda model: {"x": 0.0}, targets={})

    def test_word_that_is_no_grouping(self, six_layers):
        with pytest.raises(TargetError, match="adapters or targets by name, got 'heads'"):
            LayerProbe(six_layers, lambda model: {"x": 0.0}, targets="heads")

    def test_target_that_matches_nothing(self, six_layers):
        with pytest.raises(TargetError):
            LayerProbe(six_layers, lambda model: {"x": 0.0}, targets={"a": "last-decoder-layer"})

    def test_model_without_stacks(self):
        with pytest.raises(ValueError, match="expected a model with stacks of blocks, got Linear without any"):
            LayerProbe(nn.Linear(2, 2), lambda model: {"x": 0.0})


class TestMemory:
    """What a sweep holds at a time does not depend on how long it is."""

    @pytest.fixture
    def peak_of(self, tiny_bert, peak_memory, tmp_path):
        model = tiny_bert(**{**SIX_LAYERS, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}).eval()

        @cache
        def peak(batches=2, radii=1, layers=1, memory=1, saved=False):
            options = {"checkpoint": tmp_path / f"{batches} {radii} {layers}"} if saved else {}
            data = [
                {"input_ids": torch.full((2, 6), 1 + index), "labels": torch.tensor([0, 1])}
                for index in range(batches)
            ]
            targets = {
                f"{layer} {copy}": [f"bert.encoder.layer.{layer}"] for copy in range(layers) for layer in (0, 1)
            }
            corruptions = [
                kind(CorruptionConstraint(epsilon=1.0 + radius))
                for radius in range(radii)
                for kind in (GradientCorruption, MultiStepCorruption, RandomCorruption)
            ]
            probe = LayerProbe(model, ClassificationMetric(data), data, targets=targets, memory=memory, progress=False)
            with peak_memory() as used:
                probe.evaluate(corruptions, trials=1, **options)
            return used.peak, sum(p.numel() * p.element_size() for p in model.parameters())

        return peak

    @pytest.mark.slow
    @for_each("longer", [{"radii": 2}, {"layers": 2}, {"batches": 6}])
    @for_each("saved", [True, False])
    def test_it_does_not_grow(self, peak_of, longer, saved):
        (short, size), (long, _) = peak_of(saved=saved), peak_of(**longer, saved=saved)
        assert short > size / 4, "or nothing was counted"
        assert long <= short + 0.01 * size

    @pytest.mark.slow
    def test_corruptions_that_are_measured_together_take_what_they_may(self, peak_of):
        (alone, size), (together, _) = peak_of(radii=2), peak_of(radii=2, memory=1 << 30)
        assert together > alone + size


def test_what_is_noted_of_many_groups_is_logged_once(caplog):
    """A message does not name the group, so that one for each of them would say the same."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.others = nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

        def forward(self, x):
            return self.used(x)

    record = LayerProbe(
        Unused(),
        lambda model: {"loss": float(model(torch.ones(1, 2)).detach().sum())},
        [torch.ones(1, 2)],
        targets={name: name for name in ("used", "others.0", "others.1", "others.2")},
        loss=lambda model, x: model(x).sum(),
        progress=False,
    ).evaluate([GradientCorruption(CorruptionConstraint(epsilon=0.1))])
    assert [len(one.corruptions[0].notes) for one in record.records.values()] == [0, 1, 1, 1]
    (said,) = [one.getMessage() for one in caplog.records if "no weight changed" in one.getMessage()]
    assert "with seed 0, in 3 groups; it is kept" in said
