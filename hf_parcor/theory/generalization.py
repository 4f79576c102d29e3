"""Theorem 3: the indicators bound the generalization error, up to a PAC-Bayes remainder."""

import math

from hf_parcor.arguments import check_count, check_norm_order, check_not_negative, check_positive, check_real


def norm_ratio(p: float, number_of_parameters: int) -> float:
    r"""Return β_p, the largest ratio between the L_p and the L_2 norm of a vector of length k.

    ::

        β_p = max_{x ≠ 0} ‖x‖_p / ‖x‖₂ = max{1, k^(1/p − 1/2)},    1 <= p <= ∞

    It is 1 for every p >= 2 and √k for p = 1.

    Source: paper 2, Lemma 3. Slips: the lemma says p > 1, and is also true for p = 1. Lemma 1 of the same paper gives
    the name β_p to another number, the largest ratio `‖x‖₂ / ‖x‖_p = max{1, n^(1/2 − 1/p)}` over n-sparse x.

    Args:
        p: Order of the norm; `math.inf` is allowed.
        number_of_parameters: k >= 1.

    Returns:
        β_p >= 1, without unit.

    Raises:
        ValueError: p or k is below 1.

    Examples:
        >>> [norm_ratio(p, 10_000) for p in (1, 2, math.inf)]
        [100.0, 1.0, 1.0]
    """
    k = check_count("number_of_parameters", number_of_parameters, minimum=1)
    return max(1.0, math.pow(k, 1 / check_norm_order(p) - 0.5))


def generalization_complexity(
    epsilon: float, weight_norm: float, prior_deviation: float, number_of_parameters: int, *, p: float = 2.0
) -> float:
    r"""Return the complexity of Theorem 3: C for p = 2, C₁ for any other norm.

    ::

        C₁ = (ε² + β_p² ‖w‖₂²) / 2β_p²σ² − k/2 + (k/2) log(k σ² β_p² / ε²) = KL(Q ‖ P)
        Q = N(w, (ε²/β_p²k) I),    P = N(0, σ² I),    β_p = max{1, k^(1/p − 1/2)}

    With p = 2 (and any larger p) β_p = 1 and this is the paper's C. Being a divergence it is never negative. Its
    smallest value over σ is (k/2) log(1 + β_p² ‖w‖₂²/ε²), at kσ² = ε²/β_p² + ‖w‖₂².

    Source: paper 2, Theorem 3 after Eq. 25 and 26, Eq. D.36 and D.46; both are right. Slips: the prior is printed
    `N(0, σ²)` in D.36 and means `N(0, σ² I)`; the appendix proves Theorem 3 under the name "Theorem 4".

    Args:
        epsilon: Radius ε > 0 of the corruption in the L_p norm, in the units of the parameters.
        weight_norm: ‖w‖₂ >= 0, in the same units.
        prior_deviation: σ > 0 of the prior over each parameter, in the same units; it must be chosen without
            looking at the training set.
        number_of_parameters: k >= 1.
        p: Order of the norm; `math.inf` is allowed.

    Returns:
        C or C₁ >= 0, in nats.

    Raises:
        ValueError: A number is out of its range.

    Examples:
        >>> round(generalization_complexity(1.0, weight_norm=10.0, prior_deviation=0.1, number_of_parameters=1000), 3)
        5701.293
        >>> round(generalization_complexity(1.0, 10.0, 0.1, 1000, p=1), 3)
        9105.22
    """
    radius = check_positive("epsilon", epsilon) / norm_ratio(p, number_of_parameters)
    check_positive("prior_deviation", prior_deviation)
    check_not_negative("weight_norm", weight_norm)
    variance_ratio = (radius / prior_deviation) ** 2 / number_of_parameters
    spread = max(0.0, variance_ratio - 1 - math.log(variance_ratio))  # zero in theory, not after rounding, at ratio 1
    return 0.5 * (number_of_parameters * spread + (weight_norm / prior_deviation) ** 2)


def generalization_remainder(complexity: float, number_of_examples: int, failure_probability: float) -> float:
    r"""Return the remainder R (or R₁) of Theorem 3, without its o(ε²).

    With probability at least 1 − δ over the draw of the training set D from the distribution D₁ ::

        L(w, D₁) <= L(w, D) + Δ_ave L(w, {‖a‖₂ = ε}, D) + R      with C  (Eq. 25)
        L(w, D₁) <= L(w, D) + Δ_max L(w, {‖a‖_p <= ε}, D) + R₁    with C₁ (Eq. 26)
        R = √((C + log(|D|/δ)) / 2(|D| − 1)) + o(ε²)

    The loss is the error rate, between 0 and 1, so the bound says nothing where R >= 1, that is from C of about 2|D|
    on. C is at least (k/2) log(1 + ‖w‖₂²/ε²): where k is far above |D|, as in every Transformer, the bound is empty
    for any small ε, and only its trend (flatter is better) is of use. The proof also applies Jensen's inequality to
    Gaussian noise, which reaches the whole space, while the theorem asks for convexity only near w; and it takes the
    Hessian of an error rate, which is piecewise constant.

    Source: paper 2, Eq. 25, 26, D.35 and D.43 (the PAC-Bayes bound of McAllester).

    Args:
        complexity: C or C₁ from `generalization_complexity`, in nats.
        number_of_examples: |D| >= 2, examples in the training set.
        failure_probability: δ, between 0 and 1.

    Returns:
        The square root alone, in the units of the error rate.

    Raises:
        ValueError: A number is out of its range.

    Examples:
        >>> round(generalization_remainder(complexity=5701.3, number_of_examples=50_000, failure_probability=0.05), 4)
        0.2391
    """
    check_not_negative("complexity", complexity)
    examples = check_count("number_of_examples", number_of_examples, minimum=2)
    if not 0 < check_real("failure_probability", failure_probability, "0 < failure_probability < 1") < 1:
        raise ValueError(f"expected 0 < failure_probability < 1, got {failure_probability}; 0.05 is usual")
    return math.sqrt((complexity + math.log(examples / failure_probability)) / (2 * (examples - 1)))
