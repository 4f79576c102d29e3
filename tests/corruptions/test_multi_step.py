"""Projected gradient ascent against the same by hand: numpy, float64, the derivative written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from for_each import for_each

from hf_parcor import CorruptionConstraint, GradientCorruption, MultiStepCorruption
from hf_parcor.functional import vector_norm

EPSILON = 0.8


def derivative(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of mean log(1 + exp(−y xᵀ(W m + c))) with respect to (W, m, c), one vector."""
    matrix, mix, shift = w[:24].reshape(6, 4), w[24:28], w[28:]
    scores = x @ (matrix @ mix + shift)
    inner = (x * (-y / (1 + np.exp(y * scores)))[:, None]).mean(axis=0)
    return np.concatenate([np.outer(inner, mix).reshape(-1), matrix.T @ inner, inner])


def top(v: np.ndarray, n: int | None) -> np.ndarray:
    kept = np.zeros_like(v)
    largest = np.argsort(-np.abs(v), kind="stable")[:n]
    kept[largest] = v[largest]
    return kept


def by_hand(w, batches, p, n, steps, step_size):
    """a_0 = 0, a_k = Π_S(a_{k−1} + u_k), one batch a step; yields every a_k."""
    a = np.zeros_like(w)
    for k in range(steps):
        x, y = (part.double().numpy() for part in batches[k % len(batches)])
        g = top(derivative(w + a, x, y), n)
        u = step_size * (np.sign(g) if math.isinf(p) else g / np.linalg.norm(g))
        a = top(a + u, n)
        a = np.clip(a, -EPSILON, EPSILON) if math.isinf(p) else a * min(1, EPSILON / np.linalg.norm(a))
        yield a


def flat(tensors) -> np.ndarray:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors.values()]).numpy()


@pytest.fixture(autouse=True)
def bundles(monkeypatch) -> None:
    """Let tensors of 24, 4 and 6 entries be taken in two bundles."""
    monkeypatch.setattr("hf_parcor.functional.vectors.TOGETHER", 10)


@pytest.fixture
def precise(weights) -> dict[str, torch.Tensor]:
    return {name: weight.detach().double() for name, weight in weights.items()}


@pytest.mark.slow
@for_each("p", [2.0, math.inf])
@for_each("n", [None, 1, 6, 30])
@for_each(("steps", "step_size"), [(1, 0.3), (4, 0.3), (7, 0.05), (12, 2.0), (None, None), (3, None)])
def test_against_the_same_by_hand(p, n, steps, step_size, precise, logistic, batches) -> None:
    source = logistic(precise)
    result = MultiStepCorruption(CorruptionConstraint(p=p, epsilon=EPSILON, top_n=n), steps, step_size)(
        precise, source
    )
    count = steps or len(batches)
    size = step_size or 1.5 * EPSILON / count
    walk = list(by_hand(flat(precise), batches, p, n, count, size))
    np.testing.assert_allclose(flat(result), walk[-1], rtol=1e-9, atol=1e-12)
    # Each gradient was asked for at the corruption before, on the next batch, beginning at 0 with the first.
    assert [index for index, _ in source.asked] == [k % len(batches) for k in range(count)]
    for (_, asked), expected in zip(source.asked, [np.zeros(34), *walk], strict=False):
        np.testing.assert_allclose(flat(asked), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@for_each("p", [2.0, math.inf])
@for_each("n", [None, 1, 5])
@for_each("steps", [1, 2, 9])
def test_stays_in_the_constraint(p: float, n: int | None, steps: int, weights, logistic) -> None:
    constraint = CorruptionConstraint(p=p, epsilon=EPSILON, top_n=n)
    for step_size in (None, 0.01, 100.0):
        result = MultiStepCorruption(constraint, steps, step_size)(weights, logistic(weights))
        assert float(vector_norm(list(result.values()), p)) <= EPSILON * (1 + 1e-6)
        assert np.count_nonzero(flat(result)) <= (n or 34)


def test_one_long_step_is_the_gradient_based_corruption(weights, logistic, batches) -> None:
    source = logistic(weights)
    source.batches = batches[:1]
    for p in (2.0, math.inf):
        constraint = CorruptionConstraint(p=p, epsilon=EPSILON, top_n=9)
        one = MultiStepCorruption(constraint)(weights, source)
        np.testing.assert_allclose(
            flat(one), flat(GradientCorruption(constraint)(weights, source)), rtol=1e-5, atol=1e-8
        )


def test_more_steps_find_a_larger_loss(precise, logistic, batches) -> None:
    source = logistic(precise)
    source.batches = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    constraint = CorruptionConstraint(epsilon=2.0)

    def loss_at(steps: int) -> float:
        a = MultiStepCorruption(constraint, steps)(precise, source)
        return float(source.loss({name: weight + a[name] for name, weight in precise.items()}, source.batches[0]))

    assert loss_at(30) > loss_at(1)


def test_weights_of_low_precision_are_corrupted_in_float32(weights, logistic) -> None:
    narrow = {name: weight.detach().bfloat16() for name, weight in weights.items()}
    result = MultiStepCorruption(CorruptionConstraint(epsilon=1e-4), 3)(narrow, logistic(narrow))
    assert {change.dtype for change in result.values()} == {torch.float32}
    assert float(vector_norm(list(result.values()))) == pytest.approx(1e-4, rel=0.3)


@for_each("value", [0.0, math.nan, math.inf])
def test_a_batch_without_a_usable_gradient_is_a_step_of_nothing(value: float, weights, logistic) -> None:
    source = logistic(weights)
    proper = source.on_next_batch

    def second_is_broken(corruption):
        gradient = proper(corruption)
        return {name: part * value for name, part in gradient.items()} if len(source.asked) == 2 else gradient

    source.on_next_batch = second_is_broken
    MultiStepCorruption(CorruptionConstraint(epsilon=EPSILON), 3, 0.1)(weights, source)
    _, after_one, after_two = (flat(asked) for _, asked in source.asked)
    assert np.linalg.norm(after_one) == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_array_equal(after_two, after_one)


def test_no_radius_is_no_corruption(weights, logistic) -> None:
    result = MultiStepCorruption(CorruptionConstraint(epsilon=0))(weights, logistic(weights))
    assert not flat(result).any()
    result = MultiStepCorruption(CorruptionConstraint(epsilon=1), 3, 0)(weights, logistic(weights))
    assert not flat(result).any()


def test_shown_with_its_steps() -> None:
    constraint = CorruptionConstraint(epsilon=0.1)
    assert str(MultiStepCorruption(constraint)) == "multi-step L2 ε=0.1"
    assert str(MultiStepCorruption(constraint, 5)) == "multi-step L2 ε=0.1 K=5"


@for_each("p", [1, 1.5, 3])
def test_norms_without_a_projection_are_refused_at_once(p: float) -> None:
    with pytest.raises(NotImplementedError, match=r"expected p = 2 or p = inf, got p ="):
        MultiStepCorruption(CorruptionConstraint(p=p, epsilon=0.1))


@for_each(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"steps: expected a whole number >= 1, got 0"),
        ({"steps": 2.0}, TypeError, r"steps: .* got 2.0"),
        ({"step_size": -0.1}, ValueError, r"step_size: expected 0 <= step_size < inf, got -0.1"),
        ({"step_size": math.nan}, ValueError, r"step_size: .* got NaN"),
        ({"constraint": 0.1}, TypeError, r"constraint: expected a CorruptionConstraint, got 0.1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiStepCorruption(**{"constraint": CorruptionConstraint(epsilon=0.1), **settings})
