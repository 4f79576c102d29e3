"""A gradient penalty is there and right, or it is refused: no function hides its gradient or its derivative."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from for_each import for_each
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_parcor import GradientPenalty, defended_backward

PENALTY = 1.0
HIDDEN, WRONG = "expected a loss whose whole gradient autograd.grad finds", "expected a loss with a right second"


class FusedCubes(torch.autograd.Function):
    """Computes its gradient in forward, as fused losses do."""

    @staticmethod
    def forward(context, x):
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            loss = inner.pow(3).mean()
            (gradient,) = torch.autograd.grad(loss, inner)
        context.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(context, outer):
        (gradient,) = context.saved_tensors
        return outer * gradient


class FusedInAnAttribute(FusedCubes):
    @staticmethod
    def forward(context, x):
        context.gradient = 3 * x.detach().square() / x.numel()
        return x.pow(3).mean()

    @staticmethod
    def backward(context, outer):
        return outer * context.gradient


class RightCubes(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.pow(3).mean()

    @staticmethod
    def backward(context, outer):
        (x,) = context.saved_tensors
        return outer * 3 * x.square() / x.numel()


class StraightThrough(torch.autograd.Function):
    """Rounds, and keeps something for a backward that does not."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(torch.ones_like(x))
        return (4 * x).round() / 4

    @staticmethod
    def backward(context, outer):
        return outer * context.saved_tensors[0]


class Net(nn.Module):
    """Two layers, the tail of which is chosen; in double precision unless told otherwise."""

    def __init__(self, loss, activation=torch.tanh, inside=None, dropout=0.0, skip=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.loss, self.activation, self.inside = loss, activation, inside
        self.dropout, self.skip = nn.Dropout(dropout), skip
        self.batch = torch.randn(8, 4, dtype=dtype)
        self.calls = 0
        self.to(dtype)

    def forward(self):
        self.calls += 1
        x = self.batch
        x = nn.functional.pad(x, (0, 2)) if self.skip else self.first(x)
        x = self.dropout(self.activation(x))
        return self.loss(self.inside(self.last, x) if self.inside else self.last(x))


def reentrant(layer, x):
    return checkpoint(layer, x.detach().requires_grad_(), use_reentrant=True)


def reentrant_too(layer, x):
    """The same weights once inside of a checkpoint and once outside."""
    return layer(x.detach()) + checkpoint(layer, x.detach().requires_grad_(), use_reentrant=True)


def not_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def cubes(x):
    return x.pow(3).mean()


REFUSED = {
    "reentrant checkpoint": (lambda: Net(cubes, inside=reentrant), "last", HIDDEN),
    "tied to a reentrant checkpoint": (lambda: Net(cubes, inside=reentrant_too), "last", HIDDEN),
    "gradient made in forward": (lambda: Net(FusedCubes.apply), "", WRONG),
    "kept as an attribute": (lambda: Net(FusedInAnAttribute.apply), "", WRONG),
    "of the last layer": (lambda: Net(FusedCubes.apply), "last", WRONG),
    "behind dropout": (lambda: Net(FusedCubes.apply, dropout=0.5), "", WRONG),
    "behind relu": (lambda: Net(FusedCubes.apply, activation=torch.relu), "", WRONG),
    "behind rounding": (lambda: Net(FusedCubes.apply, activation=StraightThrough.apply), "", WRONG),
    "in double precision": (lambda: Net(FusedCubes.apply, dtype=torch.float64), "", WRONG),
    "under autocast": (lambda: Net(lambda x: FusedCubes.apply(x.float())), "", WRONG),
}
ALLOWED = {
    "PyTorch's own": lambda: Net(cubes),
    "a function of one's own": lambda: Net(RightCubes.apply),
    "behind dropout": lambda: Net(RightCubes.apply, dropout=0.5),
    "behind relu": lambda: Net(RightCubes.apply, activation=torch.relu),
    "relu alone": lambda: Net(cubes, activation=torch.relu),
    "half precision": lambda: Net(RightCubes.apply, dtype=torch.bfloat16),
    "rounded": lambda: Net(RightCubes.apply, activation=StraightThrough.apply),
    "a layer is skipped": lambda: Net(RightCubes.apply, skip=True),
    "flat": lambda: Net(lambda x: RightCubes.apply(x * 0)),
    "not finite": lambda: Net(lambda x: RightCubes.apply(x * torch.inf)),
    "checkpoint": lambda: Net(RightCubes.apply, inside=not_reentrant),
}


def step(model, defense=None, part="", mixed_precision="no"):
    parameters = dict(model.named_parameters())
    selected = {name: parameter for name, parameter in parameters.items() if name.startswith(part)}

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            return model()

    return defended_backward(Accelerator(cpu=True), defense or GradientPenalty(weight=PENALTY), model, loss, selected)


@pytest.mark.slow
@for_each("accumulated", [False, True])
@for_each("name", REFUSED)
def test_refused_with_weights_and_gradients_as_before(name, accumulated):
    build, part, message = REFUSED[name]
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0) if accumulated else None
    gradients = [parameter.grad for parameter in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    for _ in range(2):  # it is not forgotten
        with pytest.raises(RuntimeError, match=f"{message}.*another defense"):
            step(model, part=part, mixed_precision="bf16" if "autocast" in name else "no")
        for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert torch.equal(parameter, weights[key]), key
            assert parameter.grad is gradient, key
            assert gradient is None or bool((gradient == 3).all()), key


@pytest.mark.slow
@for_each("precision", ["no", "bf16"])
@for_each("name", ALLOWED)
def test_not_refused(name, precision):
    step(ALLOWED[name](), mixed_precision=precision)


@for_each("seed", range(5))
def test_the_gradient_is_that_of_plain_operations(seed):
    ours, plain = Net(RightCubes.apply, dropout=0.5), Net(cubes, dropout=0.5)
    for model in (ours, plain):
        torch.manual_seed(seed)
        step(model)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(torch.rand(3), torch.rand(3)) is False


@for_each(("build", "calls"), [(lambda: Net(cubes), 1), (lambda: Net(RightCubes.apply), 4)])
def test_tried_once_where_there_is_something_to_try(build, calls):
    model, defense = build(), GradientPenalty(weight=PENALTY)
    step(model, defense)
    tried = model.calls
    assert (tried == 1) == (calls == 1)
    state = torch.get_rng_state()
    for defended in (defense, defense):
        step(model, defended)
    assert model.calls == tried + 2
    assert torch.equal(torch.get_rng_state(), state)
    other = build()
    step(other, defense)
    assert other.calls == tried, "another model is tried out anew"


def test_what_was_tried_is_no_setting():
    defense = GradientPenalty(weight=PENALTY)
    step(Net(RightCubes.apply), defense)
    for same in (copy.deepcopy(defense), pickle.loads(pickle.dumps(defense)), GradientPenalty(weight=PENALTY)):
        assert same == defense
        assert repr(same) == repr(defense)
        model = Net(FusedCubes.apply)
        with pytest.raises(RuntimeError, match=WRONG):
            step(model, same)
