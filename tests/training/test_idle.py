"""A defense that does nothing says so: at the start where it can be known, at the end where it cannot."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GaussianNoise,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
)
from hf_parcor.training import IdleDefenseCallback
from hf_parcor.training import callbacks as idle_module

L2 = CorruptionConstraint(epsilon=0.1)
NEVER, NOT_STARTED, RARELY = "did nothing in this run", "does nothing in this run", "is longer than this run"
UNUSED, NONE_USED = "did not use them", "ever had a gradient, so nothing was corrupted"


def test_whether_an_interval_has_a_turn_among_some_steps():
    for interval in (1, 2, 3, 7):
        for first in range(9):
            for end in range(first, 16):
                turns = any(step % interval == 0 for step in range(first, end))
                assert idle_module._had_its_turn(SAM(L2, interval=interval), first, end) == turns


class Classifier(nn.Module):
    """Has a head that is never called, and a layer that is called now and then."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.pooler, self.rare = nn.Embedding(30, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, input_ids, labels=None, **_):
        self.calls += 1
        x = self.embedding(input_ids).mean(1)
        if self.calls == 5:
            x = self.rare(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class When(TrainerCallback):
    """Keeps how many warnings there were when the run began."""

    def __init__(self, caplog):
        self.caplog, self.before = caplog, []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.before = [record.getMessage() for record in self.caplog.records]


def late(**settings):
    return MultiStepRisk(L2, **settings)


# The run is one epoch of six steps, unless the options say otherwise.
AT_THE_START = {
    "starts behind the last epoch": (late(start_epoch=3), {}, NOT_STARTED),
    "starts at the end": (late(start_epoch=1), {}, NOT_STARTED),
    "starts behind the last step": (late(start_epoch=0.5), {"max_steps": 3}, NOT_STARTED),
    "with accumulation": (late(start_epoch=0.5), {"max_steps": 1, "gradient_accumulation_steps": 2}, NOT_STARTED),
    "comes again behind the last step": (late(interval=7), {}, f"in the first step alone.*{RARELY}"),
    "comes again and starts late": (late(interval=7, start_epoch=0.5), {}, f"in no step.*{RARELY}"),
    "another defense": (GradientPenalty(start_epoch=2), {}, NOT_STARTED),
    "no steps": (late(steps=0, start_epoch=9), {}, f"{NOT_STARTED}: steps=0 is"),
    "steps of no size": (late(step_size=0), {}, f"{NOT_STARTED}: step_size=0 is"),
    "no radius": (SAM(CorruptionConstraint(epsilon=0)), {}, f"{NOT_STARTED}: epsilon=0 is"),
    "nothing to move": (AWP(L2, steps=0, input_epsilon=0), {}, f"{NOT_STARTED}: steps=0 and input_epsilon=0 is"),
    "no weight": (ACRT(L2, alpha=0), {}, f"{NOT_STARTED}: alpha=0 is"),
    "no penalty": (GradientPenalty(weight=0), {}, f"{NOT_STARTED}: weight=0 is"),
    "clean weights alone": (CorruptionRisk(GaussianNoise(1), clean_weight=1), {}, f"{NOT_STARTED}: clean_weight=1 is"),
    "noise of no size": (CorruptionRisk(GaussianNoise(0)), {}, f"{NOT_STARTED}: corruption=Gaussian σ=0 is"),
}
AT_THE_END = {
    "stopped before": (late(start_epoch=0.5), {}, {"callbacks": [StopAt(2)]}, NEVER),
    "no target is used": (late(), {}, {"target_modules": ["pooler"]}, NONE_USED),
    "no target is used, by SAM": (SAM(L2), {}, {"target_modules": ["pooler"]}, NONE_USED),
    "no target is used, by a penalty": (GradientPenalty(), {}, {"target_modules": ["pooler"]}, NONE_USED),
    "one is not": (late(), {}, {"target_modules": ["pooler", "head"]}, f"2 of the 4 .*pooler.weight.*{UNUSED}"),
    "one is excluded": (ACRT(L2), {}, {"target_modules": "all-linear"}, UNUSED),
}
NOTHING = {
    "from the start": (late(), {}, {}),
    "an interval of the whole run": (late(interval=6), {}, {}),
    "starts in the last step": (late(start_epoch=0.8), {}, {}),
    "one step": (late(interval=4), {"max_steps": 1}, {}),
    "all that can be trained": (late(), {}, {}),
    "used once": (late(), {}, {"target_modules": ["rare", "head"]}),
    "a stopped run that was defended": (late(), {}, {"callbacks": [StopAt(2)]}),
}


def run(train, caplog, defense, options, extra, kind=ParameterDefenseTrainer):
    logging.getLogger("transformers").propagate = True
    when = When(caplog)
    extra = {**extra, "callbacks": [*extra.get("callbacks", []), when]}
    with caplog.at_level(logging.WARNING, logger=idle_module.__name__):
        trainer = train(kind, Classifier(), options, defense=defense, **extra)
    said = [record.getMessage() for record in caplog.records if record.name == idle_module.__name__]
    return trainer, said, when


@pytest.mark.parametrize("name", AT_THE_START)
def test_said_at_the_start_and_once(name, train, caplog):
    defense, options, message = AT_THE_START[name]
    _, said, when = run(train, caplog, defense, options, {})
    assert len(said) == 1
    assert said[0] in when.before
    assert re.search(message, said[0])


@pytest.mark.parametrize("name", AT_THE_END)
def test_said_at_the_end(name, train, caplog):
    defense, options, extra, message = AT_THE_END[name]
    _, said, when = run(train, caplog, defense, options, extra)
    assert len(said) == 1
    assert said[0] not in when.before
    assert re.search(message, said[0])


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_said_of_a_defense_that_does_something(name, train, caplog):
    defense, options, extra = NOTHING[name]
    assert run(train, caplog, defense, options, extra)[1] == []


def test_a_stream_has_no_length_and_is_judged_at_its_end(train, caplog, rows):
    extra = {"rows": Stream(rows)}
    assert NEVER in run(train, caplog, late(start_epoch=0.9), {"max_steps": 2}, extra)[1][0]


@pytest.mark.parametrize(
    ("defense", "options", "steps"),
    [
        (late(), {}, 6),
        (late(interval=4), {}, 2),
        (late(start_epoch=0.5), {}, 3),
        (late(), {"gradient_accumulation_steps": 2}, 3),
        (late(start_epoch=5), {}, 0),
        (late(steps=0), {}, 0),
    ],
)
def test_defended_steps_are_counted(defense, options, steps, train, caplog):
    trainer, *_ = run(train, caplog, defense, options, {})
    assert trainer._parameter_defense.log.defended_steps == steps
    trainer.train()
    assert trainer._parameter_defense.log.defended_steps == steps, "of one run"


def test_stays_removed(train, arguments, rows):
    trainer = ParameterDefenseTrainer(model=Classifier(), args=arguments(max_steps=1), train_dataset=rows)
    trainer.remove_callback(IdleDefenseCallback)
    trainer.train()
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert IdleDefenseCallback not in kinds


def test_a_resumed_run_that_is_too_short_for_its_interval_is_no_news(train, arguments, rows, caplog, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    trainer, said, _ = run(train, caplog, late(interval=4), options, {})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer._parameter_defense.log.defended_steps == 0
    assert said == []
    assert not [record for record in caplog.records if record.name == idle_module.__name__]
