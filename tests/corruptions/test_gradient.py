"""Gradient-based and random corruption are the closed form on a gradient, and on noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from for_each import for_each
from scipy import stats

from hf_parcor import CorruptionConstraint, GradientCorruption, RandomCorruption
from hf_parcor.functional import constrained_maximum, constrained_maximum_value, gaussian_noise, vector_norm

NORMS = [1.0, 1.5, 2.0, 4.0, math.inf]


class TestGradientCorruption:
    @for_each("p", NORMS)
    @for_each("top_n", [None, 1, 11])
    def test_is_the_closed_form_on_autograds_gradient(self, p: float, top_n: int | None, weights, logistic) -> None:
        source = logistic(weights)
        constraint = CorruptionConstraint(p=p, epsilon=0.3, top_n=top_n)
        result = GradientCorruption(constraint)(weights, source)
        loss = torch.stack([source.loss(weights, batch) for batch in source.batches]).mean()
        gradient = torch.autograd.grad(loss, list(weights.values()))
        expected = constrained_maximum(gradient, p, 0.3, top_n)
        for found, right in zip(result.values(), expected, strict=True):
            torch.testing.assert_close(found, right)

    @for_each("p", NORMS)
    def test_raises_the_loss_as_much_as_the_first_order_says(self, p: float, weights, logistic) -> None:
        weights = {name: weight.detach().double() for name, weight in weights.items()}
        source, epsilon = logistic(weights), 1e-6
        a = GradientCorruption(CorruptionConstraint(p=p, epsilon=epsilon))(weights, source)

        def loss(change: float) -> float:
            point = {name: weight + change * a[name] for name, weight in weights.items()}
            return float(torch.stack([source.loss(point, batch) for batch in source.batches]).mean())

        promised = float(constrained_maximum_value(list(source.over_data().values()), p, epsilon))
        assert loss(1) - loss(0) == pytest.approx(promised, rel=1e-4)
        assert loss(-1) - loss(0) == pytest.approx(-promised, rel=1e-4)

    def test_gradients_are_taken_by_name_and_only_read(self, weights, logistic) -> None:
        source = logistic(weights)
        gradient = source.over_data()
        before = {name: part.clone() for name, part in gradient.items()}

        class Reversed:
            def __len__(self) -> int:
                return 1

            def over_data(self) -> dict[str, torch.Tensor]:
                return {"unrelated": torch.ones(1), **dict(reversed(gradient.items()))}

            def on_next_batch(self, _: object) -> dict[str, torch.Tensor]:
                raise AssertionError("not of a batch")

        corruption = GradientCorruption(CorruptionConstraint(epsilon=0.3, top_n=9))
        found, expected = corruption(weights, Reversed()), corruption(weights, source)
        assert all(torch.equal(found[name], expected[name]) for name in weights)
        assert all(torch.equal(gradient[name], before[name]) for name in weights)

    @for_each("value", [0.0, math.nan, math.inf])
    def test_no_usable_gradient_is_no_corruption(self, value: float, weights, logistic) -> None:
        source = logistic(weights)
        gradient = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with torch.no_grad():
            gradient["mix"][1] = value
        source.over_data = lambda: gradient
        for p in NORMS:
            result = GradientCorruption(CorruptionConstraint(p=p, epsilon=0.3))(weights, source)
            assert not any(change.any() for change in result.values())


class TestRandomCorruption:
    @for_each("p", NORMS)
    @for_each("top_n", [None, 1, 11])
    def test_is_the_closed_form_on_normal_noise(self, p: float, top_n: int | None, weights) -> None:
        corruption = RandomCorruption(CorruptionConstraint(p=p, epsilon=0.3, top_n=top_n))
        found = corruption(weights, generator=torch.Generator().manual_seed(5))
        noise = gaussian_noise(list(weights.values()), 1.0, torch.Generator().manual_seed(5))
        expected = constrained_maximum(noise, p, 0.3, top_n)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
        assert float(vector_norm(expected, p)) == pytest.approx(0.3, rel=1e-6)

    def test_uniform_on_the_sphere(self) -> None:
        # A coordinate of a uniform point on the sphere in k dimensions: (x + 1)/2 is Beta((k−1)/2, (k−1)/2).
        generator = torch.Generator().manual_seed(0)
        corruption, k = RandomCorruption(CorruptionConstraint(epsilon=2.0)), 5
        weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
        points = np.array(
            [torch.cat(list(corruption(weights, generator=generator).values())).numpy() for _ in range(1500)]
        )
        assert np.linalg.norm(points, axis=1) == pytest.approx(2.0, rel=1e-6)
        for coordinate in points.T:
            assert stats.kstest((coordinate / 2 + 1) / 2, stats.beta((k - 1) / 2, (k - 1) / 2).cdf).pvalue > 1e-3
        assert np.abs(np.cov(points.T) - np.eye(k) * 4 / k).max() < 0.1

    @pytest.mark.slow
    def test_signs_for_infinity_and_every_coordinate_for_one(self) -> None:
        weights = {"w": torch.zeros(10_000)}
        (signs,) = RandomCorruption(CorruptionConstraint(p=math.inf, epsilon=0.5))(weights).values()
        assert set(signs.tolist()) == {-0.5, 0.5}
        assert abs(float(signs.mean())) < 0.5 * 5 / 100
        generator = torch.Generator().manual_seed(0)
        one = RandomCorruption(CorruptionConstraint(p=1, epsilon=0.5))
        few = {"w": torch.zeros(4)}
        hits = [one(few, generator=generator)["w"].abs().argmax().item() for _ in range(400)]
        assert stats.chisquare(np.bincount(hits, minlength=4)).pvalue > 1e-3


@for_each("kind", [GradientCorruption, RandomCorruption])
def test_a_bare_radius_is_no_constraint(kind) -> None:
    with pytest.raises(TypeError, match=r"constraint: expected a CorruptionConstraint, got 0.1"):
        kind(0.1)
