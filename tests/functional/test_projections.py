"""Projection is the nearest point: against a numerical solver over every support, and against random points."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import launches
from scipy import optimize

from hf_parcor.functional import keep_top_n, project, project_, vector_norm
from hf_parcor.functional.projections import project_each_

NORMS = [2.0, math.inf]

entries = st.floats(-100, 100, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-38])
vectors = st.lists(st.lists(entries, max_size=5), min_size=1, max_size=4).filter(lambda parts: any(parts))

PROBLEMS = {
    "p": st.sampled_from(NORMS),
    "parts": vectors,
    "n": st.none() | st.integers(1, 8),
    "epsilon": st.floats(1e-3, 300),
}


def tensors_of(parts: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(part) for part in parts]


def solve(x: np.ndarray, p: float, epsilon: float, n: int) -> float:
    """Return the smallest distance to S that a solver finds when every support of n entries is tried."""
    distances = []
    for support in itertools.combinations(range(len(x)), n):
        target = x[list(support)]
        ball = (
            [] if math.isinf(p) else [{"type": "ineq", "fun": lambda y: epsilon**2 - y @ y, "jac": lambda y: -2 * y}]
        )
        solution = optimize.minimize(
            lambda y, target=target: ((y - target) ** 2).sum(),
            np.full(n, 0.1 * epsilon),
            jac=lambda y, target=target: 2 * (y - target),
            bounds=[(-epsilon, epsilon)] * n,
            constraints=ball,
            method="SLSQP",
            options={"ftol": 1e-9, "maxiter": 500},
        )
        assert solution.success, solution.message
        distances.append(solution.fun + (x**2).sum() - (target**2).sum())
    return math.sqrt(min(distances))


@pytest.mark.slow
@for_each("p", NORMS)
@for_each("n", [1, 2, 3, 4, 5])
@for_each("epsilon", [0.1, 1.0, 1.9, 10.0])
def test_as_near_as_a_solver_gets_over_every_support(p: float, n: int, epsilon: float) -> None:
    x = np.array([1.3, -0.2, 0.9, 2.1, -1.1])
    y = project([torch.from_numpy(x[:2]), torch.from_numpy(x[2:])], p, epsilon, n)
    found = torch.cat(y).numpy()
    assert np.linalg.norm(found, ord=p) <= epsilon * (1 + 1e-12)
    assert np.count_nonzero(found) <= n
    assert np.linalg.norm(found - x) == pytest.approx(solve(x, p, epsilon, n), rel=1e-5, abs=1e-4)


@settings(max_examples=75)
@given(
    **PROBLEMS,
    seed=st.integers(0, 2**32 - 1),
)
def test_no_point_of_the_constraint_is_nearer(
    p: float, parts: list[list[float]], n: int | None, epsilon: float, seed: int
) -> None:
    x = np.concatenate([np.asarray(part, np.float64) for part in parts])
    y = torch.cat(project([part.double() for part in tensors_of(parts)], p, epsilon, n)).numpy()
    assert np.linalg.norm(y, ord=p) <= epsilon * (1 + 1e-12)
    assert np.count_nonzero(y) <= (n or len(x))
    generator = np.random.default_rng(seed)
    # Rivals near x, near y and anywhere, with random supports, pulled into the ball.
    rivals = generator.standard_normal((5000, len(x))) * generator.choice([1e-3, 1, 100], (5000, 1))
    rivals += generator.choice([0, 1], (5000, 1)) * np.where(generator.random((5000, 1)) < 0.5, x, y)
    rivals[generator.random(rivals.shape).argsort(axis=1) >= (n or len(x))] = 0
    norms = np.linalg.norm(rivals, ord=p, axis=1, keepdims=True)
    rivals *= np.minimum(1, epsilon / np.where(norms > 0, norms, 1))
    assert np.linalg.norm(rivals - x, axis=1).min() >= np.linalg.norm(y - x) - 1e-12 * np.linalg.norm(x)


@settings(max_examples=150)
@given(p=st.sampled_from(NORMS), parts=vectors, n=st.none() | st.integers(1, 8), margin=st.floats(1.00001, 1e6))
def test_inside_keeps_every_bit(p: float, parts: list[list[float]], n: int | None, margin: float, same_bits) -> None:
    x = tensors_of(parts)
    kept = x if n is None else keep_top_n(x, n)
    epsilon = margin * float(vector_norm([part.double() for part in kept], p))
    assert same_bits(project(x, p, epsilon, n), kept)


def test_on_the_boundary_nothing_moves(same_bits) -> None:
    x = [torch.tensor([3.0, -0.0]), torch.tensor([-4.0])]
    assert same_bits(project(x, 2, 5.0), x)
    assert same_bits(project(x, math.inf, 4.0), x)


@settings(max_examples=50)
@given(parts=vectors, shrink=st.floats(1e-3, 0.99))
def test_outside_goes_to_the_boundary_in_the_same_direction(parts: list[list[float]], shrink: float) -> None:
    x = [part.double() for part in tensors_of(parts)]
    norm = float(vector_norm(x))
    y = project(x, 2, shrink * norm)
    assert float(vector_norm(y)) == pytest.approx(shrink * norm, rel=1e-12, abs=1e-300)
    torch.testing.assert_close(y, [part * shrink for part in x], rtol=1e-12, atol=1e-300)


def test_outside_is_clipped_for_infinity() -> None:
    (y,) = project([torch.tensor([3.0, -0.5, -7.0, 0.2])], math.inf, 0.3)
    torch.testing.assert_close(y, torch.tensor([0.3, -0.3, -0.3, 0.2]), rtol=0, atol=0)


@settings(max_examples=150)
@given(**PROBLEMS)
def test_idempotent(p: float, parts: list[list[float]], n: int | None, epsilon: float) -> None:
    once = project(tensors_of(parts), p, epsilon, n)
    twice = project(once, p, epsilon, n)
    # For p = 2 the rounded norm may lie an ulp outside, and is pulled back by an ulp.
    torch.testing.assert_close(twice, once, rtol=0 if math.isinf(p) else 3e-7, atol=0 if math.isinf(p) else 1e-45)


@settings(max_examples=150)
@given(
    p=st.sampled_from(NORMS),
    pairs=st.lists(st.tuples(entries, entries), min_size=1, max_size=8),
    epsilon=st.floats(1e-3, 300),
)
def test_projection_onto_the_convex_ball_never_moves_points_apart(
    p: float, pairs: list[tuple[float, float]], epsilon: float
) -> None:
    x, y = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    apart = (project([x], p, epsilon)[0] - project([y], p, epsilon)[0]).norm()
    assert float(apart) <= float((x - y).norm()) * (1 + 1e-12)


@for_each("largest", [1e-44, 1e-38, 1e-20, 1e-9, 1.0, 1e9, 1e20, 3e38])
@for_each("ratio", [1e-3, 1.0, 1e3])
def test_norm_neither_over_nor_underflows(largest: float, ratio: float) -> None:
    x = [torch.tensor([largest, 0.0, -largest]), torch.tensor([largest / 4])]
    exact = torch.cat(x).double()
    epsilon = ratio * float(exact.norm())
    y = torch.cat(project(x, 2, epsilon)).double()
    torch.testing.assert_close(y, exact * min(1.0, ratio), rtol=1e-6, atol=3e-45)


@for_each("largest", [1e-44, 1e-30, 1e30, 3e38])
@for_each("epsilon", [1e-8, 1.0, 1e8])
def test_far_from_the_boundary(largest: float, epsilon: float) -> None:
    x = [torch.tensor([largest, 0.0, -largest])]
    expected = torch.tensor([1.0, 0.0, -1.0]) * min(largest, epsilon / math.sqrt(2))
    torch.testing.assert_close(project(x, 2, epsilon), [expected], rtol=1e-6, atol=0)


@for_each("largest", [5e-324, 1e-300, 1e300])
def test_extremes_in_float64(largest: float) -> None:
    x = [torch.tensor([largest, 0.0, -largest], dtype=torch.float64)]
    expected = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) * min(largest, 0.5 / math.sqrt(2))
    torch.testing.assert_close(project(x, 2, 0.5), [expected], rtol=1e-12, atol=0)


def test_epsilon_of_zero_is_the_origin() -> None:
    for p in NORMS:
        assert all(not part.any() for part in project([torch.randn(4), torch.randn(2, 2)], p, 0.0, 3))
        assert all(not part.any() for part in project([torch.zeros(4)], p, 0.0))


@for_each("p", NORMS)
@for_each("n", [None, 4])
def test_a_list_is_the_concatenated_vector(p: float, n: int | None) -> None:
    x = [torch.randn(3, 4), torch.empty(0), torch.randn(5)]
    whole = project([torch.cat([part.reshape(-1) for part in x])], p, 0.5, n)
    pieces = project(x, p, 0.5, n)
    assert [part.shape for part in pieces] == [part.shape for part in x]
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in pieces]), whole[0], rtol=1e-6, atol=0)
    assert project([], p, 0.5, n) == []
    assert [part.shape for part in project([torch.empty(0)], p, 0.5, n)] == [(0,)]


@settings(max_examples=75)
@given(
    **PROBLEMS,
    batched=st.booleans(),
)
def test_each_by_itself(p: float, parts: list[list[float]], n: int | None, epsilon: float, batched: bool) -> None:
    tensors = tensors_of(parts)
    with launches(batched):
        project_each_(tensors, p, epsilon, n)
    for found, part in zip(tensors, tensors_of(parts), strict=True):
        torch.testing.assert_close(found, project([part], p, epsilon, n)[0], rtol=1e-6, atol=1e-45)


@for_each("p", NORMS)
@for_each("n", [None, 9])
def test_in_place_on_tensors_that_are_not_contiguous(p: float, n: int | None) -> None:
    x = [torch.randn(6, 4).t(), torch.randn(9)[::2]]
    expected = project([part.contiguous() for part in x], p, 0.5, n)
    project_(x, p, 0.5, n)
    assert not any(part.is_contiguous() for part in x)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)


@for_each("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, same_bits) -> None:
    x = [torch.randn(7, 3).to(dtype)]
    for p in NORMS:
        assert same_bits(project(x, p, 0.5, 5), project([part.float() for part in x], p, 0.5, 5))


def test_input_is_only_read_and_parameters_are_welcome(same_bits) -> None:
    x = torch.nn.Parameter(torch.randn(3, 2))
    before = x.detach().clone()
    (y,) = project([x], 2, 0.1)
    assert same_bits([x], [before])
    assert not y.requires_grad


@for_each("p", [1, 1.5, 3, 1e9])
def test_other_norms_are_refused(p: float, same_bits) -> None:
    x = [torch.randn(3)]
    before = [x[0].clone()]
    with pytest.raises(NotImplementedError, match=r"expected p = 2 or p = inf, got p = .*: use one of these"):
        project_(x, p, 0.1, 1)
    assert same_bits(x, before)
    with pytest.raises(NotImplementedError):
        project(x, p, 0.1)


@for_each(
    ("p", "epsilon", "n", "error", "message"),
    [
        (0.5, 1.0, None, ValueError, r"p: expected 1 <= p <= inf, got 0.5"),
        (math.nan, 1.0, None, ValueError, r"p: .* got NaN"),
        (2, -1.0, None, ValueError, r"epsilon: .* got -1"),
        (2, math.nan, None, ValueError, r"epsilon: .* got NaN"),
        (2, math.inf, None, ValueError, r"epsilon: .* got inf"),
        (2, 1.0, 0, ValueError, r"top_n: .* got 0"),
        (2, 1.0, 1.5, TypeError, r"top_n: .* got 1.5"),
    ],
)
def test_bad_numbers_are_refused_before_anything_changes(p, epsilon, n, error, message, same_bits) -> None:
    x = [torch.randn(3)]
    before = [x[0].clone()]
    for write in (project_, project_each_):
        with pytest.raises(error, match=message):
            write(x, p, epsilon, n)
        assert same_bits(x, before), write
