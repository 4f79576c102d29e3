"""Golden section against SciPy, and what it promises of its interval."""

from __future__ import annotations

import math

import pytest
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from hf_parcor.search import GOLDEN_RATIO, golden_section_maximum


def parabola(x, peak):
    return -((x - peak) ** 2)


def tent(x, peak):
    return -abs(x - peak) if x < peak else -3 * abs(x - peak)


@given(function=st.sampled_from([parabola, tent]), peak=st.floats(-2, 7), evaluations=st.integers(2, 25))
def test_finds_the_maximum_within_the_interval_it_leaves(function, peak, evaluations):
    low, high = -1.0, 5.0
    points = golden_section_maximum(lambda x: function(x, peak), low, high, evaluations)
    assert len(points) == len({x for x, _ in points}) == evaluations
    assert all(low <= x <= high for x, _ in points)
    best = max(points, key=lambda point: point[1])[0]
    reference = minimize_scalar(lambda x: -function(x, peak), bounds=(low, high), method="bounded").x
    left = (high - low) * GOLDEN_RATIO ** (evaluations - 1)
    assert abs(best - reference) <= left + 1e-5


def test_each_evaluation_shrinks_the_interval_by_the_golden_ratio():
    points = golden_section_maximum(lambda x: -x, 0.0, 1.0, 6)  # the maximum is at the lower end
    expected = [1 - GOLDEN_RATIO, *(GOLDEN_RATIO**k for k in (1, 3, 4, 5, 6))]
    assert [x for x, _ in points] == pytest.approx(expected)


def test_nan_is_worse_than_any_number():
    points = golden_section_maximum(lambda x: math.nan if x > 0.5 else -((x - 0.2) ** 2), 0.0, 1.0, 12)
    assert max((p for p in points if not math.isnan(p[1])), key=lambda p: p[1])[0] == pytest.approx(0.2, abs=0.01)


@for_each(
    ("low", "high", "evaluations", "says"),
    [
        (1.0, 1.0, 4, "expected finite low < high"),
        (0.0, math.inf, 4, "expected finite low < high"),
        (0.0, 1.0, 1, "evaluations: expected 2 or more, got 1"),
    ],
)
def test_bad_input(low, high, evaluations, says):
    with pytest.raises(ValueError, match=says):
        golden_section_maximum(lambda x: x, low, high, evaluations)
