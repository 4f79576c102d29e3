"""A run that collapses is noticed and said."""

from __future__ import annotations

import logging
import math

import pytest

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer
from hf_parcor.training import signs_of_collapse


def history(clean, corrupted=None):
    corrupted = clean if corrupted is None else corrupted
    return [
        {"loss": (a + b) / 2, "loss_clean": a, "loss_corrupted": b} for a, b in zip(clean, corrupted, strict=True)
    ] + [{"eval_loss": 3.0}]


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (history([0.70, 0.69, 0.69, 0.69, 0.69, 0.70]), "did not fall"),
        (history([0.7, 0.5, 0.3, 0.9, 0.9, 0.9]), "did not fall"),
        (history([0.70, 0.6, 0.5, 0.4], [0.8, 1.0, 2.0, 4.0]), "10.0 times"),
        (history([0.70, math.nan, 0.5, 0.4]), "NaN"),
        ([{"loss": 0.7}] * 5, "did not fall"),
    ],
)
def test_collapse_is_seen(log, says):
    assert any(says in sign for sign in signs_of_collapse(log))


@pytest.mark.parametrize(
    "log",
    [
        history([0.70, 0.6, 0.5, 0.4], [0.8, 0.7, 0.6, 0.5]),
        history([0.70, 0.69]),  # too short to tell
        history([0.0, 0.70, 0.6, 0.5, 0.4]),  # the first step overflowed, and logged no loss
        [{"eval_loss": math.nan}],
        [],
        [{"loss": 0.7 - 0.05 * step} for step in range(8)],
    ],
)
def test_healthy_runs_are_left_in_peace(log):
    assert signs_of_collapse(log) == []


def test_trainer_says_so_at_the_end(tiny_bert, train, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        defense = MultiStepRisk(CorruptionConstraint(p=math.inf, epsilon=1.0), steps=1)
        train(ParameterDefenseTrainer, tiny_bert(), {"learning_rate": 1e-4}, defense=defense)
    assert any("may have collapsed" in record.getMessage() for record in caplog.records)
