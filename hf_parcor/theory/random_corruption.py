"""Theorem 1: how much of the worst loss change a random corruption brings about."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hf_parcor.arguments import check_count
from hf_parcor.statistics import scipy_module

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Numbers = TypeVar("Numbers", float, "NDArray[np.float64]")

_PURPOSE = "the distribution of random corruptions"
_NODES = 40  # of the quadrature
_SMALL = -600.0  # from this logarithm of a probability on it is integrated; doubles underflow at −745


@dataclass(frozen=True)
class RandomCorruptionRatio:
    r"""The distribution of η, the loss change of a random corruption over that of the worst one.

    For a uniform on the sphere `‖a‖₂ = ε` in R^k and any gradient g with `G = ‖g‖₂ > 0`, to first order ::

        η = |aᵀg| / εG ∈ [0, 1],    η² ~ Beta(1/2, (k − 1)/2)

    η is also the absolute cosine between a random direction and the gradient. It does not depend on ε or g, its mean
    square is 1/k, and √k η tends to the absolute value of a standard normal variable.

    All methods take a number or a NumPy array and return the same; they need SciPy and hold up to k = 10⁹ and more.

    Source: paper 1, Theorem 1 (Eq. 8, 9, 18); paper 2, Theorem 1 (Eq. 8, 9). Both printed results are right, with
    F₁ read as the Gaussian ₂F₁ (it is also the usual name of another function, Appell's). Slips in the proofs:
    paper 1, Eq. 34 and paper 2, Eq. D.19 print `P(η <= x) = 2P(0 <= φ₁ <= arccos x)`, which is `P(η >= x)`; so
    the next integrals run over [0, α] where [α, π/2] is meant, and the last step (Eq. 37, D.22) silently puts it
    right. For k = 1 the formulas do not hold (η is always 1).

    Table 3 of paper 1 fits: its "theoretical" row follows from εG = 0.044 for k between 23.5 and 24.3 million, and
    the language model described there has 24 221 600 parameters if input and output embeddings are tied. The
    "empirical" row has nearly the same shape but is 2.7 times as wide, so the first order does not explain it.

    Args:
        number_of_parameters: k >= 2, the number of corrupted parameters.

    Raises:
        ValueError: k is not a whole number or below 2.
        ImportError: A method is called and SciPy is not installed.

    Examples:
        >>> ratio = RandomCorruptionRatio(24_221_600)
        >>> [round(0.044 * ratio.quantile(p) * 1e5, 2) for p in (0.9, 0.95, 0.995)]  # paper 1, Table 3: 1.5, 1.8, 2.5
        [1.47, 1.75, 2.51]
    """

    number_of_parameters: int

    def __post_init__(self) -> None:
        check_count("number_of_parameters", self.number_of_parameters, minimum=2)

    @property
    def _half(self) -> float:
        return (self.number_of_parameters - 1) / 2

    def log_density(self, x: Numbers) -> Numbers:
        r"""Return the logarithm of the density of η, finite where the density itself underflows.

        ::

            log p(x) = log 2 − log B((k−1)/2, 1/2) + (k−3)/2 · log(1 − x²),    0 <= x <= 1

        Examples:
            >>> round(RandomCorruptionRatio(1_000_000_000).log_density(0.5), 3)
            -143841025.659
        """
        special = scipy_module("special", _PURPOSE)

        def evaluate(values: Any) -> Any:
            import numpy as np

            inside = np.clip(values, 0, 1)
            exponent = (self.number_of_parameters - 3) / 2
            power = special.xlog1py(exponent, -inside) + special.xlog1py(exponent, inside)
            logarithm = math.log(2) - special.betaln(0.5, self._half) + power
            return np.where((values < 0) | (values > 1), -np.inf, logarithm)

        return _evaluate(evaluate, x)

    def density(self, x: Numbers) -> Numbers:
        r"""Return the density of η, zero outside [0, 1].

        ::

            p(x) = 2 Γ(k/2) / (√π Γ((k−1)/2)) · (1 − x²)^((k−3)/2)    (Eq. 8)

        Examples:
            >>> RandomCorruptionRatio(3).density(0.7)  # in three dimensions every η is equally likely
            1.0
        """

        def evaluate(values: Any) -> Any:
            import numpy as np

            return np.exp(self.log_density(values))

        return _evaluate(evaluate, x)

    def cdf(self, x: Numbers) -> Numbers:
        r"""Return P(η <= x), the distribution function.

        ::

            P(η <= x) = 2x ₂F₁(1/2, (3−k)/2; 3/2; x²) / B((k−1)/2, 1/2) = I_{x²}(1/2, (k−1)/2)    (Eq. 9)

        with I the regularized incomplete beta function, which is what is evaluated.

        Examples:
            >>> round(RandomCorruptionRatio(1000).cdf(0.05), 4)
            0.8861
        """
        special = scipy_module("special", _PURPOSE)
        return _evaluate(lambda values: special.betainc(0.5, self._half, _square(values)), x)

    def survival(self, x: Numbers) -> Numbers:
        r"""Return P(η > x), accurate also where it is tiny and `1 - cdf(x)` is rounded to zero.

        Examples:
            >>> f"{RandomCorruptionRatio(1000).survival(0.5):.2g}"  # reaching half of the worst case by chance
            '2e-64'
        """
        special = scipy_module("special", _PURPOSE)
        return _evaluate(lambda values: special.betaincc(0.5, self._half, _square(values)), x)

    def log_survival(self, x: Numbers) -> Numbers:
        r"""Return the logarithm of P(η > x), finite where the probability itself underflows.

        ::

            P(η > x) = y^h / (2h) · 2 / B(h, 1/2) · ∫_0^∞ e^(−t) / √(x² + y (1 − e^(−t/h))) dt,
            y = 1 − x²,   h = (k − 1)/2

        which Gauss–Laguerre quadrature takes to rounding, that far out.

        Examples:
            >>> f"{RandomCorruptionRatio(1_000_000_000).log_survival(0.5):.0f}"  # half of the worst case by chance
            '-143841046'
        """
        special = scipy_module("special", _PURPOSE)

        def evaluate(values: Any) -> Any:
            import numpy as np

            inside = np.clip(values, 0, 1)
            nodes, weights = np.polynomial.laguerre.laggauss(_NODES)
            rest = (1 - inside) * (1 + inside)
            root = np.sqrt(inside[..., None] ** 2 + rest[..., None] * -np.expm1(-nodes / self._half))
            power = special.xlog1py(self._half, -inside) + special.xlog1py(self._half, inside)
            with np.errstate(divide="ignore"):
                near = np.log(special.betaincc(0.5, self._half, inside**2))
                far = power - math.log(self._half) - special.betaln(0.5, self._half) + np.log((weights / root).sum(-1))
            return np.where(near > _SMALL, near, far)

        return _evaluate(evaluate, x)

    def quantile(self, probability: Numbers) -> Numbers:
        r"""Return the x with P(η <= x) = probability; α(p) of paper 1, Table 3 is εG times it.

        Raises:
            ValueError: A probability is outside [0, 1].

        Examples:
            >>> round(RandomCorruptionRatio(1_000_000_000).quantile(0.95) * 1_000_000_000**0.5, 4)
            1.96
        """
        special = scipy_module("special", _PURPOSE)
        return _evaluate(lambda values: special.betaincinv(0.5, self._half, _fractions(values)) ** 0.5, probability)

    def upper_quantile(self, probability: Numbers) -> Numbers:
        r"""Return the x with P(η > x) = probability, also where `1 - probability` is rounded to one.

        Raises:
            ValueError: A probability is outside [0, 1].

        Examples:
            >>> round(RandomCorruptionRatio(1_000_000_000).upper_quantile(1e-100) * 1_000_000_000**0.5, 3)
            21.306
        """
        special = scipy_module("special", _PURPOSE)
        return _evaluate(lambda values: special.betainccinv(0.5, self._half, _fractions(values)) ** 0.5, probability)

    def signed_cdf(self, x: Numbers) -> Numbers:
        r"""Return P(aᵀg / εG <= x), the distribution function without the absolute value.

        ::

            P(aᵀg/εG <= x) = ½ (1 + sgn(x) I_{x²}(1/2, (k−1)/2)),    −1 <= x <= 1

        It is symmetric about 0. For a Kolmogorov–Smirnov test: `scipy.stats.kstest(cosines, ratio.signed_cdf)`.

        Examples:
            >>> [RandomCorruptionRatio(3).signed_cdf(x) for x in (-0.5, 0.0, 0.5)]
            [0.25, 0.5, 0.75]
        """
        special = scipy_module("special", _PURPOSE)

        def evaluate(values: Any) -> Any:
            import numpy as np

            tail = 0.5 * special.betaincc(0.5, self._half, _square(np.abs(values)))
            return np.where(values > 0, 1 - tail, tail)

        return _evaluate(evaluate, x)


def _fractions(values: Any) -> Any:
    """Return probabilities as they are, or raise `ValueError`."""
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected probabilities in [0, 1], got {values}; pass fractions, not percent")
    return values


def _square(values: Any) -> Any:
    """Return x² with x brought into [0, 1], so that the distribution functions hold on the whole line."""
    return values.clip(0, 1) ** 2


def _evaluate(function: Callable[[Any], Any], x: Numbers) -> Numbers:
    """Apply a function of arrays; a number, also one of NumPy's, gives a `float`, all else a float64 array."""
    import numpy as np

    values = function(np.asarray(x, dtype=np.float64))
    return cast("Numbers", float(values) if isinstance(x, Real) else np.asarray(values))
