"""Checks of numbers that callers hand in: each returns its argument, or says expected, got, and what to do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


def known_elsewhere_as(**others: str) -> Callable[[type[_Kind]], type[_Kind]]:
    """Return a decorator that lets a class say what it calls an argument that other libraries call otherwise.

    Args:
        **others: By the other name, what to write here.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> CorruptionConstraint(rho=0.05)
        Traceback (most recent call last):
        ...
        TypeError: rho: expected epsilon, the same by the papers' name, got rho=0.05; write epsilon=0.05
    """

    def decorate(kind: type[_Kind]) -> type[_Kind]:
        build: Any = kind.__init__

        @functools.wraps(build)
        def build_or_say(self: _Kind, *positional: Any, **named: Any) -> None:
            for name, instead in others.items():
                if name in named:
                    got = f"{name}={named[name]!r}; write {instead.format(named[name])}"
                    raise TypeError(f"{name}: expected epsilon, the same by the papers' name, got {got}")
            build(self, *positional, **named)

        kind.__init__ = build_or_say  # type: ignore[assignment, method-assign]
        return kind

    return decorate


def check_real(name: str, value: object, expected: str) -> float:
    """Return `value` as a float; booleans and non-numbers are a `TypeError`, NaN is a `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}; pass a number")
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"{name}: expected {expected}, got NaN; pass a number")
    return number


def check_norm_order(p: object) -> float:
    """Return the order of a norm, `1 ≤ p ≤ ∞`.

    Examples:
        >>> check_norm_order(2)
        2.0
        >>> check_norm_order(0.5)
        Traceback (most recent call last):
        ...
        ValueError: p: expected 1 <= p <= inf, got 0.5; below 1 the L_p ball is not convex: pass 2 or float("inf")
    """
    order = check_real("p", p, "1 <= p <= inf")
    if order < 1:
        raise ValueError(
            f'p: expected 1 <= p <= inf, got {order:g}; below 1 the L_p ball is not convex: pass 2 or float("inf")'
        )
    return order


def check_not_negative(name: str, value: object, advice: str = "check what it was computed from") -> float:
    """Return a number, `0 ≤ value < ∞`."""
    number = check_real(name, value, f"0 <= {name} < inf")
    if number < 0 or math.isinf(number):
        raise ValueError(f"{name}: expected 0 <= {name} < inf, got {number:g}; {advice}")
    return number


def check_radius(name: str, value: object) -> float:
    """Return a radius, `0 ≤ value < ∞`."""
    return check_not_negative(name, value, "pass 0 for no corruption")


def check_share(name: str, value: object, advice: str) -> float:
    """Return a number, `0 ≤ value ≤ 1`.

    Examples:
        >>> check_share("rate", 2, "it is a probability")
        Traceback (most recent call last):
        ...
        ValueError: rate: expected 0 <= rate <= 1, got 2; it is a probability
    """
    number = check_real(name, value, f"0 <= {name} <= 1")
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected 0 <= {name} <= 1, got {number:g}; {advice}")
    return number


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return a whole number that is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name}: expected a whole number >= {minimum}, got {value!r} of type {type(value).__name__}; pass an int"
        )
    count = int(value)
    if count < minimum:
        raise ValueError(f"{name}: expected a whole number >= {minimum}, got {count}; pass {minimum} or more")
    return count


def check_top_n(top_n: object) -> int | None:
    """Return how many entries may be non-zero, at least 1; None for all."""
    return None if top_n is None else check_count("top_n", top_n)


def check_finite(name: str, value: object) -> float:
    """Return a finite number."""
    number = check_real(name, value, f"a finite {name}")
    if math.isinf(number):
        raise ValueError(f"{name}: expected a finite number, got {number:g}; check what it was computed from")
    return number


def check_positive(name: str, value: object) -> float:
    """Return a number, `0 < value < ∞`."""
    number = check_finite(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected 0 < {name} < inf, got {number:g}; check what it was computed from")
    return number


def check_choice(name: str, value: object, known: Collection[str]) -> str:
    """Return a word that is one of those known.

    Examples:
        >>> check_choice("per", "row", ("tensor", "channel"))
        Traceback (most recent call last):
        ...
        ValueError: per: expected one of tensor, channel, got 'row'; choose one of these
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(known)}, got {value!r}; pass a string")
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}; choose one of these")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}; pass one of them")
    return value
