"""Corrupt, measure, restore: every bit comes back, whatever happens in between."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
import transformers
from for_each import for_each
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MetricInfo,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    UniformNoise,
    corrupted,
    measure_indicators,
    select_parameters,
)
from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.evaluation import DEFAULT_TRIALS, ClassificationMetric, PredictionMetric
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights
from hf_parcor.evaluation.identity.row_fingerprint import data_fingerprint
from hf_parcor.records import EvaluationData, EvaluationRecord
from hf_parcor.targets import TargetError

# The clean model, then every trial of each kind.
MEASUREMENTS = 1 + sum(DEFAULT_TRIALS if kind.stochastic else 1 for kind in CORRUPTIONS.values())
NORM = CorruptionConstraint(epsilon=0.5)


@pytest.fixture
def evaluator_of(classifier, batches):
    def build(metric=None, model=classifier, data=batches, **options):
        return CorruptionEvaluator(
            model, metric or ClassificationMetric(batches), data, **{"progress": False, **options}
        )

    return build


def weights_of(model):
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])


def watching(seen, look):
    """Return a metric that keeps what it sees of the model."""

    def metric(model):
        seen.append(look(model))
        return {"x": 0.0}

    return metric


class Moods(nn.Module):
    """Modules in training and in evaluation mode side by side, a frozen weight, buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(4, 2)
        self.first.weight.requires_grad_(False)
        self.train()
        self.norm.eval()
        self.last.eval()

    def forward(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


class TestEveryBitComesBack:
    def test_after_every_corruption(self, classifier, evaluator_of, corruption, bits_of):
        before, seen = bits_of(classifier), []
        evaluator_of(watching(seen, bits_of)).evaluate([corruption])
        assert bits_of(classifier) == before
        assert seen[0] == before, "the clean model is measured first"
        assert before not in seen[1:], "then the corrupted one"
        assert len(seen) == 1 + (DEFAULT_TRIALS if corruption.stochastic else 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("call", range(MEASUREMENTS))
    def test_when_the_metric_raises(self, evaluator_of, one_of_each, bits_of, call, error, tiny_bert):
        model = tiny_bert(num_hidden_layers=1).train()
        before, calls = bits_of(model), []

        def metric(_):
            calls.append(None)
            if len(calls) > call:
                raise error("in the middle")
            return {"x": 0.0}

        with pytest.raises(error, match="in the middle"):
            evaluator_of(metric, model).evaluate(list(one_of_each.values()))
        assert bits_of(model) == before
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("call", range(6))
    def test_when_the_loss_raises(self, classifier, evaluator_of, bits_of, call):
        before, calls = bits_of(classifier), []

        def loss(model, batch):
            calls.append(None)
            if len(calls) > call:
                raise KeyboardInterrupt
            return model(**batch).loss

        classifier.train()
        with pytest.raises(KeyboardInterrupt):
            evaluator_of(loss=loss).evaluate([GradientCorruption(NORM), MultiStepCorruption(NORM)])
        assert bits_of(classifier) == before
        assert all(module.training for module in classifier.modules())
        assert all(parameter.grad is None for parameter in classifier.parameters())

    def test_the_model_is_never_copied(self, classifier, evaluator_of, one_of_each, monkeypatch):
        def places():
            return [(id(parameter), parameter.data_ptr()) for parameter in classifier.parameters()]

        def metric(model):
            assert model is classifier
            assert places() == before
            return {"x": 0.0}

        def refuse(*_):
            raise AssertionError("copied")

        before = places()
        monkeypatch.setattr(nn.Module, "__deepcopy__", refuse, raising=False)
        monkeypatch.setattr(nn.Module, "state_dict", refuse)
        with pytest.raises(AssertionError, match="copied"):
            copy.deepcopy(classifier)
        evaluator_of(metric).evaluate(list(one_of_each.values()))
        assert places() == before

    def test_grad_is_not_touched(self, classifier, evaluator_of, one_of_each, batches):
        classifier(**batches[0]).loss.backward()
        grads = [parameter.grad for parameter in classifier.parameters()]
        copies = [None if grad is None else grad.clone() for grad in grads]
        evaluator_of().evaluate(list(one_of_each.values()))
        for parameter, grad, before in zip(classifier.parameters(), grads, copies, strict=True):
            assert parameter.grad is grad
            assert grad is None or torch.equal(grad, before)

    def test_training_flags_of_every_module(self, bits_of):
        model = Moods()
        before, flags = bits_of(model), [module.training for module in model.modules()]

        def metric(model):
            assert not any(module.training for module in model.modules())
            model(torch.randn(8, 3))
            model.train()  # bad manners, as of a metric that is used between epochs
            return {"x": 0.0}

        def loss(model, batch):
            assert not any(module.training for module in model.modules())
            return model(batch).square().mean()

        evaluator = CorruptionEvaluator(
            model, metric, [torch.randn(2, 3)], loss=loss, target_modules=["last"], progress=False
        )
        evaluator.evaluate([GaussianNoise(1.0), GradientCorruption(NORM), MultiStepCorruption(NORM)])
        assert [module.training for module in model.modules()] == flags
        assert bits_of(model) == before


class TestSeeds:
    @pytest.mark.parametrize("seed", [0, 7])
    def test_trial_t_is_seeded_with_seed_plus_t(self, classifier, evaluator_of, seed):
        seen = []
        record = evaluator_of(watching(seen, weights_of)).evaluate([GaussianNoise(0.1)], trials=2, seed=seed)
        assert record.corruptions[0].seeds == (seed, seed + 1)
        for trial, corrupted_weights in enumerate(seen[1:]):
            generator = torch.Generator().manual_seed(seed + trial)
            noise = GaussianNoise(0.1)(dict(classifier.named_parameters()), generator=generator)
            expected = weights_of(classifier) + torch.cat([part.reshape(-1) for part in noise.values()])
            torch.testing.assert_close(corrupted_weights, expected, rtol=0, atol=0)
        assert not torch.equal(seen[1], seen[2])

    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_record(self, evaluator_of, one_of_each):
        corruptions = list(one_of_each.values())
        first = evaluator_of().evaluate(corruptions, seed=3).to_json()
        torch.rand(5)
        assert evaluator_of().evaluate(corruptions, seed=3).to_json() == first
        assert evaluator_of().evaluate(corruptions, seed=4).to_json() != first

    def test_the_global_generator_is_not_consumed(self, classifier, one_of_each):
        rows = [{"input_ids": torch.randint(1, 20, (6,)), "labels": torch.tensor(1)} for _ in range(6)]
        loader = DataLoader(rows, batch_size=4)  # draws from the global generator whenever it is walked through
        evaluator = CorruptionEvaluator(classifier, ClassificationMetric(loader), loader, progress=False)
        state = torch.get_rng_state()
        evaluator.evaluate(list(one_of_each.values()))
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_metric_that_draws_begins_with_the_same_numbers_each_time(self, classifier, one_of_each, batches):
        rows = [{name: values[0] for name, values in batch.items()} for batch in batches]
        loader = DataLoader(rows)  # draws from the global generator whenever gradients walk through it
        drawing = CorruptionEvaluator(classifier, lambda _: {"x": float(torch.rand(()))}, loader, progress=False)
        record = drawing.evaluate(list(one_of_each.values()))
        assert {value for row in record.rows() for value in row.metrics["x"]} == {record.clean.mean("x")}

    def test_only_stochastic_corruptions_have_several_trials(self, evaluator_of, corruption):
        [row] = evaluator_of().evaluate([corruption], trials=2, seed=5).corruptions
        assert row.seeds == ((5, 6) if corruption.stochastic else (5,))
        assert [len(values) for values in row.metrics.values()] == [len(row.seeds)] * 2
        assert row.corruption == next(name for name, kind in CORRUPTIONS.items() if type(corruption) is kind)
        assert row.label == str(corruption)
        assert row.settings == corruption.settings()


class TestRecord:
    def test_what_it_says(self, classifier, evaluator_of, batches):
        record = evaluator_of(target_modules=["query", "value"], layers=(0,)).evaluate([Quantization(2)], seed=9)
        assert record.model == "BertForSequenceClassification"
        assert record.target == {"target_modules": ["query", "value"], "layers": [0]}
        assert record.parameters == 2 * (8 * 8 + 8)
        attention = classifier.bert.encoder.layer[0].attention.self
        weights = [*attention.query.parameters(), *attention.value.parameters()]
        squared = sum(float((weight.detach() ** 2).sum()) for weight in weights)
        assert record.weights_norm == pytest.approx(math.sqrt(squared), rel=1e-5)
        assert record.weights == fingerprint_of_weights(classifier)
        assert set(record.versions) == {"hf-parcor", "torch", "transformers", "accelerate"}
        assert torch.__version__.startswith(record.versions["torch"])
        assert record.data == data_fingerprint(batches)
        assert record.clean.seeds == (9,)
        assert (record.clean.changed, record.clean.norm) == (0, 0)
        assert record.clean.metrics == {
            key: (value,) for key, value in ClassificationMetric(batches)(classifier.eval()).items()
        }

    def test_what_the_caller_and_the_metric_say_of_themselves(self, evaluator_of, batches):
        data, metric = EvaluationData("dev.tsv", rows=6), ClassificationMetric(batches)
        metric.notes = ("counted by hand",)
        record = evaluator_of(
            metric, evaluated_on=data, task="sorting", metric_info={"loss": MetricInfo(True, "nats")}
        )
        record = record.evaluate([Quantization(2)])
        assert (record.evaluated_on, record.task, record.notes) == (data, "sorting", ("counted by hand",))
        assert record.metric_info["loss"] == MetricInfo(True, "nats")
        assert evaluator_of().evaluate([]).task == "text-classification"

    def test_units_are_guessed_from_all_that_was_measured(self, evaluator_of):
        """A number between 0 and 1 that leaves it under corruption is no share."""
        seen = iter([0.5, 3.0])
        assert (
            evaluator_of(lambda model: {"accuracy": next(seen)}).evaluate([Quantization(2)]).info("accuracy").unit
            == ""
        )

    def test_a_wrapper_of_the_model_is_the_model(self, classifier, evaluator_of):
        wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
        nn.Module.__init__(wrapper)
        wrapper.module = classifier
        found = evaluator_of(model=wrapper, target_modules=["classifier"]).evaluate([Quantization(2)])
        assert found == evaluator_of(target_modules=["classifier"]).evaluate([Quantization(2)])

    def test_only_the_targets_are_corrupted(self, classifier, evaluator_of):
        names = {"bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.1.attention.self.query.bias"}
        before = {name: parameter.detach().clone() for name, parameter in classifier.named_parameters()}
        changed = []

        def changes(model):
            return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}

        evaluator = evaluator_of(
            watching(changed, changes),
            target_modules="attention",
            exclude_modules=["key", "value", "output"],
            layers=iter([-1]),
        )
        record = evaluator.evaluate([GaussianNoise(0.1), MultiStepCorruption(NORM)], trials=1)
        assert changed == [set(), names, names]
        assert record.target["layers"] == [-1]
        types = evaluator_of(module_types=nn.LayerNorm).evaluate([])
        assert types.target["module_types"] == "LayerNorm"
        assert types.parameters == 5 * 2 * 8

    def test_the_weights_are_those_that_the_model_has_when_it_is_called(self, classifier, evaluator_of):
        """Loading may give a model other parameters, and what is trained may change."""
        seen = []
        evaluator = evaluator_of(watching(seen, weights_of))
        evaluator.evaluate([Quantization(2)])
        classifier.load_state_dict({k: v.clone() for k, v in classifier.state_dict().items()}, assign=True)
        evaluator.evaluate([Quantization(2)])
        assert [torch.equal(one, seen[0]) for one in seen] == [True, False, True, False]
        classifier.bert.requires_grad_(False)
        record = evaluator.evaluate([Quantization(2)])
        assert record.parameters == sum(one.numel() for one in classifier.classifier.parameters())

    def test_size_of_the_corruption(self, classifier, evaluator_of):
        k = sum(parameter.numel() for parameter in classifier.parameters())
        ball, sparse, _ = (
            evaluator_of()
            .evaluate(
                [
                    RandomCorruption(CorruptionConstraint(epsilon=0.3)),
                    GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=0.1, top_n=10)),
                    UniformNoise(0.1),
                ]
            )
            .corruptions
        )
        assert ball.norm == pytest.approx(0.3, rel=1e-4)
        assert 0.9 * k < ball.changed <= k
        assert sparse.changed == 10
        assert sparse.norm == pytest.approx(0.1 * math.sqrt(10), rel=1e-4)

    def test_a_corruption_that_changes_nothing_is_noted(self, evaluator_of):
        record = evaluator_of().evaluate([GaussianNoise(0.0), GaussianNoise(0.1)], trials=2)
        assert record.corruptions[0].notes == ("no weight changed with seed 0", "no weight changed with seed 1")
        assert record.corruptions[1].notes == record.clean.notes == ()

    def test_a_gradient_that_is_not_finite_is_noted(self, evaluator_of):
        evaluator = evaluator_of(loss=lambda model, batch: model(**batch).loss * math.inf)
        [row] = evaluator.evaluate([GradientCorruption(NORM)]).corruptions
        assert row.norm == 0
        assert row.notes == ("no weight changed with seed 0",)

    def test_no_corruption_and_no_data(self, classifier):
        record = CorruptionEvaluator(classifier, lambda _: {"x": 1.0}, progress=False).evaluate([])
        assert record.corruptions == ()
        assert record.data == ""
        assert record.clean.metrics == {"x": (1.0,)}

    def test_a_corruption_outside_the_catalogue(self, evaluator_of):
        class Zero(Corruption):
            def _choose(self, weights, gradients, generator):
                return {name: -weight for name, weight in weights.items()}

            def __str__(self):
                return "zero"

        [row] = evaluator_of(lambda model: {"x": float(weights_of(model).abs().max())}).evaluate([Zero()]).corruptions
        assert (row.corruption, row.label, row.settings, row.metrics) == ("Zero", "zero", {}, {"x": (0.0,)})

    def test_tied_weights_are_corrupted_once(self, tiny_bert):
        model = tiny_bert(transformers.BertForMaskedLM)
        data = [{"input_ids": torch.randint(1, 20, (2, 5)), "labels": torch.randint(1, 20, (2, 5))}]
        evaluator = CorruptionEvaluator(model, lambda _: {"x": 0.0}, data, progress=False)
        record = evaluator.evaluate([GradientCorruption(CorruptionConstraint(epsilon=0.5))])
        assert record.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert record.corruptions[0].norm == pytest.approx(0.5, rel=1e-4)

    def test_the_progress_bar_moves_with_every_batch(self, classifier, batches, monkeypatch):
        class Bar(tqdm):
            def update(self, n=1):
                steps.append(n)
                super().update(n)
                assert self.n <= self.total  # else tqdm warns

        steps = []
        monkeypatch.setattr("hf_parcor.evaluation.measurement.tqdm", Bar)
        many = (20 * batches)[:11]  # elevenths add up to more than one, as floats
        metric, targets = ClassificationMetric(many), {"head": ["classifier"], "pooler": ["bert.pooler"]}
        LayerProbe(classifier, metric, targets=targets).evaluate([GaussianNoise(0.1)], trials=2)
        assert sum(steps) == pytest.approx(4)
        assert max(steps) < 2  # else nothing would be known of what is left before half of it is done
        assert len(steps) > 2

    def test_progress_bar(self, evaluator_of, capsys):
        evaluator_of(progress=True).evaluate([GaussianNoise(0.1), Quantization(4)], trials=2)
        assert "3/3" in capsys.readouterr().err
        evaluator_of(progress=True).evaluate([])  # nothing to wait for
        evaluator_of(progress=False).evaluate([GaussianNoise(0.1)])
        assert capsys.readouterr().err == ""


class TestMetricValues:
    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            pytest.param(math.nan, "nan", id="nan"),
            pytest.param(None, "None", id="none"),
            pytest.param("0.5", "'0.5'", id="text"),
            pytest.param(torch.ones(2), "tensor([1., 1.])", id="vector"),
            pytest.param([1.0], "[1.0]", id="list"),
        ],
    )
    def test_what_is_no_number_is_kept_as_nan_noted_and_warned_of(self, evaluator_of, value, shown, caplog):
        calls = []

        def metric(_):
            calls.append(None)
            return {"fine": 0.5, "odd": 0.25 if len(calls) == 1 else value}

        with caplog.at_level(logging.WARNING):
            record = evaluator_of(metric).evaluate([GaussianNoise(0.1)], trials=2, seed=4)
        [row] = record.corruptions
        assert record.clean.metrics == {"fine": (0.5,), "odd": (0.25,)}
        assert record.clean.notes == ()
        assert row.metrics["fine"] == (0.5, 0.5)
        assert all(math.isnan(number) for number in row.metrics["odd"])
        assert row.notes == (f"odd was {shown} with seed 4", f"odd was {shown} with seed 5")
        messages = [entry.getMessage() for entry in caplog.records]
        assert messages == [f"Gaussian σ=0.1: {note}; it is kept in the record." for note in row.notes]

    @pytest.mark.parametrize("error", [ValueError, ZeroDivisionError])
    def test_what_a_function_refuses_of_a_corrupted_model_is_nan(self, evaluator_of, error, caplog):
        calls = []

        def metric(_):
            calls.append(None)
            if len(calls) == refused:
                raise error("Input contains NaN.")
            return {"fine": 0.5, "other": 0.25}

        refused = 1
        with pytest.raises(error, match="Input contains NaN"):
            evaluator_of(metric).evaluate([Quantization(4), Quantization(3)])
        calls, refused = [], 2
        rows = evaluator_of(metric).evaluate([Quantization(4), Quantization(3)]).corruptions
        assert [str(row.metrics) for row in rows] == [
            "{'fine': (nan,), 'other': (nan,)}",
            "{'fine': (0.5,), 'other': (0.25,)}",
        ]
        assert "without corruption, so all it finds is NaN: Input contains NaN." in caplog.text

    def test_infinity_is_kept_and_noted(self, evaluator_of):
        record = evaluator_of(lambda _: {"perplexity": math.inf}).evaluate([])
        assert record.clean.metrics == {"perplexity": (math.inf,)}
        assert record.clean.notes == ("perplexity was inf with seed 0",)

    @for_each(
        "value",
        [
            *(1, True, torch.tensor(1.0), torch.tensor([1.0], dtype=torch.bfloat16)),
            *(np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), np.array([1])),
        ],
    )
    def test_numbers_of_all_kinds(self, evaluator_of, batches, value):
        assert evaluator_of(lambda _: {"x": value}).evaluate([]).clean.metrics == {"x": (1.0,)}
        of_classes = PredictionMetric(batches, lambda predictions, references: {"y": 0.0, "x": value})
        assert evaluator_of(of_classes).evaluate([]).clean.metrics == {"y": (0.0,), "x": (1.0,)}

    @for_each("name", [1, 0.5, None, True, (1, 2), "1"])
    def test_names_that_are_no_texts_are_their_texts(self, evaluator_of, name):
        record = evaluator_of(lambda _: {name: 2.0, "epoch": 1}).evaluate([GaussianNoise(0.1)], trials=1)
        assert [row.metrics for row in record.rows()] == [{str(name): (2.0,)}] * 2
        assert EvaluationRecord.from_json(record.to_json()) == record

    def test_a_metric_that_comes_and_goes(self, evaluator_of):
        values = iter([{"a": 1.0}, {"a": 1.0}, {"b": 3.0}])
        [row] = evaluator_of(lambda _: next(values)).evaluate([GaussianNoise(0.1)], trials=2).corruptions
        assert {name: str(numbers) for name, numbers in row.metrics.items()} == {"a": "(1.0, nan)", "b": "(nan, 3.0)"}
        assert row.notes == ("a was missing with seed 1", "b was missing with seed 0")

    @pytest.mark.parametrize("value", [0.5, None, {}, [("accuracy", 0.5)]])
    def test_a_metric_must_return_a_mapping(self, evaluator_of, value, monkeypatch):
        def refuse(*_):
            raise AssertionError("a weight was touched")

        monkeypatch.setattr("hf_parcor.evaluation.measurement.corrupted_model", refuse)
        with pytest.raises(TypeError, match="metric: expected numbers by name"):
            evaluator_of(lambda _: value).evaluate([GaussianNoise(0.1)])


class TestFrozenWeights:
    @pytest.fixture(autouse=True)
    def freeze(self, classifier):
        classifier.requires_grad_(False).classifier.requires_grad_(True)

    def flags_of(self, model):
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    @pytest.mark.slow
    def test_named_they_are_corrupted_like_any_other(self, classifier, evaluator_of, one_of_each, bits_of):
        frozen, before = self.flags_of(classifier), bits_of(classifier)
        record = evaluator_of(target_modules="all").evaluate(list(one_of_each.values()))
        assert self.flags_of(classifier) == frozen == ["classifier.weight", "classifier.bias"]
        assert bits_of(classifier) == before
        assert all(parameter.grad is None for parameter in classifier.parameters())
        classifier.requires_grad_(True)
        other = evaluator_of(target_modules="all").evaluate(list(one_of_each.values()))
        assert record.to_json() == other.to_json()

    def test_not_named_they_are_left_out(self, classifier, evaluator_of):
        only = evaluator_of(target_modules=["classifier"]).evaluate([GradientCorruption(NORM)]).corruptions
        assert evaluator_of().evaluate([GradientCorruption(NORM)]).corruptions == only

    def test_flags_come_back_when_the_loss_raises(self, classifier, evaluator_of):
        def loss(model, batch):
            raise KeyboardInterrupt

        frozen = self.flags_of(classifier)
        with pytest.raises(KeyboardInterrupt):
            evaluator_of(target_modules="all", loss=loss).evaluate([GradientCorruption(NORM)])
        assert self.flags_of(classifier) == frozen


def test_one_corruption_is_as_good_as_a_list_of_one(evaluator_of):
    measure = evaluator_of().evaluate
    assert measure(Quantization(3)) == measure([Quantization(3)])


class TestErrorsBeforeAnythingIsMeasured:
    @pytest.fixture
    def refusing(self, evaluator_of):
        def metric(_):
            raise AssertionError("measured")

        def build(**options):
            return evaluator_of(metric, **options)

        return build

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda model, metric: CorruptionEvaluator(model, "accuracy"), "metric: expected a function"),
            (lambda model, metric: CorruptionEvaluator("bert", metric), "model: expected a module, got 'bert'"),
            (lambda model, metric: LayerProbe(model, metric, targets=["all"]), "targets: expected the parts by name"),
        ],
    )
    def test_what_is_no_metric_and_what_are_no_parts(self, classifier, batches, make, says):
        with pytest.raises(TypeError, match=says):
            make(classifier, ClassificationMetric(batches))

    @pytest.mark.parametrize("wrong", ["gaussian", None, GaussianNoise])
    def test_what_is_no_corruption(self, refusing, wrong):
        with pytest.raises(TypeError, match="expected Corruption objects, got"):
            refusing().evaluate([GaussianNoise(0.1), wrong])

    @pytest.mark.parametrize(("trials", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
    def test_trials(self, refusing, trials, error):
        with pytest.raises(error, match="trials: expected a whole number >= 1"):
            refusing().evaluate([], trials=trials)

    @pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), ("0", TypeError), (None, TypeError)])
    def test_seed(self, refusing, seed, error):
        with pytest.raises(error, match="seed: expected a whole number >= 0"):
            refusing().evaluate([], seed=seed)

    @pytest.mark.parametrize("kind", [GradientCorruption, MultiStepCorruption])
    def test_missing_batches(self, refusing, kind):
        with pytest.raises(ValueError, match=r"batches: expected data for .*-.* L2 ε=0.5, got None; pass batches="):
            refusing(data=None).evaluate([GaussianNoise(0.1), kind(NORM)])

    def test_empty_data(self, refusing):
        with pytest.raises(ValueError, match="expected at least one item with a label, got 0 batches"):
            refusing(data=[]).evaluate([GradientCorruption(NORM)])

    def test_an_iterator(self, refusing, batches):
        with pytest.raises(ValueError, match="walked through again, got the iterator"):
            refusing(data=iter(batches))

    def test_an_integer_parameter(self, refusing):
        model = nn.Linear(2, 2)
        model.scale = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(TargetError, match=r"expected weights that can be corrupted, got \['scale'\], .* are int8"):
            refusing(model=model, target_modules=["scale"])
        refusing(model=model, target_modules="all")  # the others can be measured

    def test_weights_that_share_their_memory_under_two_names(self, refusing):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = nn.Parameter(model[0].weight.data)
        with pytest.raises(ValueError, match=r"every weight under one name, got that of 0\.weight"):
            refusing(model=model)

    def test_targets_that_match_nothing(self, refusing):
        with pytest.raises(TargetError):
            refusing(target_modules=["no-such-module"])
        with pytest.raises(TypeError, match="layers"):
            refusing(layers=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CorruptionEvaluator, LayerProbe])
def test_the_batches_are_those_of_the_metric(classifier, batches, kind):
    """Unless others are given: the record is the same, and says on which data gradients were taken."""
    corruptions = [GradientCorruption(NORM), MultiStepCorruption(NORM, steps=2)]
    metric = ClassificationMetric(batches)
    found = kind(classifier, metric, progress=False).evaluate(corruptions)
    assert found.to_json() == kind(classifier, metric, batches, progress=False).evaluate(corruptions).to_json()
    assert found.data
    assert kind(classifier, metric, batches[:1], progress=False).evaluate(corruptions).data != found.data


def test_corruptions_may_be_any_iterable_of_them(evaluator_of):
    record = evaluator_of().evaluate(corruption for corruption in [Quantization(4), BitFlips(count=1)])
    assert len(record.corruptions) == 2


class TestADamagedModelIsNotWritten:
    @pytest.mark.parametrize("part", [lambda model: model, lambda model: model.bert], ids=["model", "part"])
    def test_a_metric_that_saves_is_refused_while_weights_are_corrupted(self, classifier, bits_of, tmp_path, part):
        before, saved = bits_of(classifier), []

        def saving(model):
            part(model).save_pretrained(tmp_path / f"at-{len(saved)}")
            saved.append(bits_of(model))
            return {"one": 1.0}

        with pytest.raises(RuntimeError, match="save_pretrained: expected"):
            CorruptionEvaluator(classifier, saving, progress=False).evaluate([GaussianNoise(0.1)])
        assert saved == [before], "the clean model alone"
        assert [path.name for path in tmp_path.iterdir()] == ["at-0"]
        assert bits_of(classifier) == before
        assert "save_pretrained" not in vars(part(classifier))
        part(classifier).save_pretrained(tmp_path / "after")

    def test_a_loss_that_saves_is_refused_too(self, classifier, batches, tmp_path):
        def saving(model, batch):
            model.save_pretrained(tmp_path / "damaged")
            return model(**batch).loss

        with pytest.raises(RuntimeError, match="save_pretrained"):
            measure_indicators(classifier, batches, [NORM], loss=saving, probes=0, draws=1, progress=False)

    def test_whoever_asks_for_it_gets_it(self, classifier, bits_of, tmp_path):
        parameters = select_parameters(classifier, target_modules="all-linear")
        with corrupted(parameters, GaussianNoise(0.1)(parameters)):
            damaged = bits_of(classifier)
            classifier.save_pretrained(tmp_path)
        assert bits_of(type(classifier).from_pretrained(tmp_path)) == damaged
