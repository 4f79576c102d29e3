"""The bookkeeping of a defended micro-batch: gradients, memory, device traffic, exceptions."""

from __future__ import annotations

import gc
import math
from collections import Counter

import pytest
import torch
from for_each import for_each
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_parcor import AWP, CorruptionConstraint, MultiStepRisk
from hf_parcor.defenses import DefendedStep
from hf_parcor.functional import vectors

CONSTRAINTS = [CorruptionConstraint(p=2, epsilon=0.1), CorruptionConstraint(p=math.inf, epsilon=1e-3)]


def parameters(count: int, entries: int = 1000, **options) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {f"p{i}": nn.Parameter(torch.randn(entries, **options)) for i in range(count)}


def fake_pass(selected: dict[str, nn.Parameter], gradients, seen=None):
    """A pass whose gradients are given: adds `gradients(index, name)` to `.grad`, as backward does."""

    def run(objective, index: int) -> Tensor:
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in selected.items()})
        for name, p in selected.items():
            gradient = gradients(index, name)
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return objective(torch.ones((), device=next(iter(selected.values())).device))

    return run


class Calls(TorchDispatchMode):
    """Counts operations, leaving out those that start no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in ("view", "detach", "empty_like", "alias", "_to_copy"):
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


SHAPES = [(40, 30), (0,), (7,), (2000,), (3, 5)]


def defended_in_bfloat16(defense, accumulated: bool, fails_in: int | None = None) -> dict[str, Tensor]:
    """Return what a step leaves, from gradients that are not in every pass, and what it wrote before each."""
    torch.manual_seed(1)
    selected = {str(i): nn.Parameter(torch.randn(shape).to(torch.bfloat16)) for i, shape in enumerate(SHAPES)}
    if accumulated:
        for parameter in selected.values():
            parameter.grad = torch.randn(parameter.shape).to(torch.bfloat16)
    seen: list[dict[str, Tensor]] = []

    def gradients(index: int, name: str) -> Tensor | None:
        if index == fails_in and name == "2":
            raise RuntimeError("fails")
        shape = selected[name].shape
        absent = (index, name) in {(0, "3"), (1, "2")}
        return None if absent else (torch.randn(shape) * 10 ** (int(name) - index)).to(torch.bfloat16)

    found = {}
    try:
        with DefendedStep(selected, fake_pass(selected, gradients, seen), defense.passes) as step:
            defense.minimize(step)
            found["norm"] = step.withdraw(defense.p).asked
    except RuntimeError:
        assert fails_in is not None
    for name, parameter in selected.items():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
        found |= {f"{name} in pass {index}": at[name] for index, at in enumerate(seen)}
    return found


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("fails_in", [None, 1, 2])
@for_each(
    "defense",
    [
        *(MultiStepRisk(constraint, steps=2) for constraint in CONSTRAINTS),
        MultiStepRisk(CONSTRAINTS[0], steps=2, step_size=0.02),
        *(MultiStepRisk(constraint, steps=2, step_size=3 * constraint.epsilon) for constraint in CONSTRAINTS),
        MultiStepRisk(CorruptionConstraint(p=2, epsilon=1e-25), steps=2),
        *(AWP(constraint, steps=2, input_epsilon=0) for constraint in CONSTRAINTS),
    ],
)
def test_an_ascent_that_is_remembered_is_the_one_that_is_kept(defense, accumulated, fails_in, monkeypatch):
    remembered = defended_in_bfloat16(defense, accumulated, fails_in)
    monkeypatch.setattr(type(defense), "_is_remembered", lambda self, step: False)
    kept = defended_in_bfloat16(defense, accumulated, fails_in)
    assert remembered.keys() == kept.keys()
    # Squares of what is far below any weight may underflow in the norm of a kept ascent, which is one fast pass.
    torch.testing.assert_close(remembered.pop("norm", None), kept.pop("norm", None), rtol=1e-6, atol=1e-20)
    for what, tensor in remembered.items():
        assert torch.equal(tensor, kept[what]), what


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_waits_for_the_device_and_calls_do_not_grow_with_the_parameters(constraint, steps, monkeypatch):
    """Tensors on the meta device have no values: reading one (`.item()`, a branch) would raise."""
    # Which refuses them: nothing is corrupted.
    monkeypatch.setattr("hf_parcor.injection.writing.check_weights", lambda weights: None)
    counts = []
    for count in (5, 50):
        selected = {name: nn.Parameter(p.to("meta")) for name, p in parameters(count).items()}
        defense = MultiStepRisk(constraint, steps=steps)
        made = {name: [torch.empty_like(p) for _ in range(defense.passes)] for name, p in selected.items()}
        run = fake_pass(selected, lambda index, name, made=made: made[name][index])
        with Calls() as calls, DefendedStep(selected, run, defense.passes) as step:
            defense.minimize(step)
            step.withdraw(constraint.p)
        calls.count.pop("add_", None)  # the fake pass accumulating into .grad
        counts.append(calls.count)
    assert counts[0] == counts[1]


@for_each("constraint", CONSTRAINTS)
@for_each("steps", [1, 2, 3])
@for_each("accumulated", [False, True])
def test_extra_memory_is_at_most_twice_the_selected_parameters(constraint, steps, accumulated, peak_memory):
    selected = parameters(4, 100_000)
    size = sum(p.numel() * p.element_size() for p in selected.values())
    if accumulated:
        for p in selected.values():
            p.grad = torch.randn_like(p)
    run = fake_pass(selected, lambda index, name: torch.randn_like(selected[name]))
    defense = MultiStepRisk(constraint, steps=steps)
    gc.collect()
    with peak_memory() as memory:
        with DefendedStep(selected, run, defense.passes) as step:
            defense.minimize(step)
            step.withdraw(constraint.p)
        del step
        gc.collect()
        between = memory.live
    stock = size  # the stock step, too, makes one gradient for each parameter
    assert memory.peak - stock <= 2.02 * size
    assert between <= (0 if accumulated else size) + 1000  # .grad alone is left between steps


@for_each("constraint", CONSTRAINTS)
def test_two_steps_in_16_bits_hold_twice_the_weights_and_two_blocks_of_scratch(constraint, peak_memory, monkeypatch):
    """Saved bits and one gradient more than a stock step has, and in float32 what is written and what is made next."""
    monkeypatch.setattr(vectors, "TOGETHER", 1)  # a block is a tensor
    count, entries = 8, 10_000
    selected = parameters(count, entries, dtype=torch.bfloat16)
    run = fake_pass(selected, lambda index, name: torch.randn_like(selected[name]))
    gc.collect()
    with peak_memory() as memory, DefendedStep(selected, run, passes=3) as step:
        MultiStepRisk(constraint, steps=2).minimize(step)
    assert memory.peak <= count * entries * (2 + 4) + 2 * 4 * entries + 1000


@for_each("bad", [math.nan, math.inf, -math.inf])
@for_each("constraint", CONSTRAINTS)
def test_gradient_that_is_not_finite_moves_no_weight(constraint, bad):
    selected, seen = parameters(3), []

    def gradients(index, name):
        gradient = torch.ones(1000)
        if name == "p1" and index == 0:
            gradient[7] = bad
        return gradient

    before = {name: p.detach().clone() for name, p in selected.items()}
    with DefendedStep(selected, fake_pass(selected, gradients, seen), 2) as step:
        MultiStepRisk(constraint, steps=1).minimize(step)
    assert all(torch.equal(seen[1][name], before[name]) for name in selected)
    assert not torch.isfinite(selected["p1"].grad[7])  # so that a gradient scaler still skips the step


@for_each("constraint", CONSTRAINTS)
def test_zero_gradient_moves_no_weight(constraint):
    selected, seen = parameters(2), []
    run = fake_pass(selected, lambda index, name: torch.zeros(1000), seen)
    with DefendedStep(selected, run, 3) as step:
        MultiStepRisk(constraint, steps=2).minimize(step)
        norm = step.withdraw(constraint.p)
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in selected)
    assert norm.realised == 0


def test_gradient_in_only_some_passes():
    """LayerDrop and mixtures of experts: a parameter may have a gradient in one pass and none in another."""
    selected, seen = parameters(3), []
    before = {name: p.detach().clone() for name, p in selected.items()}
    absent = {("p0", 0), ("p1", 1), ("p2", 0), ("p2", 1), ("p2", 2)}

    def gradients(index, name):
        return None if (name, index) in absent else torch.full((1000,), 1.0 + index)

    with DefendedStep(selected, fake_pass(selected, gradients, seen), 3) as step:
        MultiStepRisk(CONSTRAINTS[0], steps=2).minimize(step)
    assert torch.equal(selected["p0"].grad, torch.full((1000,), 2.0 + 3.0))
    assert torch.equal(selected["p1"].grad, torch.full((1000,), 1.0 + 3.0))
    assert selected["p2"].grad is None
    assert torch.equal(seen[1]["p0"], before["p0"])
    assert not torch.equal(seen[1]["p1"], before["p1"])
    assert not torch.equal(seen[2]["p0"], before["p0"])
    assert all(torch.equal(selected[name], before[name]) for name in selected)


@for_each("dtype", [torch.bfloat16, torch.float32])
@for_each(
    "defense",
    [
        *(MultiStepRisk(constraint, steps=2) for constraint in CONSTRAINTS),
        AWP(CONSTRAINTS[0], steps=2, per_tensor=True, input_epsilon=0),
        MultiStepRisk(CorruptionConstraint(p=2, epsilon=0.1, top_n=5), steps=2),
    ],
)
@pytest.mark.parametrize("without", [{0}, {1}, {0, 1}])
def test_a_pass_without_any_gradient_is_one_of_zeros(defense, dtype, without):
    """A layer that is dropped, or an expert that no token is sent to, may be all that is selected."""

    def found(absent):
        selected, seen = parameters(2, dtype=dtype), []
        run = fake_pass(
            selected, lambda index, name: absent(name) if index in without else torch.ones(1000).to(dtype), seen
        )
        with DefendedStep(selected, run, defense.passes) as step:
            defense.minimize(step)
        return seen

    zeros = torch.zeros(1000, dtype=dtype)
    for expected, at in zip(found(lambda name: zeros.clone()), found(lambda name: None), strict=True):
        assert all(torch.equal(expected[name], at[name]) for name in at)


@for_each("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@for_each("fails_in", [0, 1, 2])
def test_weights_come_back_after_an_exception(error, fails_in):
    selected = parameters(3)
    before = {name: p.detach().clone() for name, p in selected.items()}

    def gradients(index, name):
        if index == fails_in and name == "p1":
            raise error("in the model")
        return torch.ones(1000)

    with pytest.raises(error), DefendedStep(selected, fake_pass(selected, gradients), 3) as step:
        MultiStepRisk(CONSTRAINTS[0], steps=2).minimize(step)
    assert all(torch.equal(selected[name], before[name]) for name in selected)


def test_narrow_weights_tell_how_much_they_swallowed():
    """L2, ε = 0.05 on a million bf16 weights: most entries do not change at all."""
    selected = parameters(2, 500_000, dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in selected.items()}
    run = fake_pass(selected, lambda index, name: torch.randn(500_000).to(torch.bfloat16))
    with DefendedStep(selected, run, 2) as step:
        MultiStepRisk(CorruptionConstraint(epsilon=0.05), steps=1).minimize(step)
        norm = step.withdraw(2.0)
    assert norm.asked.item() == pytest.approx(0.05, rel=1e-3)
    assert abs(norm.realised.item() - 0.05) > 0.005
    assert all(torch.equal(selected[name], before[name]) for name in selected)


@for_each("dtypes", [("bfloat16",), ("float16", "float32"), ("bfloat16", "float64"), ("float32",)])
@for_each("number", [0, 1])
def test_gradients_are_float32_at_least_and_what_is_to_be_overwritten_is_not_in_the_update(dtypes, number):
    selected = {name: nn.Parameter(torch.randn(5, dtype=getattr(torch, name))) for name in dtypes}
    made = {(index, name): torch.randn_like(p) for name, p in selected.items() for index in range(3)}
    with DefendedStep(selected, fake_pass(selected, lambda index, name: made[index, name].clone()), 3) as step:
        for index in range(3):
            step.backward(lambda loss: loss)
            if index == number:
                taken, ours = step.gradients()
                for name, gradient in taken.items():
                    assert torch.equal(gradient, made[index, name].to(gradient.dtype))
                    assert gradient.dtype == torch.promote_types(selected[name].dtype, torch.float32)
                    if ours:
                        gradient.fill_(math.nan)
    assert ours or number == 0
    for name, p in selected.items():
        assert torch.equal(p.grad, made[0, name] + made[1, name] + made[2, name])


def test_a_rehearsal_is_no_pass_of_the_step():
    selected, indices, seen = parameters(1), [], []

    def run(objective, index: int) -> Tensor:
        indices.append(index)
        return objective(torch.ones(()))

    with DefendedStep(selected, run, 3) as step:
        step.rehearse(lambda loss: seen.append(loss.item()))
        assert (seen, step.losses) == ([1.0], [])
    assert len(indices) == 1
    assert indices[0] < 0  # which neither counts in a Trainer, nor lets DDP reduce


def test_a_loss_of_zero_is_zero_in_the_log():
    selected = parameters(1)

    def run(objective, index: int) -> Tensor:
        return objective(torch.zeros(()))

    with DefendedStep(selected, run, 2) as step:
        MultiStepRisk(CONSTRAINTS[0], steps=1).minimize(step)
    assert [loss.item() for loss in step.losses] == [0.0, 0.0]
    assert step.risk == 0


class TestGradientsOfOthers:
    """What `.grad` held before, and memory that several parameters' gradients share."""

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    @for_each("failing", [0, 1, 2])
    @for_each("where", ["forward", "backward"])
    def test_a_failure_in_the_middle_loses_no_gradient(self, failing, where):
        model, x = self.model(), torch.randn(5, 3).double()
        parameters = dict(model.named_parameters())
        selected = {name: parameters[name] for name in ("0.weight", "2.weight")}
        others = [parameter for name, parameter in parameters.items() if name not in selected]
        bits = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        finished = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}

        def run_pass(objective, index):
            if index == failing and where == "forward":
                raise MemoryError
            loss = objective(model(x).square().mean())
            if index == failing:
                raise MemoryError
            for (name, _), part in zip(
                parameters.items(), torch.autograd.grad(loss, [*parameters.values()], retain_graph=True), strict=True
            ):
                finished[name] += part
            loss.backward()
            return loss.detach()

        with pytest.raises(MemoryError), DefendedStep(selected, run_pass, 3, others) as step:
            MultiStepRisk(CorruptionConstraint(epsilon=0.5), steps=2).minimize(step)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, bits[name])
            torch.testing.assert_close(parameter.grad, finished[name], rtol=1e-12, atol=0)

    @for_each("p", [2, math.inf])
    @for_each("steps", [1, 2, 3])
    @for_each("with_another", [False, True])
    def test_gradients_in_one_place_are_scaled_once(self, with_another, steps, p):
        """Two parameters whose sum is used have one gradient, and a function may bring it as one tensor."""
        found = []
        for shared in (True, False):
            parameters = {name: nn.Parameter(torch.full((3,), 2.0).double()) for name in ("one", "other")}
            one, other = parameters.values()
            selected = {"one": one} if with_another else parameters
            others = [other] if with_another else []

            def run_pass(objective, index, one=one, other=other, shared=shared):
                loss = objective(((one + other) ** 2).sum())
                (gradient,) = torch.autograd.grad(loss, [one])
                for parameter in (one, other):
                    held = gradient if shared else gradient.clone()
                    parameter.grad = held if parameter.grad is None else parameter.grad + gradient
                return loss.detach()

            with DefendedStep(selected, run_pass, steps + 1, others) as step:
                MultiStepRisk(CorruptionConstraint(p=p, epsilon=0.5), steps=steps).minimize(step)
                norm = step.withdraw(p)
            found.append([norm.realised, *(parameter.grad for parameter in parameters.values())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
