"""Options of the stock Trainer that reach into the step: clipping, checkpointing, batch size, noise."""

from __future__ import annotations

import math

import pytest
import torch
from longhand import longhand
from trainings import logs_of, losses_of, stacked, weights_of
from transformers import Trainer

from hf_parcor import ACRT, SAM, CorruptionConstraint, GradientPenalty, MultiStepRisk, ParameterDefenseTrainer

L2 = CorruptionConstraint(epsilon=0.2)
DEFENDED = {
    "multi_step_risk": MultiStepRisk(L2, steps=2),
    "acrt": ACRT(L2),
    "sam": SAM(L2),
    "gradient_penalty": GradientPenalty(weight=0.1),
}
REFUSED = ("gradient_penalty", True)  # reentrant checkpoints have no second derivative
ONE_STEP = {"max_steps": 1, "train_sampling_strategy": "sequential", "optim": "sgd"}


def assert_same_weights(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class TestClipping:
    @pytest.fixture
    def step(self, tiny_bert, rows, train, keep_gradients):
        """Take one step of two micro-batches; returns the Trainer, its gradient, and the longhand one."""

        def run(max_grad_norm):
            calls = []

            class Counting(ParameterDefenseTrainer):
                def create_accelerator_and_postprocess(self):
                    super().create_accelerator_and_postprocess()
                    clip = self.accelerator.clip_grad_norm_
                    self.accelerator.clip_grad_norm_ = lambda *args: calls.append(args[1]) or clip(*args)

            options = {**ONE_STEP, "gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm}
            model, reference = tiny_bert(dropout=0.0).double(), tiny_bert(dropout=0.0).double()
            trainer = train(Counting, model, options, callbacks=[keep_gradients], defense=DEFENDED["multi_step_risk"])
            parts = []
            for start in (0, 4):
                used = rows[start : start + 4]
                inputs = stacked(used)
                parts.append(longhand(reference, lambda call, i=inputs: call(**i).loss, [1 / 3, 1 / 3, 1 / 3]))
            # BERT does not divide by the number of micro-batches, in stock training neither.
            expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}
            return trainer, calls, keep_gradients.kept[0], expected

        return run

    def test_only_the_gradient_of_the_risk_is_clipped_once(self, step):
        trainer, calls, kept, expected = step(0.05)
        norm = float(torch.sqrt(sum(part.square().sum() for part in expected.values())))
        assert calls == [0.05]
        assert norm > 0.1
        assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
        for name, gradient in kept.items():
            torch.testing.assert_close(gradient, expected[name] * 0.05 / norm, rtol=1e-4, atol=1e-12, msg=name)

    def test_zero_clips_nothing(self, step):
        trainer, calls, kept, expected = step(0.0)
        norm = float(torch.sqrt(sum(part.square().sum() for part in expected.values())))
        assert calls == [math.inf]  # the Trainer asks for the norm
        assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
        for name, gradient in kept.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


class TestGradientCheckpointing:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "reentrant"),
        [(name, reentrant) for name in DEFENDED for reentrant in (False, True) if (name, reentrant) != REFUSED],
    )
    def test_equals_the_run_without_it(self, tiny_bert, train, name, reentrant):
        """With dropout, whose masks are recomputed, and accumulation; recomputed at the weights of the pass."""
        defense = DEFENDED[name]
        options = {"max_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
        checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        layers = []
        model = tiny_bert(dropout=0.3)
        model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(lambda *_: layers.append(1))
        plain = train(ParameterDefenseTrainer, tiny_bert(dropout=0.3), options, defense=defense)
        ours = train(ParameterDefenseTrainer, model, options | checkpointed, defense=defense)
        assert len(layers) > 4 * defense.passes, "nothing was computed again"
        assert losses_of(ours) == pytest.approx(losses_of(plain), rel=1e-6)
        for first, second in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)

    def test_second_derivative_of_reentrant_checkpoints_is_refused(self, tiny_bert, arguments):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        with pytest.raises(ValueError, match="expected use_reentrant=False for a defense that differentiates twice"):
            ParameterDefenseTrainer(model=tiny_bert(), args=arguments(**options), defense=GradientPenalty())

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("targets", ["last-encoder-layer", None])
    @pytest.mark.parametrize("named_by", ["the model", "other settings"])
    def test_it_is_where_no_argument_names_them(self, tiny_bert, arguments, rows, targets, named_by):
        """PyTorch says it of all weights; those inside of checkpoints alone would have no penalty, without a word."""
        model, options = tiny_bert(dropout=0.0), {}
        if named_by == "the model":
            model.gradient_checkpointing_enable({"use_reentrant": True})
        else:
            options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}}
        trainer = ParameterDefenseTrainer(
            model=model,
            args=arguments(**options),
            train_dataset=rows,
            defense=GradientPenalty(),
            target_modules=targets,
        )
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with pytest.raises(RuntimeError, match="use_reentrant"):
            trainer.train()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name


@pytest.mark.parametrize("at", [3, 5])
def test_batch_size_found_after_running_out_of_memory(tiny_bert, train, rows, at):
    """An error in any pass leaves no trace: weights, gradients and log are those of a run at the smaller size.

    It comes in the last pass of the first micro-batch, or in a corrupted pass of the second; accelerate
    then tries 90 % of 8.
    """
    options = {
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "logging_steps": 2,
    }
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("CUDA out of memory.")

    model = tiny_bert(dropout=0.0)
    model.classifier.register_forward_hook(fail)
    found = train(
        ParameterDefenseTrainer,
        model,
        {**options, "per_device_train_batch_size": 8, "auto_find_batch_size": True},
        defense=DEFENDED["multi_step_risk"],
    )
    plain = train(
        ParameterDefenseTrainer,
        tiny_bert(dropout=0.0),
        {**options, "per_device_train_batch_size": 7},
        defense=DEFENDED["multi_step_risk"],
    )
    assert found.state.train_batch_size == 7
    assert_same_weights(weights_of(plain.model), weights_of(found.model))
    logs, expected = logs_of(found), logs_of(plain)
    for key in ("loss", "loss_clean", "loss_corrupted", "corruption_norm"):
        assert [entry[key] for entry in logs] == [entry[key] for entry in expected]


def test_neftune_noise_is_in_every_pass_and_gone_afterwards(tiny_bert, train):
    model, outputs = tiny_bert(dropout=0.0), []
    embedding = model.get_input_embeddings()
    weights = []

    class Watching(ParameterDefenseTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            handle = embedding.register_forward_hook(lambda module, args, output: outputs.append((args[0], output)))
            weights.append(embedding.weight.detach().clone())
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                handle.remove()

    train(Watching, model, {**ONE_STEP, "neftune_noise_alpha": 5.0}, defense=DEFENDED["multi_step_risk"])
    assert len(outputs) == 3
    bound = 5.0 / math.sqrt(8 * 16)
    noises = [output - value[ids] for (ids, output), value in zip(outputs, weights, strict=True)]
    for noise in noises:
        assert 0.9 * bound < float(noise.detach().abs().max()) <= bound * (1 + 1e-6)
    assert not torch.equal(noises[0], noises[1])
    model.train()
    ids = outputs[0][0]
    assert torch.equal(embedding(ids), embedding.weight[ids])
    assert not hasattr(embedding, "neftune_noise_alpha")


def test_neftune_without_defense_is_the_stock_run(tiny_bert, train):
    options = {"neftune_noise_alpha": 5.0}
    stock = train(Trainer, tiny_bert(), options)
    ours = train(ParameterDefenseTrainer, tiny_bert(), options, defense=MultiStepRisk(L2, steps=0))
    assert_same_weights(weights_of(stock.model), weights_of(ours.model))
