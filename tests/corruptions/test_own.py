"""A corruption outside of the library, as the page of corruptions shows it, made of public names alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from for_each import for_each
from torch import nn
from trainings import QUIET
from transformers import TrainingArguments

import hf_parcor.corruptions
from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRisk,
    DefendedBackward,
    EvaluationRecord,
    GradientCorruption,
    ParameterDefenseTrainer,
    Quantization,
    RobustnessReport,
    corrupted,
)
from hf_parcor.corruptions import Corruption, Pieces, Replacement
from hf_parcor.evaluation import ClassificationMetric

PAGE = (Path(hf_parcor.corruptions.__file__).parent / "README.md").read_text(encoding="utf-8")
NAMES: dict[str, type[Corruption]] = {}
exec(
    compile(re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1], "README.md", "exec", dont_inherit=True), NAMES
)
StuckAtZero = NAMES["StuckAtZero"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@for_each("rate", [0.0, 0.1, 0.5, 1.0])
def test_each_cell_is_stuck_with_that_probability_and_no_other_changes(rate):
    weights = {"a": torch.randn(300, 40), "b": torch.randn(5_000).to(torch.bfloat16)}
    values = StuckAtZero(rate)(weights, generator=seeded())
    stuck = {name: values[name] == 0 for name in weights}
    assert all(torch.equal(values[name][~stuck[name]], weights[name][~stuck[name]]) for name in weights)
    cells = sum(weight.numel() for weight in weights.values())
    count = sum(int(which.sum()) for which in stuck.values())
    assert abs(count - rate * cells) <= 5 * math.sqrt(cells * rate * (1 - rate))  # five deviations of a binomial


@for_each("rate", [-0.1, 1.5, math.nan])
def test_what_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="rate: expected"):
        StuckAtZero(rate)


@dataclass(frozen=True)
class Halved(Corruption):
    """Half of every weight, in one of the forms that a corruption has."""

    form: str

    def __str__(self):
        return f"half as {self.form}"

    def _choose(self, weights, gradients, generator):
        pairs = ((name, weight / 2 if "new" in self.form else -weight / 2) for name, weight in weights.items())
        if "pieces" in self.form:
            return Pieces(pairs, replaces="new" in self.form)
        return Replacement(pairs) if "new" in self.form else dict(pairs)


@for_each("form", ["added", "new values", "added in pieces", "new values in pieces"])
def test_every_form_writes_the_same_weights(form):
    model = nn.Linear(3, 2)
    halves = [weight.detach() / 2 for weight in model.parameters()]
    parameters = dict(model.named_parameters())
    for made in (Halved(form), Halved(form).pieces):
        with corrupted(parameters, made(parameters)):
            assert all(torch.equal(weight, half) for weight, half in zip(model.parameters(), halves, strict=True))


def test_a_record_of_it_comes_back_and_a_report_reads_it(tiny_bert, tmp_path):
    batch = {"input_ids": torch.randint(20, (6, 4)), "labels": torch.tensor([0, 1] * 3)}
    metric = ClassificationMetric([batch])
    rates = (0.0, 0.5, 1.0)
    found = CorruptionEvaluator(tiny_bert(), metric, progress=False).evaluate([StuckAtZero(rate) for rate in rates])
    found.save(tmp_path / "stuck.json")
    record = EvaluationRecord.load(tmp_path / "stuck.json")
    assert record == found
    nothing, _, everything = record.corruptions
    assert nothing.metrics["loss"] == (record.clean.mean("loss"),) * 3
    # A model without weights says nothing: the loss of two classes alike.
    assert everything.metrics["loss"] == pytest.approx([math.log(2)] * 3)
    assert [row.settings for row in record.corruptions] == [{"rate": rate} for rate in rates]
    assert {row.kind.title for row in record.corruptions} == {StuckAtZero.title}
    assert StuckAtZero.title in RobustnessReport(record).to_markdown(tmp_path / "stuck.md").read_text(encoding="utf-8")


def test_training_against_it_takes_the_gradient_where_it_is_written(tiny_bert, tmp_path):
    """Where every cell is stuck the logits are alike, and only their bias has a gradient: half minus the labels."""
    model = tiny_bert()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        **QUIET,
    )
    rows = [{"input_ids": [1, 2, 3], "labels": label} for label in (0, 1, 1, 1)]
    defense = CorruptionRisk(StuckAtZero(1.0), clean_weight=0)
    ParameterDefenseTrainer(model=model, args=arguments, train_dataset=rows, defense=defense).train()
    moved = before["classifier.bias"] - 0.5 * (torch.tensor([0.5, 0.5]) - torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(model.classifier.bias.detach(), moved)
    for name, weight in model.named_parameters():
        assert name == "classifier.bias" or torch.equal(weight, before[name]), name


@dataclass(frozen=True)
class AlongTheGradientIfThereIsOne(Corruption):
    """It did not ask for a gradient, and so there is none: not in an evaluation that has data, nor in training."""

    def _choose(self, weights, gradients, generator):
        assert gradients is None
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}


def test_a_gradient_that_was_not_asked_for_is_none_in_an_evaluation_and_in_training(tiny_bert, tmp_path):
    model, corruption = tiny_bert(), AlongTheGradientIfThereIsOne()
    batch = {"input_ids": torch.randint(20, (6, 4)), "labels": torch.tensor([0, 1] * 3)}
    CorruptionEvaluator(model, ClassificationMetric([batch]), [batch], progress=False).evaluate([corruption])
    rows = [{"input_ids": [1, 2, 3], "labels": 0}]
    arguments = TrainingArguments(tmp_path, max_steps=1, **QUIET)
    beside = CorruptionRisk([GradientCorruption(CorruptionConstraint(epsilon=0.1)), corruption])
    for defense in (CorruptionRisk(corruption), beside):
        ParameterDefenseTrainer(model=model, args=arguments, train_dataset=rows, defense=defense).train()


@dataclass(frozen=True)
class ForMatricesAlone(Corruption):
    """It refuses vectors, and would not notice one where it is chosen."""

    def check(self, weights):
        for name, weight in weights.items():
            if weight.ndim < 2:
                raise ValueError(f"{name}: expected a matrix, got a vector; leave it out")

    def _choose(self, weights, gradients, generator):
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}


def test_weights_that_it_refuses_are_refused_before_anything_is_measured_or_trained(tiny_bert, tmp_path):
    model, corruption = tiny_bert(), ForMatricesAlone()
    batch = {"input_ids": torch.randint(20, (6, 4)), "labels": torch.tensor([0, 1] * 3)}
    defense, arguments = CorruptionRisk([Quantization(4), corruption]), TrainingArguments(tmp_path, **QUIET)
    starts = (
        lambda: CorruptionEvaluator(model, ClassificationMetric([batch]), progress=False).evaluate([corruption]),
        lambda: ParameterDefenseTrainer(model=model, args=arguments, defense=defense),
        lambda: DefendedBackward(Accelerator(cpu=True), defense, model),
    )
    for start in starts:
        with pytest.raises(ValueError, match="expected a matrix"):
            start()
    ParameterDefenseTrainer(model=model, args=arguments, defense=defense, target_modules=[r".*\.query\.weight"])
