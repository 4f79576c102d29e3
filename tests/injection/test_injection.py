"""Weights are really corrupted inside the block, and every bit is back after it, whatever happens."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from for_each import for_each
from torch import Tensor, nn

from hf_parcor import GaussianNoise, corrupted
from hf_parcor.functional import project_
from hf_parcor.functional.norms import vector_norm
from hf_parcor.injection import Injection, Multiple, Pieces, Replacement

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 3e38, math.inf, -math.inf, math.nan, -math.nan, 0.1]


class Weights(nn.Module):
    """Parameters of all precisions, some not contiguous, some with odd values, and buffers beside them."""

    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            self.register_parameter(f"{name}_matrix", nn.Parameter(torch.randn(30, 20).to(dtype)))
            self.register_parameter(f"{name}_transposed", nn.Parameter(torch.randn(5, 7).to(dtype).t()))
            self.register_parameter(f"{name}_special", nn.Parameter(torch.tensor(SPECIAL, dtype=dtype)))
            self.register_parameter(f"{name}_scalar", nn.Parameter(torch.tensor(0.3, dtype=dtype)))
            self.register_parameter(f"{name}_empty", nn.Parameter(torch.empty(0, 3, dtype=dtype)))
        self.register_buffer("running", torch.randn(4))
        self.register_buffer("steps", torch.tensor(3))

    def ordinary(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if "special" not in name}


@pytest.fixture(params=[[torch.float32], [torch.bfloat16], DTYPES], ids=["wide", "narrow", "mixed"])
def model(request) -> Weights:
    return Weights(request.param)


def noise(weights: dict[str, Tensor], size: float = 0.1) -> dict[str, Tensor]:
    return {name: size * torch.randn(weight.shape) for name, weight in weights.items()}


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def sum_of(weight: Tensor, change: Tensor) -> Tensor:
    """fl(w + a): the change in at least float32, the sum rounded once to the weight's precision."""
    return (wide(weight) + change.to(wide(weight).dtype)).to(weight.dtype)


class TestWhyBitsAreSaved:
    def test_adding_and_subtracting_does_not_restore_and_this_does(self) -> None:
        weight = nn.Parameter(0.04 * torch.randn(100_000))
        before = weight.detach().clone()
        change = 0.04 * torch.randn(100_000)
        assert float(((before + change) - change != before).double().mean()) > 0.3
        with corrupted({"w": weight}, {"w": change}):
            pass
        assert torch.equal(weight, before)


class TestInsideTheBlock:
    def test_weights_are_the_rounded_sum(self, model: Weights) -> None:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        changes = noise(before)
        changes["float32_matrix"] = changes.get("float32_matrix", torch.zeros(30, 20)).double()
        changes = {name: change for name, change in changes.items() if name in before}
        with corrupted(dict(model.named_parameters()), changes):
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(
                    parameter.detach(), sum_of(before[name], changes[name]), rtol=0, atol=0, equal_nan=True
                )

    def test_names_that_are_absent_stay(self, model: Weights, bits_of) -> None:
        parameters = dict(model.named_parameters())
        name = next(iter(parameters))
        others = {other: parameter.detach().clone() for other, parameter in parameters.items() if other != name}
        with corrupted(parameters, {name: torch.ones_like(parameters[name])}) as injection:
            for other, value in others.items():
                torch.testing.assert_close(parameters[other].detach(), value, rtol=0, atol=0, equal_nan=True)
            assert injection.size().changed == parameters[name].numel()

    @for_each("value", [0.5, math.nan, math.inf, -math.inf])
    def test_replacements_are_written_as_they_are(self, model: Weights, value: float, bits_of) -> None:
        before = bits_of(model)
        parameters = dict(model.named_parameters())
        values = {name: torch.full_like(parameter, value) for name, parameter in parameters.items()}
        with corrupted(parameters, Replacement(values)):
            for name, parameter in parameters.items():
                torch.testing.assert_close(parameter.detach(), values[name], rtol=0, atol=0, equal_nan=True)
        assert bits_of(model) == before

    def test_a_change_may_be_inf_or_nan(self, model: Weights, bits_of) -> None:
        before = bits_of(model)
        parameters = model.ordinary()
        for value in (math.inf, math.nan):
            with corrupted(parameters, {name: torch.full_like(p, value) for name, p in parameters.items()}):
                assert not any(torch.isfinite(parameter).any() for parameter in parameters.values())
            assert bits_of(model) == before

    def test_parameters_are_the_same_objects_at_the_same_place(self, model: Weights) -> None:
        places = [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()]
        with corrupted(dict(model.named_parameters()), noise(dict(model.named_parameters()))):
            assert [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()] == places
        assert [(id(parameter), parameter.data_ptr()) for parameter in model.parameters()] == places

    def test_gradients_are_those_of_the_corrupted_weights(self) -> None:
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        with corrupted({"w": weight}, {"w": torch.tensor([0.5, -0.5])}):
            (weight**2).sum().backward()
        assert weight.grad.tolist() == [3, 3]
        assert weight.requires_grad
        assert weight.is_leaf

    def test_a_graph_made_inside_is_refused_outside(self) -> None:
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        with corrupted({"w": weight}, {"w": torch.ones(2)}):
            loss = (weight**2).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_what_is_added_is_only_read_and_may_require_gradients(self) -> None:
        weight = nn.Parameter(torch.ones(3))
        for change in (torch.full((3,), 0.5, requires_grad=True), torch.full((3,), 0.5)):
            for kind in (dict, Replacement):
                with corrupted({"w": weight}, kind({"w": change})):
                    pass
                assert change.tolist() == [0.5] * 3
        assert weight.tolist() == [1, 1, 1]


class TestEveryBitIsBack:
    @pytest.fixture(params=["addition", "replacement"])
    def corruption(self, request, model: Weights) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        if request.param == "addition":
            return noise(parameters)
        return Replacement({name: torch.full_like(parameter, math.nan) for name, parameter in parameters.items()})

    def test_after_the_block(self, model: Weights, corruption, bits_of) -> None:
        before = bits_of(model)
        with corrupted(dict(model.named_parameters()), corruption):
            assert bits_of(model) != before
        assert bits_of(model) == before

    @for_each("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration])
    def test_after_an_exception_in_the_body(self, model: Weights, corruption, bits_of, error) -> None:
        before = bits_of(model)
        with pytest.raises((error, RuntimeError)), corrupted(dict(model.named_parameters()), corruption):
            raise error
        assert bits_of(model) == before

    def test_after_return_and_break(self, model: Weights, corruption, bits_of) -> None:
        before = bits_of(model)

        def leave() -> int:
            with corrupted(dict(model.named_parameters()), corruption):
                return 1

        assert leave() == 1
        for _ in range(2):
            with corrupted(dict(model.named_parameters()), corruption):
                break
        assert bits_of(model) == before

    def test_after_an_early_end(self, model: Weights, corruption, bits_of) -> None:
        before = bits_of(model)
        with corrupted(dict(model.named_parameters()), corruption) as injection:
            injection.withdraw(2)
            assert bits_of(model) == before
        with corrupted(dict(model.named_parameters()), corruption) as injection:
            injection.restore()
            injection.restore()
            assert bits_of(model) == before
        assert bits_of(model) == before

    def test_nested(self, model: Weights, corruption, bits_of) -> None:
        parameters = dict(model.named_parameters())
        clean = bits_of(model)
        with corrupted(parameters, noise(parameters)):
            outer = bits_of(model)
            with pytest.raises(ZeroDivisionError), corrupted(parameters, corruption):
                raise ZeroDivisionError
            assert bits_of(model) == outer
            with corrupted(parameters, corruption):
                assert bits_of(model) not in (clean, outer)
            assert bits_of(model) == outer
        assert bits_of(model) == clean

    def test_also_when_the_body_scribbles_over_weights(self, model: Weights, corruption, bits_of) -> None:
        before = bits_of(model)
        with corrupted(dict(model.named_parameters()), corruption):
            for parameter in model.parameters():
                parameter.data.fill_(7)
        assert bits_of(model) == before

    @for_each("cast", [torch.float32, torch.float64, torch.float16])
    def test_also_where_the_model_has_moved_its_weights(self, model: Weights, cast) -> None:
        """As a router of Switch Transformers, which casts itself: it is as if nothing had been corrupted."""
        expected = {name: weight.detach().to(cast, copy=True) for name, weight in model.named_parameters()}
        with corrupted(model.ordinary(), noise(model.ordinary())) as injection:
            model.to(cast)
            assert not torch.equal(model.get_parameter(next(iter(model.ordinary()))), next(iter(expected.values())))
            injection.write({})
            torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=0, equal_nan=True)
            injection.write(noise(model.ordinary()))
        torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=0, equal_nan=True)

    @for_each("cast", [torch.float64, torch.float16])
    def test_also_where_they_moved_between_two_steps(self, model: Weights, cast) -> None:
        expected = {name: weight.detach().to(cast, copy=True) for name, weight in model.named_parameters()}
        injection = Injection(dict(reversed(model.ordinary().items())))  # those of narrow dtypes first
        injection.displace(noise(model.ordinary()))
        model.to(cast)
        injection.displace(noise(model.ordinary()))
        injection.restore()
        torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=0, atol=0, equal_nan=True)

    def test_weights_that_moved_before_the_first_write_are_corrupted_where_they_are(self, model: Weights) -> None:
        injection = Injection(model.ordinary())
        model.to(torch.float64)
        before = {name: weight.detach().clone() for name, weight in model.ordinary().items()}
        change = {name: torch.randn_like(weight) for name, weight in before.items()}
        injection.displace(change)
        for name, weight in model.ordinary().items():
            assert torch.equal(weight, before[name] + change[name])
        injection.restore()
        torch.testing.assert_close(dict(model.ordinary()), before, rtol=0, atol=0)

    def test_a_thousand_times(self, bits_of) -> None:
        model = Weights([torch.float32, torch.bfloat16])
        parameters = dict(model.named_parameters())
        before = bits_of(model)
        for _ in range(1000):
            with corrupted(parameters, noise(parameters)):
                pass
        assert bits_of(model) == before


class TestFailuresWhileWriting:
    """Whatever is raised between the first and the last write, the saved bits are put back first."""

    @pytest.fixture(params=[RuntimeError, KeyboardInterrupt])
    def error(self, request) -> type[BaseException]:
        return request.param

    def test_in_the_projection(self, model: Weights, bits_of, error) -> None:
        before = bits_of(model)
        injection = Injection(model.ordinary())

        def project(tensors: list[Tensor]) -> None:
            for tensor in tensors:
                tensor.fill_(9)
            raise error

        for steps in (0, 1, 2):  # in the first step, and when weights are corrupted already
            for _ in range(steps):
                injection.displace(noise(model.ordinary()))
            with pytest.raises(error):
                injection.displace(noise(model.ordinary()), project)
            assert bits_of(model) == before
        injection.displace(noise(model.ordinary()))  # and it can be used again
        assert bits_of(model) != before
        injection.restore()
        assert bits_of(model) == before

    @pytest.mark.parametrize("operation", ["_foreach_zero_", "_foreach_add_", "_foreach_sub_", "_foreach_copy_"])
    def test_in_any_operation(self, model: Weights, bits_of, error, operation: str, monkeypatch) -> None:
        before = bits_of(model)
        original = getattr(torch, operation)

        def fails_at(failing: int) -> Callable[..., object]:
            countdown = iter(range(failing - 1, -100, -1))

            def wrapped(*args: object) -> object:
                result = original(*args)
                if next(countdown) == 0:
                    raise error
                return result

            return wrapped

        raised = 0
        for failing in range(1, 7):
            injection = Injection(model.ordinary())
            monkeypatch.setattr(torch, operation, fails_at(failing))
            try:
                injection.displace(noise(model.ordinary()), lambda corruption: None)
                injection.displace(noise(model.ordinary()))
            except error:
                raised += 1
                assert bits_of(model) == before
            monkeypatch.undo()
            injection.restore()
            assert bits_of(model) == before
        has_wide = any(parameter.dtype.itemsize >= 4 for parameter in model.parameters())
        assert raised >= (1 if has_wide or operation in ("_foreach_add_", "_foreach_copy_") else 0)

    def test_in_the_second_value_of_a_replacement(self, model: Weights, bits_of) -> None:
        before = bits_of(model)
        parameters = dict(model.named_parameters())
        values = Replacement({name: torch.full_like(p, 5.0) for name, p in parameters.items()})
        values[list(parameters)[1]] = torch.empty_like(parameters[list(parameters)[1]], device="meta")
        injection = Injection(parameters)
        with pytest.raises((RuntimeError, NotImplementedError)):
            injection.write(values)
        assert bits_of(model) == before
        with pytest.raises((RuntimeError, NotImplementedError)), corrupted(parameters, values):
            raise AssertionError("the body must not run")
        assert bits_of(model) == before

    @for_each(
        "replacing, inside_of",
        [
            *(
                (replacing, [Injection.displace.__wrapped__, Injection.write.__wrapped__])
                for replacing in (False, True)
            ),
            (False, [Injection._restore, Injection._put_back]),
        ],
    )
    def test_an_interrupt_at_any_line_of_a_write(self, bits_of, replacing: bool, inside_of) -> None:
        model = Weights([torch.float32, torch.bfloat16])
        parameters = model.ordinary()
        corruption = noise(parameters)
        before = bits_of(model)
        writing = {function.__code__ for function in inside_of}
        interrupted = 0
        for line in range(1, 100):
            lines = 0

            def trace(frame, event, _):
                nonlocal lines
                if frame.f_code not in writing:
                    return None

                def inside(_, event, __):
                    nonlocal lines
                    lines += event == "line"
                    if lines == line:  # noqa: B023
                        lines += 1
                        raise KeyboardInterrupt
                    return inside

                return inside

            previous = sys.gettrace()
            sys.settrace(trace)
            try:
                with corrupted(parameters, Replacement(corruption) if replacing else corruption):
                    pass
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(previous)
            assert bits_of(model) == before
            if interrupted < line:
                break
        assert interrupted >= 4

    @pytest.mark.parametrize("withdrawn", [False, True])
    def test_an_interrupt_while_bits_are_put_back(self, bits_of, error, withdrawn: bool, monkeypatch) -> None:
        model = Weights([torch.float32, torch.bfloat16])
        before = bits_of(model)
        injection = Injection(model.ordinary())
        injection.displace(noise(model.ordinary()))
        original, calls = torch._foreach_copy_, []

        def fails_first(*args: object) -> None:
            original(*args)
            calls.append(args)
            if len(calls) == 1:
                raise error

        monkeypatch.setattr(torch, "_foreach_copy_", fails_first)
        with pytest.raises(error):
            injection.withdraw(2) if withdrawn else injection.restore()
        assert bits_of(model) == before
        injection.restore()  # and again does no harm
        assert bits_of(model) == before

    def test_in_the_norm_that_withdraw_takes(self, model: Weights, bits_of, error, monkeypatch) -> None:
        before = bits_of(model)
        injection = Injection(model.ordinary())
        injection.displace(noise(model.ordinary()))

        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr("hf_parcor.injection.writing.vector_norm_of_unit_scale", fails)
        with pytest.raises(error):
            injection.withdraw(2)
        assert bits_of(model) == before

    def test_not_enough_memory_for_the_saved_bits(self, model: Weights, bits_of, error, monkeypatch) -> None:
        before = bits_of(model)

        def fails(_: object) -> None:
            raise error

        monkeypatch.setattr("hf_parcor.injection.writing.clones", fails)
        with pytest.raises(error), corrupted(dict(model.named_parameters()), noise(dict(model.named_parameters()))):
            raise AssertionError("the body must not run")
        assert bits_of(model) == before


class TestPieces:
    """What comes tensor by tensor is written tensor by tensor, and all of it is put back."""

    @pytest.fixture(autouse=True)
    def _one_by_one(self, monkeypatch) -> None:
        monkeypatch.setattr("hf_parcor.functional.vectors.TOGETHER", 1)

    @for_each("error", [RuntimeError, KeyboardInterrupt])
    @for_each("replaces", [False, True])
    @for_each("saved_on", [None, "cpu"])
    def test_nothing_stays_written_whatever_fails_between_two(self, bits_of, error, replaces, saved_on) -> None:
        model = Weights(DTYPES)
        parameters, before = dict(model.named_parameters()), bits_of(model)
        for count in range(len(parameters)):

            def pieces() -> Iterator[tuple[str, Tensor]]:
                for name in list(parameters)[:count]:  # noqa: B023
                    yield name, torch.full(parameters[name].shape, 5.0)
                assert count < 3 or bits_of(model) != before  # noqa: B023
                raise error

            with pytest.raises(error), corrupted(parameters, Pieces(pieces(), replaces=replaces), saved_on=saved_on):
                raise AssertionError("the body must not run")
            assert bits_of(model) == before

    @for_each("piece", [("nobody", torch.ones(2)), ("a", torch.ones(3)), ("a", None)])
    def test_one_that_fits_no_weight(self, piece) -> None:
        weights = {"b": torch.ones(2), "a": torch.ones(2)}
        pieces = Pieces([("b", torch.ones(2)), piece])
        with pytest.raises((ValueError, TypeError), match="expected"), corrupted(weights, pieces):
            raise AssertionError("the body must not run")
        assert torch.equal(weights["b"], torch.ones(2))

    def test_overlapping_weights(self) -> None:
        memory = torch.arange(8.0)
        weights = {"left": memory[:5], "right": memory[3:]}
        with corrupted(weights, {name: torch.ones(5) for name in weights}):
            assert memory.tolist() == [1, 2, 3, 5, 6, 6, 7, 8]
        assert memory.tolist() == list(range(8))

    @for_each("saved_on", [None, "cpu"])
    def test_the_second_is_of_the_weights_as_they_were_saved(self, model: Weights, bits_of, saved_on) -> None:
        parameters, clean = model.ordinary(), bits_of(model)
        injection = Injection(parameters, saved_on=saved_on)
        injection.write(noise(parameters))
        second = dict(list(noise(parameters).items())[:2])
        injection.write(Pieces(second.items()))
        for name, parameter in parameters.items():
            kept = injection._saved.get(injection._places[name], parameter)
            expected = sum_of(kept, second[name]) if name in second else kept
            assert torch.equal(parameter, expected)
        injection.restore()
        assert bits_of(model) == clean

    @for_each("p", [1.0, 2.0, math.inf])
    def test_norms_of_what_is_gone(self, model: Weights, p: float) -> None:
        parameters = model.ordinary()
        changes = noise(parameters, 1e-3)
        with corrupted(parameters, changes) as injection:
            expected, size = injection.withdraw(p), None
        with corrupted(parameters, Pieces(changes.items()), p=p) as injection:
            size, found = injection.size(), injection.withdraw(p)
        longhand = torch.linalg.vector_norm(torch.cat([change.reshape(-1) for change in changes.values()]), p)
        assert float(found.asked) == pytest.approx(float(expected.asked), rel=1e-6)
        assert float(found.asked) == pytest.approx(float(longhand), rel=1e-2 if p == math.inf else 1e-4)
        assert torch.equal(found.realised, expected.realised)
        assert size.changed > 0

    def test_a_norm_that_was_not_measured_is_refused(self) -> None:
        weight = torch.ones(3, dtype=torch.bfloat16)
        with corrupted({"w": weight}, Pieces([("w", torch.ones(3))]), p=1) as injection:
            with pytest.raises(ValueError, match=r"p: expected 1\.0, .*got 2; pass p=2"):
                injection.withdraw(2)
            assert weight.tolist() == [2, 2, 2]

    @for_each("dtype", [torch.bfloat16, torch.float32])
    @for_each("whole", [False, True])
    def test_the_saved_bits_are_all_that_is_kept(self, peak_memory, dtype, whole) -> None:
        weights = {str(at): torch.randn(1000, 50).to(dtype) for at in range(20)}
        largest, bits = 4 * 50_000, 20 * 50_000 * dtype.itemsize
        noise = GaussianNoise(0.1)
        given = noise(weights) if whole else None
        with peak_memory() as memory, corrupted(weights, noise.pieces(weights) if given is None else given):
            pass
        assert bits <= memory.peak <= bits + (dtype.itemsize * 50_000 if whole else largest) + 100


@for_each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@for_each("of_update", [torch.float64, torch.float32, torch.bfloat16])
def test_an_update_stays_the_callers_unless_it_is_given_away(dtype, of_update):
    weights = {"w": nn.Parameter(torch.ones(4, dtype=dtype)), "v": nn.Parameter(torch.ones(3, dtype=torch.float32))}
    updates = {name: torch.full(weight.shape, 0.5, dtype=of_update) for name, weight in weights.items()}
    injection = Injection(weights)
    for times in (1, 2):
        injection.displace(updates)
        assert all(torch.equal(weight, torch.full_like(weight, 1 + times / 2)) for weight in weights.values())
    injection.restore()
    assert all(torch.equal(update, torch.full_like(update, 0.5)) for update in updates.values())


class TestStepByStep:
    @staticmethod
    def longhand(
        weights: dict[str, Tensor], updates: list[dict[str, Tensor]], project: Callable[[list[Tensor]], None] | None
    ) -> Iterator[dict[str, Tensor]]:
        """a ← Π(a + u) in float64, or in float32 where that is what is kept."""
        kept = {2: torch.float32, 4: torch.float64, 8: torch.float64}
        a = {name: torch.zeros(w.shape, dtype=kept[w.dtype.itemsize]) for name, w in weights.items()}
        for update in updates:
            for name, change in update.items():
                a[name] += change
            if project is not None:
                project(list(a.values()))
            yield a

    @pytest.mark.parametrize("partially", [False, True])
    @pytest.mark.parametrize(
        "project",
        [
            None,
            partial(project_, p=2, epsilon=0.5),
            partial(project_, p=math.inf, epsilon=0.01),
            partial(project_, p=2, epsilon=0.1, top_n=40),
        ],
        ids=["free", "L2", "Linf", "top-n"],
    )
    def test_against_longhand(self, model: Weights, partially: bool, project, bits_of) -> None:
        clean = bits_of(model)
        parameters = model.ordinary()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        updates = [noise(parameters, 0.01) for _ in range(4)]
        if partially:
            updates = [
                {name: change for at, (name, change) in enumerate(update.items()) if (at + step) % 3}
                for step, update in enumerate(updates)
            ]
        injection = Injection(parameters)
        for a in self.longhand(before, [{k: v.clone() for k, v in update.items()} for update in updates], project):
            injection.displace(updates.pop(0), project)
            for name, parameter in parameters.items():
                # What is read back from w + a at every step costs half a unit in the last place of a weight, and in a
                # list of mixed precisions the norm feels it everywhere.
                scale = max((float(value.abs().amax()) for value in before.values() if value.numel()), default=0)
                unit = torch.finfo(parameter.dtype).eps
                if len({value.dtype for value in before.values()}) > 1:
                    unit = max(unit, torch.finfo(torch.float32).eps)
                expected = (before[name].double() + a[name]).to(parameter.dtype)
                torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=4 * scale * unit)
        injection.restore()
        assert bits_of(model) == clean

    @for_each("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_weights_hold_exactly_the_rounded_sum(self, dtype: torch.dtype) -> None:
        weight = nn.Parameter(torch.randn(1000).to(dtype))
        before, a = weight.detach().clone(), torch.zeros(1000)
        injection = Injection({"w": weight})
        for _ in range(20):  # steps that each would be swallowed add up
            update = torch.full((1000,), 1e-4)
            injection.displace({"w": update})
            a += update
            assert torch.equal(weight, sum_of(before, a))
        assert not torch.equal(weight, before)

    @for_each("dtype", DTYPES)
    def test_a_projection_moves_what_was_not_updated(self, dtype: torch.dtype) -> None:
        first, second = (nn.Parameter(torch.zeros(1, dtype=dtype)) for _ in range(2))
        injection = Injection({"first": first, "second": second})
        onto_unit_ball = partial(project_, p=2, epsilon=1.0)
        injection.displace({"first": torch.ones(1)}, onto_unit_ball)
        injection.displace({"second": torch.ones(1)}, onto_unit_ball)
        assert first.item() == pytest.approx(math.sqrt(0.5), rel=1e-2)
        assert second.item() == pytest.approx(math.sqrt(0.5), rel=1e-2)

    def test_the_projection_sees_every_tensor_once_in_float32_at_least(self, model: Weights) -> None:
        parameters = model.ordinary()
        seen = []
        Injection(parameters).displace({}, lambda tensors: seen.extend(tensor.clone() for tensor in tensors))
        assert [tensor.shape for tensor in seen] == [parameter.shape for parameter in parameters.values()]
        assert all(tensor.dtype.itemsize >= 4 for tensor in seen)
        assert not any(tensor.any() for tensor in seen)

    def test_no_update_changes_nothing_but_is_withdrawn(self, model: Weights, bits_of) -> None:
        before = bits_of(model)
        injection = Injection(model.ordinary())
        injection.displace({})
        injection.restore()
        assert bits_of(model) == before

    def test_used_again_it_starts_from_nothing(self, model: Weights) -> None:
        parameters = model.ordinary()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        injection = Injection(parameters)
        for _ in range(2):
            update = noise(parameters)
            injection.displace(update)
            assert all(torch.equal(p, sum_of(before[name], update[name])) for name, p in parameters.items())
            injection.restore()

    def test_moving_and_replacing_are_not_mixed(self, model: Weights, bits_of) -> None:
        clean = bits_of(model)
        parameters = model.ordinary()
        values = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
        injection = Injection(parameters)
        injection.write(Replacement(values))
        during = bits_of(model)
        with pytest.raises(RuntimeError, match=r"displace: expected weights not written before.*restore\(\) first"):
            injection.displace(values)
        assert bits_of(model) == during
        injection.restore()
        injection.displace(values)
        with pytest.raises(RuntimeError, match=r"write: expected weights not displaced before.*restore\(\) first"):
            injection.write(Replacement(values))
        injection.restore()
        assert bits_of(model) == clean


class TestNorms:
    @for_each("p", [1.0, 2.0, 3.0, math.inf])
    def test_asked_and_realised_in_full_precision(self, p: float) -> None:
        weights = {"a": nn.Parameter(torch.randn(50)), "b": nn.Parameter(torch.randn(4, 5, dtype=torch.float64))}
        changes = noise(weights)
        with corrupted(weights, changes) as injection:
            norm = injection.withdraw(p)
        expected = torch.linalg.vector_norm(torch.cat([change.reshape(-1) for change in changes.values()]), p)
        assert float(norm.asked) == pytest.approx(float(expected), rel=1e-5)
        assert float(norm.realised) == pytest.approx(float(expected), rel=1e-5)

    @for_each("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_weights_swallow_small_changes(self, dtype: torch.dtype) -> None:
        weight = nn.Parameter((1 + torch.rand(10_000)).to(dtype))
        change = torch.full((10_000,), 1e-5)
        with corrupted({"w": weight}, {"w": change}) as injection:
            size = injection.size()
            norm = injection.withdraw(2)
        assert float(norm.asked) == pytest.approx(1e-3, rel=1e-5)
        assert float(norm.realised) < 0.1 * float(norm.asked)
        assert size.changed < 1000
        with corrupted({"w": weight}, {"w": 1e4 * change}) as injection:
            norm = injection.withdraw(2)
        assert float(norm.realised) == pytest.approx(float(norm.asked), rel=0.05)

    @torch.no_grad()
    def test_realised_is_that_of_the_difference(self, model: Weights) -> None:
        parameters = model.ordinary()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with corrupted(parameters, noise(parameters)) as injection:
            difference = torch.cat(
                [(p.double() - before[name].double()).reshape(-1) for name, p in parameters.items()]
            )
            size = injection.size()
            norm = injection.withdraw(2)
        tolerance = 1e-3 if any(parameter.dtype.itemsize < 4 for parameter in parameters.values()) else 1e-6
        assert float(norm.realised) == pytest.approx(float(difference.norm()), rel=tolerance)
        assert size.norm == pytest.approx(float(difference.norm()), rel=1e-12)
        assert size.changed == int(difference.count_nonzero())

    def test_size_takes_no_memory_that_grows_with_the_weights(self, peak_memory) -> None:
        weight = nn.Parameter(torch.zeros(2000, 2000))
        with corrupted({"w": weight}, {"w": torch.full((2000, 2000), 0.5)}) as injection, peak_memory() as memory:
            size = injection.size()
        assert (size.changed, size.norm) == (4_000_000, 1000)
        assert memory.peak < 50e6  # it took 100 MB here, and four times as much for four times the weights

    def test_of_float16_beyond_its_range(self) -> None:
        weight = nn.Parameter(torch.zeros(100_000, dtype=torch.float16))
        with corrupted({"w": weight}, {"w": torch.ones(100_000)}) as injection:
            assert float(injection.withdraw(1).realised) == 100_000

    def test_of_a_replacement(self) -> None:
        weight = nn.Parameter(torch.tensor([1.0, 2.0, 2.0]))
        with corrupted({"w": weight}, Replacement({"w": torch.tensor([1.0, 5.0, -2.0])})) as injection:
            assert injection.size().changed == 2
            assert injection.size().norm == 5
            norm = injection.withdraw(2)
        assert (float(norm.asked), float(norm.realised)) == (5, 5)
        with corrupted({"w": weight}, Replacement({"w": torch.tensor([1.0, math.inf, 2.0])})) as injection:
            assert injection.size().norm == math.inf
            assert float(injection.withdraw(2).realised) == math.inf
        assert weight.tolist() == [1, 2, 2]

    def test_of_nothing(self, model: Weights) -> None:
        injection = Injection(model.ordinary())
        norm = injection.withdraw(2)
        assert (float(norm.asked), float(norm.realised)) == (0, 0)
        assert (injection.size().changed, injection.size().norm) == (0, 0)

    def test_weights_that_were_not_finite_and_did_not_change_do_not_count(self) -> None:
        weight = nn.Parameter(torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0]))
        with corrupted({"w": weight}, {"w": torch.tensor([1.0, 1.0, 1.0, 0.0, -2.0])}) as injection:
            assert (injection.size().changed, injection.size().norm) == (1, 2)
        values = Replacement({"w": torch.tensor([math.nan, math.inf, math.inf, math.nan, 0.0])})
        with corrupted({"w": weight}, values) as injection:
            assert injection.size().changed == 2

    @for_each("p", [0.5, math.nan, "2"])
    def test_bad_orders_change_nothing(self, p) -> None:
        weight = nn.Parameter(torch.ones(3))
        with corrupted({"w": weight}, {"w": torch.ones(3)}) as injection:
            with pytest.raises((ValueError, TypeError), match="p: expected 1 <= p <= inf"):
                injection.withdraw(p)
            assert weight.tolist() == [2, 2, 2]


class TestRefusals:
    """Each says what was expected, what was given and what to do, before any weight is written."""

    @pytest.fixture
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"layer.{index}.weight": nn.Parameter(torch.ones(2, 3)) for index in range(12)}

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        yield
        assert all(torch.equal(parameter, torch.ones(2, 3)) for parameter in parameters.values())
        assert all(parameter._version == 0 for parameter in parameters.values())

    @for_each("kind", [dict, Replacement])
    @for_each(
        ("corruption", "error", "message"),
        [
            ({}, ValueError, r"corruption: expected at least one tensor, got none"),
            (
                {"layer.1.weight": torch.ones(2, 3), "layer.3.weigth": torch.ones(2, 3)},
                ValueError,
                r"corruption: expected names of the 12 selected parameters, got 'layer.3.weigth'; "
                r"the nearest are .*layer.3.weight",
            ),
            ({"zzz": torch.ones(1)}, ValueError, r"got 'zzz'; the nearest are layer.0.weight"),
            (
                {"layer.1.weight": torch.ones(2, 3), "layer.3.weight": torch.ones(3, 2)},
                ValueError,
                r"layer.3.weight: expected a corruption of shape \(2, 3\), got \(3, 2\)",
            ),
            ({"layer.3.weight": torch.ones(1)}, ValueError, r"of shape \(2, 3\), got \(1,\)"),  # no broadcasting
            ({"layer.3.weight": torch.tensor(1.0)}, ValueError, r"of shape \(2, 3\), got \(\)"),
            ({"layer.3.weight": 0.1}, TypeError, r"layer.3.weight: expected a tensor, got float"),
            ({"layer.3.weight": None}, TypeError, r"layer.3.weight: expected a tensor, got NoneType"),
        ],
    )
    def test_corruptions(self, parameters, kind, corruption, error, message) -> None:
        with pytest.raises(error, match=message), corrupted(parameters, kind(corruption)):
            raise AssertionError("the body must not run")
        if corruption:
            injection = Injection(parameters)
            with pytest.raises(error, match=message):
                (injection.write if kind is Replacement else injection.displace)(kind(corruption))

    @for_each("given", [GaussianNoise(0.1), None, [torch.ones(2, 3)], 0.1])
    def test_corruptions_that_are_no_mapping(self, parameters, given) -> None:
        message = r"corruption: expected tensors by name, got .*; call a corruption on the parameters"
        with pytest.raises(TypeError, match=message), corrupted(parameters, given):
            raise AssertionError("the body must not run")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_weights_that_are_not_floating_point(self, parameters, dtype: torch.dtype) -> None:
        weights = {**parameters, "embedding": torch.ones(3).to(dtype)}
        words = str(dtype).removeprefix("torch.")
        message = rf"embedding: expected a floating-point weight of 16 bits .*, got one that is {words}; leave it out"
        corruption = {name: torch.ones(weight.shape) for name, weight in weights.items()}
        with pytest.raises(TypeError, match=message), corrupted(weights, corruption):
            raise AssertionError("the body must not run")
        with pytest.raises(TypeError, match=message):
            Injection(weights)
        with corrupted(weights, {"layer.0.weight": torch.zeros(0, 3)[:0].new_zeros(2, 3)}):
            pass  # what is not touched may be anything
        parameters.pop("layer.0.weight")  # it was written, and restored

    @for_each(
        "rows",
        [torch.ones(1, 3).expand(2, 3), torch.ones(5).unfold(0, 3, 1), torch.ones(9).as_strided((2, 2), (1, 1))],
    )
    def test_weights_whose_entries_share_memory(self, parameters, rows) -> None:
        """None can be written by itself; and where a write fails in the middle, so does putting the bits back."""
        apart = torch.ones(6, 4, 6)
        weights = {**parameters, "row": torch.ones(1, 3).expand(1, 3), "part": apart[::2, 1:3, ::3].transpose(0, 2)}
        weights |= {"diagonal": apart[:, 0].diagonal(), "windows": torch.ones(9).unfold(0, 3, 3), "rows": rows}
        message = r"rows: expected .* is expanded or overlapping, several entries in one place; leave it out"
        for write in (lambda: Injection(weights), lambda: GaussianNoise(0.1).pieces(weights)):
            with pytest.raises(TypeError, match=message):
                write()

    def test_no_weights(self) -> None:
        with pytest.raises(ValueError, match=r"weights: expected at least one tensor, got none"):
            Injection({})

    @for_each("given", [nn.Linear(2, 2), nn.Linear(2, 2).named_parameters(), [torch.ones(2)], None])
    def test_weights_that_are_no_mapping(self, given) -> None:
        with pytest.raises(TypeError, match=r"parameters: expected tensors by name, got .*"):
            corrupted(given, {"w": torch.ones(2)}).__enter__()
        with pytest.raises(TypeError, match=r"weights: expected tensors by name, got .*"):
            Injection(given)

    def test_one_weight_under_two_names(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        before = model[0].weight.detach().clone()
        message = r"1.weight: expected every weight under one name, got that of 0.weight again; .* leave one"
        for weights in (dict(model.named_parameters(remove_duplicate=False)), model.state_dict()):
            with pytest.raises(ValueError, match=message), corrupted(weights, noise(weights)):
                raise AssertionError("the body must not run")
        assert torch.equal(model[0].weight, before)

    def test_parts_of_one_storage_are_several_weights(self) -> None:
        flat = torch.ones(10)
        weights = {"first": flat[:5], "second": flat[5:], "none": flat[:0], "nothing": flat[:0]}
        with corrupted(weights, {name: torch.ones(weight.shape) for name, weight in weights.items()}):
            assert flat.tolist() == [2] * 10
        assert flat.tolist() == [1] * 10


class TestAMultiple:
    """`w + f v` in one pass is `w + a` of the a that is never made."""

    @staticmethod
    def multiple_of(weights: dict[str, nn.Parameter], factor: float = 0.25) -> Multiple:
        direction = {name: torch.randn_like(weight, requires_grad=False) for name, weight in weights.items()}
        norm = factor * vector_norm(list(direction.values())).double()
        return Multiple(direction, torch.tensor(factor, dtype=torch.float64), norm)

    @pytest.mark.parametrize("saved_on", [None, "cpu"])
    @pytest.mark.parametrize("method", ["write", "displace"])
    def test_is_its_tensors(self, model: Weights, method: str, saved_on: str | None) -> None:
        weights = model.ordinary()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        multiple = self.multiple_of(weights)
        injection = Injection(weights, saved_on=saved_on)
        if method == "write":
            injection.write(multiple, p=2)
        elif any(weight.dtype.itemsize < 4 for weight in weights.values()):
            with pytest.raises(TypeError, match="narrow"):
                injection.displace(multiple)
            return
        else:
            injection.displace(multiple)
            injection.displace(multiple)
        for name, weight in weights.items():
            change = (1 if method == "write" else 2) * 0.25 * multiple.direction[name].to(wide(weight).dtype)
            torch.testing.assert_close(weight.detach(), sum_of(before[name], change))
        size, norm = injection.size(), injection.withdraw(2)
        assert size.asked == pytest.approx(float(norm.asked), rel=1e-4)
        assert float(norm.asked) == pytest.approx(float(multiple.norm) * (1 if method == "write" else 2), rel=1e-4)
        assert float(norm.realised) == pytest.approx(float(norm.asked), rel=1e-2)
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())

    def test_takes_the_place_of_what_was_written(self, model: Weights) -> None:
        weights = model.ordinary()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        injection = Injection(weights)
        injection.write(noise(dict(weights)))
        nothing = self.multiple_of(weights, 0.0)
        injection.write(
            Multiple({name: v * math.nan for name, v in nothing.direction.items()}, nothing.factor, nothing.norm)
        )
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
        with pytest.raises(ValueError, match="selected"):
            injection.write(Multiple({"no": torch.ones(1)}, nothing.factor, nothing.norm))
        injection.restore()

    def test_of_what_narrow_weights_swallow_both_methods_say_what_was_asked_for(self) -> None:
        weights = {"w": nn.Parameter(torch.ones(30).bfloat16())}
        multiple = self.multiple_of(weights, 1e-5)
        injection = Injection(weights)
        injection.write(multiple, p=2)
        size, norm = injection.size(), injection.withdraw(2)
        assert (size.changed, size.norm) == (0, float(norm.realised)) == (0, 0.0)
        assert size.asked == pytest.approx(float(norm.asked), rel=1e-6)
        assert size.asked == pytest.approx(float(multiple.norm), rel=1e-6)

    def test_of_narrow_weights_only_the_norm_that_is_known_can_be_asked_for(self) -> None:
        weights = {"w": nn.Parameter(torch.randn(30).bfloat16())}
        injection = Injection(weights)
        injection.write(self.multiple_of(weights), p=2)
        with pytest.raises(ValueError, match="order"):
            injection.withdraw(3)
