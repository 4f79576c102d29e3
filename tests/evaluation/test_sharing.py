"""Measuring with a shared prefix: the same record, with less computed."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import transformers
from for_each import for_each
from operations import count_operations
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import ModelOutput

import hf_parcor.evaluation.passes.prefixes as prefixes
from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    select_parameters,
)
from hf_parcor.corruptions.multi_step import climb_together
from hf_parcor.evaluation import BatchMetric, ClassificationMetric, DatasetGradients
from hf_parcor.evaluation.passes.prefixes import PrefixSearch
from hf_parcor.evaluation.passes.together import Group, Job, choose_together

MANY = [
    *(GradientCorruption(CorruptionConstraint(epsilon=epsilon)) for epsilon in (0.1, 0.5, 2.0)),
    *(MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=epsilon)) for epsilon in (0.05, 0.2)),
    MultiStepCorruption(CorruptionConstraint(epsilon=1.0), steps=7),
]


@pytest.fixture
def evaluate(classifier, batches):
    def run(corruptions, target="last-encoder-layer", metric=None, model=classifier, **options):
        metric = ClassificationMetric(batches) if metric is None else metric
        evaluator = CorruptionEvaluator(model, metric, batches, target_modules=target, progress=False, **options)
        return evaluator.evaluate(corruptions, trials=2)

    return run


@pytest.fixture
def corruptions(one_of_each):
    return [*one_of_each.values(), *MANY]


@pytest.fixture
def plain(evaluate, corruptions, target):
    return evaluate(corruptions, target, reuse_prefix=False)


@pytest.mark.slow
@for_each("memory", [1, 3000 * 4, 1 << 30])
@pytest.mark.parametrize("target", ["last-encoder-layer", ["classifier"]])
def test_the_record_is_the_same(evaluate, classifier, corruptions, plain, bits_of, target, memory):
    before = bits_of(classifier)
    assert evaluate(corruptions, target, memory=memory) == plain
    assert len({row.metrics["loss"] for row in plain.rows()}) > len(corruptions) // 2, "they do something"
    assert bits_of(classifier) == before
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in classifier.modules())


def test_frozen_weights_too(evaluate, classifier, one_of_each):
    classifier.requires_grad_(False)
    corruptions = list(one_of_each.values())
    assert evaluate(corruptions) == evaluate(corruptions, reuse_prefix=False)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


class Sampled(ClassificationMetric):
    """Its numbers are also of what is drawn on each batch, as where texts are sampled, more or less often."""

    def of_batch(self, model, batch):
        """Return the sums of a batch, and a draw."""
        found = super().of_batch(model, batch)
        draws = torch.rand(1 + found["correct"]).sum() + torch.rand((), device=model.device).cpu()
        return {**found, "loss": found["loss"] + draws.item()}


@pytest.mark.slow
def test_what_a_metric_draws_does_not_depend_on_what_is_measured_beside(evaluate, batches, one_of_each):
    corruptions, metric = [*one_of_each.values(), *MANY], Sampled(DataLoader(batches, batch_size=None))
    alone = evaluate(corruptions, metric=metric, reuse_prefix=False)
    assert evaluate(corruptions, metric=metric) == alone


def counting(module):
    """Return a list that grows by one each time the module computes."""
    forward, computed = module.forward, []

    def counted(*args, **kwargs):
        computed.append(1)
        return forward(*args, **kwargs)

    module.forward = counted
    return computed


def test_lower_layers_run_once_a_batch(evaluate, classifier, batches):
    """Beside the trial on one batch: for the clean model, for the gradient, for all ascents, for all measurements."""
    computed = [counting(layer) for layer in classifier.bert.encoder.layer]
    n, ascents = len(batches), 3
    evaluate(MANY)
    longest = 7
    clean, gradient = n, n
    for_ascents, for_measurements = 3, 5  # watched, run in full, recorded; the same, and twice at other weights
    assert len(computed[0]) == for_ascents + for_measurements + clean + gradient + longest + n
    steps = n + n + longest  # of the three ascents
    tried = 6 + 7  # three times with the prefix reused; a run that records ends inside of it
    assert len(computed[1]) == (tried + clean + gradient) + (steps + longest) + (n * len(MANY) + n)
    assert ascents == sum(isinstance(corruption, MultiStepCorruption) for corruption in MANY)


@pytest.mark.slow
@pytest.mark.usefixtures("prefixes_are_sought_where_it_pays")
def test_a_prefix_is_sought_where_it_takes_less_than_it_saves(classifier, batches):
    """Two noises of two layers and the head: on one batch as many runs as without, on 24 of them fewer."""
    computed = counting(classifier.bert.encoder.layer[0])

    def runs(data, **options):
        before = len(computed)
        targets = {"first": ["layer.0"], "second": ["layer.1"], "head": ["classifier"]}
        probe = LayerProbe(classifier, ClassificationMetric(data), targets=targets, progress=False, **options)
        probe.evaluate([GaussianNoise(0.1), GaussianNoise(0.2)], trials=1)
        return len(computed) - before

    assert runs(batches[:1]) == 1 + 3 * 2
    many = 24 * batches[:1]
    assert runs(many) < runs(many, reuse_prefix=False) == 24 * (1 + 3 * 2)
    assert runs(without_length(many)) < 24 * (1 + 3 * 2), "also where it is not known how many there are"


@pytest.mark.slow
@pytest.mark.usefixtures("prefixes_are_sought_where_it_pays")
@for_each(
    ("rows", "steps", "climbing", "measuring"),
    [
        (1, [2], 2, 1),  # of the first layer as many runs as without a prefix
        (24, [None], 24, 24),  # one alone has nothing to share
        (24, [2, 2], 2 + 2, 5 + 24),
        (24, [None, None], 3 + 24, 5 + 24),  # sought in three runs to their end, and run once a batch
    ],
)
def test_ascents_share_a_prefix_where_that_takes_less_than_it_saves(
    classifier, batches, rows, steps, climbing, measuring
):
    data, computed = rows * batches[:1], counting(classifier.bert.encoder.layer[0])
    evaluator = CorruptionEvaluator(
        classifier, ClassificationMetric(data), target_modules="classifier", progress=False
    )
    corruptions = [MultiStepCorruption(CorruptionConstraint(epsilon=0.1 + index), k) for index, k in enumerate(steps)]
    evaluator.evaluate(corruptions)
    assert len(computed) == rows + climbing + measuring, "for the clean model, the ascents and the measurements"


def without_length(data):
    """Return data that can be walked through again, and do not say how many they are."""

    class Walked:
        def __iter__(self):
            return iter(data)

    return Walked()


def search_of(model, selection, batches):
    """Return what seeks the prefixes of one selection of a model, whose runs are many."""
    many = {"trials": [1000], "steps": [1000], "shared": [0], "limit": 1000, "memory": 1 << 30}
    groups = [select_parameters(model, selection)]
    return PrefixSearch(model.eval(), ClassificationMetric(batches), batches, groups, **many)


@pytest.mark.usefixtures("prefixes_are_sought_where_it_pays")
@for_each(("seek", "runs"), [("of_measurements", "RUNS_TO_PLAN"), ("of_ascents", "RUNS_TO_PLAN_ASCENTS")])
def test_what_seeking_a_prefix_takes(classifier, batches, seek, runs):
    counted = []
    hook = classifier.register_forward_pre_hook(lambda *_: counted.append(1))
    found = getattr(search_of(classifier, "last-encoder-layer", batches), seek)
    assert found(0) is found(0) is not None
    hook.remove()
    assert len(counted) == getattr(prefixes, runs)


@for_each("at_once", [2, 3, 6])
def test_as_many_share_a_run_as_the_memory_admits(evaluate, classifier, batches, at_once):
    size = 4 * sum(parameter.numel() for parameter in select_parameters(classifier, "last-encoder-layer").values())
    computed = counting(classifier.bert.embeddings)
    evaluate([GaussianNoise(std) for std in (0.1, 0.2, 0.3)], memory=at_once * size)
    tried, trials, n = 5, 6, len(batches)
    assert len(computed) == tried + n + n * trials // at_once


def test_what_shares_no_run_is_written_as_often_however_many_batches_there_are(classifier, batches):
    def writes(data):
        weight = classifier.bert.embeddings.word_embeddings.weight
        targets, before = {"head": ["classifier"], "embeddings": ["bert.embeddings"]}, weight._version
        LayerProbe(classifier, ClassificationMetric(data), targets=targets, progress=False).evaluate(
            [GaussianNoise(0.1), GaussianNoise(0.2)], trials=1
        )
        return weight._version - before

    assert 0 < writes(batches) == writes(batches[:1])


@pytest.mark.slow
def test_operations_of_single_layers(tiny_bert):
    """The first and the last of six layers, five radii, gradient-based and multi-step, by an evaluator for each.

    Each of them still measures the clean model, and takes its own gradient over the data.
    """
    model = tiny_bert(num_hidden_layers=6, hidden_size=16, intermediate_size=64).eval()
    batches = [{"input_ids": torch.randint(1, 20, (4, 12)), "labels": torch.randint(0, 2, (4,))} for _ in range(4)]
    corruptions = [
        kind(CorruptionConstraint(epsilon=epsilon))
        for epsilon in (0.1, 0.2, 0.5, 1.0, 2.0)
        for kind in (GradientCorruption, MultiStepCorruption)
    ]
    counted: dict[bool, list[int]] = {True: [], False: []}
    for reuse, of_layers in counted.items():
        for layer in (0, 5):
            settings = {"target_modules": "all", "layers": [layer], "progress": False, "reuse_prefix": reuse}
            evaluator = CorruptionEvaluator(model, ClassificationMetric(batches), batches, **settings)
            of_layers.append(count_operations(partial(evaluator.evaluate, corruptions)))
    ratios = [shared / plain for shared, plain in zip(counted[True], counted[False], strict=True)]
    assert ratios[-1] < 0.56
    assert sum(counted[True]) < 0.9 * sum(counted[False])


def test_ascents_of_different_lengths_end_where_they_would_alone(classifier, batches):
    classifier.eval()
    parameters = select_parameters(classifier, "last-encoder-layer")
    corruptions = [MultiStepCorruption(CorruptionConstraint(epsilon=0.5), steps=steps) for steps in (1, 4, 2)]
    gradients = DatasetGradients(classifier, parameters, batches)
    alone = []
    for corruption in corruptions:
        gradients.restart()
        alone.append(corruption(parameters, gradients))
    gradients.restart()
    with torch.no_grad():
        ascents = [corruption.ascent(parameters, len(gradients)) for corruption in corruptions]
        walked = [gradients.next_batch() for _ in range(4)]

        def gradients_at(climbing):
            batch = walked.pop(0)
            return [gradients.on_batch(batch, corruption) for corruption in climbing.values()]

        together = climb_together(ascents, gradients_at)
    for one, other in zip(together, alone, strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name])


class ClimbsByItself(MultiStepCorruption):
    """Is no multi-step corruption to whoever lets those climb together."""


@for_each("whole", [True, False])
def test_every_ascent_begins_at_the_first_batch(classifier, batches, whole):
    """Whatever walked before, and how far."""
    classifier.eval()
    parameters = select_parameters(classifier, "last-encoder-layer")
    gradients = DatasetGradients(classifier, parameters, batches)
    group = Group(parameters, gradients, None, 0)
    settings = {"constraint": CorruptionConstraint(epsilon=0.5), "steps": 2}
    assert len(batches) % 2 == 1  # else every ascent of two steps ends with a round
    ((first,), *others) = (
        choose_together([Job(group, kind(**settings), 0)], whole=whole)
        for kind in (MultiStepCorruption, MultiStepCorruption, ClimbsByItself, ClimbsByItself)
    )
    for (other,) in others:
        entries = other if whole or isinstance(other, dict) else other.whole()
        assert all(torch.equal(entries[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("call", [1, 5, 9])
def test_every_bit_comes_back_when_the_metric_raises(evaluate, classifier, batches, bits_of, call):
    class Failing(ClassificationMetric):
        calls = 0

        def of_batch(self, model, batch):
            Failing.calls += 1
            if Failing.calls == call:
                raise KeyboardInterrupt
            return super().of_batch(model, batch)

    before = bits_of(classifier)
    with pytest.raises(KeyboardInterrupt):
        evaluate(MANY, metric=Failing(batches))
    assert bits_of(classifier) == before
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in classifier.modules())


def test_a_prefix_that_was_tried_out_holds_nothing(classifier, batches, bits_of):
    before, search = bits_of(classifier), search_of(classifier, "last-encoder-layer", batches)
    for prefix in (search.of_measurements(0), search.of_ascents(0)):
        assert classifier.bert.encoder.layer[0] in prefix.prefix
        assert prefix.recorded == {}
    assert bits_of(classifier) == before


def test_ascents_of_a_model_without_labels_have_a_prefix(batches):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, input_ids):
            return ModelOutput(logits=self.last(self.first(input_ids.float())))

    model = Model()
    assert model.first in search_of(model, "last", batches).of_ascents(0).prefix


class Counting(nn.Linear):
    """Counts its calls, which changes what it returns, or in a buffer what somebody else may read."""

    def __init__(self, counts_in_buffer):
        super().__init__(6, 4)
        self.calls, self.counts_in_buffer = 0, counts_in_buffer
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.counts_in_buffer:
            self.seen += 1
            return super().forward(x)
        self.calls += 1
        return super().forward(x) * self.calls


@for_each(
    ("counts_in_buffer", "why"),
    [(False, "the result of two full runs differs"), (True, "a buffer of the model moves")],
)
def test_a_model_that_cannot_be_cut_is_measured_whole(batches, caplog, counts_in_buffer, why):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = Counting(counts_in_buffer), nn.Linear(4, 2)

        def forward(self, input_ids, labels):
            logits = self.last(self.first(input_ids.float()))
            return ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    transformers.utils.logging.enable_propagation()
    settings = {"target_modules": ["last"], "progress": False}
    evaluator = CorruptionEvaluator(Model(), ClassificationMetric(batches), batches, **settings)
    record = evaluator.evaluate([GaussianNoise(0.1)])
    assert record.corruptions[0].changed == 10
    assert f"Every measurement runs all of the model: {why}" in caplog.text


def test_a_weight_that_is_used_before_its_module_is_called(batches):
    class Peeking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.others[0].weight.sum()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = Peeking(6, 4), nn.Linear(4, 2)
            self.first.others = [self.last]

        def forward(self, input_ids, labels):
            logits = self.last(self.first(input_ids.float()))
            return ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    model = Model()

    def record(reuse):
        settings = {"target_modules": ["last"], "progress": False, "reuse_prefix": reuse}
        return CorruptionEvaluator(model, ClassificationMetric(batches), **settings).evaluate([GaussianNoise(1.0)])

    assert record(True) == record(False)


class Layer(nn.Linear):
    """One of a stack, which may look at others or at what they left behind, as some of real models do."""

    def __init__(self, peeks=None, remembers=None, counts=False):
        super().__init__(6, 6)
        self.peeks, self.remembers, self.counts, self.stack, self.left = peeks, remembers, counts, [], None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.counts:
            self.seen += 1
        x = x + super().forward(x).tanh()
        self.left = x
        if self.peeks is not None:
            x = x + self.stack[self.peeks].weight.sum()
        return x if self.remembers is None else x * self.stack[self.remembers].left.cos()


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(6, 2)
        for layer in layers:
            layer.stack = list(layers)

    def forward(self, input_ids, labels):
        x = input_ids.float() / 20
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    def sweep(self, batches, noises=3, targets=None, **options):
        targets = targets or {str(index): [f"layers.{index}"] for index in range(len(self.layers))}
        probe = LayerProbe(self, ClassificationMetric(batches), targets=targets, progress=False, **options)
        record = probe.evaluate([GaussianNoise(0.1 * (1 + index)) for index in range(noises)], trials=1)
        return [one.to_json() for one in record.records.values()]


@pytest.mark.slow
@pytest.mark.usefixtures("prefixes_are_sought_where_it_pays")
def test_a_sweep_of_32_layers_takes_six_tenths_of_the_plain_loop(batches):
    """Three corruptions on four batches: sought for all layers together, from what one run shows, and tried once each.

    Were prefixes known for nothing, it would be half: a run of the clean model, a run that records, and 3 × 16.5 runs
    from a layer on, of 97 runs.
    """
    model, data = Stack(*(Layer() for _ in range(32))), 4 * batches[:1]
    computed = [counting(layer) for layer in model.layers]
    reused = model.sweep(data)
    counted = sum(map(len, computed)) / 32
    assert counted <= 0.6 * 97 * len(data)
    assert reused == model.sweep(data, reuse_prefix=False)
    assert sum(map(len, computed)) / 32 - counted == 97 * len(data), "the plain loop's"


@pytest.mark.slow
@pytest.mark.usefixtures("prefixes_are_sought_where_it_pays")
def test_a_sweep_of_few_layers_on_little_data_takes_no_more_than_the_plain_loop(batches):
    for layers in (2, 3, 4, 6, 8):
        for data in (batches[:1], 2 * batches[:1], 4 * batches[:1]):
            model = Stack(*(Layer() for _ in range(layers)))
            computed = [counting(layer) for layer in model.layers]
            model.sweep(data)
            assert sum(map(len, computed)) <= layers * len(data) * (1 + 3 * layers), (layers, len(data))


@for_each(
    ("layer", "wrong", "why"),
    [
        (1, {"peeks": 2}, "the result differs"),  # the second layer at the weights of the third
        (1, {"remembers": 0}, "the result differs"),  # at what is old where the first is replayed
        (3, {"remembers": 0}, "the result differs"),  # and of no layer the prefix is longer
        (1, {"counts": True}, "a buffer of the model moves"),
    ],
)
def test_a_wrong_cut_of_a_sweep_is_noticed(batches, caplog, bits_of, layer, wrong, why):
    """By the trial alone: with a cut that is wrong, measured values would be."""
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    model = Stack(*(Layer(**(wrong if index == layer else {})) for index in range(4)))
    before, reused = bits_of(model), model.sweep(batches)
    assert f"Every measurement runs all of the model: {why}" in caplog.text
    assert reused == model.sweep(batches, reuse_prefix=False)
    assert bits_of(model) == before
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_of_a_sweep_only_the_parts_whose_cut_is_wrong_run_all_of_the_model(batches):
    """The fifth layer cannot be cut off from what the fourth one left behind; all others can."""
    model = Stack(*(Layer() for _ in range(4)), Layer(remembers=3), *(Layer() for _ in range(3)))
    computed = counting(model.layers[0])
    reused, data = model.sweep(batches), len(batches)
    counted = len(computed)
    assert reused == model.sweep(batches, reuse_prefix=False)
    clean, whole, tried = 1, 3 * 2, 7  # three noises of the first layer, and of the one that remembers
    recorded = 2  # for the layers between them, and for those behind
    assert counted <= data * (clean + recorded + whole) + tried


def test_parts_of_a_sweep_may_overlap(batches, bits_of):
    model = Stack(*(Layer() for _ in range(4)))
    before = bits_of(model)
    targets = {"two": ["layers.1", "layers.3"], "last": ["layers.3"], "upper": ["layers.2", "layers.3"], "all": "all"}
    assert model.sweep(batches, targets=targets) == model.sweep(batches, targets=targets, reuse_prefix=False)
    assert bits_of(model) == before


def test_a_metric_of_no_batch_says_what_it_likes(classifier):
    class Counted:
        batches = ()

        def of_batch(self, model, batch):
            return batch["labels"]

        def combine(self, parts):
            return {"batches": len(parts)}

        def __call__(self, model):
            return self.combine([])

    evaluator = CorruptionEvaluator(classifier, Counted(), target_modules="last-encoder-layer", progress=False)
    assert evaluator.evaluate([GaussianNoise(0.1)]).corruptions[0].metrics["batches"] == (0.0,) * 3


def test_a_metric_of_single_batches_is_one_by_its_methods(batches):
    assert isinstance(ClassificationMetric(batches), BatchMetric)
    assert not isinstance(lambda model: {}, BatchMetric)


def test_numbers_are_changed_where_they_are_combined(classifier, batches):
    """Several corruptions are measured batch by batch, and one or none by a call of the metric."""

    with pytest.raises(TypeError, match="change the numbers in combine"):
        type("Percent", (ClassificationMetric,), {"__call__": lambda self, model: {}})

    class Percent(ClassificationMetric):
        def combine(self, parts):
            return {name: 100 * value for name, value in super().combine(parts).items()}

    plain, changed = (
        CorruptionEvaluator(classifier, one(batches), target_modules=["classifier"], progress=False).evaluate(
            [GaussianNoise(0.1), GaussianNoise(0.5)], trials=2
        )
        for one in (ClassificationMetric, Percent)
    )
    for one, other in zip(plain.rows(), changed.rows(), strict=True):
        assert other.mean("accuracy") == pytest.approx(100 * one.mean("accuracy"))


def test_tensors_are_the_numbers_that_they_hold_however_they_are_measured(evaluate, batches):
    class OfTensors(ClassificationMetric):
        def combine(self, parts):
            return {"batches": torch.tensor([len(parts)]), "nothing": torch.tensor(math.nan)}

    corruptions = [GaussianNoise(0.1), GaussianNoise(0.2)]
    shared, one_by_one = (
        evaluate(corruptions, metric=OfTensors(batches), reuse_prefix=reuse) for reuse in (True, False)
    )
    assert shared.to_json() == one_by_one.to_json()
    assert shared.clean.metrics["batches"] == (float(len(batches)),)
