"""Measures of a curve, against NumPy on a fine grid and against numbers by hand."""

import math

import numpy
import pytest
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from hf_parcor.records.curves import area_under_curve, epsilon_at_half, metric_drop

nan, inf = math.nan, math.inf
curves = st.lists(
    st.tuples(st.integers(1, 1000).map(lambda n: n / 8), st.floats(0, 4)),
    min_size=1,
    max_size=6,
    unique_by=lambda p: p[0],
)


@for_each(
    ("clean", "corrupted", "greater_is_better", "drop"),
    [(0.75, 0.5, True, 0.25), (0.5, 0.75, True, -0.25), (0.5, 2.0, False, 1.5), (2.0, inf, False, inf)],
)
def test_drop(clean, corrupted, greater_is_better, drop):
    assert metric_drop(clean, corrupted, greater_is_better=greater_is_better) == drop


def test_drop_of_nan():
    assert math.isnan(metric_drop(0.5, nan))


@given(curves, st.floats(0, 4))
def test_area_is_the_trapezoid_rule_over_the_range(points, clean):
    epsilons, values = zip(*points, strict=True)
    xs, ys = zip(*sorted([(0.0, clean), *points]), strict=True)
    expected = trapezoid(ys, xs) / max(epsilons)
    assert area_under_curve(epsilons, values, clean=clean) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@for_each("scale", [1e-300, 1e300])
def test_area_of_extreme_radii(scale):
    assert area_under_curve([scale, 2 * scale], [0.5, 0.5], clean=1.0) == 0.625


@for_each("values", [[nan, 0.5], [0.5, nan]])
def test_area_with_nan(values):
    assert math.isnan(area_under_curve([1.0, 2.0], values, clean=1.0))


@for_each(("values", "area"), [([inf, 0.5], inf), ([-inf, 0.5], -inf), ([inf, -inf], nan)])
def test_area_with_infinities(values, area):
    assert area_under_curve([1.0, 2.0], values, clean=1.0) == pytest.approx(area, nan_ok=True)


@given(curves, st.floats(0.25, 4), st.booleans())
def test_half_is_the_first_crossing_on_a_fine_grid(points, clean, greater_is_better):
    epsilons, values = zip(*points, strict=True)
    found = epsilon_at_half(epsilons, values, clean=clean, greater_is_better=greater_is_better)
    xs, ys = zip(*sorted([(0.0, clean), *points]), strict=True)
    grid = numpy.linspace(0, max(xs), 20_001)
    curve = numpy.interp(grid, xs, ys)
    lost = curve <= clean / 2 if greater_is_better else curve >= 2 * clean
    width = grid[1]
    if math.isinf(found):
        assert not lost[:-1].any() or numpy.isclose(curve[lost], clean / 2 if greater_is_better else 2 * clean).all()
    else:
        assert numpy.interp(found, xs, ys) == pytest.approx(clean / 2 if greater_is_better else 2 * clean, rel=1e-6)
        assert not lost[grid < found - width].any()


@for_each(
    ("epsilons", "values", "clean", "greater_is_better", "half"),
    [
        ([2.0, 1.0], [0.25, 0.75], 1.0, True, 1.5),  # any order
        ([1.0], [0.5], 1.0, True, 1.0),  # exactly half
        ([1.0, 2.0], [0.6, 0.51], 1.0, True, inf),
        ([1.0, 2.0, 3.0], [0.4, 0.9, 0.1], 1.0, True, 1 / 1.2),  # the first of two crossings
        ([1.0, 2.0], [0.3, 1.2], 0.5, False, 1.0 + 0.7 / 0.9),
        ([1.0, 2.0], [0.6, inf], 0.5, False, 2.0),
        ([1.0, 2.0], [inf, 0.1], 1.0, True, 2.0),
        ([1.0, 2.0], [-inf, inf], 0.5, False, 2.0),
        ([1.0, 2.0], [0.4, nan], 1.0, True, 1 / 1.2),  # what comes later does not matter
    ],
)
def test_half(epsilons, values, clean, greater_is_better, half):
    found = epsilon_at_half(epsilons, values, clean=clean, greater_is_better=greater_is_better)
    assert found == pytest.approx(half)


@for_each(("values", "clean"), [([nan, 0.1], 1.0), ([0.0, 0.0], 0.0), ([0.5, 0.1], nan), ([1, 2], -1.0)])
def test_half_that_cannot_be_said(values, clean):
    assert math.isnan(epsilon_at_half([1.0, 2.0], values, clean=clean))


@for_each("measure", [area_under_curve, epsilon_at_half])
@for_each(
    ("epsilons", "values", "message"),
    [
        ([], [], "got 0 for 0"),
        ([1.0], [0.5, 0.5], "got 2 for 1"),
        ([1.0, 1.0], [0.5, 0.5], "expected different positive finite numbers"),
        ([0.0], [0.5], "pass each once, and what was measured at 0 as clean="),
        ([-1.0], [0.5], "positive"),
        ([inf], [0.5], "finite"),
        ([nan], [0.5], "finite"),
    ],
)
def test_errors(measure, epsilons, values, message):
    with pytest.raises(ValueError, match=message):
        measure(epsilons, values, clean=1.0)
