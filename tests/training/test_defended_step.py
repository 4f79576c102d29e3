"""The defended step inside the real Trainer."""

from __future__ import annotations

import logging

import pytest
import torch
from longhand import longhand
from torch import nn
from trainings import IN_ORDER, logs_of, stacked
from transformers import Trainer

from hf_parcor import (
    CorruptionConstraint,
    MultiStepRisk,
    ParameterDefenseMixin,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
)
from hf_parcor.training import DEFAULT_DEFENSE

L2 = CorruptionConstraint(epsilon=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(  # any three of these settings meet in all their values
    ("steps", "accumulation", "target", "smoothing"),
    [
        (1, 1, "all", 0.0),
        (1, 1, "last-encoder-layer", 0.1),
        (1, 3, "all", 0.1),
        (1, 3, "last-encoder-layer", 0.0),
        (2, 1, "all", 0.1),
        (2, 1, "last-encoder-layer", 0.0),
        (2, 3, "all", 0.0),
        (2, 3, "last-encoder-layer", 0.1),
    ],
)
def test_gradient_of_the_optimizer_is_that_of_the_risk(
    tiny_bert, rows, train, keep_gradients, steps, accumulation, target, smoothing
):
    """Each micro-batch climbs along its own gradient, whatever was accumulated before."""
    model = tiny_bert(dropout=0.0).double()
    used, accumulated = rows[: 4 * accumulation], []
    reference = tiny_bert(dropout=0.0).double()
    selected = [n for n, _ in reference.named_parameters() if target == "all" or ".layer.1." in n]
    for i in range(accumulation):
        batch = stacked(used[4 * i : 4 * i + 4])
        labels = batch.pop("labels")

        def loss_of(call, batch=batch, labels=labels):
            return nn.functional.cross_entropy(call(**batch).logits, labels, label_smoothing=smoothing)

        accumulated.append(longhand(reference, loss_of, [1 / (steps + 1)] * (steps + 1), selected=selected))
    train(
        ParameterDefenseTrainer,
        model,
        {
            "gradient_accumulation_steps": accumulation,
            **IN_ORDER,
            "label_smoothing_factor": smoothing,
        },
        rows=used,
        callbacks=[keep_gradients],
        defense=MultiStepRisk(L2, steps=steps),
        target_modules=target,
        # BERT takes **kwargs, and so is believed to divide by num_items_in_batch itself, which it does not do.
        compute_loss_func=None if smoothing else _mean_over_the_step(accumulation),
    )
    (kept,) = keep_gradients.kept
    tolerance = {"rtol": 1e-5, "atol": 1e-9} if smoothing else {"rtol": 1e-9, "atol": 1e-13}
    for name, gradient in kept.items():
        expected = sum(part[name] for part in accumulated) / accumulation
        torch.testing.assert_close(gradient, expected, **tolerance)  # the label smoother sums in float32


def _mean_over_the_step(accumulation):
    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels) / accumulation

    return loss


def test_logs_what_is_known_for_free(tiny_bert, train):
    trainer = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), defense=MultiStepRisk(L2, steps=2))
    logs = logs_of(trainer)
    assert len(logs) == 6
    for entry in logs:
        assert entry["loss_clean"] < entry["loss"] < entry["loss_corrupted"]
        assert entry["sharpness"] == pytest.approx(entry["loss_corrupted"] - entry["loss_clean"], abs=1e-6)
        assert entry["corruption_norm"] == pytest.approx(0.2, rel=1e-3)
        assert entry["corruption_norm_asked"] == pytest.approx(0.2, rel=1e-3)


def test_log_over_several_micro_batches_is_the_mean_over_steps(tiny_bert, train):
    """One step, K = 1: the risk is the mean of both losses, also where a step has several micro-batches."""
    options = {"gradient_accumulation_steps": 3, "logging_steps": 2}
    trainer = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, defense=MultiStepRisk(L2, steps=1))
    (entry,) = logs_of(trainer)
    assert entry["loss"] == pytest.approx((entry["loss_clean"] + entry["loss_corrupted"]) / 2, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_operations_are_exactly_those_of_all_passes(tiny_bert, train, steps):
    stock = train(Trainer, tiny_bert())
    ours = train(ParameterDefenseTrainer, tiny_bert(), defense=MultiStepRisk(L2, steps=steps))
    assert ours.state.total_flos == (steps + 1) * stock.state.total_flos > 0
    assert ours.state.global_step == stock.state.global_step


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_weights_come_back_after_an_exception_in_the_model(tiny_bert, train, error, call):
    model = tiny_bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == call:
            raise error("in the middle of the step")

    model.bert.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(error):
        train(ParameterDefenseTrainer, model, defense=MultiStepRisk(L2, steps=2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class NormalizedClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.last(torch.relu(self.norm(self.first(input_ids.float() / 30))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("settings", [{}, {"random_start": True}, {"batch_share": 0.5}])
def test_running_statistics_move_as_in_the_stock_step(train, settings):
    """One step from the same weights; the stock Trainer never sees a corruption, nor a part of the batch."""
    models = []
    defense = MultiStepRisk(L2, steps=2, **settings)
    for trainer_class, extra in ((Trainer, {}), (ParameterDefenseTrainer, {"defense": defense})):
        torch.manual_seed(0)
        models.append(NormalizedClassifier())
        train(trainer_class, models[-1], {"max_steps": 1}, **extra)
    assert models[0].norm.num_batches_tracked == models[1].norm.num_batches_tracked == 1
    assert torch.equal(models[0].norm.running_mean, models[1].norm.running_mean)
    assert torch.equal(models[0].norm.running_var, models[1].norm.running_var)
    assert models[1].norm.track_running_stats


def test_dropout_draws_fresh_masks_for_each_pass(tiny_bert, train):
    model, outputs = tiny_bert(dropout=0.5), []
    model.bert.embeddings.register_forward_hook(lambda module, args, output: outputs.append(output.detach() == 0))
    train(ParameterDefenseTrainer, model, {"max_steps": 1}, defense=MultiStepRisk(L2, steps=1))
    assert len(outputs) == 2
    assert not torch.equal(*outputs)


def test_bf16_weights_that_swallow_the_corruption_are_reported_once(tiny_bert, train, caplog):
    defense = MultiStepRisk(CorruptionConstraint(epsilon=1e-5), steps=1)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        trainer = train(ParameterDefenseTrainer, tiny_bert().to(torch.bfloat16), defense=defense)
    said = [record for record in caplog.records if "swallows" in record.getMessage()]
    assert len(said) == 1
    assert len(said) == 1
    logs = logs_of(trainer)
    assert logs[0]["corruption_norm"] < 0.9e-5
    assert logs[0]["corruption_norm_asked"] == pytest.approx(1e-5, rel=1e-2)


def test_mixin_serves_another_trainer_with_its_own_loss(tiny_bert, train):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = 7 * nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    class Defended(ParameterDefenseMixin, Weighted):
        pass

    trainer = train(Defended, tiny_bert(dropout=0.0), {"max_steps": 1}, defense=MultiStepRisk(L2, steps=1))
    entry = trainer.state.log_history[0]
    assert entry["loss_clean"] == pytest.approx(7 * torch.log(torch.tensor(3.0)).item(), rel=0.1)
    assert entry["loss"] > entry["loss_clean"]


def test_evaluation_and_prediction_see_the_plain_loss(tiny_bert, rows, train):
    trainer = train(ParameterDefenseTrainer, tiny_bert(), defense=MultiStepRisk(L2, steps=1))
    plain = Trainer(model=trainer.model, args=trainer.args)
    assert trainer.evaluate(rows)["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    assert (trainer.predict(rows).predictions == plain.predict(rows).predictions).all()


def test_default_is_the_measured_one_with_plain_arguments_and_with_flags(tiny_bert, arguments):
    plain = ParameterDefenseTrainer(model=tiny_bert(), args=arguments())
    flags = ParameterDefenseTrainer(model=tiny_bert(), args=arguments(ParameterDefenseTrainingArguments))
    assert plain.defense == flags.defense == DEFAULT_DEFENSE
    assert len(plain.defended_parameters()) == len(list(plain.model.parameters()))


class TestBadInput:
    """Refused at construction, before any weight is touched."""

    def test_targets_that_match_nothing(self, tiny_bert, arguments):
        with pytest.raises(ValueError, match="last-decoder-layer"):
            ParameterDefenseTrainer(model=tiny_bert(), args=arguments(), target_modules="last-decoder-layer")

    def test_frozen_targets(self, tiny_bert, arguments):
        model = tiny_bert()
        model.bert.embeddings.requires_grad_(False)
        with pytest.raises(ValueError, match="expected trainable parameters, got 5 frozen ones"):
            ParameterDefenseTrainer(model=model, args=arguments(), target_modules=["embeddings"])
        trainer = ParameterDefenseTrainer(model=model, args=arguments())
        assert not any("embeddings" in name for name in trainer.defended_parameters())

    def test_no_trainable_parameter(self, tiny_bert, arguments):
        with pytest.raises(ValueError, match=r"expected trainable parameters, got .* frozen ones"):
            ParameterDefenseTrainer(model=tiny_bert().requires_grad_(False), args=arguments())

    def test_defense_that_is_none(self, tiny_bert, arguments):
        with pytest.raises(TypeError, match="expected a Defense"):
            ParameterDefenseTrainer(model=tiny_bert(), args=arguments(), defense="multi_step_risk")

    def test_optimizers_that_update_inside_backward(self, tiny_bert, arguments):
        with pytest.raises(ValueError, match="updates after backward"):
            ParameterDefenseTrainer(model=tiny_bert(), args=arguments(optim="galore_adamw_layerwise"))
