"""The formulas of Theorems 1 to 3 against independent computations: arbitrary precision, quadrature, brute force."""

import ast
import itertools
import math
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from for_each import for_each
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import hf_parcor.statistics
import hf_parcor.theory
from hf_parcor.theory import (
    RandomCorruptionRatio,
    first_order_maximum_loss_change,
    generalization_complexity,
    generalization_remainder,
    gradient_corruption_relative_error,
    norm_ratio,
    relative_error_exponent,
    second_order_average_loss_change,
)

NORM_ORDERS = [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 10.0, math.inf]


def uniform_on_sphere(generator, samples, k):
    vectors = generator.standard_normal((samples, k))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class TestRandomCorruptionRatio:
    @staticmethod
    def printed_density(x, k):
        """Eq. 8 as printed, in arbitrary precision."""
        gammas = 2 * mpmath.gamma(mpmath.mpf(k) / 2) / (mpmath.sqrt(mpmath.pi) * mpmath.gamma(mpmath.mpf(k - 1) / 2))
        return gammas * (1 - mpmath.mpf(x) ** 2) ** (mpmath.mpf(k - 3) / 2)

    @staticmethod
    def printed_cdf(x, k):
        """Eq. 9 as printed, with F₁ read as the Gaussian hypergeometric function."""
        series = mpmath.hyp2f1(mpmath.mpf(1) / 2, mpmath.mpf(3 - k) / 2, mpmath.mpf(3) / 2, mpmath.mpf(x) ** 2)
        return 2 * mpmath.mpf(x) * series / mpmath.beta(mpmath.mpf(k - 1) / 2, mpmath.mpf(1) / 2)

    @pytest.mark.slow
    @for_each("k", [2, 3, 4, 7, 50, 1001])
    @for_each("x", [0.01, 0.3, 0.7, 0.99])
    def test_printed_equations_are_right_and_agree_with_each_other(self, k, x):
        ratio = RandomCorruptionRatio(k)
        with mpmath.workdps(60):
            integral = mpmath.quad(lambda s: self.printed_density(s, k), [0, x])
            assert float(self.printed_cdf(x, k)) == pytest.approx(float(integral), rel=1e-14)
            assert ratio.cdf(x) == pytest.approx(float(integral), rel=1e-12)
            assert ratio.density(x) == pytest.approx(float(self.printed_density(x, k)), rel=1e-11)

    @for_each("k", [2, 5, 40])
    def test_proof_step_of_the_papers_gives_the_survival_function(self, k):
        """Eq. 34–36 (D.19–D.21) print 2∫₀^arccos x sin^(k−2) / B((k−1)/2, 1/2) as P(η <= x): it is P(η >= x)."""
        x = 0.2
        integral = mpmath.quad(lambda angle: mpmath.sin(angle) ** (k - 2), [0, mpmath.acos(x)])
        printed = float(2 * integral / mpmath.beta(mpmath.mpf(k - 1) / 2, 0.5))
        assert printed == pytest.approx(RandomCorruptionRatio(k).survival(x), rel=1e-12)
        assert printed != pytest.approx(RandomCorruptionRatio(k).cdf(x), rel=0.01)

    @pytest.mark.slow
    @for_each("k", [10**6, 24_221_600, 10**9, 10**12])
    def test_billions_of_parameters(self, k):
        ratio = RandomCorruptionRatio(k)
        with mpmath.workdps(40):
            constant = 2 / mpmath.beta(mpmath.mpf(k - 1) / 2, mpmath.mpf(1) / 2)

            def density(x):
                return constant * mpmath.exp(mpmath.mpf(k - 3) / 2 * mpmath.log1p(-(mpmath.mpf(x) ** 2)))

            for z in (0.1, 1.645, 6.0):
                x = z / math.sqrt(k)
                below = float(mpmath.quad(density, mpmath.linspace(0, x, 5)))
                above = float(mpmath.quad(density, mpmath.linspace(x, x + 20 / mpmath.sqrt(k), 41)))
                assert ratio.cdf(x) == pytest.approx(below, rel=1e-13)
                assert ratio.survival(x) == pytest.approx(above, rel=1e-12)
                assert ratio.density(x) == pytest.approx(float(density(x)), rel=1e-9)
                assert ratio.log_density(x) == pytest.approx(float(mpmath.log(density(x))), rel=1e-9)
            assert ratio.quantile(0.9) * math.sqrt(k) == pytest.approx(stats.norm.ppf(0.95), rel=2 / k + 1e-12)
        assert math.isfinite(ratio.log_density(0.9))
        assert ratio.density(0.9) == 0

    @pytest.mark.slow
    @for_each(
        ("k", "x"),
        [
            *((2, 0.5), (3, 0.9), (1000, 0.0), (1000, 0.05), (1000, 0.9), (3000, 0.6)),
            *((10**6, 0.034), (10**6, 0.036), (10**9, 1e-3), (10**9, 1.2e-3), (10**9, 0.5), (10**9, 0.999)),
        ],
    )
    def test_probabilities_that_underflow(self, k, x):
        """The tail beyond x = cos φ as an integral of sin^(k−2) over the angle, scaled by its largest value."""
        with mpmath.workdps(40):
            far = mpmath.acos(mpmath.mpf(x))
            largest = (k - 2) * mpmath.log(mpmath.sin(far))

            def scaled(angle):
                return mpmath.exp((k - 2) * mpmath.log(mpmath.sin(angle)) - largest) if angle else mpmath.mpf(k == 2)

            width = min(far, 200 / (mpmath.mpf(k) * max(x, mpmath.sqrt(1 / mpmath.mpf(k)))))
            integral = mpmath.quad(scaled, mpmath.linspace(far - width, far, 21))
            half = (mpmath.mpf(k) - 1) / 2
            expected = largest + mpmath.log(2 * integral) - mpmath.log(mpmath.beta(half, mpmath.mpf(1) / 2))
        assert RandomCorruptionRatio(k).log_survival(x) == pytest.approx(float(expected), rel=1e-11, abs=1e-11)

    @for_each("k", [50, 10**6, 10**9])
    @for_each("probability", [0.5, 1e-3, 1e-30, 1e-250])
    def test_quantiles_of_the_upper_tail(self, k, probability):
        ratio = RandomCorruptionRatio(k)
        assert ratio.log_survival(ratio.upper_quantile(probability)) == pytest.approx(math.log(probability), rel=1e-6)
        assert ratio.upper_quantile(0.25) == pytest.approx(ratio.quantile(0.75))

    def test_reaching_half_of_the_worst_case_by_chance(self):
        with mpmath.workdps(40):
            above = mpmath.quad(lambda s: self.printed_density(s, 1000), mpmath.linspace(0.5, 1, 41))
        assert RandomCorruptionRatio(1000).survival(0.5) == pytest.approx(float(above), rel=1e-10)

    @settings(max_examples=60)
    @given(k=st.integers(2, 10**9), probability=st.floats(0, 1))
    @example(k=2, probability=0.99999)
    @example(k=2, probability=1 - 2**-30)
    def test_quantile_inverts_the_distribution_function(self, k, probability):
        """To the next number on either side: near x = 1 the function rises by more than 1e-12 from one to the next."""
        ratio = RandomCorruptionRatio(k)
        x = ratio.quantile(probability)
        assert 0 <= x <= 1
        assert ratio.cdf(math.nextafter(x, 0)) - 1e-12 <= probability <= ratio.cdf(math.nextafter(x, 1)) + 1e-12
        assert ratio.cdf(x) + ratio.survival(x) == pytest.approx(1)
        assert ratio.signed_cdf(x) == pytest.approx((1 + probability) / 2)
        assert ratio.signed_cdf(x) + ratio.signed_cdf(-x) == pytest.approx(1)

    @for_each("k", [2, 3, 6, 200])
    def test_signed_distribution_is_a_stretched_beta(self, k):
        """(aᵀg/εG + 1)/2 ~ Beta((k−1)/2, (k−1)/2), another way to the same numbers."""
        x = np.linspace(-1, 1, 41)
        expected = stats.beta((k - 1) / 2, (k - 1) / 2).cdf((x + 1) / 2)
        np.testing.assert_allclose(RandomCorruptionRatio(k).signed_cdf(x), expected, atol=1e-13)

    @for_each("k", [2, 5, 300])
    def test_sampled_corruptions_follow_it(self, k):
        generator = np.random.default_rng(k)
        gradient = generator.standard_normal(k) * 10
        cosines = uniform_on_sphere(generator, 2000, k) @ gradient / np.linalg.norm(gradient)
        ratio = RandomCorruptionRatio(k)
        assert stats.kstest(cosines, ratio.signed_cdf).pvalue > 0.01
        assert stats.kstest(np.abs(cosines), ratio.cdf).pvalue > 0.01
        assert stats.kstest(np.abs(cosines), RandomCorruptionRatio(3 * k).cdf).pvalue < 0.01
        assert np.mean(cosines**2) == pytest.approx(1 / k, rel=0.15)

    def test_outside_the_support_and_at_its_ends(self):
        ratio = RandomCorruptionRatio(10)
        assert [ratio.density(x) for x in (-0.1, 1.0, 1.1)] == [0, 0, 0]
        assert ratio.density(0.0) == pytest.approx(float(self.printed_density(0.0, 10)))
        assert [ratio.log_density(x) for x in (-0.1, 1.0, 1.1)] == [-math.inf] * 3
        assert [ratio.cdf(x) for x in (-1.0, 0.0, 1.0, 2.0)] == [0, 0, 1, 1]
        assert [ratio.survival(x) for x in (-1.0, 0.0, 1.0, 2.0)] == [1, 1, 0, 0]
        assert [ratio.signed_cdf(x) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)] == [0, 0, 0.5, 1, 1]
        assert [ratio.quantile(p) for p in (0.0, 1.0)] == [0, 1]
        assert [RandomCorruptionRatio(2).density(x) for x in (1.0, 1.1)] == [math.inf, 0]
        assert math.isnan(ratio.cdf(math.nan))
        assert math.isnan(ratio.density(math.nan))

    def test_logarithms_of_the_survival_function_at_the_ends(self):
        ratio = RandomCorruptionRatio(10)
        assert [ratio.log_survival(x) for x in (-1.0, 0.0, 1.0, 2.0)] == [0, 0, -math.inf, -math.inf]
        assert math.isnan(ratio.log_survival(math.nan))

    def test_numbers_give_numbers_and_arrays_give_arrays(self):
        ratio = RandomCorruptionRatio(10)
        grid = np.array([[0.1, 0.2], [0.3, 0.4]])
        names = (
            "density",
            "log_density",
            "cdf",
            "survival",
            "log_survival",
            "quantile",
            "upper_quantile",
            "signed_cdf",
        )
        for method in (getattr(ratio, name) for name in names):
            for number in (0.3, 1, np.float64(0.3), np.float32(0.3), np.int64(1)):
                assert type(method(number)) is float
            values = method(grid)
            assert values.shape == grid.shape
            assert values[1, 0] == method(0.3)

    @for_each("k", [1, 0, -3, 2.5, 1e9, "10"])
    def test_number_of_parameters_is_checked(self, k):
        with pytest.raises((ValueError, TypeError), match="number_of_parameters"):
            RandomCorruptionRatio(k)

    @for_each("probability", [-0.1, 1.1, math.nan, 95])
    def test_probabilities_are_checked(self, probability):
        with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
            RandomCorruptionRatio(10).quantile(probability)

    def test_without_scipy_the_error_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy", None)
        ratio = RandomCorruptionRatio(10)
        with pytest.raises(ImportError, match=r"SciPy is needed for .*pip install 'hf-parcor\[statistics\]'"):
            ratio.cdf(0.1)


def test_nothing_is_imported_from_scipy_or_numpy_on_import():
    files = [*Path(hf_parcor.theory.__file__).parent.glob("*.py"), Path(hf_parcor.statistics.__file__)]
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # at the top, not in `if TYPE_CHECKING`
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in {"scipy", "numpy"}], file.name


THEORETICAL = {0.9: 1.5e-5, 0.95: 1.8e-5, 0.995: 2.5e-5}
EMPIRICAL = {0.9: 4.0e-5, 0.95: 4.8e-5, 0.995: 7.0e-5}


class TestTable3OfPaper1:
    """α(p) = εG · quantile(p) with εG = 0.044 on a language model of unstated size."""

    @staticmethod
    def parameters_of_the_language_model():
        """Three LSTM layers 400 → 1150 → 1150 → 400 with two biases a gate, 10,000 words, tied embeddings."""
        layers = [(400, 1150), (1150, 1150), (1150, 400)]
        return sum(4 * out * (size + out + 2) for size, out in layers) + 10_000 * 400 + 10_000

    def test_theoretical_row_is_reproduced(self):
        assert self.parameters_of_the_language_model() == 24_221_600
        ratio = RandomCorruptionRatio(24_221_600)
        for p, alpha in THEORETICAL.items():
            assert round(0.044 * ratio.quantile(p), 6) == pytest.approx(alpha)

    def test_theoretical_row_tells_between_which_numbers_of_parameters_there_are(self):
        def reproduced(k):
            ratio = RandomCorruptionRatio(k)
            return all(round(0.044 * ratio.quantile(p), 6) == pytest.approx(alpha) for p, alpha in THEORETICAL.items())

        assert [k for k in range(23_000_000, 25_000_000, 100_000) if reproduced(k)] == [
            *range(23_500_000, 24_300_000, 100_000)
        ]

    def test_empirical_row_is_wider_than_the_first_order_explains(self):
        for p in THEORETICAL:
            expected = 0.044 * RandomCorruptionRatio(24_221_600).quantile(p)
            assert EMPIRICAL[p] / expected == pytest.approx(2.75, abs=0.05)


class TestIndicators:
    def test_maximum_is_reached_by_the_gradient_direction(self):
        gradient = np.array([3.0, -4.0, 12.0])
        corruption = 0.1 * gradient / np.linalg.norm(gradient)
        assert corruption @ gradient == pytest.approx(first_order_maximum_loss_change(0.1, np.linalg.norm(gradient)))

    def test_average_over_sphere_and_gaussian_and_ball(self):
        generator = np.random.default_rng(0)
        matrix = generator.standard_normal((5, 5))
        hessian, epsilon = matrix + matrix.T + 4 * np.eye(5), 0.3
        expected = second_order_average_loss_change(epsilon, float(np.trace(hessian)), 5)
        sphere = epsilon * uniform_on_sphere(generator, 200_000, 5)
        gaussian = epsilon / math.sqrt(5) * generator.standard_normal((200_000, 5))
        ball = sphere * generator.random((200_000, 1)) ** (1 / 5)

        def average(corruptions):
            return np.einsum("ni,ij,nj->n", corruptions, hessian, corruptions).mean() / 2

        assert average(sphere) == pytest.approx(expected, rel=0.02)
        assert average(gaussian) == pytest.approx(expected, rel=0.02)
        assert average(ball) == pytest.approx(expected * 5 / 7, rel=0.02)

    def test_negative_curvature_lowers_the_average(self):
        assert second_order_average_loss_change(1.0, -8.0, 4) == -1.0

    def test_one_parameter_moves_by_epsilon_either_way(self):
        assert second_order_average_loss_change(0.5, 8.0, 1) == 0.5 * 8 * 0.5**2

    @for_each(
        "call",
        [
            lambda: first_order_maximum_loss_change(-1.0, 1.0),
            lambda: first_order_maximum_loss_change(1.0, math.nan),
            lambda: second_order_average_loss_change(-1.0, 1.0, 3),
            lambda: second_order_average_loss_change(1.0, math.inf, 3),
            lambda: second_order_average_loss_change(1.0, 1.0, 0),
        ],
    )
    def test_arguments_are_checked(self, call):
        with pytest.raises(ValueError, match=r"expected .*, got"):
            call()


class TestErrorBound:
    @for_each(("p", "exponent"), [(1, 0), (2, -0.5), (4, 0), (math.inf, 0.5), (1.5, -1 / 3), (8, 0.25)])
    def test_exponent(self, p, exponent):
        assert relative_error_exponent(p) == pytest.approx(exponent)

    @given(st.floats(1, 1e6))
    def test_exponent_is_the_printed_formula_and_least_at_two(self, p):
        assert relative_error_exponent(p) == pytest.approx(max((p - 4) / (2 * p), (1 - p) / p), abs=1e-12)
        assert relative_error_exponent(p) >= relative_error_exponent(2)

    @given(p=st.sampled_from(NORM_ORDERS), n=st.integers(1, 10**6))
    def test_exponent_follows_from_lemma_1(self, p, n):
        """β_p² β_q / √n = n^g(p) with β_r = max{1, n^(1/2 − 1/r)} and 1/p + 1/q = 1 (Eq. 51)."""

        def beta(reciprocal):
            return max(1.0, n ** (0.5 - reciprocal))

        assert beta(1 / p) ** 2 * beta(1 - 1 / p) / math.sqrt(n) == pytest.approx(n ** relative_error_exponent(p))

    @settings(max_examples=60)
    @given(
        seed=st.integers(0, 10**6),
        k=st.integers(1, 5),
        p=st.sampled_from([1.0, 2.0, math.inf]),
        epsilon=st.floats(1e-3, 3),
    )
    def test_half_of_it_bounds_the_true_error_of_convex_quadratics(self, seed, k, p, epsilon):
        """A convex loss is largest on extreme points of S: signs (p = ∞), axes (p = 1), a sampled sphere (p = 2)."""
        generator = np.random.default_rng(seed)
        n = int(generator.integers(1, k + 1))
        gradient, matrix = generator.standard_normal(k), generator.standard_normal((k, k))
        hessian = matrix @ matrix.T

        def loss_change(corruptions):
            return corruptions @ gradient + 0.5 * np.einsum("ni,ij,nj->n", corruptions, hessian, corruptions)

        largest = np.argsort(-np.abs(gradient))
        if p == 1:
            candidates = np.concatenate([np.eye(k), -np.eye(k)])
            best_linear = np.sign(gradient[largest[0]]) * np.eye(k)[largest[0]]
        else:
            signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
            directions = signs if p == math.inf else uniform_on_sphere(generator, 2000, n)
            subsets = list(itertools.combinations(range(k), n))
            candidates = np.zeros((len(subsets), len(directions), k))
            for block, subset in zip(candidates, subsets, strict=True):
                block[:, subset] = directions
            candidates = candidates.reshape(-1, k)
            best_linear = np.zeros(k)
            best_linear[largest[:n]] = gradient[largest[:n]]
            best_linear = np.sign(best_linear) if p == math.inf else best_linear / np.linalg.norm(best_linear)
        error = loss_change(epsilon * candidates).max() / loss_change(epsilon * best_linear[None])[0] - 1
        bound = gradient_corruption_relative_error(
            epsilon,
            float(np.linalg.norm(gradient)),
            float(np.linalg.eigvalsh(hessian)[-1]),
            k,
            p=p,
            top_n=n,
        )
        assert error <= bound / 2 + 1e-12

    def test_all_parameters_under_the_euclidean_norm(self):
        """√k cancels: L ε / G."""
        assert gradient_corruption_relative_error(0.1, 2.0, 4.0, 12345) == pytest.approx(0.2)
        assert gradient_corruption_relative_error(0.1, 2.0, 4.0, 12345, top_n=12345) == pytest.approx(0.2)

    def test_billions_of_parameters_under_the_maximum_norm(self):
        assert gradient_corruption_relative_error(1e-9, 1.0, 1.0, 10**9, p=math.inf) == pytest.approx(1.0)

    @for_each(
        "change",
        [
            {"p": 0.5},
            {"p": math.nan},
            {"gradient_norm": 0.0},
            {"epsilon": -1.0},
            {"smoothness": math.inf},
            {"number_of_parameters": 0},
            {"top_n": 0},
            {"top_n": 11},
            {"top_n": 2.0},
        ],
    )
    def test_arguments_are_checked(self, change):
        arguments = {"epsilon": 0.1, "gradient_norm": 1.0, "smoothness": 1.0, "number_of_parameters": 10}
        with pytest.raises(
            (ValueError, TypeError), match=rf"\b{next(iter(change))}\b.*expected|expected.*\b{next(iter(change))}\b"
        ):
            gradient_corruption_relative_error(**{**arguments, **change})


class TestGeneralization:
    @given(seed=st.integers(0, 10**6), k=st.integers(1, 30), p=st.sampled_from(NORM_ORDERS))
    def test_norm_ratio_is_the_largest_ratio(self, seed, k, p):
        vector = np.random.default_rng(seed).standard_normal(k)
        beta = norm_ratio(p, k)
        assert np.linalg.norm(vector, p) <= beta * np.linalg.norm(vector) * (1 + 1e-12)
        extreme = np.ones(k) if p < 2 else np.eye(k)[0]
        assert np.linalg.norm(extreme, p) == pytest.approx(beta * np.linalg.norm(extreme))

    @given(
        epsilon=st.floats(1e-3, 10),
        weight_norm=st.floats(0, 100),
        deviation=st.floats(1e-3, 10),
        k=st.integers(1, 10**7),
        p=st.sampled_from(NORM_ORDERS),
    )
    def test_complexity_is_the_printed_formula(self, epsilon, weight_norm, deviation, k, p):
        with mpmath.workdps(40):
            variance, square = mpmath.mpf(deviation) ** 2, mpmath.mpf(norm_ratio(p, k)) ** 2
            expected = (
                (mpmath.mpf(epsilon) ** 2 + square * mpmath.mpf(weight_norm) ** 2) / (2 * square * variance)
                - mpmath.mpf(k) / 2
                + mpmath.mpf(k) / 2 * mpmath.log(k * variance * square / mpmath.mpf(epsilon) ** 2)
            )
        computed = generalization_complexity(epsilon, weight_norm, deviation, k, p=p)
        assert computed == pytest.approx(float(expected), rel=1e-9, abs=k * 1e-14)
        assert computed >= 0
        if p >= 2:
            assert computed == generalization_complexity(epsilon, weight_norm, deviation, k)

    def test_complexity_is_the_divergence_of_two_gaussians(self):
        """KL(N(w, (ε²/k) I) ‖ N(0, σ² I)) by sampling log Q − log P."""
        generator = np.random.default_rng(0)
        weights, epsilon, deviation, k = generator.standard_normal(6), 0.8, 0.9, 6
        posterior = weights + epsilon / math.sqrt(k) * generator.standard_normal((100_000, k))
        difference = stats.norm(weights, epsilon / math.sqrt(k)).logpdf(posterior) - stats.norm(0, deviation).logpdf(
            posterior
        )
        expected = difference.sum(axis=1).mean()
        norm = float(np.linalg.norm(weights))
        assert generalization_complexity(epsilon, norm, deviation, k) == pytest.approx(expected, rel=0.01)

    @for_each("p", [1.0, 2.0, math.inf])
    def test_smallest_complexity_over_the_prior(self, p):
        epsilon, weight_norm, k = 0.5, 30.0, 400
        radius = epsilon / norm_ratio(p, k)
        best = math.sqrt((radius**2 + weight_norm**2) / k)
        smallest = k / 2 * math.log(1 + (weight_norm / radius) ** 2)
        assert generalization_complexity(epsilon, weight_norm, best, k, p=p) == pytest.approx(smallest)
        for factor in (0.9, 1.1):
            assert generalization_complexity(epsilon, weight_norm, factor * best, k, p=p) > smallest

    def test_complexity_of_prior_equal_to_posterior_is_zero(self):
        assert generalization_complexity(2.0, 0.0, 1.0, 4) == 0

    def test_remainder(self):
        assert generalization_remainder(10.0, 101, 0.05) == pytest.approx(math.sqrt((10 + math.log(101 / 0.05)) / 200))
        assert generalization_remainder(0.0, 2, 0.5) == pytest.approx(math.sqrt(math.log(4) / 2))

    @for_each(
        "call",
        [
            lambda: norm_ratio(0.9, 3),
            lambda: norm_ratio(2, 0),
            lambda: generalization_complexity(0.0, 1.0, 1.0, 3),
            lambda: generalization_complexity(1.0, -1.0, 1.0, 3),
            lambda: generalization_complexity(1.0, 1.0, 0.0, 3),
            lambda: generalization_remainder(-1.0, 10, 0.05),
            lambda: generalization_remainder(1.0, 1, 0.05),
            lambda: generalization_remainder(1.0, 10, 0.0),
            lambda: generalization_remainder(1.0, 10, 1.0),
            lambda: generalization_remainder(1.0, 10, 5),
            lambda: generalization_remainder(1.0, 10, "0.05"),
        ],
    )
    def test_arguments_are_checked(self, call):
        with pytest.raises((ValueError, TypeError), match=r"expected .*, got"):
            call()
