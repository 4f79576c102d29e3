"""Callbacks, the progress bar, integrations and the Hub see what they see from the stock Trainer."""

from __future__ import annotations

import fnmatch
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainings import UNMOVED, logs_of
from transformers import ProgressCallback, Trainer, TrainerCallback

from hf_parcor import CorruptionConstraint, DefenseConfig, MultiStepRisk, ParameterDefenseTrainer
from hf_parcor.defenses import DEFENSES, DefendedStep
from hf_parcor.training import DEFENSE_CONFIG_NAME

K2 = MultiStepRisk(CorruptionConstraint(epsilon=0.2), steps=2)
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
OURS = {"loss_clean", "loss_corrupted", "sharpness", "corruption_norm", "corruption_norm_asked"}


class Recorder(TrainerCallback):
    """Keeps every event, with what the Trainer says of itself at that moment."""

    def __init__(self):
        self.events, self.logs = [], []


def _record(name):
    def event(self, args, state, control, logs=None, **kwargs):
        told = {key for key in kwargs if kwargs[key] is not None}
        self.events.append((name, state.global_step, state.epoch, state.max_steps, control.should_log, told))
        if name == "on_log":
            self.logs.append(dict(logs))

    return event


for event_name in EVENTS:
    setattr(Recorder, event_name, _record(event_name))


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
def test_events_come_as_from_the_stock_trainer(tiny_bert, rows, train, name, defense_of):
    """Once a step or a micro-batch, however many passes these take, with the same state at each."""
    options = {
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "epoch",
    }
    recorders = []
    for kind, extra in ((Trainer, {}), (ParameterDefenseTrainer, {"defense": defense_of(name)})):
        recorder = Recorder()
        trainer = train(kind, tiny_bert(), options, callbacks=[recorder], eval_dataset=rows[:4], **extra)
        trainer.predict(rows[:4])
        recorders.append(recorder)
    stock, ours = recorders
    assert ours.events == stock.events
    counted = {event: sum(entry[0] == event for entry in ours.events) for event in EVENTS}
    steps, micro_batches = 4, 12
    assert counted["on_step_begin"] == counted["on_step_end"] == counted["on_pre_optimizer_step"] == steps
    assert counted["on_substep_end"] == micro_batches - steps
    assert (counted["on_save"], counted["on_evaluate"], counted["on_predict"]) == (2, 2, 1)
    for plain, logged in zip(stock.logs, ours.logs, strict=True):
        assert set(logged) - set(plain) == (OURS if "loss" in plain else set())
        assert set(plain) <= set(logged)


def test_evaluation_inside_training_is_the_stock_one_at_the_weights_of_that_step(tiny_bert, rows, train, arguments):
    """The plain loss of the uncorrupted weights, which that step's checkpoint holds; the best one wins."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    options = {**saving, "load_best_model_at_end": True, "label_smoothing_factor": 0.1, "learning_rate": 0.1}
    trainer = train(ParameterDefenseTrainer, tiny_bert(), options, defense=K2, eval_dataset=rows)
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    plain = {}
    for step in (1, 2, 3):
        model = type(trainer.model).from_pretrained(f"{trainer.args.output_dir}/checkpoint-{step}")
        stock = Trainer(model, arguments(label_smoothing_factor=0.1), eval_dataset=rows)
        plain[step] = stock.evaluate()["eval_loss"]
    assert logged == plain
    assert len(set(plain.values())) == 3
    assert trainer.evaluate()["eval_loss"] == min(plain.values())


@pytest.mark.parametrize("prediction_loss_only", [True, False])
def test_prediction_step_is_the_stock_one(tiny_bert, rows, arguments, prediction_loss_only):
    results = []
    for kind in (Trainer, ParameterDefenseTrainer):
        trainer = kind(tiny_bert(), arguments(), eval_dataset=rows[:4])
        batch = next(iter(trainer.get_eval_dataloader()))
        results.append(trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_integrations_get_plain_finite_numbers(tiny_bert, train):
    """What TensorBoard and the like can draw: floats, at the step that they belong to."""
    recorder = Recorder()
    trainer = train(ParameterDefenseTrainer, tiny_bert(), {"max_steps": 2}, callbacks=[recorder], defense=K2)
    drawn = [logs for logs in recorder.logs if "loss" in logs]
    assert len(drawn) == 2
    for logs, entry in zip(drawn, trainer.state.log_history, strict=False):
        assert set(logs) >= OURS
        assert all(type(value) is float and math.isfinite(value) for name, value in logs.items() if name in OURS)
        assert {**logs, "step": entry["step"]} == entry


def test_progress_bar_counts_steps_and_not_passes(tiny_bert, rows, arguments, capsys):
    class Kept(ProgressCallback):
        def on_train_end(self, args, state, control, **kwargs):
            bars.append((self.training_bar.n, self.training_bar.total))
            super().on_train_end(args, state, control, **kwargs)

    bars, options = [], {"gradient_accumulation_steps": 3, "max_steps": 3, "disable_tqdm": False}
    trainer = ParameterDefenseTrainer(tiny_bert(), arguments(**options), train_dataset=rows, defense=K2)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Kept())
    trainer.train()
    assert bars == [(3, 3)]
    assert "sharpness" in capsys.readouterr().out


class FakeHub:
    """Stands for `HfApi`: keeps every call, and which files lie in the folder that is pushed."""

    def __init__(self):
        self.calls, self.files = [], []

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        return SimpleNamespace(repo_id=f"owner/{name}")

    def upload_folder(self, folder_path, ignore_patterns=(), **options):
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        ignored = [*ignore_patterns, *(f"{pattern}/*" for pattern in ignore_patterns)]
        self.files.append({n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in ignored)})
        self.calls.append(("upload_folder", folder.name, ignore_patterns, options))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_pushes_are_those_of_the_stock_trainer_with_the_defense_in_every_folder(
    tiny_bert, train, tmp_path, monkeypatch, strategy
):
    hubs = []
    empty = SimpleNamespace(siblings=[])
    monkeypatch.setattr("hf_parcor.cards.mixin.card_on_hub", lambda *args: ("", empty))
    for kind, extra in ((Trainer, {}), (ParameterDefenseTrainer, {"defense": K2, "target_modules": ["attention"]})):
        hubs.append(FakeHub())
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: hubs[-1])
        folder = tmp_path / kind.__name__ / "model"
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": str(folder)}
        pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_token": "secret", "hub_revision": "robust"}
        trainer = train(kind, tiny_bert(), {**saving, **pushing}, **extra)
        trainer.save_model()
        trainer.push_to_hub(commit_message="Defended", tags=["robust"])
    stock, ours = hubs
    assert ours.calls == stock.calls
    pushes = {"end": 2, "every_save": 4, "checkpoint": 6, "all_checkpoints": 6}[strategy]
    assert len(ours.files) == len(stock.files) == pushes
    for plain, pushed in zip(stock.files, ours.files, strict=True):
        assert pushed - plain == {DEFENSE_CONFIG_NAME}
        assert plain <= pushed
    assert DefenseConfig.from_pretrained(folder) == DefenseConfig(K2, ["attention"])


@pytest.mark.slow
@pytest.mark.parametrize(("logging_steps", "measured"), [(1, 18), (2, 9), (18, 2)])
def test_the_corruption_is_measured_where_a_log_wants_it(tiny_bert, train, monkeypatch, logging_steps, measured):
    """The first micro-batch of a log, and every 16th of a long one: each log has a norm, which is the usual one."""
    calls, withdraw = [], DefendedStep.withdraw
    monkeypatch.setattr(DefendedStep, "withdraw", lambda step, p: calls.append(p) or withdraw(step, p))
    options = {"max_steps": 18, "logging_steps": logging_steps}
    trainer = train(ParameterDefenseTrainer, tiny_bert(), options, defense=K2)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(calls) == measured
    assert len(logs) == 18 // logging_steps
    assert all(entry["corruption_norm"] == pytest.approx(K2.constraint.epsilon, rel=1e-3) for entry in logs)


@pytest.mark.parametrize("without", [0, 1, 2])
def test_what_is_not_finite_is_left_out_of_the_means(tiny_bert, train, without):
    """As the stock Trainer leaves it out of its own loss; whichever micro-batch of a log it is."""

    class Overflows(ParameterDefenseTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + math.inf if self.state.global_step == without else loss  # its gradient stays finite

    options = {**UNMOVED, "max_steps": 3}
    each = logs_of(train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, defense=K2))
    (mean,) = logs_of(train(Overflows, tiny_bert(dropout=0.0), {**options, "logging_steps": 3}, defense=K2))
    del each[without]
    for name in ("loss_clean", "loss_corrupted", "sharpness"):
        assert mean[name] == pytest.approx(sum(entry[name] for entry in each) / 2, rel=1e-5), name
