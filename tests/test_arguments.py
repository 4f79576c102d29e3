"""Every number that a formula takes is checked once, here."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from for_each import for_each

from hf_parcor.arguments import check_count, check_norm_order, check_radius, check_real, check_top_n

NOT_NUMBERS = [None, "2", True, False, [2.0], torch.tensor(2.0), 1j, np.array([2.0])]


@for_each("check", [check_norm_order, lambda value: check_radius("epsilon", value)])
@for_each("value", NOT_NUMBERS)
def test_what_is_no_number_is_a_type_error(check, value) -> None:
    with pytest.raises(TypeError, match=r"expected .*, got .* of type .*"):
        check(value)


@for_each("value", [1, 1.0, 2, 1.5, 1e300, math.inf, np.float32(2), np.int64(3), Fraction(3, 2)])
def test_norm_orders(value) -> None:
    order = check_norm_order(value)
    assert type(order) is float
    assert order == float(value)


@for_each("value", [0.999, 0, -1, -math.inf])
def test_norm_orders_below_one(value) -> None:
    with pytest.raises(ValueError, match=r"p: expected 1 <= p <= inf, got .*"):
        check_norm_order(value)


@for_each("check", [check_norm_order, lambda value: check_radius("epsilon", value)])
def test_nan_is_a_value_error(check) -> None:
    with pytest.raises(ValueError, match=r"got NaN; pass a number"):
        check(math.nan)


@for_each("value", [0, 0.0, -0.0, 1e-45, 3, np.float32(0.5), 1e38])
def test_radii(value) -> None:
    radius = check_radius("epsilon", value)
    assert type(radius) is float
    assert radius == float(value)


@for_each("value", [-1e-45, -1, math.inf, -math.inf])
def test_radii_out_of_range(value) -> None:
    with pytest.raises(ValueError, match=r"alpha: expected 0 <= alpha < inf, got .*"):
        check_radius("alpha", value)


@for_each("value", [1, 10**30, np.int64(3), np.uint8(7)])
def test_counts(value) -> None:
    count = check_count("n", value)
    assert type(count) is int
    assert count == value


@for_each("value", [1.0, 1.5, math.nan, None, "1", True, torch.tensor(1)])
def test_counts_that_are_not_whole(value) -> None:
    with pytest.raises(TypeError, match=r"n: expected a whole number >= 1, got .*"):
        check_count("n", value)


@for_each(("value", "minimum"), [(0, 1), (-3, 1), (1, 2), (-1, 0)])
def test_counts_that_are_too_small(value, minimum) -> None:
    with pytest.raises(ValueError, match=rf"n: expected a whole number >= {minimum}, got {value}"):
        check_count("n", value, minimum)


def test_top_n_may_be_none() -> None:
    assert check_top_n(None) is None
    assert type(check_top_n(np.int64(3))) is int
    with pytest.raises(ValueError, match=r"top_n: expected a whole number >= 1, got 0"):
        check_top_n(0)


def test_the_name_and_the_expectation_are_said() -> None:
    with pytest.raises(ValueError, match=r"^rate: expected 0 <= rate <= 1, got NaN"):
        check_real("rate", math.nan, "0 <= rate <= 1")
