"""What is said when a run goes on from a checkpoint of another defense."""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from hf_parcor import (
    SAM,
    CorruptionConstraint,
    DefenseConfig,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
)
from hf_parcor.training import DEFENSE_CONFIG_NAME

K1 = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=1)


@pytest.fixture
def run(rows, arguments, tiny_bert, tmp_path):
    """Train in a folder of its own; returns the trainer."""

    def train(folder, options, kind=TrainingArguments, resume=None, **extra):
        args = arguments(kind, output_dir=str(tmp_path / folder), **options)
        trainer = ParameterDefenseTrainer(tiny_bert(), args, train_dataset=rows, **extra)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def test_changed_settings_are_said_once_and_the_run_goes_on_with_them(run, tmp_path, said):
    run("old", {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}, defense=K1, target_modules=["attention"])
    checkpoint = str(tmp_path / "old" / "checkpoint-2")
    new = MultiStepRisk(CorruptionConstraint(p=float("inf"), epsilon=0.001), steps=1)
    trainer = run("again", {"max_steps": 3}, resume=checkpoint, defense=new)
    assert said("another defense") == [
        f"{checkpoint} was trained with another defense: settings.constraint.p: 2.0 -> 'inf'; "
        "settings.constraint.epsilon: 0.2 -> 0.001; target_modules: ['attention'] -> None. "
        "The run goes on with the new settings."
    ]
    norms = [entry["corruption_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert norms == pytest.approx([0.2, 0.2, 0.001], rel=1e-3)
    assert trainer.defense_config == DefenseConfig(new)


def _other_defense(checkpoint):
    DefenseConfig(SAM(CorruptionConstraint(epsilon=0.2))).save_pretrained(checkpoint)


def _none(checkpoint):
    (checkpoint / DEFENSE_CONFIG_NAME).unlink()


def _broken(checkpoint):
    (checkpoint / DEFENSE_CONFIG_NAME).write_text("{", encoding="utf-8")


def _of_ones_own(checkpoint):
    path = checkpoint / DEFENSE_CONFIG_NAME
    path.write_text(path.read_text(encoding="utf-8").replace("multi_step_risk", "mine.Own"), encoding="utf-8")


def _of_another_version(checkpoint):
    path = checkpoint / DEFENSE_CONFIG_NAME
    path.write_text(path.read_text(encoding="utf-8").replace('_version": "', '_version": "9.'), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        (_other_defense, {}, ["'sam' -> 'multi_step_risk'; settings.steps: 'not set' -> 1; settings.step_size: "]),
        (_other_defense, {"defense": "none"}, ["was trained with another defense: defense: 'sam' -> None. The run"]),
        (_none, {}, [f"has no {DEFENSE_CONFIG_NAME}: it was trained without a defense, and now goes on with Multi"]),
        (_none, {"defense": "none"}, []),
        (_broken, {}, [f"{DEFENSE_CONFIG_NAME}: expected JSON, got Expecting"]),
        (_of_ones_own, {}, ["defense: 'mine.Own' -> 'multi_step_risk'. The run goes on"]),
        (_of_another_version, {}, []),
    ],
)
def test_what_is_said_of_a_checkpoint(run, tmp_path, said, change, flags, says):
    flags = flags or {"defense_epsilon": 0.2}
    run("old", {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}, defense=K1)
    checkpoint = tmp_path / "old" / "checkpoint-1"
    change(checkpoint)
    run("again", {**flags, "max_steps": 1}, kind=ParameterDefenseTrainingArguments, resume=str(checkpoint))
    warnings = said(str(checkpoint))
    assert len(warnings) == len(says)
    for warning, phrase in zip(warnings, says, strict=True):
        assert phrase in warning
