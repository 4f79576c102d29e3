"""Where the defense does nothing, training is the stock Trainer's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from trainings import logs_of, losses_of
from transformers import Trainer

from hf_parcor import (
    CorruptionConstraint,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
)

L2 = CorruptionConstraint(epsilon=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "defense",
    [
        MultiStepRisk(L2, steps=0),
        MultiStepRisk(CorruptionConstraint(epsilon=0.0), steps=2),
        MultiStepRisk(L2, steps=2, start_epoch=2.0),
    ],
    ids=["steps=0", "epsilon=0", "before the start epoch"],
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_equals_the_stock_trainer_bit_for_bit(tiny_bert, train, defense, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    stock = train(Trainer, tiny_bert(), options)
    ours = train(ParameterDefenseTrainer, tiny_bert(), options, defense=defense)
    _assert_same_run(stock, ours)


def test_defense_none_equals_the_stock_trainer(tiny_bert, train):
    stock = train(Trainer, tiny_bert())
    ours = train(ParameterDefenseTrainer, tiny_bert(), {"defense": "none"}, kind=ParameterDefenseTrainingArguments)
    _assert_same_run(stock, ours)


def test_start_epoch_begins_in_the_middle(tiny_bert, train):
    options = {"num_train_epochs": 2}
    stock = train(Trainer, tiny_bert(), options)
    ours = train(ParameterDefenseTrainer, tiny_bert(), options, defense=MultiStepRisk(L2, steps=1, start_epoch=1.0))
    logs = logs_of(ours)
    plain = logs_of(stock)
    assert [entry["loss"] for entry in logs[:6]] == [entry["loss"] for entry in plain[:6]]
    assert ["loss_corrupted" in entry for entry in logs] == [False] * 6 + [True] * 6


def _assert_same_run(stock: Trainer, ours: Trainer) -> None:
    losses = [losses_of(trainer) for trainer in (stock, ours)]
    assert losses[0]
    assert losses[0] == losses[1]
    assert stock.state.total_flos == ours.state.total_flos
    for (name, first), second in zip(stock.model.state_dict().items(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
