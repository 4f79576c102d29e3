"""`hyperparameter_search` over the Trainer's own arguments and over the flags of the defense."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_parcor import (
    ACRT,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    DefenseConfig,
    MultiStepRisk,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
)
from hf_parcor.training import DEFAULT_DEFENSE
from hf_parcor.training.training_args import DefenseSettings

optuna = pytest.importorskip("optuna")

K1 = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=1)
FLAGS = ParameterDefenseTrainingArguments


class KeepRuns(TrainerCallback):
    """Keeps the log entries of every run."""

    def __init__(self):
        self.runs = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.runs.append([])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.runs[-1].append(dict(logs))


@pytest.fixture
def build(rows, arguments, tiny_bert):
    def trainer(kind, arguments_kind=TrainingArguments, options=None, **extra):
        return kind(
            model_init=lambda: tiny_bert(),
            args=arguments(arguments_kind, **{"max_steps": 2, **(options or {})}),
            train_dataset=rows,
            eval_dataset=rows,
            **extra,
        )

    return trainer


def search(trainer, grid):
    """Try every point of a grid, in order."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def space(trial):
        return {name: trial.suggest_categorical(name, values) for name, values in grid.items()}

    sampler = optuna.samplers.GridSampler(grid, seed=0)
    return trainer.hyperparameter_search(
        space, backend="optuna", n_trials=math.prod(len(values) for values in grid.values()), sampler=sampler
    )


def test_learning_rate_without_a_defense_finds_what_the_stock_trainer_finds(build):
    grid = {"learning_rate": [1e-4, 1e-1]}
    best = [search(build(Trainer), grid), search(build(ParameterDefenseTrainer, FLAGS, {"defense": "none"}), grid)]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags", "extra"), [(FLAGS, {"defense_epsilon": 0.2}, {}), (TrainingArguments, {}, {"defense": K1})]
)
def test_each_trial_is_the_run_that_its_settings_make_alone(build, kind, flags, extra):
    """A trial leaves nothing behind for the next: no old model's parameters, no sums of the log.

    Three steps and a log entry after the second: the sums of the third are left over.
    """
    options, keep, alone = {**flags, "max_steps": 3, "logging_steps": 2}, KeepRuns(), []
    rates = [1e-4, 1e-2]
    search(build(ParameterDefenseTrainer, kind, options, callbacks=[keep], **extra), {"learning_rate": rates})
    for rate in rates:
        trainer = build(ParameterDefenseTrainer, kind, {**options, "learning_rate": rate}, **extra)
        trainer.train()
        alone.append(numbers([entry for entry in trainer.state.log_history if "loss" in entry]))
    assert sorted(map(numbers, keep.runs), key=str) == sorted(alone, key=str)
    assert alone[0] != alone[1]


def numbers(entries):
    return [{k: v for k, v in entry.items() if k.startswith(("loss", "sharp", "corruption"))} for entry in entries]


@pytest.mark.parametrize("flags", [{}, {"defense_epsilon": 1}])  # Transformers casts a trial to the type of the flag
def test_searched_flag_of_the_defense_is_the_one_that_trains(build, flags):
    keep = KeepRuns()
    trainer = build(ParameterDefenseTrainer, FLAGS, flags, callbacks=[keep])
    best = search(trainer, {"defense_epsilon": [0.0, 0.05, 0.3], "learning_rate": [1e-2]})
    norms = sorted(run[0].get("corruption_norm_asked", 0.0) for run in keep.runs)
    assert norms == pytest.approx([0.0, 0.05, 0.3], rel=1e-3)
    assert set(best.hyperparameters) == {"defense_epsilon", "learning_rate"}


def test_searched_defense(build):
    """Between none and others, in any order; the files beside the models say which it was."""
    trainer = build(ParameterDefenseTrainer, FLAGS, {"defense": "none", "save_strategy": "steps", "save_steps": 2})
    search(trainer, {"defense": ["none", "sam", "acrt"]})
    saved = [
        DefenseConfig.from_pretrained(path.parent).defense
        for path in Path(trainer.args.output_dir).glob("run-*/*/defense_config.json")
    ]
    assert sorted(map(type, saved), key=str) == [ACRT, SAM]


def test_a_trial_is_not_refused_for_what_another_one_searched(build, said):
    """Transformers leaves on the arguments what a trial set: a setting that only one of the defenses has, say."""
    trainer = build(ParameterDefenseTrainer, FLAGS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = []

    def space(trial):
        defense = trial.suggest_categorical("defense", ["multi_step_risk", "corruption"])
        own = {"defense_steps": [2]} if defense == "multi_step_risk" else {"defense_corruption": ["gaussian=0.02"]}
        return {"defense": defense, **{name: trial.suggest_categorical(name, values) for name, values in own.items()}}

    def objective(metrics):
        tried.append(trainer.defense)
        return metrics["eval_loss"]

    sampler = optuna.samplers.GridSampler({"defense": ["multi_step_risk", "corruption"]}, seed=0)
    trainer.hyperparameter_search(
        space, backend="optuna", n_trials=2, sampler=sampler, compute_objective=objective, direction="minimize"
    )
    assert sorted(map(type, tried), key=str) == [CorruptionRisk, MultiStepRisk]
    assert len(said("there is nothing that --defense_")) == 1


def test_flag_changed_by_hand_counts_from_the_next_run(build):
    trainer = build(ParameterDefenseTrainer, FLAGS)
    trainer.train()
    everything = len(trainer.defended_parameters())
    trainer.args.defense_target_modules = ["attention"]
    trainer.args.defense_epsilon = 0.3
    trainer.train()
    assert trainer.defense.constraint.epsilon == 0.3
    assert len(trainer.defended_parameters()) < everything
    trainer.defense = SAM(CorruptionConstraint(epsilon=0.1))
    trainer.args.defense_target_modules = ["bias"]
    trainer.train()
    assert trainer.defense == SAM(CorruptionConstraint(epsilon=0.1))
    assert all(name.endswith("bias") for name in trainer.defended_parameters())


def test_parameters_frozen_after_construction_are_left_alone(rows, arguments, tiny_bert):
    """The usual order of freezing for a second phase of training: the selection is that of the run, not of before."""
    trainer = ParameterDefenseTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=rows, defense=K1)
    assert len(trainer.defended_parameters()) == len(list(trainer.model.parameters()))
    trainer.model.bert.requires_grad_(False)
    trainer.train()
    assert list(trainer.defended_parameters()) == ["classifier.weight", "classifier.bias"]
    trainer.model.bert.pooler.requires_grad_(True)
    trainer.train()
    assert len(trainer.defended_parameters()) == 4


def test_flag_that_is_not_read_is_refused(build):
    trainer = build(ParameterDefenseTrainer, FLAGS, defense=K1)
    with pytest.raises(ValueError, match=r"defense_epsilon: expected the flag unchanged, .* given defense="):
        search(trainer, {"defense_epsilon": [0.3]})
    trainer = build(ParameterDefenseTrainer, FLAGS, target_modules=["attention"])
    with pytest.raises(ValueError, match=r"defense_target_modules: expected the flag unchanged, .* target_modules="):
        search(trainer, {"defense_target_modules": ["bias"]})


def test_flags_that_cannot_be_are_refused_before_a_step(build):
    trainer = build(ParameterDefenseTrainer, FLAGS)
    trainer.args.defense_epsilon = -1.0
    for _ in range(2):  # the second try must not run with the old flag
        with pytest.raises(ValueError, match="epsilon: expected 0 <= epsilon < inf"):
            trainer.train()
    assert trainer.state.global_step == 0
    trainer = build(ParameterDefenseTrainer, FLAGS)
    trainer.args.optim = "lomo"
    with pytest.raises(ValueError, match="updates after backward"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_plain_arguments_have_no_flags_to_search(build, tmp_path):
    settings = DefenseSettings(TrainingArguments(str(tmp_path)), None, {}, None)
    assert not settings.changed(TrainingArguments(str(tmp_path)))
    assert settings.defense(TrainingArguments(str(tmp_path))) == DEFAULT_DEFENSE
    assert settings.reuses_prefix(TrainingArguments(str(tmp_path)))
