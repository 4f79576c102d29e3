"""Many tests at once."""

from collections.abc import Sequence


def holm_correction(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return the p-values adjusted for multiple comparisons by Holm's step-down method, in the order given.

    ::

        adjusted_(i) = max_{j <= i} min(1, (m − j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    Rejecting where the adjusted value is below a level keeps the chance of *any* false rejection below that level,
    however the tests depend on each other. (`scipy.stats.false_discovery_control` bounds another, weaker quantity.)

    Raises:
        ValueError: A p-value is not between 0 and 1.

    Examples:
        >>> [round(p, 3) for p in holm_correction([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"expected p-values in [0, 1], got {p}; pass TTest.p_value, not t")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)
