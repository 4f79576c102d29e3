"""Robustness beside every evaluation: the run is the one without it, and the most robust checkpoint wins."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_parcor import (
    CorruptionConstraint,
    GaussianNoise,
    GradientCorruption,
    MetricInfo,
    MultiStepRisk,
    ParameterDefenseTrainer,
    RobustnessCallback,
)
from hf_parcor.evaluation import measure_robustness

CORRUPTIONS = {"noise": GaussianNoise(0.3)}
KEY = "eval_robustness_noise_loss"
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
KINDS = {
    "stock": (Trainer, {}),
    "defended": (ParameterDefenseTrainer, {"defense": MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=1)}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def logged(trainer, name):
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.mark.slow
@pytest.mark.parametrize("random_during", [False, True], ids=["plain", "random numbers during evaluation"])
def test_the_run_is_the_one_without_the_callback(kind, make, model, bits_of, random_during):
    runs = []
    for watched in (False, True):
        trainer = make(kind[0], trained=copy.deepcopy(model), eval_strategy="steps", eval_steps=1, **kind[1])
        if random_during:
            trainer.preprocess_logits_for_metrics = lambda logits, labels: logits + torch.randn(())
        if watched:
            trainer.add_callback(RobustnessCallback(trainer, CORRUPTIONS, trials=2))
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    assert bits_of(watched.model) == bits_of(plain.model)
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        assert logged(watched, name) == logged(plain, name)
    assert list(logged(watched, KEY)) == [1, 2, 3, 4]
    assert watched.state.total_flos == plain.state.total_flos
    assert watched.state.num_input_tokens_seen == plain.state.num_input_tokens_seen


@pytest.mark.slow
def test_the_most_robust_checkpoint_is_loaded(kind, make):
    key = "eval_robustness_worst_loss"
    options = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": key, "greater_is_better": False}
    trainer = make(kind[0], max_steps=5, learning_rate=0.03, **options, **kind[1])
    worst = GradientCorruption(CorruptionConstraint(epsilon=3.0))
    trainer.add_callback(RobustnessCallback(trainer, {"worst": worst}))
    trainer.train()
    found, clean = logged(trainer, key), logged(trainer, "eval_loss")
    best = min(found, key=found.__getitem__)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert best != 5, "the last one would be loaded anyway"
    assert best != min(clean, key=clean.__getitem__), "the clean loss would have chosen it, too"
    again = measure_robustness(trainer, [worst])
    assert again.corruptions[0].mean("loss") == found[best]


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["added before", "added after"])
def test_early_stopping_goes_by_robustness(make, first):
    """A threshold that nothing reaches stops the run after one more evaluation, wherever the callback was added."""
    options = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": KEY, "greater_is_better": False}
    trainer = make(Trainer, max_steps=4, **options)
    callbacks = [RobustnessCallback(trainer, CORRUPTIONS), EarlyStoppingCallback(1, early_stopping_threshold=1e6)]
    for callback in callbacks if first else reversed(callbacks):
        trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "every", "clean", "robust"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, 2, [1, 2, 3, 4], [2, 4]),
        ({}, 3, [3], [3]),
        ({"eval_strategy": "epoch"}, None, [3, 4], [3, 4]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}, None, [0, 2, 4], [0, 2, 4]),
    ],
    ids=str,
)
def test_when(make, options, every, clean, robust):
    trainer = make(Trainer, **options)
    trainer.add_callback(RobustnessCallback(trainer, CORRUPTIONS, every_n_steps=every))
    trainer.train()
    assert list(logged(trainer, "eval_loss")) == clean
    assert list(logged(trainer, KEY)) == robust


class Silent(Trainer):
    """Evaluates by itself, and tells no callback on what."""

    def evaluation_loop(self, *args, **kwargs):
        found = super().evaluation_loop(*args, **kwargs)
        self.callback_handler.eval_dataloader = None
        return found


def test_a_trainer_that_does_not_say_what_it_evaluates_is_told_how(make):
    trainer = make(Silent)
    trainer.add_callback(RobustnessCallback(trainer, CORRUPTIONS))
    with pytest.raises(ValueError, match=r"self\.callback_handler\.eval_dataloader = dataloader"):
        trainer.evaluate()


def test_metrics_without_the_time_that_names_their_prefix_are_refused(make):
    trainer = make()
    callback = RobustnessCallback(trainer, [GaussianNoise(0.1)])
    with pytest.raises(ValueError, match=r"expected a time such as eval_runtime, .* got eval_loss"):
        callback.on_evaluate(
            trainer.args, trainer.state, trainer.control, {"eval_loss": 1.0}, trainer.get_eval_dataloader()
        )


def test_evaluate_returns_it_for_each_data_set(make, rows):
    trainer = make(Trainer, eval_dataset={"first": rows[:6], "last": rows[6:]})
    trainer.add_callback(RobustnessCallback(trainer, CORRUPTIONS))
    metrics = trainer.evaluate()
    for name, part in (("first", rows[:6]), ("last", rows[6:])):
        record = measure_robustness(trainer, list(CORRUPTIONS.values()), eval_dataset=part)
        assert metrics[f"eval_{name}_robustness_noise_loss"] == record.corruptions[0].mean("loss")
    other = trainer.evaluate(rows[:3], metric_key_prefix="test")
    assert other["test_robustness_noise_loss"] != metrics["eval_first_robustness_noise_loss"]


def test_its_settings_are_those_of_the_measurement(make, rows):
    """Also where a metric of the Trainer's own is called a runtime."""
    best = {"metric_for_best_model": "eval_first_distance", "greater_is_better": False}
    trainer = make(ParameterDefenseTrainer, eval_dataset={"first": rows[:6]}, **best)
    trainer.compute_metrics = lambda prediction: {
        name: float(prediction.predictions.max()) for name in ("distance", "kernel_runtime")
    }
    settings: dict = {"trials": 2, "seed": 5, "gradient_dataset": rows[6:], "target_modules": ["classifier"]}
    corruptions = {**CORRUPTIONS, "worst": GradientCorruption(CorruptionConstraint(epsilon=0.1))}
    measured: list = []
    trainer.robustness_was_measured = lambda *found: measured.append(found)
    trainer.add_callback(RobustnessCallback(trainer, corruptions, **settings))
    metrics = trainer.evaluate()
    record = measure_robustness(
        trainer, list(corruptions.values()), eval_dataset="first", metric_key_prefix="eval_first", **settings
    )
    assert record.metric_info["distance"] == MetricInfo(False)
    ((prefix, found),) = measured
    assert prefix == "eval_first"
    assert replace(found, evaluated_on=record.evaluated_on) == record
    assert metrics["eval_first_robustness_noise_distance"] == record.corruptions[0].mean("distance")


def test_the_share_of_a_process_is_measured_as_the_whole_it_is_of(make, rows):
    trainer = make(Trainer)
    callback, metrics = RobustnessCallback(trainer, CORRUPTIONS), {"eval_loss": 1.0, "eval_runtime": 1.0}
    share = SimpleNamespace(dataset=IterableDatasetShard(rows, batch_size=2, num_processes=2, process_index=1))
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics, share)
    assert metrics[KEY] == measure_robustness(trainer, list(CORRUPTIONS.values())).corruptions[0].mean("loss")
    assert callback.on_evaluate(trainer.args, trainer.state, trainer.control) is None, "nothing was evaluated"


def test_one_that_is_not_added_goes_nowhere(make):
    trainer, other = make(Trainer), make(Trainer)
    before = list(trainer.callback_handler.callbacks)
    RobustnessCallback(trainer, CORRUPTIONS).on_train_begin(other.args, other.state, other.control)
    assert trainer.callback_handler.callbacks == before


def test_other_callbacks_hear_of_one_evaluation(make):
    heard = []

    class Listener(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            heard.append(KEY in metrics)

        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(sorted(name for name in logs if name in (KEY, "eval_loss")))

    trainer = make(Trainer, callbacks=[Listener()], eval_strategy="steps", eval_steps=4, logging_strategy="no")
    trainer.add_callback(RobustnessCallback(trainer, CORRUPTIONS, trials=3))
    trainer.train()
    assert heard == [["eval_loss"], [KEY], True, []], "the last log is the summary of the run"


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"trials": 0}, "trials"), ({"seed": -1}, "seed"), ({"every_n_steps": 0}, "every_n_steps")],
    ids=str,
)
def test_errors(make, settings, says):
    with pytest.raises(ValueError, match=f"{says}: expected a whole number"):
        RobustnessCallback(make(Trainer), CORRUPTIONS, **settings)


def test_what_is_no_corruption_is_refused_before_training(make):
    with pytest.raises(TypeError, match=r"got 0\.1"):
        RobustnessCallback(make(Trainer), {"noise": 0.1})


def test_what_a_user_states_of_a_metric_is_in_the_record(make):
    info = {"accuracy": MetricInfo(True, "share")}
    trainer = make(ParameterDefenseTrainer, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(RobustnessCallback(trainer, CORRUPTIONS, metric_info=info))
    trainer.train()
    assert trainer.robustness_facts().info == info["accuracy"]
    with pytest.raises(TypeError, match="metric_info"):
        RobustnessCallback(trainer, CORRUPTIONS, metric_info={"accuracy": True})
