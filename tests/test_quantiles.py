"""Quantiles against NumPy, their intervals against SciPy's binomial and against what they promise."""

import math
import sys

import numpy as np
import pytest
from for_each import for_each
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_parcor.statistics import QuantileWithInterval

SHARES = st.floats(0.01, 0.99)


@settings(max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=50), SHARES, st.sampled_from([0.5, 0.95, 0.99]))
@example([5.0, 1.0, 4.0, 2.0, 3.0], 0.5, 0.9375)  # the tails are steps of the distribution, and representable
@example([float(value) for value in range(13)], 0.5, 1 - 2 * 14 / 2**13)
def test_against_numpy_and_scipy(values, p, level):
    found = QuantileWithInterval.from_values(values, p, level)
    assert found.p == p
    assert found.value == pytest.approx(np.quantile(values, p), abs=1e-12)
    ends = stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], len(values), p).astype(int)
    ordered = sorted(values)
    assert found.low == ordered[max(ends[0] - 1, 0)]
    assert found.high == ordered[min(ends[1], len(values) - 1)]


@for_each("p", [0.5, 0.9])
def test_the_interval_holds_the_true_quantile_as_often_as_it_says(p):
    generator = np.random.default_rng(0)
    true = stats.expon.ppf(p)
    found = [QuantileWithInterval.from_values(generator.exponential(size=60), p) for _ in range(1000)]
    share = np.mean([one.low <= true <= one.high for one in found])
    assert 0.94 < share < 0.99  # at least 0.95 in theory: order statistics are coarse


def test_infinite_values_have_their_places():
    found = QuantileWithInterval.from_values([1.0, math.inf, math.inf], 0.5)
    assert (found.value, found.low, found.high) == (math.inf, 1.0, math.inf)
    assert QuantileWithInterval.from_values([1.0, 2.0, math.inf], 0.5).value == 2.0
    assert QuantileWithInterval.from_values([-math.inf, 2.0], 0.25).value == -math.inf


@for_each(
    ("values", "p", "level", "message"),
    [
        ([], 0.5, 0.95, "expected one number or more"),
        ([1.0, math.nan], 0.5, 0.95, "no NaN"),
        ([1.0], 0.0, 0.95, "0 < p < 1"),
        ([1.0], 95, 0.95, "fraction, not percent"),
        ([1.0], 0.5, 1.0, "0 < level < 1"),
    ],
)
def test_what_is_refused(values, p, level, message):
    with pytest.raises(ValueError, match=message):
        QuantileWithInterval.from_values(values, p, level)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"intervals of quantiles"):
        QuantileWithInterval.from_values([1.0, 2.0], 0.5)
