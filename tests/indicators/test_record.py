"""Estimates and records."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest
from for_each import for_each
from scipy import stats

from hf_parcor import CorruptionConstraint, IndicatorRecord
from hf_parcor.records import Estimate


@pytest.fixture
def record(known):
    return known.measure(
        CorruptionConstraint(p=math.inf, epsilon=0.1, top_n=3),
        CorruptionConstraint(p=3, epsilon=0.1),
        draws=3,
        probes=2,
    )


class TestEstimate:
    def test_against_scipy(self):
        values = (1.0, 4.0, 2.5, -3.0)
        estimate = Estimate(values)
        assert estimate.mean == statistics.fmean(values)
        assert estimate.standard_deviation == pytest.approx(statistics.stdev(values))
        assert estimate.standard_error == pytest.approx(stats.sem(values))
        expected = stats.t.interval(0.9, 3, statistics.fmean(values), stats.sem(values))
        assert estimate.confidence_interval(0.9) == pytest.approx(expected)
        assert estimate.scaled(-2).mean == -2 * estimate.mean
        assert estimate.scaled(-2).standard_error == pytest.approx(2 * estimate.standard_error)

    @for_each(
        ("values", "mean"), [((), math.nan), ((2.0,), 2.0), ((2.0, math.nan), math.nan), ((1.0, math.inf), math.inf)]
    )
    def test_no_spread(self, values, mean):
        estimate = Estimate(values)
        assert estimate.mean == pytest.approx(mean, nan_ok=True)
        assert math.isnan(estimate.standard_error)
        with pytest.raises(ValueError, match="expected"):
            estimate.confidence_interval()


class TestRecord:
    def test_round_trip(self, record, tmp_path):
        assert record.indicators[1].multi_step is None
        path = record.save(tmp_path / "folder" / "indicators.json")
        assert IndicatorRecord.load(path) == record
        assert json.loads(path.read_text())["indicators"][0]["constraint"]["p"] == "inf"

    def test_numbers_that_are_not_finite(self, record):
        odd = replace(record, loss=math.inf, hessian_trace=Estimate((math.nan,)))
        back = IndicatorRecord.from_json(odd.to_json())
        assert back.loss == math.inf
        assert math.isnan(back.hessian_trace.mean)
        assert back.to_json() == odd.to_json()

    def test_what_it_says_of_itself(self, record, known):
        assert (record.model, record.parameters, record.seed) == ("Quadratic", 7, 0)
        assert record.target == {}
        assert known.measure(CorruptionConstraint(epsilon=1), layers=None, probes=0).hessian_trace.values == ()
        assert record.data
        assert "torch" in record.versions

    @for_each("damage", ["indicators", "hessian_trace", "loss"])
    def test_a_missing_field(self, record, damage):
        data = json.loads(record.to_json())
        del data[damage]
        with pytest.raises(ValueError, match=f"indicator record: expected all fields of format 1, got .*{damage}"):
            IndicatorRecord.from_plain(data)

    def test_linearity_without_a_gradient(self, record):
        assert math.isnan(replace(record.indicators[0], first_order=0.0).linearity)

    @for_each(
        "field, broken",
        [("gradient_based", math.nan), ("multi_step", math.nan), ("random", Estimate((0.5, math.nan)))],
    )
    def test_a_destroyed_model_is_not_one_that_loses_nothing(self, record, field, broken):
        assert math.isnan(replace(record.indicators[0], **{field: broken}).lower_bound)
        assert replace(record.indicators[0], gradient_based=math.inf).lower_bound == math.inf
