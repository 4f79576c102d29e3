"""Passes over a part of the batch that reuse the prefix of the whole: which models admit it, and what they get."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from for_each import for_each
from prefix_rows import find_rows_of
from torch import nn

from hf_parcor.prefix import PrefixError, PrefixReuse, plan_prefix
from hf_parcor.prefix.consumers import Unkept

EXAMPLES, WORDS, WIDTH = 6, 3, 4


class Between(nn.Module):
    """What a prefix does to `[examples, words, width]` behind its first layer; it returns what it hands on."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Model(nn.Module):
    """A first layer, what lies between, and the last layer, which is defended; all that is handed on is added."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between if isinstance(between, nn.Module) else Between(between)
        self.double()

    def forward(self, x):
        handed_on = self.between(self.first(x))
        hidden, *others = handed_on if isinstance(handed_on, tuple) else (handed_on,)
        return {"loss": (self.last(hidden) + sum(other.mean() for other in others)).tanh().square().mean()}


class Words(nn.Module):
    """Batch statistics over the examples, of each word."""

    def __init__(self, training):
        super().__init__()
        self.norm, self.training_of_norm = nn.BatchNorm1d(WORDS), training

    def forward(self, x):
        self.norm.train(self.training_of_norm and self.training)
        return self.norm(x)


class PenaltyInBackward(torch.autograd.Function):
    """Adds to a gradient what depends on how many examples there are, as losses of routers do."""

    @staticmethod
    def forward(context, x):
        context.examples = len(x)
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient + 1 / context.examples


COMMUTE = {
    "rows first": lambda between, x: x.tanh(),
    "words first": lambda between, x: x.transpose(0, 1),
    "words as rows": lambda between, x: x.flatten(0, 1),
    "positions beside": lambda between, x: (x, x.new_ones(WORDS, WIDTH)),
    "expanded": lambda between, x: (x, x.new_ones(1, WIDTH).expand(len(x), WIDTH)),
    "no number": lambda between, x: (x, x.argmax(-1).double()),
    "fixed statistics": Words(training=False),
}
BY_CHANCE = {
    "dropout": nn.Dropout(0.5),
    "dropped rows": lambda between, x: x * (torch.rand(len(x), 1, 1) < 0.5 if between.training else 1),
}


def long_last(x):
    """The last example is the largest, and the first the shortest."""
    return x * torch.arange(1, len(x) + 1).view(-1, 1, 1)


DO_NOT = {
    "batch statistics": Words(training=True),
    "sorted": lambda between, x: x[x.square().sum((1, 2)).argsort(descending=True)],
    "centered": lambda between, x: x - x.mean(0),
    "examples inside of words": lambda between, x: x.transpose(0, 1).flatten(0, 1),
    "packed": lambda between, x: x[x.sum(-1) > 0],
    "the largest": lambda between, x: (x, x.abs().amax()),
    "of each pair": lambda between, x: (x, torch.einsum("iwd,jwd->ij", x, x)),
    "other tensors in training": lambda between, x: (x, x[0], x)[: 3 if between.training else 2],
    "a number": lambda between, x: (x, x.sum(1), torch.tensor(float(len(x)))),
    "backward": lambda between, x: PenaltyInBackward.apply(x),
    "statistics in training alone": lambda between, x: x - x.mean() if between.training else x,
    "draws of all": lambda between, x: x + (torch.randperm(len(x)).view(-1, 1, 1) * x[-1] if between.training else 0),
}


def prefix_of(model):
    return PrefixReuse([model.first, model.between], [model.last])


def calls_of(module):
    """Return a list that grows with each call that computes."""
    calls, forward = [], module.forward

    def counted(*arguments):
        calls.append(1)
        return forward(*arguments)

    module.forward = counted
    return calls


def batch_of(examples=EXAMPLES):
    return {"x": long_last(torch.randn(examples, WORDS, WIDTH)).double()}


@for_each("training", [False, True])
@for_each("count", [1, 2, 3])
@for_each("name", COMMUTE)
def test_a_part_finds_what_a_full_pass_over_it_does(name, count, training):
    """On the batch that it was tried out on and on one of another size, gradients of the whole and of the part add."""
    model = Model(COMMUTE[name]).train(training)
    prefix, calls = prefix_of(model), calls_of(model.first)
    find_rows_of(prefix, model, batch_of(), count / EXAMPLES)
    for examples in (EXAMPLES, 2 * EXAMPLES):
        x, some = batch_of(examples)["x"], count * examples // EXAMPLES
        expected = torch.autograd.grad(model(x)["loss"] + model(x[:some])["loss"], list(model.parameters()))
        model.zero_grad()
        with prefix.recording():
            model(x)
        calls.clear()
        with prefix.replaying():
            model(x)["loss"].backward()
        with prefix.of_rows(some, examples), prefix.replaying():
            model(x[:some])["loss"].backward()
        prefix.backward()
        assert not calls
        for parameter, right in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, right, rtol=1e-12, atol=1e-14)


@for_each("name", BY_CHANCE)
def test_a_part_keeps_its_rows_of_what_was_drawn(name):
    model, seen = Model(BY_CHANCE[name]).train(), []
    prefix, x = prefix_of(model), batch_of()["x"]
    find_rows_of(prefix, model, {"x": x}, 0.5)
    model.last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with prefix.recording():
        model(x)
    seen.clear()
    for count in (EXAMPLES, 3):
        with prefix.of_rows(count, EXAMPLES), prefix.replaying():
            model(x[:count])
    assert torch.equal(seen[1], seen[0][:3])
    assert (seen[0] == 0).any()


@for_each("name", DO_NOT)
def test_what_is_no_part_is_refused_and_leaves_no_trace(name, bits_of):
    model = Model(DO_NOT[name]).train()
    prefix, batch = prefix_of(model), batch_of()
    model(**batch)["loss"].backward()
    before, state = bits_of(model), torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    with pytest.raises(PrefixError):
        find_rows_of(prefix, model, batch, 0.5)
    assert prefix.rows == prefix.recorded == {}
    assert bits_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    kept = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(kept, gradients, strict=True))


@for_each("statistics", [True, False])
def test_batch_statistics_of_many_rows_are_seen_in_half_precision_too(statistics):
    """There they differ between a part of ten thousand words and its batch by less than rounding may."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH, affine=False)

        def forward(self, x):
            return self.norm(x.flatten(0, 1)).view_as(x) if self.training else x

    x = torch.randn(64, 256, WIDTH, dtype=torch.bfloat16)
    model = Model(Norm() if statistics else nn.Tanh()).bfloat16().train()
    with pytest.raises(PrefixError, match="depends on other examples") if statistics else nullcontext():
        find_rows_of(prefix_of(model), model, {"x": x}, 0.5)


def test_a_batch_that_is_its_own_part_shows_no_rows():
    model = Model(COMMUTE["rows first"])
    with pytest.raises(PrefixError, match="all of it"):
        find_rows_of(prefix_of(model), model, batch_of(1), 0.5)


def test_what_a_trial_did_not_see_is_computed():
    """A module that is called once more, and a batch whose tensors are no multiple of its rows."""
    model, x = Model(COMMUTE["words as rows"]), batch_of()["x"]
    prefix, calls = prefix_of(model), calls_of(model.between)
    find_rows_of(prefix, model, {"x": x}, 0.5)
    expected = float(model(x[:3])["loss"].detach())
    for forget in (False, True):
        if forget:
            del prefix.rows[model.between, 0, 0]
        with prefix.recording():
            model(x)
        calls.clear()
        with prefix.of_rows(3, EXAMPLES), prefix.replaying():
            assert float(model(x[:3])["loss"].detach()) == pytest.approx(expected, rel=1e-12)
        assert len(calls) == forget
    prefix.recorded[model.between, 0][0][0] = torch.zeros(7, WIDTH).double()
    prefix.rows[model.between, 0, 0] = 0
    with prefix.of_rows(3, EXAMPLES), prefix.replaying():
        assert float(model(x[:3])["loss"].detach()) == pytest.approx(expected, rel=1e-12)


@for_each("shape", [(1, WORDS, WIDTH), (WORDS, WIDTH), (), None])
def test_what_was_of_no_example_when_it_was_tried_and_is_now(shape):
    """As a mask, of which a batch without padding needs none, or one for all examples."""

    def shifted(between, x):
        if not hasattr(between, "shift"):
            return x, None if shape is None else x.new_ones(shape)
        return x, between.shift[: len(x)].expand_as(x) if between.shift.dim() == 3 else between.shift

    class Shifted(Model):
        def forward(self, x):
            hidden, shift = self.between(self.first(x))
            return {"loss": self.last(hidden if shift is None else hidden + shift).tanh().square().mean()}

    model, x = Shifted(shifted), batch_of(2)["x"]
    prefix = prefix_of(model)
    find_rows_of(prefix, model, {"x": x}, 0.5)
    for later in (torch.rand(2, 1, 1), torch.rand(())):
        model.between.shift = later.double()
        with prefix.recording():
            model(x)
        with prefix.of_rows(1, 2), prefix.replaying():
            found = float(model(x[:1])["loss"].detach())
        assert found == pytest.approx(float(model(x[:1])["loss"].detach()), rel=1e-12)


def test_what_is_not_kept_has_the_shape_of_its_part():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            hidden = self.first(x)
            assert hidden.shape == x.shape
            return {"loss": self.last(self.second(hidden)).square().mean()}

    model, batch = Looks(), {"x": torch.randn(EXAMPLES, WIDTH)}
    prefix = plan_prefix(model, {"w": model.last.weight}, lambda: model(**batch), sparing=True)
    assert prefix.unused == {(model.first, 0, 0)}
    find_rows_of(prefix, model, batch, 0.5)
    with prefix.recording():
        model(**batch)
    assert isinstance(prefix.recorded[model.first, 0][0][0], Unkept)
    with prefix.of_rows(3, EXAMPLES), prefix.replaying():
        model(batch["x"][:3])


def test_what_is_frozen_stays_so():
    model, batch = Model(COMMUTE["rows first"]), batch_of()
    model.first.requires_grad_(False)
    prefix = prefix_of(model)
    find_rows_of(prefix, model, batch, 0.5)
    assert all(parameter.grad is None for parameter in model.first.parameters())
