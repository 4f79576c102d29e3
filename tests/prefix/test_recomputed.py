"""A prefix that is computed at the first pass and again at the last: what must be as if its graph had been kept."""

from __future__ import annotations

import pytest
import torch
from for_each import for_each
from interrupts import MAY_BE_IGNORED, interrupted_at_lines
from torch import nn

from hf_parcor import ACRT, SAM, CorruptionConstraint, MultiStepRisk
from hf_parcor.defenses import DefendedStep
from hf_parcor.overriding import undoing_left
from hf_parcor.prefix import (
    PrefixError,
    PrefixReuse,
    RecomputedPrefix,
    find_prefix,
    try_prefix,
)

L2 = CorruptionConstraint(epsilon=0.3)
DEFENSES = [MultiStepRisk(L2, steps=3), ACRT(L2, alpha=0.3), SAM(L2)]
ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()


class Layer(nn.Module):
    """Works in place on what it is handed, and returns more than one thing."""

    def __init__(self):
        super().__init__()
        self.own, self.dropout = nn.Linear(4, 4).double(), nn.Dropout(0.5)

    def forward(self, x):
        x += 1
        hidden = self.dropout(self.own(x).tanh())
        return {"hidden": hidden, "norm": hidden.norm(), "name": "layer"}


class Net(nn.Module):
    """Has one dropout before all layers and behind the last one."""

    def __init__(self, layers=3, in_place=False):
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.layers, self.dropped, self.calls = nn.ModuleList(Layer() for _ in range(layers)), False, 0
        self.shared, self.last = nn.Dropout(0.5), nn.Linear(4, 4).double()

    def forward(self, x):
        self.calls += 1
        hidden, norms = self.shared(x.clone()), 0
        for layer in self.layers:
            result = layer(hidden)
            hidden, norms = result["hidden"], norms + result["norm"]
            hidden = hidden.mul_(2) if self.in_place else hidden * 2
            hidden += 1
        if self.dropped and self.calls == 4:  # as a model that skips layers at random
            hidden = torch.ones_like(hidden)
        return {"loss": self.shared(self.last(hidden)).tanh().square().mean() + norms / 10}


def defended(model, prefix, defense, fail_at=None, scale=1.0):
    """Return all gradients of one step, in training mode; a gradient scaler would send scaled losses backward."""
    model.zero_grad()
    model.calls = 0
    selected = {"weight": model.last.weight, "bias": model.last.bias}

    def run_pass(objective, index):
        if index == fail_at:
            raise KeyboardInterrupt
        loss = objective(model(ROWS)["loss"])
        (loss * scale).backward()
        return loss.detach()

    torch.manual_seed(2)
    with DefendedStep(selected, run_pass, defense.passes, list(model.layers.parameters()), prefix=prefix) as step:
        defense.minimize(step)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@for_each("in_place", [False, True])
@for_each("defense", DEFENSES)
def test_the_same_dropout_masks_and_gradients_as_with_a_graph_that_is_kept(defense, in_place):
    model = Net(in_place=in_place)
    expected = defended(model, PrefixReuse([model.shared, *model.layers], [model.last]), defense)
    after = torch.rand(3)
    found = defended(model, RecomputedPrefix([model.shared, *model.layers], [model.last]), defense)
    assert torch.equal(after, torch.rand(3))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_a_scaled_loss_scales_the_gradients_of_all_passes():
    """By a power of two, so exactly; the direction of a corruption does not depend on it."""
    model, defense = Net(), MultiStepRisk(L2, steps=2)
    model.eval()
    prefix = RecomputedPrefix([model.shared, *model.layers], [model.last])
    expected = defended(model, prefix, defense)
    for name, gradient in defended(model, prefix, defense, scale=1024.0).items():
        torch.testing.assert_close(gradient, 1024 * expected[name], rtol=1e-12, atol=0, msg=name)


def test_what_the_last_pass_does_not_use_gets_the_gradients_of_the_others():
    model, defense = Net(), MultiStepRisk(L2, steps=3)
    model.eval()
    model.dropped = True
    expected = defended(model, None, defense)
    for name, gradient in defended(
        model, RecomputedPrefix([model.shared, *model.layers], [model.last]), defense
    ).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14, msg=name)


def test_it_is_computed_twice_and_its_hooks_run_no_oftener():
    model, calls, hooks = Net(layers=1), [], []
    model.layers[0].own.register_forward_hook(lambda *_: calls.append(1))
    model.layers[0].register_forward_pre_hook(lambda module, _: hooks.append(type(module).__name__))
    prefix = RecomputedPrefix([model.shared, *model.layers], [model.last])
    defended(model, prefix, MultiStepRisk(L2, steps=5))
    assert len(calls) == len(hooks) == prefix.forwards == 2
    assert set(hooks) == {"Layer"}
    assert prefix.recorded == {}
    assert prefix.outputs == prefix.boundary == []


def test_nothing_is_held_once_it_was_sent_backward():
    model = Net()
    prefix = RecomputedPrefix([model.shared, *model.layers], [model.last])
    prefix.begin(lambda: None)
    for last in (False, True):
        with prefix.sharing(last):
            prefix.joined(model(ROWS)["loss"]).backward()
    assert prefix.recorded
    prefix.backward()
    assert not prefix.recorded
    assert prefix.outputs == prefix.boundary == []


@for_each("index", [1, 3])
def test_an_interrupt_leaves_no_trace(index):
    model = Net()
    prefix = RecomputedPrefix([model.shared, *model.layers], [model.last])
    with pytest.raises(KeyboardInterrupt):
        defended(model, prefix, MultiStepRisk(L2, steps=3), fail_at=index)
    assert {type(layer) for layer in model.layers} == {Layer}
    assert prefix.outputs == prefix.boundary == []


@MAY_BE_IGNORED
@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_every_module_of_its_class():
    """Also just where a block ends, of which nothing is ended then."""
    model = Net(layers=1)
    prefix = RecomputedPrefix([model.shared, *model.layers], [model.last])
    step = undoing_left()(lambda: defended(model, prefix, MultiStepRisk(L2, steps=1)))
    for at in interrupted_at_lines(step, every=3):
        assert [type(module) for module in (model.shared, *model.layers)] == [nn.Dropout, Layer], at


class Early(nn.Module):
    """Knows another module, which is no child of it."""

    def __init__(self, other):
        super().__init__()
        self.__dict__["other"] = other
        self.own = nn.Linear(4, 4)

    def forward(self, x):
        return self.own(x) @ self.other.weight


class Shy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.early = Early(self.last)

    def forward(self, x):
        return self.last(self.early(self.first(x)))


class Leaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(4, 4), nn.Linear(4, 4), []
        self.first.register_forward_hook(lambda module, arguments, output: self.seen.append(output))

    def forward(self, x):
        self.seen.clear()
        return self.last(self.first(x)) + sum(self.seen)


@for_each(
    ("model", "message"),
    [
        (Shy, "last.weight is used before the module that holds it is called"),
        (Leaking, "the result differs by .* where the prefix is reused"),
    ],
)
def test_what_cannot_be_cut_and_that_trying_leaves_nothing_behind(model, message, bits_of):
    model, x = model().train(), torch.ones(2, 4)
    model.first.weight.grad = torch.ones(4, 4)
    selected, before, state = {"weight": model.last.weight}, bits_of(model), torch.get_rng_state()

    def run_pass(objective):
        result = model(x)
        objective(result).backward()
        return result

    prefix = find_prefix(model, selected, lambda: model(x), RecomputedPrefix)
    assert prefix.prefix[0] is model.first
    with pytest.raises(PrefixError, match=message):
        try_prefix(prefix, model, selected, run_pass)
    assert bits_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.first.weight.grad, torch.ones(4, 4))
    assert model.last.weight.grad is None
    assert prefix.boundary == []
