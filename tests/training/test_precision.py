"""fp16=True: the loss scaler, overflows, and autocast to float16."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from trainings import logs_of, weights_of
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_parcor import ACRT, SAM, CorruptionConstraint, GradientPenalty, MultiStepRisk, ParameterDefenseTrainer

L2 = CorruptionConstraint(epsilon=0.2)
DEFENDED = {
    "multi_step_risk": MultiStepRisk(L2, steps=2),
    "acrt": ACRT(L2),
    "sam": SAM(L2),
    "gradient_penalty": GradientPenalty(weight=0.1),
}
SCALE = 2.0**16
SGD = {"optim": "sgd"}  # shows the scale of a gradient, and tells the Trainer that the scaler skipped its step


@pytest.fixture
def scaled(monkeypatch):
    """Return a Trainer class that scales its loss as fp16=True does, which wants a GPU, by a real scaler on the CPU.

    The forward pass stays in float32, so that a power of two must come out again to the last bit.
    """
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")

    class Scaled(ParameterDefenseTrainer):
        scale = SCALE
        autocast = False

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
            self.accelerator.native_amp = True
            self.accelerator.autocast_handler = AutocastKwargs(enabled=self.autocast)

    return Scaled


@pytest.fixture
def fp16(scaled, monkeypatch):
    """Return a Trainer class that does all that fp16=True does: autocast to float16, and the scaler."""
    monkeypatch.setattr(AcceleratorState, "mixed_precision", "fp16")
    scaled.autocast = True
    return scaled


def assert_same_weights(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class TestScaledLoss:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", DEFENDED)
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_equals_the_unscaled_run(self, tiny_bert, train, scaled, name, accumulation):
        """Also with clipping, which must see unscaled gradients."""
        options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.1, **SGD}
        plain = train(ParameterDefenseTrainer, tiny_bert(), options, defense=DEFENDED[name])
        ours = train(scaled, tiny_bert(), options, defense=DEFENDED[name])
        assert ours.accelerator.scaler.get_scale() == SCALE
        assert_same_weights(weights_of(plain.model), weights_of(ours.model))
        losses, expected = logs_of(ours), logs_of(plain)
        for key in ("loss", "loss_clean", "loss_corrupted", "corruption_norm", "grad_norm"):
            assert [entry[key] for entry in losses] == [entry[key] for entry in expected]


@pytest.fixture
def overflow(scaled, tiny_bert, rows, train):
    """Train for some steps with a gradient that overflows at one backward pass; returns what the passes saw."""

    def run(defense, at, steps, rows=rows, **options):
        model = tiny_bert(dropout=0.0)
        seen, backwards = [], []
        model.register_forward_pre_hook(lambda *_: seen.append(weights_of(model)))

        def hook(gradient):
            backwards.append(1)
            return gradient * math.inf if len(backwards) == at + 1 else gradient

        model.classifier.bias.register_hook(hook)
        before = weights_of(model)
        options = {"max_steps": steps, "train_sampling_strategy": "sequential", **SGD, **options}
        trainer = train(scaled, model, options, defense=defense, rows=rows)
        return trainer, before, seen

    return run


CONSTANT = {"lr_scheduler_type": "constant"}


class TestOverflow:
    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_step_is_skipped_and_no_corruption_comes_of_it(self, overflow, at):
        trainer, before, seen = overflow(MultiStepRisk(L2, steps=2), at, steps=1)
        assert_same_weights(before, weights_of(trainer.model))
        assert trainer.accelerator.optimizer_step_was_skipped
        assert trainer.accelerator.scaler.get_scale() == SCALE / 2
        assert len(seen) == 3
        for k in (1, 2):
            moved = any(not torch.allclose(seen[k][name], seen[k - 1][name], atol=1e-7) for name in before)
            assert moved == (k != at + 1), f"pass {k} must stand where the overflow left it"
            assert all(value.isfinite().all() for value in seen[k].values())

    def test_fused_optimizer_skips_by_itself(self, overflow):
        """The default optimizer is handed the overflow and skips inside: the Trainer believes that it took a step."""
        trainer, before, _ = overflow(MultiStepRisk(L2, steps=2), 1, steps=1, optim="adamw_torch_fused")
        assert_same_weights(before, weights_of(trainer.model))
        assert trainer.accelerator.scaler.get_scale() == SCALE / 2
        assert not trainer.accelerator.optimizer_step_was_skipped

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_next_step_is_as_if_nothing_had_been(self, overflow, tiny_bert, rows, train, at):
        defense = MultiStepRisk(L2, steps=2)
        trainer, _, _ = overflow(defense, at, steps=2, **CONSTANT)
        plain = train(
            ParameterDefenseTrainer,
            tiny_bert(dropout=0.0),
            {"max_steps": 1, "train_sampling_strategy": "sequential", **SGD, **CONSTANT},
            defense=defense,
            rows=rows[4:8],
        )
        assert not trainer.accelerator.optimizer_step_was_skipped
        assert_same_weights(weights_of(plain.model), weights_of(trainer.model))

    @pytest.mark.parametrize("at", [0, 1, 2, 3])
    def test_other_micro_batches_keep_their_own_corruption(self, overflow, at):
        """Two micro-batches of two passes: only the pass after the overflow in the same micro-batch stands still."""
        trainer, before, seen = overflow(MultiStepRisk(L2, steps=1), at, steps=1, gradient_accumulation_steps=2)
        assert_same_weights(before, weights_of(trainer.model))
        assert trainer.accelerator.optimizer_step_was_skipped
        corrupted = [any(not torch.equal(state[name], before[name]) for name in before) for state in seen]
        assert corrupted == [False, at != 0, False, at != 2]

    @pytest.mark.parametrize("name", DEFENDED)
    def test_every_defense_skips_when_its_last_pass_overflows(self, overflow, name):
        trainer, before, seen = overflow(DEFENDED[name], DEFENDED[name].passes - 1, steps=1)
        assert_same_weights(before, weights_of(trainer.model))
        assert trainer.accelerator.optimizer_step_was_skipped
        assert len(seen) == DEFENDED[name].passes

    def test_probe_that_overflows_leaves_the_plain_gradient(self, overflow, tiny_bert, train, rows):
        """The gradient that only makes the corruption is thrown away: SAM then takes the stock step."""
        trainer, _, _ = overflow(SAM(L2), 0, steps=1)
        options = {"max_steps": 1, "train_sampling_strategy": "sequential", **SGD}
        stock = train(Trainer, tiny_bert(dropout=0.0), options)
        assert not trainer.accelerator.optimizer_step_was_skipped
        assert_same_weights(weights_of(stock.model), weights_of(trainer.model))


class TestFloat16:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", DEFENDED)
    def test_scale_falls_until_it_fits_and_then_learns(self, tiny_bert, train, fp16, name):
        """A real overflow: 2**24 is beyond float16."""
        fp16.scale = 2.0**24
        model = tiny_bert(dropout=0.0)
        trainer = train(fp16, model, {"num_train_epochs": 6}, defense=DEFENDED[name])
        # Steps whose penalty overflowed have no loss to log.
        logs = [entry for entry in trainer.state.log_history if "loss_clean" in entry]
        assert trainer.accelerator.scaler.get_scale() < 2.0**24
        assert all(math.isfinite(entry[key]) for entry in logs for key in ("loss_clean", "corruption_norm"))
        assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
        assert logs[-1]["loss_clean"] < logs[0]["loss_clean"]


def penalty_gradient(train, trainer_class, scale=None):
    """Return the gradient of a penalized loss over 2048 tokens, without the scale, and the log."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 256}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes, **tiny.STILL_GPT2))
    tokens = torch.randint(2000, (8, 256))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    gradients = []

    class Kept(trainer_class):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]) / (scale or 1.0))
            return result

    trainer_class.scale = scale
    trainer = train(
        Kept, model, {"max_steps": 1, "per_device_train_batch_size": 8}, rows=rows, defense=GradientPenalty(weight=1.0)
    )
    return gradients[0], trainer.state.log_history[0]


@pytest.mark.slow
def test_inner_gradient_of_the_penalty_does_not_underflow(train, fp16):
    """The scaler scales the outer loss only; without a scale of its own the inner gradient loses 16 bits of range."""
    expected, plain = penalty_gradient(train, type("Float32", (ParameterDefenseTrainer,), {}))
    half, log = penalty_gradient(train, fp16, scale=2.0**8)
    assert float((half - expected).norm() / expected.norm()) < 0.02
    for key in ("loss", "loss_clean"):
        assert log[key] == pytest.approx(plain[key], rel=1e-3)
