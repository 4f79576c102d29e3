"""One set of laws for all of them: a defense that does nothing is no defense, a prefix reused is one computed."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from differential.hostile import CASES, MakesItsOptimizer, PopsWhatIsNested, boxed, detector
from for_each import for_each
from torch import nn
from trainings import QUIET, losses_of
from transformers.loss.loss_for_object_detection import HungarianMatcher

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRisk,
    GaussianNoise,
    GradientCorruption,
    MultiStepRisk,
    Quantization,
    UniformNoise,
    defended_backward,
)
from hf_parcor.batches import private_copy

NOTHING = CorruptionConstraint(epsilon=1e-9)
DEFENSES = {
    "multi-step": MultiStepRisk(NOTHING, steps=1),
    "three passes": MultiStepRisk(NOTHING, steps=2),
    "random start": MultiStepRisk(NOTHING, steps=1, random_start=True),
    "acrt": ACRT(NOTHING),
    "sam": SAM(NOTHING),
    "sam on a part of the batch": SAM(NOTHING, batch_share=0.5),
    "awp": AWP(NOTHING, input_epsilon=0),
    "corruption": CorruptionRisk([GradientCorruption(NOTHING), UniformNoise(1e-9)]),
    "corruption alone": CorruptionRisk(UniformNoise(1e-9), clean_weight=0),
}


def near(name):
    """Of numbers that follow from weights; what no weight is needed for is the same to the last bit."""
    return {"rtol": 0, "atol": CASES[name].close}


@pytest.fixture(autouse=True, scope="module")
def somewhere_else(tmp_path_factory):
    """Let Trainers that are made once for several tests make their folder where it is cleaned up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("differential"))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trainer_of(name, defense=None, **settings):
    case = CASES[name]
    options = {
        **QUIET,
        "output_dir": "unused",
        "logging_steps": 1,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        **case.options,
    }
    kind = case.trainer if defense is None else case.defended()
    if defense is not None:
        settings["defense"] = defense
    return kind(
        model=case.build(),
        args=tf.TrainingArguments(**options),
        train_dataset=case.rows(),
        data_collator=case.collator,
        **settings,
    )


@functools.cache
def stock_run(name):
    return trained(trainer_of(name))


def one_step(name, defense=None):
    """Return the Trainer, the batch as the step left it, and what it returned."""
    case, trainer = CASES[name], trainer_of(name, defense)
    trainer.current_gradient_accumulation_steps = 1
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    batch = case.collator(case.rows()[:4])
    torch.manual_seed(2)
    return trainer, batch, trainer.training_step(trainer.model, batch)


@functools.cache
def stock_step(name):
    return one_step(name)


def trained(trainer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train()
    return trainer


def leaves(batch):
    if isinstance(batch, dict):
        return [(f"{name}.{inner}", leaf) for name, part in batch.items() for inner, leaf in leaves(part)]
    if isinstance(batch, list):
        return [(f"{place}.{inner}", leaf) for place, part in enumerate(batch) for inner, leaf in leaves(part)]
    return [("", batch)]


def assert_same_batch(one, other):
    first, second = dict(leaves(one)), dict(leaves(other))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        assert torch.equal(leaf, second[name]) if isinstance(leaf, torch.Tensor) else leaf == second[name], name


def assert_same_model(one, other, close, *, buffers_close=False):
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), **close, msg=name)
    for name, buffer in one.named_buffers():
        if buffers_close:  # after an update of the weights
            torch.testing.assert_close(buffer, other.get_buffer(name), **close, msg=name)
        else:
            assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("name", CASES)
class TestTraining:
    @pytest.mark.slow
    @for_each("defense", ["multi-step", "random start"])
    def test_a_defense_that_does_nothing_trains_as_the_stock_trainer(self, name, defense):
        stock, ours = stock_run(name), trained(trainer_of(name, DEFENSES[defense]))
        assert losses_of(ours) == pytest.approx(losses_of(stock), abs=1e-6)
        assert_same_model(ours.model, stock.model, near(name), buffers_close=True)

    @pytest.mark.slow
    @for_each("defense", DEFENSES)
    def test_a_step_leaves_batch_buffers_and_gradients_as_the_stock_step(self, name, defense):
        if CASES[name].trainer is PopsWhatIsNested and DEFENSES[defense].splits_batch:
            return  # a list beside the tensors is no list of examples
        stock, given, stock_loss = stock_step(name)
        ours, ours_given, loss = one_step(name, DEFENSES[defense])
        torch.testing.assert_close(loss, stock_loss, **near(name))
        assert_same_batch(ours_given, given)
        assert_same_model(ours.model, stock.model, near(name))
        for parameter, (key, other) in zip(ours.model.parameters(), stock.model.named_parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), key
            if other.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad, **near(name), msg=key)

    @pytest.mark.slow
    @for_each("steps", [1, 3])
    def test_a_prefix_that_is_reused_is_one_that_is_computed(self, name, steps):
        case, defense = CASES[name], MultiStepRisk(CorruptionConstraint(epsilon=0.3), steps=steps)
        reused, full = (
            trained(trainer_of(name, defense, target_modules=case.head, reuse_prefix=reuse)) for reuse in (True, False)
        )
        assert (reused.shared_prefix is not None) == case.reused
        assert losses_of(reused) == pytest.approx(losses_of(full), rel=1e-12)
        # A part that computes in float32 rounds sums in another order to its own digits.
        summed = {"rtol": 1e-10, "atol": 1e-12 if case.close < 1e-6 else 1e-8}
        for (key, one), other in zip(reused.model.named_parameters(), full.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, **summed, msg=key)
        for (key, one), other in zip(reused.model.named_buffers(), full.model.buffers(), strict=True):
            torch.testing.assert_close(one, other, **summed, msg=key)


LOOPED = [name for name, case in CASES.items() if case.trainer in (tf.Trainer, MakesItsOptimizer)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPED)
@for_each("defense", ["multi-step", "random start", "sam"])
def test_a_loop_of_ones_own_leaves_what_backward_leaves(name, defense):
    found = []
    for ours in (False, True):
        case, accelerator = CASES[name], Accelerator(cpu=True)
        model = case.build()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        batch = case.collator(case.rows()[:4])

        def loss_of(model=model, batch=batch):
            found = model(**private_copy(batch))
            return found[0] if isinstance(found, tuple) else found["loss"]

        torch.manual_seed(2)
        if ours:
            defended_backward(accelerator, DEFENSES[defense], model, loss_of)
        else:
            accelerator.backward(loss_of())
        found.append(model)
    stock, model = found
    assert_same_model(model, stock, near(name))
    for (key, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, **near(name), msg=key)


class TestDetectors:
    """What a detector's loss is of: a matching of boxes that are there with predictions, found in each pass anew."""

    def yolos(self):
        torch.manual_seed(3)
        return detector()

    def detr(self):
        torch.manual_seed(3)
        sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_labels": 3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "auxiliary_loss": True}
        no_masks = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        backbone = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], out_features=["stage2"])
        config = tf.DetrConfig(**sizes, **heads, **no_masks, backbone_config=backbone)
        model = tf.DetrForObjectDetection(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    def batch(self, counts=(3, 1, 0, 2), side=8):
        torch.manual_seed(1)
        images = torch.randn(len(counts), 3, side, side, dtype=torch.float64)
        return {"pixel_values": images, "labels": [boxed(count) for count in counts]}

    def step(self, model, batch, defense):
        defended_backward(Accelerator(cpu=True), defense, model, lambda: model(**private_copy(batch)).loss)
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    def gradient(self, model, batch):
        """Return the gradient of the loss, and the vector's length."""
        parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        found = torch.autograd.grad(model(**private_copy(batch)).loss, list(parameters.values()), allow_unused=True)
        gradient = {name: one for name, one in zip(parameters, found, strict=True) if one is not None}
        return gradient, torch.stack([one.norm() for one in gradient.values()]).norm()

    @pytest.fixture
    def matching(self, monkeypatch):
        """Return a list that each matching adds itself to, and those to take instead, one after the other."""
        found, given, match = [], [], HungarianMatcher.forward

        def seen(matcher, outputs, targets):
            found.append(given.pop(0) if given else match(matcher, outputs, targets))
            return found[-1]

        monkeypatch.setattr(HungarianMatcher, "forward", seen)
        return found, given

    @pytest.mark.slow
    @pytest.mark.parametrize(("build", "side", "each"), [("yolos", 8, 1), ("detr", 32, 2)])
    def test_boxes_are_matched_anew_in_each_pass(self, build, side, each, matching, in_double):
        found, given = matching
        epsilon, batch = 2.0, self.batch(side=side)
        ours = self.step(getattr(self, build)(), batch, MultiStepRisk(CorruptionConstraint(epsilon=epsilon), steps=1))
        clean, corrupted = found[:each], found[each:]
        assert len(corrupted) == each  # of DETR each layer of the decoder has one
        assert not same_matching(clean, corrupted)

        model = getattr(self, build)()
        first, length = self.gradient(model, batch)
        with torch.no_grad():
            for name, gradient in first.items():
                model.get_parameter(name).add_(gradient, alpha=float(epsilon / length))
        second, _ = self.gradient(model, batch)
        assert same_matching(found[2 * each :], [*clean, *corrupted])
        given.extend(clean)
        frozen, _ = self.gradient(model, batch)
        for name, gradient in ours.items():
            expected = (first[name] + second[name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9, msg=name)
        assert any(not torch.allclose(frozen[name], second[name]) for name in second)

    @pytest.mark.slow
    @for_each("steps", [1, 2, 3])
    def test_one_matching_a_pass(self, steps, matching, in_double):
        found, _ = matching
        found.clear()
        self.step(self.yolos(), self.batch(), MultiStepRisk(CorruptionConstraint(epsilon=1.0), steps=steps))
        assert len(found) == steps + 1

    @pytest.mark.slow
    @for_each(
        ("what", "counts", "classes"),
        [("no boxes", (0, 0, 0, 0), 3), ("one box", (0, 1, 0, 0), 3), ("a class that never occurs", (3, 1, 2, 5), 2)],
    )
    def test_images_that_show_little(self, what, counts, classes, in_double):
        batch = self.batch(counts)
        for target in batch["labels"]:
            target["class_labels"] = target["class_labels"].clamp(max=classes - 1)
        expected, _ = self.gradient(self.yolos(), batch)
        found = self.step(self.yolos(), batch, DEFENSES["multi-step"])
        for name, gradient in found.items():
            assert gradient.isfinite().all(), name
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-7, msg=name)
        moved = self.step(self.yolos(), batch, MultiStepRisk(CorruptionConstraint(epsilon=0.5), steps=2))
        assert all(gradient.isfinite().all() for gradient in moved.values())
        assert any(not torch.allclose(moved[name], expected[name]) for name in moved)


def same_matching(one, other):
    """Whether boxes are matched with the same predictions, image by image."""
    pairs = [[torch.stack(pair).tolist() for images in found for pair in images] for found in (one, other)]
    return pairs[0] == pairs[1]


MEASURED = {name: case for name, case in CASES.items() if case.measured}


@pytest.mark.parametrize("case", MEASURED.values(), ids=MEASURED)
class TestMeasuring:
    def batches(self, case):
        rows = case.rows()
        return [case.collator(rows[start : start + 4]) for start in range(0, len(rows), 4)]

    def measure(self, case, model, corruptions, *, reuse, batches=None):
        batches = self.batches(case) if batches is None else batches
        given = [{key: value for key, value in batch.items() if key != "weights"} for batch in batches]
        evaluator = CorruptionEvaluator(
            model, case.metric(given), given, target_modules=case.head, reuse_prefix=reuse, progress=False
        )
        record = evaluator.evaluate(corruptions, trials=2)
        return [row.metrics for row in record.rows()]

    @pytest.mark.slow
    def test_a_prefix_that_is_reused_is_one_that_is_computed(self, case):
        corruptions = [GaussianNoise(0.5), GaussianNoise(0.0), Quantization(3), GaussianNoise(0.1)]
        corruptions.insert(0, GradientCorruption(CorruptionConstraint(epsilon=0.5)))
        reused, full = (self.measure(case, case.build(), corruptions, reuse=reuse) for reuse in (True, False))
        assert reused == full

    @pytest.mark.slow
    @for_each("reuse", [True, False])
    def test_no_noise_is_clean_and_measurements_are_equal(self, case, reuse):
        model = case.build()
        corruptions = [GaussianNoise(0.0), GaussianNoise(0.3), GaussianNoise(0.0)]
        first = self.measure(case, model, corruptions, reuse=reuse)
        clean, nothing, _, again = first
        for name, (value,) in clean.items():
            assert math.isfinite(value)
            assert nothing[name] == again[name] == (value, value)
        assert self.measure(case, model, corruptions, reuse=reuse) == first

    def test_model_and_data_are_afterwards_as_they_were(self, case):
        model = case.build()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        batches = self.batches(case)
        given = private_copy(batches)
        before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.measure(case, model, [GaussianNoise(0.3), Quantization(4)], reuse=True, batches=batches)
        assert_same_batch(batches, given)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert torch.equal(tensor, before[name]), name
        assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
        assert isinstance(model, nn.Module)
