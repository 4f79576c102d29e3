"""Theorem 2: the gradient-based corruption is nearly the worst one, with an error that vanishes with ε."""

from __future__ import annotations

import math

from hf_parcor.arguments import check_count, check_norm_order, check_not_negative, check_positive


def relative_error_exponent(p: float) -> float:
    r"""Return the exponent g(p) of the number of corrupted parameters in Theorem 2.

    ::

        g(p) = max{(p − 4)/2p, (1 − p)/p} = max{1/2 − 2/p, 1/p − 1},    1 <= p <= ∞

    The two branches meet at p = 2, where g is smallest: g(1) = 0, g(2) = −1/2, g(4) = 0, g(∞) = 1/2. So between
    p = 1 and p = 4 the bound gets better the more of the k parameters may be corrupted, and above p = 4 worse.

    Source: paper 1, Eq. 12 and 52; paper 2, Eq. 12 and D.32.

    Args:
        p: Order of the norm that bounds the corruption; `math.inf` is allowed.

    Returns:
        g(p), between −1/2 and 1/2, without unit.

    Raises:
        ValueError: p is below 1.

    Examples:
        >>> [relative_error_exponent(p) for p in (1, 2, 4, math.inf)]
        [0.0, -0.5, 0.0, 0.5]
    """
    check_norm_order(p)
    return max(0.5 - 2 / p, 1 / p - 1)


def gradient_corruption_relative_error(
    epsilon: float,
    gradient_norm: float,
    smoothness: float,
    number_of_parameters: int,
    *,
    p: float = 2.0,
    top_n: int | None = None,
) -> float:
    r"""Return the term inside O(·) of Theorem 2, the relative error of the gradient-based corruption.

    For a loss that is convex and L-smooth on w + S, `S = {a : ‖a‖_p <= ε, ‖a‖₀ <= n}`, the best corruption
    a* and the gradient-based one â satisfy ::

        ΔL(w, a*, D) / ΔL(w, â, D) = 1 + O(L n^g(p) √k ε / G),    G = ‖g‖₂ > 0

    The returned value is `L n^g(p) √k ε / G`, as the theorem states it. **Half of it is a true upper bound** on the
    ratio minus one, not only an order (paper 1, Eq. 52), under the theorem's two assumptions. Real networks are not
    convex around w and their L is seldom known: read it as how the error scales.

    Source: paper 1, Eq. 12 and 45–52; paper 2, Eq. 12 and D.25–D.32. Slips, none of which changes the result: the
    proofs print `‖top_n(g)‖₂ >= (n/k) ‖g‖₂` and rightly go on with the stronger `√(n/k)`; paper 1, Eq. 46 prints
    the exponent 1/r where 1/2 is meant; Lemma 1 says r > 1, and is needed and true for r = 1; "the same order
    infinitesimal" is too weak, the ratio tends to one.

    Args:
        epsilon: Radius ε >= 0 of the corruption in the L_p norm, in the units of the parameters.
        gradient_norm: G > 0, always the L_2 norm of the whole gradient over the k parameters.
        smoothness: L >= 0, a Lipschitz constant of the gradient (for a quadratic: the largest eigenvalue of H).
        number_of_parameters: k >= 1.
        p: Order of the norm; `math.inf` is allowed.
        top_n: n, how many parameters may change, 1 <= n <= k; all of them when None.

    Returns:
        L n^g(p) √k ε / G, without unit.

    Raises:
        ValueError: A number is out of its range; for G = 0 the ratio has no first-order part.

    Examples:
        >>> gradient_corruption_relative_error(0.01, gradient_norm=2.0, smoothness=10.0, number_of_parameters=10_000)
        0.05
        >>> gradient_corruption_relative_error(1e-4, 2.0, 10.0, 10_000, p=math.inf, top_n=100)
        0.5
    """
    check_not_negative("epsilon", epsilon)
    check_positive("gradient_norm", gradient_norm)
    check_not_negative("smoothness", smoothness)
    k = check_count("number_of_parameters", number_of_parameters, minimum=1)
    n = k if top_n is None else check_count("top_n", top_n, minimum=1)
    if n > k:
        raise ValueError(f"expected top_n <= number_of_parameters = {k}, got {n}; pass None to corrupt all of them")
    return smoothness * math.pow(n, relative_error_exponent(p)) * math.sqrt(k) * epsilon / gradient_norm
