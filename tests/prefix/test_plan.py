"""Where a model can be cut, and what refuses a cut: how far apart results may be, and models that cannot be."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext, suppress

import pytest
import torch
from for_each import for_each
from interrupts import MAY_BE_IGNORED, interrupted_at_lines
from torch import nn

from hf_parcor.model_state import BufferSnapshot
from hf_parcor.overriding import undoing_left
from hf_parcor.prefix import (
    PrefixError,
    PrefixReuse,
    RecomputedPrefix,
    check_results,
    distance,
    find_prefix,
    leaves_of,
    plan_prefix,
    try_prefix,
)
from hf_parcor.prefix.plan import differing_gradient, objective_of, saving_nothing

G = {"large": torch.tensor([100.0, 1.0]), "small": torch.tensor([1e-3])}


@for_each(
    ("found", "factor", "differs"),
    [
        ({"large": 3 * G["large"], "small": 3 * G["small"]}, 3, None),
        ({"large": 2 * G["large"], "small": 3 * G["small"]}, 3, "large"),
        ({"large": G["large"] + 0.09, "small": G["small"]}, 1, None),
        ({"large": G["large"] + 0.11, "small": G["small"]}, 1, "large"),
        ({"large": 3 * (G["large"] + 0.09), "small": 3 * G["small"]}, 3, None),
        ({"large": G["large"], "small": G["small"] + 0.9e-3}, 1, None),
        ({"large": G["large"], "small": G["small"] + 1.1e-3}, 1, "small"),
        ({"large": G["large"], "small": G["small"] + 2e-3}, 1, "small"),
        ({"small": torch.tensor([])}, 1, None),
    ],
)
def test_which_gradient_is_no_multiple(found, factor, differs):
    """To a thousandth of the tensor's largest, or of a hundredth of the largest of all."""
    expected = G if "large" in found else {"small": torch.tensor([])}
    assert differing_gradient(found, expected, factor, 1e-3) == differs


def test_gradients_that_are_not_finite_in_both_are_no_difference_and_no_size():
    odd = {"a": torch.tensor([math.inf, math.nan, 1.0]), "b": torch.tensor([1.0])}
    assert differing_gradient(odd, odd, 1, 1e-3) is None
    assert differing_gradient({**odd, "b": torch.tensor([1.1])}, odd, 1, 1e-3) == "b"


NAN, INF = math.nan, math.inf


@for_each("found, expected", itertools.product((0.0, NAN, INF, -INF), repeat=2))
def test_what_is_not_finite_in_one_alone_is_a_difference(found, expected):
    """Of gradients, of results, and of buffers."""
    same = repr(found) == repr(expected)
    found, expected = torch.tensor([found, 1.0]), torch.tensor([expected, 1.0])
    assert differing_gradient({"a": 2 * found}, {"a": expected}, 2, 1e-3) == (None if same else "a")
    assert distance([found], [expected]) == (0 if same else INF)
    assert distance([found[0].item()], [expected[0].item()]) == (0 if same else INF)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.copy_(expected)
    before = BufferSnapshot([norm])
    norm.running_mean.data.copy_(found)
    assert before.moved() == (not same)


W = torch.tensor([1.0, 3.0], requires_grad=True)


@for_each(
    ("result", "value"),
    [
        ({"loss": 2 * W, "logits": W}, 4.0),
        ({"loss": torch.tensor(7.0), "logits": 2 * W}, 20.0),
        ((W, 3 * W.double(), torch.tensor([5.0]), torch.tensor([5]), "a"), 50.0),
        ({"logits": W, "past_key_values": 9 * W}, 5.0),
        ({"logits": W, "cache": 9 * W}, 5.0),
    ],
)
def test_gradients_are_those_of_the_loss_or_of_mean_squares(result, value):
    objective = objective_of(result)
    assert objective.item() == value
    assert objective.dim() == 0


@for_each("result", [{"loss": torch.tensor(1.0)}, (torch.ones(2), 3), None])
def test_a_result_without_gradient(result):
    with pytest.raises(PrefixError, match="no number that has a gradient"):
        objective_of(result)


NARROW, WIDE = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)


@for_each(
    ("found", "expected", "apart"),
    [
        (WIDE, NARROW, INF),
        (NARROW[:1], NARROW, INF),
        (NARROW.long() + 1, NARROW.long(), INF),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0),
        (torch.tensor([1.0, NAN]), NARROW, INF),
        (torch.tensor([1.0, NAN, INF]), torch.tensor([2.0, NAN, INF]), 0.5),
        (torch.tensor([-INF, 1.0]), torch.tensor([INF, 2.0]), INF),
        (torch.tensor([0.0, 1e-30]), torch.tensor([0.0, 2e-30]), 0.5),
        (0.5 + 1e-12, 0.5, 2e-12),
        (NAN, NAN, 0),
        (2, 1, INF),
        (object(), object(), 0),
        (NARROW, "a", INF),
    ],
)
def test_how_far_apart_results_are(found, expected, apart):
    assert distance([found], [expected]) == pytest.approx(apart, rel=1e-3)
    assert distance([1, found], [1, expected]) == pytest.approx(apart, rel=1e-3)
    assert distance([found, 1], [expected]) == INF


@for_each(
    ("found", "of_full_runs", "says"),
    [
        (0.0, 0.0, None),
        (1e-9, 0.0, "where the prefix is reused"),
        (3e-5, 1e-5, None),
        (5e-5, 1e-5, "where the prefix is reused"),
        (0.0, 0.01, "of two full runs"),
    ],
)
def test_how_far_apart_they_may_be(found, of_full_runs, says):
    if says is None:
        check_results("loss", found, of_full_runs)
    else:
        with pytest.raises(PrefixError, match=f"the loss.* {says}"):
            check_results("loss", found, of_full_runs)


@for_each("name", ["past_key_values", "cache"])
def test_keys_and_values_for_a_generation_are_no_result_and_results_hold_no_graph(name):
    weight = torch.ones(2, requires_grad=True)
    (found,) = leaves_of({"logits": 2 * weight, name: object()})
    assert found.tolist() == [2, 2]
    assert not found.requires_grad


@for_each("kind", [PrefixReuse, RecomputedPrefix])
def test_statistics_that_move_are_no_difference_of_two_full_runs(kind, bits_of):
    """Which are compared under FSDP2 always, and else where a device computes in no fixed order."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(6, 4)
    before = bits_of(model)

    def run_pass(objective):
        result = {"loss": model(x)[:, 0].sigmoid().mean()}
        objective(result).backward()
        return result

    try_prefix(kind([model[0], model[1]], [model[2]]), model, {"w": model[2].weight}, run_pass, in_step=True)
    assert bits_of(model) == before


def refuse_a_mode(mode=True):
    """As a module of `torch.export` does."""
    raise NotImplementedError("not supported yet")


class TestWhatCannotBeCut:
    def test_a_selected_parameter_that_is_used_before_its_module_is_called(self):
        class Shy(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
                self.early = Early(self.last)

            def forward(self, x):
                return {"loss": self.last(self.early(self.first(x))).square().mean()}

        class Early(nn.Module):
            def __init__(self, other):
                super().__init__()
                self.__dict__["other"] = other  # known, but no child
                self.own = nn.Linear(4, 4)

            def forward(self, x):
                return self.own(x) @ self.other.weight

        model = Shy()
        selected = {"weight": model.last.weight}
        with pytest.raises(PrefixError, match="weight is used before the module that holds it is called"):
            plan_prefix(model, selected, lambda: model(torch.randn(2, 4)))

    def test_a_model_without_an_evaluation_mode(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].train = refuse_a_mode
        with pytest.raises(
            PrefixError, match=r"an evaluation mode, got Sequential \(not supported yet\); take the model"
        ):
            plan_prefix(model, {"weight": model[1].weight}, lambda: model(torch.randn(2, 4)))

    def test_a_result_that_goes_around_what_modules_return(self):
        class Leaking(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
                self.seen = []
                self.first.forward = self.remember

            def remember(self, x):
                self.seen.append(nn.functional.linear(x, self.first.weight, self.first.bias))
                return self.seen[-1]

            def forward(self, x):
                self.seen.clear()
                result = self.last(self.first(x)).square().mean()
                return {"loss": result + sum(part.square().mean() for part in self.seen)}

        model = Leaking()
        x = torch.randn(2, 4)
        with pytest.raises(PrefixError, match=r"the result differs by .* where the prefix is reused"):
            plan_prefix(model, {"weight": model.last.weight}, lambda: model(x))
        assert model.first.forward == model.remember

    def test_a_buffer_elsewhere_that_the_prefix_writes(self):
        model, x = that_cannot_be_cut(), torch.randn(2, 4)
        with pytest.raises(PrefixError, match="state that the model keeps in buffers differs"):
            plan_prefix(model, {"w": model[1].weight}, lambda: {"loss": model(x).square().mean()})

    def test_a_gradient_that_is_bounded_on_its_way_into_the_prefix(self):
        """The bound of a sum is not the sum of what was bounded."""

        class Bounded(nn.Linear):
            def forward(self, x):
                hidden = super().forward(x)
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
                return hidden

        model, x = nn.Sequential(Bounded(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
        with pytest.raises(PrefixError, match=r"the gradient of 0\.\w+ differs where the prefix is reused"):
            plan_prefix(model, {"w": model[1].weight}, lambda: {"loss": model(x).square().mean()})

    @for_each("kind", [PrefixReuse, RecomputedPrefix])
    def test_a_trial_that_breaks_off_holds_nothing(self, kind):
        model, x, passes = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), []

        def run_pass(objective):
            result = {"loss": model(x).square().mean()}
            objective(result).backward()
            passes.append(1)
            if len(passes) == 3:
                raise KeyboardInterrupt
            return result

        prefix = find_prefix(model, {"w": model[1].weight}, lambda: model(x), kind)
        with pytest.raises(KeyboardInterrupt):
            try_prefix(prefix, model, {"w": model[1].weight}, run_pass)
        assert prefix.recorded == {}
        assert prefix.outputs == prefix.boundary == []
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_full_runs_that_differ_a_little_may_differ_as_much_from_one_that_shares(self):
        """As where a device sums in no fixed order; here every other run is off."""

        class Wavers(nn.Sequential):
            runs = 0

            def forward(self, x):
                self.runs += 1
                return {"loss": super().forward(x).square().mean() * (1 + self.off * (self.runs % 2))}

        for off, refused in ((1e-5, False), (1e-2, True)):
            model, x = Wavers(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
            model.off = off
            with pytest.raises(PrefixError, match="of two full runs") if refused else nullcontext():
                plan_prefix(model, {"w": model[1].weight}, lambda model=model, x=x: model(x))

    def test_a_model_that_needs_more_than_its_batch(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with pytest.raises(PrefixError, match="could not be run alone on a batch"):
            plan_prefix(model, {"w": model[1].weight}, lambda: model(rows=torch.ones(1, 2)))

    def test_a_parameter_that_a_batch_does_not_use_has_no_gradient_and_refuses_nothing(self):
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
        model[0].unused, model[1].unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        for selected in ({"w": model[1].weight}, {"w": model[1].weight, "u": model[1].unused}):
            plan_prefix(model, selected, lambda: {"loss": model(x).square().mean()})
        assert model[0].unused.grad is None

    @for_each("kind", [PrefixReuse, RecomputedPrefix])
    def test_the_random_numbers_behind_a_replayed_call_are_those_behind_a_computed_one(self, kind):
        """Else the second dropout would have another mask than in a full run."""
        model, x = (
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 64), nn.Dropout(0.5)),
            torch.randn(9, 4),
        )

        def run_pass(objective):
            result = {"loss": model(x).square().mean()}
            objective(result).backward()
            return result

        selected = {"w": model[2].weight}
        prefix = find_prefix(model, selected, lambda: model(x), kind)
        assert prefix.prefix[1:] == [model[1]]
        try_prefix(prefix, model, selected, run_pass)

    def test_nothing_is_left_behind(self, bits_of):
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 2)).train()
        model[1].eval()
        before, state = bits_of(model), torch.get_rng_state()
        for sparing in (False, True):
            run = lambda: {"loss": model(torch.ones(1, 2)).sum() + torch.rand(())}  # noqa: E731
            plan_prefix(model, {"w": model[2].weight}, run, sparing=sparing)
        assert bits_of(model) == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == [True, True, False, True]
        assert all(parameter.grad is None for parameter in model.parameters())
        weight = {"w": model[2].weight}
        plan_prefix(model, weight, lambda: {"loss": model(torch.ones(1, 2)).sum()}, trained=weight)
        assert all(parameter.grad is None for parameter in model.parameters())


class Writes(nn.Linear):
    """Writes into a buffer behind it, so that it cannot be replayed."""

    def forward(self, x):
        self.others[0].seen += 1
        return super().forward(x)


def that_cannot_be_cut():
    model = nn.Sequential(Writes(4, 4), nn.Linear(4, 4))
    model[1].register_buffer("seen", torch.zeros(()))
    model[0].others = [model[1]]
    return model


class ByTurns(nn.Sequential):
    """Uses in every second pass what the first layer returned first: that is to be kept, which a second trial does."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        first = self[0](x)
        second = self[0](first)
        return self[1](second + 0 * first if self.passes % 2 else second)


@for_each("make", [that_cannot_be_cut, lambda: ByTurns(nn.Linear(4, 4), nn.Linear(4, 4))])
@for_each("sparing", [False, True])
def test_a_model_is_freed_after_ways_that_failed(make, sparing, freed):
    """Errors that are kept hold, by their tracebacks, the frame that keeps them."""

    def seek(model):
        x = torch.randn(2, 4)
        with suppress(PrefixError):
            plan_prefix(model, {"w": model[1].weight}, lambda: {"loss": model(x).square().mean()}, sparing=sparing)

    assert freed(make, seek)


@MAY_BE_IGNORED
def test_an_interrupt_leaves_nothing_that_drops_what_autograd_saves():
    weight = torch.tensor(3.0, requires_grad=True)

    @undoing_left()
    def run():
        with saving_nothing():
            weight.square()

    for at in interrupted_at_lines(run, every=1):
        assert torch.autograd.grad(weight.square(), weight)[0] == 6, at
        while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
