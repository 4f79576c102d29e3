"""The constraint: one frozen object that refuses nonsense at once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import pickle

import numpy as np
import pytest
from for_each import for_each

from hf_parcor import AWP, SAM, CorruptionConstraint
from hf_parcor.constraints import check_constraint


def test_defaults() -> None:
    constraint = CorruptionConstraint(epsilon=0.1)
    assert (constraint.p, constraint.epsilon, constraint.top_n) == (2.0, 0.1, None)


def test_it_is_frozen_and_a_value() -> None:
    constraint = CorruptionConstraint(p=math.inf, epsilon=0.1, top_n=5)
    same = CorruptionConstraint(p=float("inf"), epsilon=0.1, top_n=5)
    assert constraint == same
    assert hash(constraint) == hash(same)
    assert constraint != dataclasses.replace(constraint, top_n=6)
    assert pickle.loads(pickle.dumps(constraint)) == constraint
    with pytest.raises(dataclasses.FrozenInstanceError):
        constraint.epsilon = 0.2


def test_replace_checks_too() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        dataclasses.replace(CorruptionConstraint(epsilon=0.1), epsilon=-1)


def test_numbers_of_numpy_become_plain_ones() -> None:
    constraint = CorruptionConstraint(p=np.int64(2), epsilon=np.float32(0.5), top_n=np.int32(3))
    assert [type(value) for value in dataclasses.astuple(constraint)] == [float, float, int]
    assert json.loads(json.dumps(dataclasses.asdict(constraint))) == {"p": 2.0, "epsilon": 0.5, "top_n": 3}


def test_order_of_arguments_cannot_be_mixed_up() -> None:
    with pytest.raises(TypeError):
        CorruptionConstraint(2.0, 0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="epsilon"):
        CorruptionConstraint()  # type: ignore[call-arg]


@for_each(
    ("settings", "shown"),
    [
        ({"epsilon": 0.1}, "L2 ε=0.1"),
        ({"p": 1, "epsilon": 5}, "L1 ε=5"),
        ({"p": 1.5, "epsilon": 1e-5}, "L1.5 ε=1e-05"),
        ({"p": math.inf, "epsilon": 5e-4, "top_n": 100}, "L∞ ε=0.0005 n=100"),
        ({"epsilon": 0}, "L2 ε=0"),
    ],
)
def test_shown_as_the_papers_write_it(settings: dict, shown: str) -> None:
    assert str(CorruptionConstraint(**settings)) == shown


@for_each(
    ("settings", "error", "message"),
    [
        ({"p": 0.99}, ValueError, r"p: expected 1 <= p <= inf, got 0.99; .* pass 2 or float\(.inf.\)"),
        ({"p": -math.inf}, ValueError, r"p: .* got -inf"),
        ({"p": math.nan}, ValueError, r"p: .* got NaN"),
        ({"p": "inf"}, TypeError, r"p: .* got 'inf' of type str"),
        ({"p": None}, TypeError, r"p: .* got None"),
        ({"p": True}, TypeError, r"p: .* got True of type bool"),
        ({"epsilon": -1e-300}, ValueError, r"epsilon: expected 0 <= epsilon < inf, got -1e-300"),
        ({"epsilon": math.nan}, ValueError, r"epsilon: .* got NaN"),
        ({"epsilon": math.inf}, ValueError, r"epsilon: .* got inf"),
        ({"epsilon": None}, TypeError, r"epsilon: .* got None"),
        ({"top_n": 0}, ValueError, r"top_n: expected a whole number >= 1, got 0"),
        ({"top_n": -1}, ValueError, r"top_n: .* got -1"),
        ({"top_n": 10.0}, TypeError, r"top_n: .* got 10.0 of type float; pass an int"),
        ({"top_n": False}, TypeError, r"top_n: .* got False"),
    ],
)
def test_nonsense_is_refused(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CorruptionConstraint(**{"epsilon": 0.1, **settings})


@for_each(
    ("build", "name", "instead"),
    [(CorruptionConstraint, "rho", "epsilon=0.05"), (SAM, "rho", "epsilon=0.05"), (AWP, "gamma", "per_tensor=True")],
)
def test_who_comes_from_another_library_is_told_the_name_here(build, name: str, instead: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: .* write .*{instead}"):
        build(**{name: 0.05})
    assert name not in inspect.signature(build).parameters
    assert "constraint" in inspect.signature(SAM).parameters


@for_each("given", [0.1, None, {"epsilon": 0.1}, CorruptionConstraint])
def test_what_is_no_constraint(given) -> None:
    check_constraint(CorruptionConstraint(epsilon=0.1))
    with pytest.raises(TypeError, match=r"constraint: expected a CorruptionConstraint, got .*"):
        check_constraint(given)
