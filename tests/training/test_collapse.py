"""A run that collapses is noticed and said."""

from __future__ import annotations

import logging
import math

import pytest
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
)
from hf_parcor.training import CollapseCallback, signs_of_collapse

L2, NOWHERE = CorruptionConstraint(epsilon=0.1), CorruptionConstraint(epsilon=0.0)


def history(clean, corrupted=None):
    corrupted = clean if corrupted is None else corrupted
    return [
        {"loss": (a + b) / 2, "loss_clean": a, "loss_corrupted": b} for a, b in zip(clean, corrupted, strict=True)
    ] + [{"eval_loss": 3.0}]


@for_each(
    ("log", "says"),
    [
        (history([0.70, 0.69, 0.69, 0.69, 0.69, 0.70]), "did not fall"),
        (history([0.7, 0.5, 0.3, 0.9, 0.9, 0.9]), "did not fall"),
        (history([0.70, 0.6, 0.5, 0.4], [0.8, 1.0, 2.0, 4.0]), "10.0 times"),
        (
            [{"loss": 0.7}, {"loss": 0.6}, *history([0.5, 0.4, 0.3, 0.2], [2.0, 2.0, 2.0, 2.0])],
            "10.0 times",
        ),  # begun late
        (history([0.70, math.nan, 0.5, 0.4]), "NaN"),
        ([{"loss": 0.7}] * 5, "did not fall"),
    ],
)
def test_collapse_is_seen(log, says):
    assert any(says in sign for sign in signs_of_collapse(log))


@for_each(
    "log",
    [
        history([0.70, 0.6, 0.5, 0.4], [0.8, 0.7, 0.6, 0.5]),
        history([0.70, 0.69]),  # too short to tell
        [{"loss": 0.0}, *history([0.70, 0.6, 0.5, 0.4])],  # the first step overflowed, and logged no loss
        [{"eval_loss": math.nan}],
        [],
        [{"loss": 0.7 - 0.05 * step} for step in range(8)],
        # Embeddings that were tuned, along the gradient and for 2 bits: both losses fall, and one stays the larger.
        history([0.06, 0.05, 0.02, 0.01, 0.015, 0.02, 0.01, 0.01], [0.19, 0.15, 0.09, 0.06, 0.05, 0.06, 0.05, 0.06]),
        history([0.06, 0.07, 0.04, 0.02, 0.03, 0.04, 0.03, 0.03], [2.9, 2.1, 1.3, 0.9, 0.7, 0.7, 0.5, 0.5]),
    ],
)
def test_healthy_runs_are_left_in_peace(log):
    assert signs_of_collapse(log) == []


@for_each(
    ("clean", "corrupted"),
    [
        ([-2.05 - step / 10 for step in range(8)], [-1.95 - step / 10 for step in range(8)]),  # densities
        ([-2.0, -2.5, -3.0, -3.0], [-1.0, 1.0, 2.0, 4.0]),
        ([1.0, 0.5, 0.0, -0.5], [1.1, 0.7, 0.2, -0.2]),  # falls through zero
        ([0.02, -0.01, 0.03, -0.02, 0.01, 0.02], [0.3, 0.1, 0.2, 0.2, 0.4, 0.3]),  # hovers around zero
        ([0.0, 0.01, 0.02, 0.04, 0.05, 0.06], [0.0, 0.3, 0.3, 0.3, 0.3, 0.3]),  # rises with its KL term
        ([-0.01] * 6, [0.5] * 6),
    ],
)
def test_a_loss_that_is_not_zero_at_best_is_judged_by_no_share(clean, corrupted):
    assert signs_of_collapse(history(clean, corrupted)) == []
    broken = [*history(clean, corrupted), {"loss": math.inf, "loss_clean": -1.0, "loss_corrupted": math.inf}]
    assert signs_of_collapse(broken) == ["the loss became NaN or infinite"]


@given(
    # Of 32 bits, so that none of 64 underflows when it is scaled.
    clean=st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=12),
    sharpness=st.floats(0, 10, width=32),
    scale=st.sampled_from([0.25, 4.0]),
)
def test_the_unit_of_the_loss_changes_nothing(clean, sharpness, scale):
    def kinds(unit):
        log = history([value * unit for value in clean], [(value + sharpness) * unit for value in clean])
        return ["fall" if "did not fall" in sign else "times" for sign in signs_of_collapse(log)]

    assert kinds(1.0) == kinds(scale)


def test_trainer_says_so_at_the_end(tiny_bert, train, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        defense = MultiStepRisk(CorruptionConstraint(p=math.inf, epsilon=1.0), steps=1)
        train(ParameterDefenseTrainer, tiny_bert(), {"learning_rate": 1e-4}, defense=defense)
    assert any("may have collapsed" in record.getMessage() for record in caplog.records)


@for_each("options", [{}, {"logging_nan_inf_filter": False}, {"logging_steps": 100}])
def test_weights_that_broke_are_a_sign_whatever_was_logged(tiny_bert, train, caplog, options):
    """The Trainer logs a loss of 0 for one that is no number, and a short run logs nothing."""
    logging.getLogger("transformers").propagate = True
    broken = {"optim": "sgd", "learning_rate": 1e20, "max_grad_norm": 0.0, "max_steps": 3, **options}
    with caplog.at_level(logging.WARNING):
        trainer = train(ParameterDefenseTrainer, tiny_bert(), broken, defense=MultiStepRisk(L2))
    assert any("may have collapsed" in record.getMessage() for record in caplog.records)
    (sign,) = signs_of_collapse(trainer.state.log_history, trainer.model)
    assert "NaN" in sign


def watchers(trainer):
    return sum(isinstance(callback, CollapseCallback) for callback in trainer.callback_handler.callbacks)


@for_each(
    ("defense", "watched"),
    [
        (MultiStepRisk(L2), True),
        (MultiStepRisk(L2, steps=0), False),
        (MultiStepRisk(NOWHERE), False),
        (ACRT(L2, alpha=0.0), False),
        (SAM(NOWHERE), False),
        (AWP(NOWHERE, input_epsilon=0.0), False),
        (GradientPenalty(weight=0.0), False),
        (GradientPenalty(), True),
    ],
)
def test_watched_where_the_defense_does_something(tiny_bert, arguments, defense, watched):
    assert watchers(ParameterDefenseTrainer(model=tiny_bert(), args=arguments(), defense=defense)) == watched


@pytest.mark.parametrize("kind", [TrainingArguments, ParameterDefenseTrainingArguments])
def test_stays_removed(tiny_bert, train, arguments, rows, kind):
    trainer = ParameterDefenseTrainer(model=tiny_bert(), args=arguments(kind, max_steps=1), train_dataset=rows)
    trainer.remove_callback(CollapseCallback)
    trainer.train()
    if kind is ParameterDefenseTrainingArguments:
        trainer.args.defense_epsilon = 0.2  # settings that are read anew
    trainer.train()
    assert watchers(trainer) == 0


def test_one_of_the_users_own_is_enough(tiny_bert, arguments):
    trainer = ParameterDefenseTrainer(model=tiny_bert(), args=arguments(), callbacks=[CollapseCallback()])
    assert watchers(trainer) == 1


def test_watched_from_the_run_that_is_defended_first(tiny_bert, arguments, rows):
    flags = arguments(ParameterDefenseTrainingArguments, max_steps=1, defense="none")
    trainer = ParameterDefenseTrainer(model=tiny_bert(), args=flags, train_dataset=rows)
    assert watchers(trainer) == 0
    trainer.args.defense = "sam"
    trainer.train()
    assert watchers(trainer) == 1
