"""Every defense inside the real Trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from hf_parcor import ACRT, AWP, SAM, CorruptionConstraint, GradientPenalty, MultiStepRisk, ParameterDefenseTrainer
from hf_parcor.defenses import DEFENSES

L2 = CorruptionConstraint(epsilon=0.1)
DEFENDED = {
    "multi_step_risk": MultiStepRisk(L2, steps=2),
    "acrt": ACRT(L2, alpha=0.3),
    "sam": SAM(L2),
    "awp": AWP(L2, steps=2),
    "gradient_penalty": GradientPenalty(weight=0.1),
}


def test_all_defenses_are_here():
    assert DEFENDED.keys() == DEFENSES.keys()


@pytest.mark.parametrize("name", DEFENDED)
@pytest.mark.parametrize("target", ["all", "last-encoder-layer"])
def test_trains_and_logs(tiny_bert, train, name, target):
    defense = DEFENDED[name]
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 6}
    stock = train(Trainer, tiny_bert(dropout=0.0), options)
    ours = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, defense=defense, target_modules=target)
    plain, logs = ([entry for entry in t.state.log_history if "loss" in entry] for t in (stock, ours))
    assert len(logs) == len(plain) == ours.state.global_step
    # Before the first update both see the same weights, and the log of the clean loss must agree.
    assert logs[0]["loss_clean"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert logs[0]["loss"] > plain[0]["loss"]
    assert logs[-1]["loss_clean"] < logs[0]["loss_clean"]
    assert ours.state.total_flos == pytest.approx(defense.cost * stock.state.total_flos)


@pytest.mark.parametrize("name", DEFENDED)
def test_stock_before_the_start_epoch(tiny_bert, train, name):
    from dataclasses import replace

    stock = train(Trainer, tiny_bert())
    ours = train(ParameterDefenseTrainer, tiny_bert(), defense=replace(DEFENDED[name], start_epoch=5.0))
    for first, second in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(first, second)
