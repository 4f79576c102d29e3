"""What every corruption of the catalogue keeps to. A new corruption adds one row to `CASES`."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_parcor import CorruptionConstraint, corrupted
from hf_parcor.corruptions import (
    CORRUPTIONS,
    BitFlips,
    ConductanceDrift,
    Corruption,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Pruning,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
)
from hf_parcor.functional import vector_norm
from hf_parcor.injection import Replacement

Weights = Mapping[str, Tensor]
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Case:
    """A row: how to make the corruption from numbers as a user may give them, and what its result keeps to."""

    make: Callable[[], Corruption]
    holds: Callable[[Weights, Weights], bool]
    replaces: bool = False


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors.values()])


def within(p: float, epsilon: float, top_n: int) -> Callable[[Weights, Weights], bool]:
    def holds(_: Weights, a: Weights) -> bool:
        norm = float(vector_norm(list(a.values()), p))
        return 0.5 * epsilon < norm <= epsilon * (1 + 1e-6) and int(flat(a).count_nonzero()) <= top_n

    return holds


def flips(count: int) -> Callable[[Weights, Weights], bool]:
    def holds(weights: Weights, values: Weights) -> bool:
        return count == sum(
            int(np.bitwise_count((integers(weights[name]) ^ integers(values[name])).numpy().astype("u8")).sum())
            for name in weights
        )

    return holds


def integers(tensor: Tensor) -> Tensor:
    width = tensor.dtype.itemsize * 8
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize]).long() & (
        2**width - 1 if width < 64 else -1
    )


CASES = {
    "random": Case(
        lambda: RandomCorruption(CorruptionConstraint(p=3, epsilon=np.float32(0.5), top_n=np.int64(20))),
        within(3, 0.5, 20),
    ),
    "gradient": Case(
        lambda: GradientCorruption(CorruptionConstraint(p=1.5, epsilon=0.5, top_n=7)), within(1.5, 0.5, 7)
    ),
    "multi_step": Case(
        lambda: MultiStepCorruption(CorruptionConstraint(epsilon=0.5, top_n=7), np.int64(3), np.float32(0.25)),
        within(2, 0.5, 7),
    ),
    "gaussian": Case(lambda: GaussianNoise(np.float32(0.02)), lambda _, a: 0.01 < float(flat(a).std()) < 0.04),
    "uniform": Case(lambda: UniformNoise(np.float32(0.5)), lambda _, a: 0.3 < float(flat(a).abs().max()) <= 0.5),
    "drift": Case(
        lambda: ConductanceDrift(np.int64(86_400)),
        lambda weights, values: bool(
            ((flat(values).abs() < 0.8 * flat(weights).abs()) & (flat(values).sign() == flat(weights).sign())).all()
        ),
        replaces=True,
    ),
    "quantization": Case(
        lambda: Quantization(np.int64(3)),
        lambda weights, values: (
            all(len(value.unique()) <= 7 for value in values.values())
            and max(float((values[name] - weights[name]).detach().abs().max()) for name in weights) < 1
        ),
        replaces=True,
    ),
    "float_quantization": Case(
        lambda: FloatQuantization("fp8_e5m2"),
        lambda weights, values: (
            0 < float((flat(values) / flat(weights) - 1).abs().max()) <= 2**-3  # two bits of mantissa
            and all(torch.equal(values[name], weights[name]) for name in weights if weights[name].ndim == 1)
        ),
        replaces=True,
    ),
    "pruning": Case(
        lambda: Pruning(np.float32(0.5)),
        lambda weights, values: all(
            torch.equal(values[name], weight)
            if weight.ndim < 2
            else int((values[name] == 0).sum()) == round(weight.numel() / 2)
            and bool(((values[name] == weight) | (values[name] == 0)).all())
            for name, weight in weights.items()
        ),
        replaces=True,
    ),
    "bit_flips": Case(lambda: BitFlips(count=np.int64(9), bits="mantissa"), flips(9), replaces=True),
    "worst_bit_flips": Case(lambda: WorstBitFlips(np.int64(9), batches=np.int64(2)), flips(9), replaces=True),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(integers(first[k]), integers(second[k])) for k in first)


def test_every_corruption_has_a_row() -> None:
    assert set(CASES) == set(CORRUPTIONS)
    assert all(type(CASES[name].make()) is kind for name, kind in CORRUPTIONS.items())
    with pytest.raises(TypeError):
        CORRUPTIONS["mine"] = GaussianNoise  # type: ignore[index]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def corruption(case: Case) -> Corruption:
    return case.make()


@pytest.fixture
def choose(corruption: Corruption, weights, logistic) -> Callable[..., Mapping[str, Tensor]]:
    """Return a function that chooses a corruption of the weights, with fresh gradients if they are needed."""

    def choice(seed: int = 0, of: Mapping[str, Tensor] = weights) -> Mapping[str, Tensor]:
        return corruption(of, logistic(of) if corruption.uses_gradients else None, seeded(seed))

    return choice


def test_what_must_hold_holds(case: Case, choose, weights) -> None:
    assert case.holds(weights, choose())


def test_weights_are_only_read(choose, weights, bits_of) -> None:
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    versions = [weight._version for weight in weights.values()]
    result = choose()
    assert same(weights, before)
    assert [weight._version for weight in weights.values()] == versions
    for tensor in result.values():  # and nothing of the result is the weights' own memory
        tensor.fill_(5)
    assert same(weights, before)
    assert all(weight.grad is None for weight in weights.values())


def test_names_order_and_shapes(case: Case, choose, weights) -> None:
    result = choose()
    assert list(result) == list(weights)
    assert all(result[name].shape == weight.shape for name, weight in weights.items())
    assert isinstance(result, Replacement) == case.replaces
    assert not any(tensor.requires_grad for tensor in result.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_precision_of_the_result(case: Case, choose, weights, dtype: torch.dtype) -> None:
    of = {name: weight.detach().to(dtype) for name, weight in weights.items()}
    expected = dtype if case.replaces else torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in choose(of=of).values()} == {expected}


def test_a_seed_means_one_corruption(corruption: Corruption, choose) -> None:
    assert same(choose(0), choose(0))
    assert same(choose(0), choose(1)) == (not corruption.stochastic)


def test_the_global_generator_is_used_only_without_another(corruption: Corruption, weights, logistic) -> None:
    state = torch.get_rng_state()
    corruption(weights, logistic(weights), seeded())
    assert torch.equal(torch.get_rng_state(), state)
    corruption(weights, logistic(weights))
    assert torch.equal(torch.get_rng_state(), state) == (not corruption.stochastic)


def test_gradients_that_are_missing_are_refused_where_they_are_needed(corruption: Corruption, weights) -> None:
    if corruption.uses_gradients:
        message = rf"gradients: expected a GradientSource for {type(corruption).__name__}, got None; pass one"
        with pytest.raises(ValueError, match=message):
            corruption(weights)
    else:
        corruption(weights)


def test_gradients_are_asked_for_only_where_they_are_needed(corruption: Corruption, weights) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(name)

    if not corruption.uses_gradients:
        corruption(weights, Untouchable())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, r"weights: expected at least one tensor, got none; select parameters first"),
        ({"w": torch.ones(3), "ids": torch.arange(3)}, TypeError, r"ids: expected a floating-point weight"),
        ({"w": torch.ones(3).to(torch.float8_e5m2)}, TypeError, r"w: expected a floating-point weight of 16 bits"),
        (torch.nn.Linear(2, 2), TypeError, r"weights: expected tensors by name, got Linear; select_parameters"),
        (torch.nn.Linear(2, 2).named_parameters(), TypeError, r"weights: expected tensors by name, got generator"),
    ],
    ids=["empty", "integer", "float8", "module", "generator"],
)
def test_selections_that_cannot_be_corrupted(corruption: Corruption, logistic, weights, given, error, message) -> None:
    with pytest.raises(error, match=message):
        corruption(given, logistic(weights))


def test_tied_weights_are_one_weight(corruption: Corruption, logistic, weights) -> None:
    with pytest.raises(ValueError, match=r"again: .*|again; tied weights are one weight"):
        corruption({**weights, "tied": weights["mix"]}, logistic(weights))


def test_settings_are_plain_and_rebuild_an_equal_object(corruption: Corruption) -> None:
    settings = json.loads(json.dumps(corruption.settings()))
    assert settings == corruption.settings()
    assert all(type(value) in (int, float, str, type(None)) for value in corruption.settings().values())
    constrained = {field.name for field in dataclasses.fields(corruption)} & {"constraint"}
    if constrained:
        bounds = {field.name: settings.pop(field.name) for field in dataclasses.fields(CorruptionConstraint)}
        settings["constraint"] = CorruptionConstraint(**bounds)
    assert type(corruption)(**settings) == corruption


def test_it_is_a_frozen_value(corruption: Corruption, case: Case) -> None:
    assert corruption == case.make()
    assert hash(corruption) == hash(case.make())
    assert pickle.loads(pickle.dumps(corruption)) == corruption
    assert copy.deepcopy(corruption) == corruption
    name = dataclasses.fields(corruption)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(corruption, name, None)


def test_it_is_shown_on_one_short_line(corruption: Corruption) -> None:
    text = str(corruption)
    assert 0 < len(text) <= 40
    assert text.isprintable()
    assert "object at" not in text


# Of each setting another value than its default: rows of two records are the same corruption if their labels are.
ANOTHER = {
    **{"constraint": CorruptionConstraint(p=4, epsilon=0.25, top_n=3), "steps": 2, "step_size": 0.01, "count": 3},
    **{"std": 0.5, "bound": 0.25, "relative_to": "tensor", "seconds": 7, "nu_mean": 0.5, "nu_std": 0.5, "t_0": 5},
    **{"bits": 8, "per": "channel", "symmetric": False, "code_range": "full", "arithmetic": "weight"},
    **{
        "sparsity": 0.25,
        "format": "fp8_e4m3",
        "of": "float16",
        "search": "data-free",
        "candidates": 3,
        "batches": None,
    },
}
UNTOLD = {"zero_point", "rate"}  # these only go with other settings


def test_settings_that_differ_are_told_apart(corruption: Corruption) -> None:
    if isinstance(corruption, MultiStepCorruption):
        corruption = MultiStepCorruption(CorruptionConstraint(epsilon=0.5))
    for field in dataclasses.fields(corruption):
        if field.name not in UNTOLD:
            value = "sign" if isinstance(corruption, BitFlips) and field.name == "bits" else ANOTHER[field.name]
            if field.name == "constraint" and isinstance(corruption, MultiStepCorruption):
                value = dataclasses.replace(value, p=math.inf)
            text = str(dataclasses.replace(corruption, **{field.name: value}))
            assert text != str(corruption), field.name
            assert len(text) <= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_injected_and_withdrawn_to_the_last_bit(case: Case, choose, weights, dtype: torch.dtype, bits_of) -> None:
    model = torch.nn.Module()
    for name, weight in weights.items():
        model.register_parameter(name, torch.nn.Parameter(weight.detach().to(dtype)))
    model.register_buffer("running", torch.randn(3))
    parameters = dict(model.named_parameters())
    before, clean = bits_of(model), {name: p.detach().clone() for name, p in parameters.items()}
    change = choose(of=parameters)
    with pytest.raises(KeyboardInterrupt), corrupted(parameters, change):
        raise KeyboardInterrupt
    assert bits_of(model) == before
    with corrupted(parameters, change) as injection:
        assert bits_of(model) != before
        assert injection.size().changed > 0
        for name, parameter in parameters.items():
            wide = torch.promote_types(dtype, torch.float32)
            right = change[name] if case.replaces else clean[name].to(wide) + change[name].to(wide)
            torch.testing.assert_close(parameter.detach(), right.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert bits_of(model) == before


def test_weights_may_be_empty_or_single_numbers(corruption: Corruption, weights, logistic) -> None:
    if corruption.uses_gradients:
        return  # the regression has the weights it has
    given = {"empty": torch.empty(0, 3), "scalar": torch.tensor(0.7), "vector": torch.randn(30)}
    result = corruption(given, None, seeded())
    assert {name: tensor.shape for name, tensor in result.items()} == {name: t.shape for name, t in given.items()}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_do_not_spoil_the_others(corruption: Corruption, bad: float) -> None:
    if corruption.uses_gradients:
        return  # that depends on the gradients, see the test of each
    given = {"broken": torch.tensor([1.0, bad]), "sound": torch.randn(30)}
    result = corruption(given, None, seeded())
    if not isinstance(corruption, BitFlips):  # a flipped exponent may make an infinity by itself
        assert torch.isfinite(result["sound"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_pieces_are_the_same_tensors_one_after_the_other(
    case: Case, choose, corruption, weights, logistic, dtype
) -> None:
    of = {name: weight.detach().to(dtype) for name, weight in weights.items()}
    pieces = corruption.pieces(of, logistic(of) if corruption.uses_gradients else None, seeded())
    assert pieces.replaces == case.replaces
    first = next(iter(pieces))
    made, whole = dict([first, *pieces]), choose(of=of)
    assert same(made, {name: whole[name] for name in made})
    for name in whole.keys() - made.keys():  # what stays as it is may be left out
        assert torch.equal(whole[name], of[name] if pieces.replaces else torch.zeros_like(of[name]))
    assert not pieces.whole()  # they come once


def test_its_pieces_can_be_written_while_they_are_made(corruption, choose, weights, logistic, bits_of) -> None:
    model = torch.nn.Module()
    for name, weight in weights.items():
        model.register_parameter(name, torch.nn.Parameter(weight.detach().clone()))
    parameters, clean = dict(model.named_parameters()), bits_of(model)
    with corrupted(parameters, choose(of=parameters)):
        expected = bits_of(model)
    pieces = corruption.pieces(parameters, logistic(parameters) if corruption.uses_gradients else None, seeded())
    with corrupted(parameters, pieces):
        assert bits_of(model) == expected
    assert bits_of(model) == clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_direction_that_is_drawn_twice_is_the_one_that_is_held(dtype, peak_memory, monkeypatch) -> None:
    corruption = RandomCorruption(CorruptionConstraint(epsilon=0.5))
    weights = {name: torch.zeros(3000, 5, dtype=dtype) for name in "abcdefgh"} | {"empty": torch.zeros(0, 2)}
    held = corruption(weights, generator=seeded())
    monkeypatch.setattr(sys.modules["hf_parcor.corruptions.random"], "_LARGE", 10)
    generator = seeded()
    with peak_memory() as memory:
        for name, part in corruption.pieces(weights, generator=generator):
            assert torch.equal(part, held[name])
            del part
    assert memory.peak < 4 * 15_000 * 1.2
    after = seeded()
    corruption(weights, generator=after)
    assert torch.equal(generator.get_state(), after.get_state())


@dataclass(frozen=True)
class OfOne(Corruption):
    """Moves one weight, of a name that there may not be."""

    name: str

    def _choose(self, weights, gradients, generator):
        return {self.name: torch.ones(2)}


def test_a_corruption_without_a_strength_has_no_other() -> None:
    with pytest.raises(ValueError, match="MXFP4: expected a corruption with a strength"):
        FloatQuantization("mxfp4").with_strength(0.5)


def test_what_a_corruption_leaves_out_stays_and_what_is_not_there_is_refused() -> None:
    weights = {"first": torch.zeros(2), "second": torch.zeros(2)}
    assert {name: float(moved.sum()) for name, moved in OfOne("second")(weights).items()} == {"first": 0, "second": 2}
    with (
        pytest.raises(ValueError, match="got 'secnod'; the nearest are second"),
        corrupted(weights, OfOne("secnod")(weights)),
    ):
        raise AssertionError("the body must not run")


@pytest.mark.parametrize(
    ("corruption", "nothing"),
    [
        (RandomCorruption(CorruptionConstraint(epsilon=0.0)), True),
        (GaussianNoise(0.0, relative_to="tensor"), True),
        (UniformNoise(0.0), True),
        (ConductanceDrift(0.0), True),
        (Pruning(0.0, "all"), True),
        (BitFlips(rate=0.0), True),
        (BitFlips(rate=0.0, of="int8"), False),
        (BitFlips(rate=0.0, of="bfloat16"), False),
        (Quantization(16), False),
    ],
    ids=str,
)
def test_what_says_that_it_changes_nothing_leaves_every_weight(corruption: Corruption, nothing: bool) -> None:
    weights = {"w": torch.randn(20, 3)}
    before = weights["w"].clone()
    with corrupted(weights, corruption(weights)):
        assert corruption.changes_nothing is torch.equal(weights["w"], before) is nothing
