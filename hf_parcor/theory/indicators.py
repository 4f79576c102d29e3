"""The indicators of Theorem 1 in closed form: to first order in ε for the worst case, to second for the average."""

from hf_parcor.arguments import check_count, check_finite, check_not_negative


def first_order_maximum_loss_change(epsilon: float, gradient_norm: float) -> float:
    r"""Return the first-order estimate of the largest loss change on the sphere of radius ε.

    ::

        Δ_max L(w, S, D) = max_{‖a‖₂ = ε} aᵀg + o(ε) = ε G + o(ε),    G = ‖g‖₂

    Source: paper 1, Eq. 6; paper 2, Eq. 7. For the general constraint `‖a‖_p <= ε, ‖a‖₀ <= n` the same product
    holds with `G` replaced by `‖top_n(g)‖_{p/(p−1)}` (paper 1, Eq. 11): pass that norm.

    Args:
        epsilon: Radius ε >= 0 of the corruption, in the units of the parameters.
        gradient_norm: G >= 0, in units of the loss per unit of parameter.

    Returns:
        ε G, in the units of the loss.

    Raises:
        ValueError: An argument is negative or not finite.

    Examples:
        >>> first_order_maximum_loss_change(epsilon=5e-4, gradient_norm=88.0)  # paper 1, Table 3
        0.044
    """
    return check_not_negative("epsilon", epsilon) * check_not_negative("gradient_norm", gradient_norm)


def second_order_average_loss_change(epsilon: float, hessian_trace: float, number_of_parameters: int) -> float:
    r"""Return the second-order estimate of the average loss change on the sphere of radius ε.

    ::

        Δ_ave L(w, S, D) = E_{‖a‖₂ = ε}[aᵀg + ½ aᵀHa] + o(ε²) = tr(H) ε² / 2k + o(ε²)

    The first-order part averages to zero, since a and −a are equally likely; `E[a aᵀ] = (ε²/k) I` gives the rest.
    The same value holds for Gaussian noise `a ~ N(0, (ε²/k) I)` (paper 2, Eq. D.40).

    Source: paper 2, Eq. 6 and D.17. Slips: paper 1, Eq. 7 gives only the order, `O(tr(H) ε²/k)`; paper 2 defines
    S as the ball `‖a‖ <= ε` (Definition 1) while its Theorem 1 means the sphere `‖a‖ = ε`: uniformly in the
    *ball* the average is `tr(H) ε² / 2(k + 2)`.

    Args:
        epsilon: Radius ε >= 0, in the units of the parameters.
        hessian_trace: tr(H) over the k parameters; negative where the loss curves down on average.
        number_of_parameters: k >= 1.

    Returns:
        tr(H) ε² / 2k, in the units of the loss, with the sign of the trace.

    Raises:
        ValueError: ε is negative, k is below 1, or a number is not finite.

    Examples:
        >>> second_order_average_loss_change(epsilon=0.5, hessian_trace=1200.0, number_of_parameters=10_000)
        0.015
    """
    check_not_negative("epsilon", epsilon)
    k = check_count("number_of_parameters", number_of_parameters, minimum=1)
    return check_finite("hessian_trace", hessian_trace) * epsilon**2 / (2 * k)
