"""What the formulas accept: each function returns its argument or raises `ValueError`."""

import math
import operator


def finite(name: str, value: float) -> float:
    """Return `value` if it is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite {name}, got {value}; check what it was computed from")
    return value


def positive(name: str, value: float) -> float:
    """Return `value` if it is finite and above zero."""
    if not 0 < value < math.inf:
        raise ValueError(f"expected a finite {name} > 0, got {value}; check what it was computed from")
    return value


def not_negative(name: str, value: float) -> float:
    """Return `value` if it is finite and at least zero."""
    if not 0 <= value < math.inf:
        raise ValueError(f"expected a finite {name} >= 0, got {value}; check what it was computed from")
    return value


def count(name: str, value: int, *, at_least: int) -> int:
    """Return `value` as an `int` if it is a whole number not below `at_least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"expected a whole number for {name}, got {value!r}; convert it with int()") from None
    if number < at_least:
        raise ValueError(f"expected {name} >= {at_least}, got {number}; the formula does not hold below")
    return number


def norm_order(p: float) -> float:
    """Return `p` if there is an L_p norm, `1 <= p <= inf`."""
    if not p >= 1:
        raise ValueError(f"expected p in [1, inf], got {p}; below 1 there is no norm, and math.inf is allowed")
    return p
