"""The defended step in loops without a Trainer, against its gradient written out."""

from __future__ import annotations

import copy
import gc
import logging
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from for_each import for_each
from longhand import longhand
from torch import nn
from torch.nn.functional import cross_entropy
from trainings import IN_ORDER, stacked

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    DefendedBackward,
    GaussianNoise,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    defended_backward,
    select_parameters,
)
from hf_parcor.defenses import DEFENSES
from hf_parcor.distributed.processes import MeasuringProcesses
from hf_parcor.targets import select_trainable
from hf_parcor.training import callbacks as idle_module

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SET = CorruptionConstraint(epsilon=0.2)
WEIGHTS = {  # of the losses at each pass, whose gradients add up
    "multi-step, K = 1": (MultiStepRisk(SET, steps=1), [1 / 2, 1 / 2]),
    "multi-step, K = 2": (MultiStepRisk(SET, steps=2), [1 / 3, 1 / 3, 1 / 3]),
    "ACRT": (ACRT(SET, alpha=0.25), [0.75, 0.25]),
    "SAM": (SAM(SET), [0.0, 1.0]),
    "none": (MultiStepRisk(SET, steps=0), [1.0]),
}


@pytest.fixture(autouse=True)
def _fresh_state():
    """Let a test make the Accelerator that it asks for, whatever another made before."""
    _forget_state()
    yield
    _forget_state()


def _forget_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def micro_batches():
    return [(torch.randn(size, 4).double(), torch.randint(3, (size,))) for size in (5, 5, 2)]


def loss_of(model, batch):
    return lambda: cross_entropy(model(batch[0]), batch[1])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("defense", "weights"), WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_written_out(network, micro_batches, bits_of, defense, weights, accumulation):
    accelerator, before = Accelerator(cpu=True, gradient_accumulation_steps=accumulation), bits_of(network)
    batches = micro_batches[:accumulation]
    expected = [longhand(network, lambda call, b=batch: loss_of(call, b)(), weights) for batch in batches]
    steps = []
    for batch in batches:
        with accelerator.accumulate(network):
            found = defended_backward(accelerator, defense, network, loss_of(network, batch))
            steps.append(accelerator.sync_gradients)
            assert bits_of(network) == before
            assert found.clean == pytest.approx(loss_of(network, batch)().item())
            assert found.norm.realised == pytest.approx(0.2 if len(weights) > 1 else 0)
            assert not found.risk.requires_grad
            assert weights == [1.0] or found.corrupted > found.clean
    assert steps == [False] * (accumulation - 1) + [True]
    for name, gradient in gradients(network).items():
        mean = sum(part[name] for part in expected) / accumulation
        torch.testing.assert_close(gradient, mean, **EXACT)


def test_a_part_of_the_parameters(network, micro_batches):
    """SAM's update is the gradient at the corrupted point, also of what is not corrupted, and no other."""
    selected, (batch, *_) = select_parameters(network, ["2"]), micro_batches
    defended_backward(Accelerator(cpu=True), SAM(SET), network, loss_of(network, batch), selected)
    expected = longhand(network, lambda call: loss_of(call, batch)(), [0, 1], selected=selected)
    torch.testing.assert_close(gradients(network), expected, **EXACT)


@pytest.mark.parametrize("defense", [MultiStepRisk(SET), ACRT(SET), SAM(SET)], ids=str)
def test_a_sparse_gradient_beside_what_is_defended_and_of_it(defense, bits_of):
    words = torch.tensor([[0, 3], [1, 3]])

    def model(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2)).double()

    def run(network, target):
        selected = select_parameters(network, [target])
        defended_backward(Accelerator(cpu=True), defense, network, lambda: network(words).square().mean(), selected)

    network, dense = model(True), model(False)
    run(network, "2")
    run(dense, "2")
    assert network[0].weight.grad.is_sparse
    for found, expected in zip(network.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(found.grad.to_dense(), expected.grad, **EXACT)
    before = bits_of(network)
    with pytest.raises(NotImplementedError, match="dense"):
        run(network, "0")
    assert bits_of(network) == before


def test_a_penalty(network, micro_batches):
    parameters, (batch, *_) = list(network.parameters()), micro_batches
    found = defended_backward(Accelerator(cpu=True), GradientPenalty(weight=0.3), network, loss_of(network, batch))
    loss = loss_of(network, batch)()
    parts = torch.autograd.grad(loss, parameters, create_graph=True)
    risk = loss + 0.3 * torch.sqrt(sum(part.square().sum() for part in parts))
    expected = torch.autograd.grad(risk, parameters)
    assert found.risk == pytest.approx(risk.item())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)


@pytest.mark.parametrize("name", DEFENSES)
def test_a_loop_is_the_trainer(name, defense_of, tiny_bert, train, rows, keep_gradients):
    """Every defense: the gradient of the first step is that of the Trainer, which seeds what is drawn at random."""
    settings = {"corruption": [GradientCorruption(SET), Quantization(4)]} if name == "corruption" else {}
    defense, model = defense_of(name, **settings), tiny_bert(dropout=0.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"max_steps": 1, **IN_ORDER}
    train(ParameterDefenseTrainer, model, options, defense=defense, callbacks=[keep_gradients])
    model.load_state_dict(state)
    model.zero_grad()
    batch = stacked(rows[:4])
    defended_backward(Accelerator(cpu=True), defense, model, lambda: model(**batch).loss)
    torch.testing.assert_close(gradients(model), keep_gradients.kept[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", [name for name, kind in DEFENSES.items() if hasattr(kind, "batch_share") and kind is not AWP]
)
def test_a_part_of_the_batch_is_the_trainer_too(name, defense_of, tiny_bert, train, rows, keep_gradients):
    """Where later passes see a part of the batch, `loss_fn` is called with it."""
    defense = replace(defense_of(name), batch_share=0.5)
    model = tiny_bert(dropout=0.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"max_steps": 1, **IN_ORDER}
    train(ParameterDefenseTrainer, model, options, defense=defense, callbacks=[keep_gradients])
    model.load_state_dict(state)
    model.zero_grad()
    batch = stacked(rows[:4])
    sizes = []

    def loss_fn(batch):
        sizes.append(len(batch["labels"]))
        return model(**batch).loss

    defended_backward(Accelerator(cpu=True), defense, model, loss_fn, batch=batch)
    assert set(sizes) == {2, 4}
    torch.testing.assert_close(gradients(model), keep_gradients.kept[0], rtol=1e-5, atol=1e-7)


def test_parameters_are_selected_once(network, micro_batches, monkeypatch):
    """Once for all steps of an object that stands for them, and once in a step that is a function's."""
    selections = []
    module = sys.modules["hf_parcor.training.accelerate"]

    def counting(*args, **kwargs):
        selections.append(args)
        return select_trainable(*args, **kwargs)

    monkeypatch.setattr(module, "select_trainable", counting)
    accelerator, defense = Accelerator(cpu=True), MultiStepRisk(SET, steps=2)
    backward = DefendedBackward(accelerator, defense, network)
    for batch in micro_batches[:2]:
        backward(loss_of(network, batch))
    assert len(selections) == 1
    defended_backward(accelerator, defense, network, loss_of(network, micro_batches[0]))
    assert len(selections) == 2


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("defense", [pair[0] for pair in WEIGHTS.values()], ids=list(WEIGHTS))
def test_what_is_unfrozen_between_two_steps_is_trained_like_the_rest(network, micro_batches, defense, reuse_prefix):
    """As in gradual unfreezing: not defended, and with the gradient of the risk alone."""
    found = []
    for trained_at_first in (True, False):
        model = copy.deepcopy(network)
        model[0].requires_grad_(trained_at_first)
        defended = select_parameters(model, ["2"])
        backward = DefendedBackward(Accelerator(cpu=True), defense, model, defended, reuse_prefix=reuse_prefix)
        model[0].requires_grad_(True)
        for batch in micro_batches[:2]:
            backward(loss_of(model, batch))
        found.append(gradients(model))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("defense", [pair[0] for pair in WEIGHTS.values()], ids=list(WEIGHTS))
def test_a_second_model_that_the_loss_goes_through(network, micro_batches, defense, share):
    """As a generator's loss goes through its critic, which another optimizer trains."""
    found, critic = [], nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    for apart in (True, False):
        first, second = copy.deepcopy(network), copy.deepcopy(critic)
        whole, accelerator = nn.Sequential(first, second), Accelerator(cpu=True)
        accelerator.prepare(*(torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)), second)
        model, target = (first, "2") if apart else (whole, "0.2")
        backward = DefendedBackward(
            accelerator, replace(defense, batch_share=share), model, select_parameters(model, [target])
        )
        for batch in micro_batches[:2]:
            backward(lambda part, whole=whole: cross_entropy(whole(part[0]), part[1]), batch)
        found.append({**gradients(whole), **dict(whole.named_buffers())})
    assert found[0]["1.0.num_batches_tracked"] == 2
    torch.testing.assert_close(*found, **EXACT)


class TestSharedPrefix:
    """A `DefendedBackward` computes once what the passes of a step share, and finds what one without finds."""

    def run(self, network, micro_batches, defense, *, reuse_prefix):
        model = copy.deepcopy(network)
        forward, computed = model[0].forward, []
        model[0].forward = lambda *args: computed.append(1) or forward(*args)
        backward = DefendedBackward(
            Accelerator(cpu=True), defense, model, select_parameters(model, ["2"]), reuse_prefix=reuse_prefix
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        risks = []
        for batch in micro_batches:
            before = len(computed)
            risks.append(backward(lambda part: cross_entropy(model(part[0]), part[1]), batch).risk.item())
            optimizer.step()
            optimizer.zero_grad()
        return model, risks, len(computed) - before, backward

    @pytest.mark.parametrize("share", [1.0, 0.5])
    @pytest.mark.parametrize(
        "defense", [MultiStepRisk(SET, steps=2), ACRT(SET), SAM(SET)], ids=lambda defense: type(defense).__name__
    )
    def test_trains_as_without(self, network, micro_batches, defense, share):
        defense = replace(defense, batch_share=share)
        reused, risks, runs, backward = self.run(network, micro_batches, defense, reuse_prefix=True)
        full, expected, whole_runs, other = self.run(network, micro_batches, defense, reuse_prefix=False)
        assert (backward.shared_prefix is None, other.shared_prefix is None) == (False, True)
        assert (runs, whole_runs) == (1, defense.passes)
        assert risks == pytest.approx(expected, rel=1e-12)
        for one, another in zip(reused.parameters(), full.parameters(), strict=True):
            torch.testing.assert_close(one, another, **EXACT)

    @for_each(("target", "options"), [("2", {"batch_share": 0.6}), ("0", {"random_start": True})])
    def test_a_norm_that_was_frozen(self, micro_batches, target, options):
        """What the first step found out does not hold once its statistics are those of the batch, and move."""
        found = []
        for modes in ([True], [False, True]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
            defense = MultiStepRisk(SET, steps=1, **options)
            backward = DefendedBackward(Accelerator(cpu=True), defense, model, select_parameters(model, [target]))
            for training in modes:
                model.train(training).zero_grad()
                for batch in micro_batches:
                    torch.manual_seed(1)
                    backward(lambda part: cross_entropy(model(part[0]), part[1]), batch)  # noqa: B023
            found.append((gradients(model), dict(model.named_buffers())))
        torch.testing.assert_close(*found, **EXACT)

    def test_a_loop_that_writes_into_its_batch_gives_each_pass_its_own(self, network, micro_batches):
        """In-place work on the batch, and labels that are popped, reach no other pass."""
        inputs, labels = micro_batches[0]

        def loss_fn(batch):
            batch["inputs"].mul_(0.5)
            return cross_entropy(network(batch["inputs"]), batch["nested"].pop("labels"))

        batch = {"inputs": inputs.clone(), "nested": {"labels": labels}}
        found = defended_backward(Accelerator(cpu=True), MultiStepRisk(SET, steps=2), network, loss_fn, batch=batch)
        grads = gradients(network)
        network.zero_grad()
        halved = inputs * 0.5
        expected = defended_backward(
            Accelerator(cpu=True), MultiStepRisk(SET, steps=2), network, loss_of(network, (halved, labels))
        )
        assert found.risk == pytest.approx(expected.risk.item(), rel=1e-12)
        torch.testing.assert_close(grads, gradients(network), **EXACT)
        assert torch.equal(batch["inputs"], inputs), "the loop's own batch is as it was"


def test_the_scale_of_float16_reaches_what_is_differentiated():
    class Watching(GradientPenalty):
        def minimize(self, step):
            step.backward(lambda loss: seen.append(loss.item()) or loss)

    accelerator, model, seen = Accelerator(cpu=True), nn.Linear(1, 1, bias=False), []
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    defended_backward(accelerator, Watching(weight=0.5), model, lambda: model(torch.ones(1, 1)).sum())
    assert seen == [model.weight.item() * 2.0**16]
    assert model.weight.grad.item() == 2.0**16, "once, not twice"


def test_half_precision(network, micro_batches, bits_of):
    network, accelerator = network.float(), Accelerator(cpu=True, mixed_precision="bf16")
    inputs, labels = micro_batches[0]
    defense, exact = MultiStepRisk(SET, steps=1), {}
    defended_backward(accelerator, defense, network, loss_of(network, (inputs.float(), labels)))
    exact = {name: gradient.clone() for name, gradient in gradients(network).items()}
    network.zero_grad()
    network, before = accelerator.prepare(network), bits_of(network)
    defended_backward(accelerator, defense, network, loss_of(network, (inputs.float(), labels)))
    assert bits_of(network) == before
    found = gradients(network)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.01)
    assert any(not torch.equal(found[name], exact[name]) for name in found), "bfloat16 was not used"


def test_running_statistics_move_once(micro_batches):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    inputs = micro_batches[0][0]
    defended_backward(Accelerator(cpu=True), MultiStepRisk(SET, steps=2), model, loss_of(model, micro_batches[0]))
    assert model[1].num_batches_tracked == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](inputs).mean(0), **EXACT)


@pytest.mark.parametrize(
    ("settings", "progress", "active"),
    [
        ({"start_epoch": 1.0}, {"epoch": 0.9}, False),
        ({"start_epoch": 1.0}, {"epoch": 1.0}, True),
        ({"interval": 3}, {"step": 2}, False),
        ({"interval": 3}, {"step": 3}, True),
        ({"interval": 3}, {"step": 0}, True),
        ({}, {}, True),
    ],
)
def test_start_epoch_and_interval(network, micro_batches, settings, progress, active):
    calls = []

    def counted():
        calls.append(1)
        return loss_of(network, micro_batches[0])()

    defense = MultiStepRisk(SET, steps=2, **settings)
    found = defended_backward(Accelerator(cpu=True), defense, network, counted, **progress)
    assert len(calls) == (3 if active else 1)
    stock = {name: gradient.clone() for name, gradient in gradients(network).items()}
    network.zero_grad()
    loss_of(network, micro_batches[0])().backward()
    assert all(torch.equal(gradient, stock[name]) for name, gradient in gradients(network).items()) is not active
    assert (found.risk == found.clean == found.corrupted) is not active
    assert found.defended is active


@pytest.mark.parametrize(("epoch", "share"), [(0.0, 0.0), (0.5, 0.25), (1.0, 0.5), (3.5, 1.0)])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_strength_grows_with_the_epochs(network, micro_batches, epoch, share, start):
    defense = CorruptionRisk(GradientCorruption(SET), ramp_epochs=2, start_epoch=start)
    loss_fn = loss_of(network, micro_batches[0])
    found = defended_backward(Accelerator(cpu=True), defense, network, loss_fn, epoch=start + epoch)
    assert found.norm.realised == pytest.approx(0.2 * share)


@pytest.mark.parametrize("call", [0, 1, 2])
def test_bit_for_bit_after_an_exception(network, micro_batches, bits_of, call):
    before, calls = bits_of(network), iter(range(3))

    def failing():
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss_of(network, micro_batches[0])()

    with pytest.raises(KeyboardInterrupt):
        defended_backward(Accelerator(cpu=True), MultiStepRisk(SET, steps=2), network, failing)
    assert bits_of(network) == before
    assert not any(module._forward_hooks for module in network.modules())


class TestErrors:
    def refused(self, network, micro_batches, *, defense=MultiStepRisk(SET), loss_fn=None, **options):  # noqa: B008
        loss_fn = loss_of(network, micro_batches[0]) if loss_fn is None else loss_fn
        accelerator, model = options.pop("accelerator", Accelerator(cpu=True)), options.pop("model", network)
        defended_backward(accelerator, defense, model, loss_fn, **options)

    @pytest.mark.parametrize(
        ("kind", "message", "wrong"),
        [
            (TypeError, "defense: expected a Defense", {"defense": "sam"}),
            (ValueError, "batch: expected the batch", {"defense": MultiStepRisk(SET, batch_share=0.5)}),
            (ValueError, "epoch: expected the epochs done", {"defense": SAM(SET, start_epoch=0.5)}),
            (ValueError, "step: expected the optimizer steps done", {"defense": SAM(SET, interval=2)}),
            (
                ValueError,
                "expected those of the model, got 1 others such as 'x'",
                {"parameters": {"x": nn.Linear(1, 1).weight}},
            ),
            (TypeError, r"accelerator: expected an Accelerator, got .* Linear; ", {"accelerator": nn.Linear(1, 1)}),
            (TypeError, r"model: expected .*, got .* dict; ", {"model": {}}),
            (TypeError, r"loss_fn: expected a function .*, got .* Tensor; .*lambda: ", {"loss_fn": torch.ones(())}),
            (TypeError, r"loss_fn: expected a function .*, got .* float; ", {"loss_fn": 1.0}),
            (TypeError, r"parameters: expected .*, got 'all'; .*select_parameters\(", {"parameters": "all"}),
            (TypeError, r"parameters: expected .*, got .* list; ", {"parameters": ["0"]}),
            (TypeError, r"parameters: expected .*, got .* dict; .* batch=$", {"parameters": {"0": torch.ones(2)}}),
            (ValueError, r"parameters: expected at least one, .*; leave it out", {"parameters": {}}),
            (TypeError, r"epoch: expected .* got '1'", {"epoch": "1"}),
            (ValueError, r"epoch: expected .* got -1", {"epoch": -1}),
            (ValueError, r"epoch: expected .* got NaN", {"epoch": math.nan}),
            (TypeError, r"step: expected .* got 1.5", {"step": 1.5}),
            (ValueError, "whose get_input_embeddings", {"defense": AWP(SET, input_epsilon=0.1)}),
            (TypeError, "loss_fn: expected a scalar tensor, got dict", {"loss_fn": lambda: {"loss": 1}}),
            (TypeError, r"loss_fn: expected a scalar tensor, got shape \(2,\)", {"loss_fn": lambda: torch.ones(2)}),
        ],
    )
    def test_wrong_arguments(self, network, micro_batches, bits_of, kind, message, wrong):
        before = bits_of(network)
        with pytest.raises(kind, match=message):
            self.refused(network, micro_batches, **wrong)
        assert bits_of(network) == before
        assert all(gradient is None for gradient in gradients(network).values())

    def test_a_frozen_parameter(self, network, micro_batches):
        network[0].requires_grad_(False)
        with pytest.raises(ValueError, match="expected trainable parameters"):
            self.refused(network, micro_batches, parameters=select_parameters(network, "all"))

    def test_a_frozen_parameter_of_a_defense_that_starts_later(self, network, micro_batches):
        network[0].requires_grad_(False)
        late = {"defense": SAM(SET, start_epoch=3), "epoch": 0.0}
        with pytest.raises(ValueError, match="expected trainable parameters"):
            self.refused(network, micro_batches, parameters=select_parameters(network, "all"), **late)

    def test_a_weight_that_cannot_be_written_of_a_defense_that_starts_later(self, network, micro_batches):
        network.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(TypeError, match=r"phase: expected .* got one that is complex64; leave it out"):
            self.refused(network, micro_batches, defense=SAM(SET, start_epoch=3), epoch=0.0)
        self.refused(network, micro_batches, defense=SAM(replace(SET, epsilon=0.0)))

    @for_each("defense", [MultiStepRisk(SET, steps=1), MultiStepRisk(SET, steps=3), ACRT(SET)])
    def test_a_closure_that_clears_gradients(self, network, micro_batches, bits_of, defense):
        """As those for L-BFGS do: the update would be that of the last pass alone."""
        before, optimizer = bits_of(network), torch.optim.SGD(network.parameters(), lr=0.1)

        def closure():
            optimizer.zero_grad()
            return loss_of(network, micro_batches[0])()

        with pytest.raises(ValueError, match=r"takes away the gradients .* optimizer.zero_grad\(\) does; call that"):
            self.refused(network, micro_batches, defense=defense, loss_fn=closure)
        assert bits_of(network) == before

    def test_parameters_that_the_model_holds_no_more(self, network, micro_batches):
        """Else the old ones would be corrupted, and every step called defended."""
        backward = DefendedBackward(
            Accelerator(cpu=True), MultiStepRisk(SET), network, dict(network.named_parameters())
        )
        backward(loss_of(network, micro_batches[0]))
        network.load_state_dict(copy.deepcopy(network.state_dict()), assign=True)
        with pytest.raises(ValueError, match=r"got 4 others such as '0.weight'; .* make a new DefendedBackward"):
            backward(loss_of(network, micro_batches[0]))

    def test_an_engine_that_was_not_tried(self, network, micro_batches, monkeypatch):
        from accelerate.utils import DistributedType

        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
        with pytest.raises(ValueError, match=r"updates inside backward.*use DDP"):
            self.refused(network, micro_batches)


class TestProcessesThatDidNotJoin:
    """As without a GPU under `accelerate launch --multi_gpu`: two were launched, and each is alone."""

    @pytest.fixture
    def launched(self, monkeypatch):
        @contextmanager
        def refused():
            for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
                monkeypatch.setenv(name, value)
            with pytest.raises(RuntimeError, match=r"processes: expected the 2 .* launched .*, got 1, .*--use_cpu"):
                yield

        Accelerator(cpu=True)
        return refused

    def test_a_loop(self, launched, network, micro_batches):
        with launched():
            defended_backward(Accelerator(cpu=True), SAM(SET), network, loss_of(network, micro_batches[0]))
        assert all(gradient is None for gradient in gradients(network).values())

    @pytest.mark.parametrize("defense", [None, MultiStepRisk(SET, steps=0)])
    def test_a_trainer(self, launched, defense, tiny_bert, arguments, rows):
        args = arguments()
        with launched():
            ParameterDefenseTrainer(model=tiny_bert(), args=args, train_dataset=rows, defense=defense)

    def test_a_measurement(self, launched):
        with launched():
            MeasuringProcesses.launched()


def test_nan_does_not_corrupt(network, micro_batches, bits_of):
    before = bits_of(network)
    found = defended_backward(
        Accelerator(cpu=True), MultiStepRisk(SET), network, lambda: loss_of(network, micro_batches[0])() * math.nan
    )
    assert bits_of(network) == before
    assert found.norm.realised == 0


NEVER = "did nothing in this loop"
IDLE = {  # what a loop of four micro-batches in two epochs says when it is over
    "starts behind the end": ([MultiStepRisk(SET, start_epoch=2)], [f"{NEVER}.* none of its 4 .*start_epoch=2"]),
    "starts in the last epoch": ([MultiStepRisk(SET, start_epoch=1)], []),
    "from the start": ([SAM(SET)], []),
    "comes again behind the end": ([SAM(SET, interval=9, start_epoch=1)], [NEVER]),
    "no steps": ([MultiStepRisk(SET, steps=0)], ["does nothing, since steps=0"]),
    "no radius": ([SAM(CorruptionConstraint(epsilon=0))], ["does nothing, since epsilon=0"]),
    "no steps of a size": ([MultiStepRisk(SET, step_size=0)], ["does nothing, since step_size=0"]),
    "a radius that grows": ([MultiStepRisk(SET, start_epoch=1.5), SAM(SET, start_epoch=0.5)], []),
    "with another model": ([SAM(SET)], [f"{NEVER}: in 4 calls .* such as 0.weight, ever had a gradient"]),
    "with another model, and noise": ([CorruptionRisk(GaussianNoise(0.1))], []),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_loop_that_was_not_defended_says_so_once(case, network, micro_batches, caplog):
    logging.getLogger("transformers").propagate = True
    idle_module.logger.warning_once.cache_clear()
    (*defenses, last), expected = IDLE[case]
    accelerator, used = Accelerator(cpu=True), copy.deepcopy(network) if "another model" in case else network
    for step, epoch in enumerate((0, 0.5, 1, 1.5)):
        defense = defenses[0] if defenses and step < 2 else last
        defended_backward(accelerator, defense, network, loss_of(used, micro_batches[0]), epoch=epoch, step=step)
    before = len(caplog.records)
    assert not [record for record in caplog.records[:before] if NEVER in record.getMessage()]
    del accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    said = [record.getMessage() for record in caplog.records if record.name == idle_module.__name__]
    assert len(said) == len(expected)
    assert all(re.search(pattern, message) for pattern, message in zip(expected, said, strict=True))
