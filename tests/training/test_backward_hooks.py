"""Hooks that take a gradient before the defended step is done: refused before anything is changed, not by name."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from for_each import for_each
from torch import nn
from transformers import Trainer

from hf_parcor import (
    ACRT,
    CorruptionConstraint,
    MultiStepRisk,
    ParameterDefenseTrainer,
    defended_backward,
)

DEFENSE = MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=1)


def after_each_gradient(model):
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)


def after_one_gradient(model):
    class Update:
        def __call__(self, parameter):
            with torch.no_grad():
                parameter.sub_(parameter.grad)
            parameter.grad = None

    list(model.parameters())[-1].register_post_accumulate_grad_hook(partial(Update()))


class Lomo(torch.optim.Optimizer):
    """Updates before gradients are accumulated, by a hook that closes over it."""

    def __init__(self, model):
        super().__init__(model.parameters(), {"lr": 0.1})

        def update(gradient):
            self.updated = True

        for parameter in model.parameters():
            parameter.register_hook(update)


class OfAMethod(torch.optim.Optimizer):
    def __init__(self, model):
        super().__init__(model.parameters(), {"lr": 0.1})
        for parameter in model.parameters():
            parameter.register_hook(partial(self.update, 1))

    def update(self, times, gradient):
        raise AssertionError


def among_others(model):
    optimizers = {"all": torch.optim.SGD(model.parameters(), lr=0.1)}

    def update(gradient):
        optimizers["all"].step()

    next(model.parameters()).register_hook(update)


def of_torch(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scripts other optimizers when it is imported
        from torch.distributed.optim import _apply_optimizer_in_backward
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})


REFUSED = {
    "after each": (after_each_gradient, "register_post_accumulate_grad_hook.*after_each_gradient.*update"),
    "after one, a partial object": (after_one_gradient, "register_post_accumulate_grad_hook.*Update"),
    "LOMO's": (Lomo, "register_hook.*Lomo"),
    "a method": (OfAMethod, "register_hook.*OfAMethod"),
    "among others": (among_others, "register_hook.*among_others"),
    "torch.distributed.optim": (of_torch, "_apply_optimizer_in_backward"),
}


def average_gradient_of_transformers(model):
    """The hook that Transformers puts on adapters beside a sharded model."""

    def average_gradient(parameter):
        parameter.grad.div_(1)

    average_gradient.__module__ = Trainer.__module__
    next(model.parameters()).register_post_accumulate_grad_hook(average_gradient)


def looks(model):
    seen = {"largest": 0.0}

    def look(gradient):
        seen["largest"] = max(seen["largest"], float(gradient.abs().max()))

    for parameter in model.parameters():
        parameter.register_hook(look)
        parameter.register_hook(nn.Identity())


ALLOWED = {
    "average": average_gradient_of_transformers,
    "before, without an optimizer": looks,
    "removed": lambda model: next(model.parameters()).register_post_accumulate_grad_hook(print).remove(),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last(self.first(x).tanh())


def step(model, defense=DEFENSE, **selection):
    batch = torch.ones(4, 3)
    return defended_backward(Accelerator(cpu=True), defense, model, lambda: model(batch).square().mean(), **selection)


@pytest.mark.slow
@for_each("name", REFUSED)
@for_each("part", ["all", "last"])
def test_refused_in_a_loop_with_nothing_changed(name, part):
    model = Net()
    selection = {} if part == "all" else {"parameters": dict(model.last.named_parameters())}
    model(torch.ones(1, 3)).sum().backward()  # accumulated before
    register, message = REFUSED[name]
    register(model)
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in model.parameters()]
    model.calls = 0
    with pytest.raises(ValueError, match=f"expected gradients that nobody takes .*{message}.*take the hook away"):
        step(model, **selection)
    assert model.calls == 0
    for parameter, (weight, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(parameter.grad, gradient)


@for_each("name", ALLOWED)
def test_allowed(name):
    plain, hooked = Net(), Net()
    hooked.load_state_dict(plain.state_dict())
    ALLOWED[name](hooked)
    step(plain)
    step(hooked)
    for one, other in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@for_each("name", REFUSED)
def test_allowed_where_the_step_is_the_stock_one(name):
    model = Net()
    register, _ = REFUSED[name]
    if register is not OfAMethod:
        register(model)
    step(model, ACRT(CorruptionConstraint(epsilon=0.0)))
    assert model.calls == 1


@for_each("when", ["before", "after"])
def test_refused_in_a_trainer_however_late_the_hook_comes(tiny_bert, arguments, rows, when):
    model = tiny_bert(dropout=0.0)
    if when == "before":
        after_each_gradient(model)
    trainer = ParameterDefenseTrainer(model=model, args=arguments(), train_dataset=rows, defense=DEFENSE)
    if when == "after":
        after_each_gradient(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="register_post_accumulate_grad_hook"):
        trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name


def test_the_stock_steps_before_the_start_epoch_run_with_hooks(tiny_bert, arguments, rows):
    model = tiny_bert(dropout=0.0)
    after_each_gradient(model)
    late = MultiStepRisk(CorruptionConstraint(epsilon=0.1), start_epoch=1)
    trainer = ParameterDefenseTrainer(
        model=model, args=arguments(max_grad_norm=0.0, max_steps=2), train_dataset=rows, defense=late
    )
    trainer.train()
    assert trainer.state.global_step == 2
