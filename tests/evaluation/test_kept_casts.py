"""What PyTorch keeps of weights, such as the casts of an outer autocast, is of the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from for_each import for_each
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from trainings import QUIET
from transformers import TrainingArguments

from hf_parcor import (
    ACRT,
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MultiStepCorruption,
    MultiStepRisk,
    ParameterDefenseTrainer,
    corrupted,
    defended_backward,
)
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.indicators import LossOverData, measure_indicators
from hf_parcor.injection import Injection, Replacement
from hf_parcor.records import EvaluationRecord

CONSTRAINT = CorruptionConstraint(epsilon=2.0)
DEFENSES = {"multi_step_risk": MultiStepRisk(CONSTRAINT, steps=2), "acrt": ACRT(CONSTRAINT)}


def autocast(*, keeps: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=keeps)


def evaluated(target: Any = None, reuse: bool = True) -> Callable[..., Any]:
    def run(model: nn.Module, batches: list, corruptions: list) -> Any:
        metric = ClassificationMetric(batches)
        evaluator = CorruptionEvaluator(
            model, metric, batches, target_modules=target, reuse_prefix=reuse, progress=False
        )
        return evaluator.evaluate(corruptions, trials=2)

    return run


def evaluated_by_a_function(model: nn.Module, batches: list, corruptions: list) -> Any:
    def metric(model: nn.Module) -> dict[str, float]:  # with gradients enabled, as a user may have it
        return {"loss": sum(float(model(**batch).loss.detach()) for batch in batches)}

    return CorruptionEvaluator(model, metric, batches, progress=False).evaluate(corruptions)


def probed(model: nn.Module, batches: list, corruptions: list) -> Any:
    probe = LayerProbe(model, ClassificationMetric(batches), batches, progress=False)
    return probe.evaluate(corruptions, trials=2)


def indicated(model: nn.Module, batches: list, corruptions: list) -> Any:
    return measure_indicators(model, batches, [CONSTRAINT], draws=2, probes=2, progress=False)


MEASURED = {
    "evaluator": evaluated(),
    "one layer": evaluated("last-encoder-layer"),
    "one layer, no prefix": evaluated("last-encoder-layer", reuse=False),
    "metric is a function": evaluated_by_a_function,
    "probe": probed,
    "indicators": indicated,
}


def test_the_loss_over_data_is_that_of_weights_that_were_written_since() -> None:
    model = parametrizations.weight_norm(nn.Linear(2, 1, bias=False))
    over_data = LossOverData(
        model, dict(model.named_parameters()), [torch.ones(1, 2)], lambda model, batch: model(batch).sum()
    )
    with parametrize.cached():
        before = float(model(torch.ones(1, 2)).detach())
        with torch.no_grad():
            model.parametrizations.weight.original0.mul_(3)
        assert over_data.value() == pytest.approx(3 * before)


@pytest.mark.slow
@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize("measure", MEASURED.values(), ids=MEASURED.keys())
def test_measurements(classifier, batches, one_of_each, measure, stepped_before) -> None:
    start = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}

    def run(*, keeps: bool) -> Any:
        torch.manual_seed(0)
        classifier.load_state_dict(start)
        with autocast(keeps=keeps):
            if stepped_before:
                classifier(**batches[0])  # leaves casts that an optimizer's step makes stale
                with torch.no_grad():
                    classifier.classifier.weight.mul_(2)
            return measure(classifier, batches, list(one_of_each.values()))

    expected = run(keeps=False)
    assert run(keeps=True).to_json() == expected.to_json()  # where NaN equals NaN
    if isinstance(expected, EvaluationRecord):
        rows = expected.rows()
        assert len({row.metrics["loss"] for row in rows}) == len(rows), "every corruption does something"


def test_frozen_weights(classifier, batches) -> None:
    classifier.requires_grad_(False)
    corruptions = [GaussianNoise(0.5), GradientCorruption(CONSTRAINT)]

    def run(*, keeps: bool) -> Any:
        with autocast(keeps=keeps):
            return evaluated()(classifier, batches, corruptions)

    assert run(keeps=True) == run(keeps=False)


@pytest.mark.parametrize("defense", DEFENSES.values(), ids=DEFENSES.keys())
@pytest.mark.parametrize("seen_before", [False, True])
def test_a_defended_step_of_a_loop(tiny_bert, batches, defense, seen_before) -> None:
    def run(*, keeps: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = tiny_bert(initializer_range=0.5).eval()
        with autocast(keeps=keeps):
            if seen_before:
                model(**batches[1])
            found = defended_backward(Accelerator(cpu=True), defense, model, lambda: model(**batches[0]).loss)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [found.clean, found.corrupted, found.risk, *gradients]

    expected = run(keeps=False)
    torch.testing.assert_close(run(keeps=True), expected, rtol=0, atol=0)
    assert expected[1] > expected[0] + 0.1


@pytest.mark.parametrize("target", [None, "last-encoder-layer"])
def test_a_step_of_the_trainer(tiny_bert, batches, tmp_path, target) -> None:
    def run(*, keeps: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = tiny_bert(initializer_range=0.5, **tiny.STILL)
        arguments = TrainingArguments(str(tmp_path), **QUIET)
        trainer = ParameterDefenseTrainer(
            model=model, args=arguments, defense=DEFENSES["multi_step_risk"], target_modules=target
        )
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # as train() sets it
        with autocast(keeps=keeps):
            loss = trainer.training_step(model, dict(batches[0]), num_items_in_batch=None)
            again = trainer.training_step(model, dict(batches[1]), num_items_in_batch=None)
        return [loss, again, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    torch.testing.assert_close(run(keeps=True), run(keeps=False), rtol=0, atol=0)


def test_every_write_is_seen() -> None:
    layer = nn.Linear(4, 4, bias=False)
    clean = layer.weight.detach().clone()
    x = torch.eye(4)

    def seen() -> Tensor:
        return layer(x).detach().float().T

    ones = {"weight": torch.ones(4, 4)}
    with autocast(keeps=True):
        assert torch.equal(seen(), clean.bfloat16().float())
        injection = Injection(dict(layer.named_parameters()))
        for write, expected in (
            (lambda: injection.displace(ones), clean + 1),
            (lambda: injection.displace(ones), clean + 2),
            (injection.restore, clean),
            (lambda: injection.write(Replacement(ones)), torch.ones(4, 4)),
            (lambda: injection.withdraw(2.0), clean),
        ):
            write()
            assert torch.equal(seen(), expected.bfloat16().float())


def test_also_where_autocast_is_off_inside_of_an_outer_one() -> None:
    layer = nn.Linear(4, 4, bias=False)
    x = torch.eye(4)
    with autocast(keeps=True):
        before = layer(x)
        with (
            torch.autocast("cpu", enabled=False),
            corrupted({"weight": layer.weight}, {"weight": torch.ones(4, 4)}),
            torch.autocast("cpu", dtype=torch.bfloat16),  # as a metric may do
        ):
            inside = layer(x)
        after = layer(x)
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)


@for_each("kind", [dict, Replacement])
def test_what_parametrizations_keep(kind) -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    weights = dict(layer.named_parameters())
    x = torch.randn(2, 3)
    values = kind({name: torch.full(weight.shape, 2.0) for name, weight in weights.items()})
    with corrupted(weights, values):
        expected = layer(x)
    with parametrize.cached():
        clean = layer(x)
        with corrupted(weights, values):
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), clean)
    assert not torch.equal(clean, expected)


def test_gradients_where_parametrizations_are_kept(batches, tiny_bert) -> None:
    model = tiny_bert(initializer_range=0.5)
    parametrizations.weight_norm(model.classifier)
    corruptions = [GradientCorruption(CONSTRAINT), MultiStepCorruption(CONSTRAINT), GaussianNoise(0.5)]
    expected = evaluated(["classifier"])(model, batches, corruptions)
    with parametrize.cached():
        with torch.no_grad():
            model(**batches[0])
        assert evaluated(["classifier"])(model, batches, corruptions) == expected
    assert all(row.changed for row in expected.corruptions)
