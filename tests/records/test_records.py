"""Records: JSON in and out, means and deviations, pandas."""

import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import get_args

import numpy as np
import pytest
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRecord,
    EvaluationRecord,
    FlipRecord,
    GradientCorruption,
    IndicatorRecord,
    RecipeRecord,
    SensitivityRecord,
)
from hf_parcor.corruptions import CORRUPTIONS
from hf_parcor.records import ConstraintIndicators, EvaluationData, SearchRecord, SearchTrial, StoredRecord
from hf_parcor.records.evaluation import CorruptionKind

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(min_size=1, max_size=8)
PLAIN = st.none() | st.booleans() | st.integers() | FLOATS | st.sampled_from(["any", "exponent", "", "ε|∞"])


@st.composite
def corruption_records(draw):
    trials = draw(st.integers(1, 4))
    return CorruptionRecord(
        corruption=draw(st.sampled_from([*CORRUPTIONS, "none"]) | NAMES),
        label=draw(st.text()),
        settings=draw(st.dictionaries(NAMES, PLAIN, max_size=3)),
        seeds=tuple(range(trials)),
        metrics=draw(st.dictionaries(NAMES, st.tuples(*[FLOATS] * trials), min_size=1, max_size=3)),
        changed=draw(FLOATS),
        norm=draw(FLOATS),
        notes=draw(st.lists(st.text(), max_size=2).map(tuple)),
    )


SETTINGS = st.dictionaries(NAMES, st.none() | st.booleans() | st.integers() | FINITE | st.text(), max_size=3)
# Of all mappings the one that JSON is read as.
st.register_type_strategy(Mapping, lambda kind: st.dictionaries(*map(st.from_type, get_args(kind)), max_size=2))
CONSTRAINTS = st.builds(
    CorruptionConstraint,
    p=st.sampled_from([1.0, 2.0, math.inf]),
    epsilon=st.floats(1e-6, 1e6),
    top_n=st.none() | st.integers(1, 9),
)


def stored(kind: type[StoredRecord], **parts: st.SearchStrategy):
    """Return records of a kind, with anything that their fields may hold: types tell what that is, or parts."""
    own = {
        "settings": SETTINGS,
        "target": SETTINGS,
        "flags": SETTINGS,
        "formats": st.dictionaries(NAMES, SETTINGS, max_size=2),
    } | parts
    others = [one.name for one in fields(kind) if one.name != "format"]
    return st.builds(kind, **{name: own.get(name, ...) for name in others})


RECORDS = st.one_of(
    stored(
        EvaluationRecord,
        target=st.dictionaries(NAMES, st.text() | st.integers() | st.lists(st.text() | st.integers()), max_size=3),
        clean=corruption_records(),
        corruptions=st.lists(corruption_records(), max_size=3).map(tuple),
        weights_norm=st.none() | st.floats(0),
    ),
    stored(SensitivityRecord),
    stored(RecipeRecord),
    stored(FlipRecord),
    stored(
        SearchRecord,
        low=FINITE,
        high=FINITE,
        trials=st.lists(st.builds(SearchTrial, FINITE, metrics=..., collapsed=...), max_size=2).map(tuple),
    ),
    stored(
        IndicatorRecord,
        indicators=st.lists(st.builds(ConstraintIndicators, constraint=CONSTRAINTS), max_size=2).map(tuple),
    ),
)


def same(first, second):
    """Compare values of the same types; NaN equals NaN."""
    if is_dataclass(first):
        return type(first) is type(second) and same(vars(first), vars(second))
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and math.isnan(first):
        return isinstance(second, float) and math.isnan(second)
    return type(first) is type(second) and first == second


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def row():
    return CorruptionRecord(
        "gaussian",
        "Gaussian σ=0.1",
        {"std": 0.1},
        (0, 1),
        {"accuracy": (0.5, 0.7), "loss": (1.0, math.nan)},
        8.0,
        0.25,
    )


@pytest.fixture
def record(row):
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,), "loss": (0.5,)})
    weak = CorruptionRecord("quantization", "8-bit quantization", {"bits": 8}, (0,), {"accuracy": (0.8,)})
    return EvaluationRecord(
        "tiny",
        {"target_modules": "all"},
        10,
        clean,
        (row, weak),
        versions={"torch": "2"},
        evaluated_on=EvaluationData("films"),
    )


class TestJson:
    @pytest.mark.parametrize("norm", [math.inf, math.nan, 2.0, None])
    def test_a_norm_that_is_no_number_comes_back_as_one(self, record, norm):
        """Of a model with weights that are not finite."""
        record = replace(record, weights_norm=norm)
        assert same(EvaluationRecord.from_json(record.to_json()), record)

    @pytest.mark.slow
    @settings(max_examples=300)
    @given(RECORDS)
    def test_round_trip(self, record):
        kind, text = type(record), record.to_json()
        json.loads(text, parse_constant=refuse)
        assert same(kind.from_json(text), record)
        assert kind.from_json(text).to_json() == text

    def test_equality_without_nan(self, record):
        record = replace(record, corruptions=record.corruptions[1:])
        assert EvaluationRecord.from_json(record.to_json()) == record

    def test_an_infinite_norm_order(self):
        settings_ = {"p": math.inf, "epsilon": 5e-4, "top_n": None}
        row = CorruptionRecord("gradient", "gradient-based L∞ ε=0.0005", settings_, (0,), {"x": (-math.inf,)})
        record = EvaluationRecord("m", {}, 1, row, (row,))
        text = record.to_json()
        assert json.loads(text, parse_constant=refuse)["clean"]["settings"]["p"] == "inf"
        assert '"-inf"' in text
        assert "L∞ ε" in text, "readable in an editor"
        assert EvaluationRecord.from_json(text) == record

    def test_numpy_settings(self, row):
        settings_ = {"bits": np.int64(4), "std": np.float32(0.5), "bound": np.float64("inf")}
        row = replace(row, settings=settings_, metrics={"x": (0.0, 1.0)})
        record = EvaluationRecord("m", {}, np.int64(3), row, ())
        assert EvaluationRecord.from_json(record.to_json()) == record

    def test_save_and_load(self, record, tmp_path):
        path = record.save(tmp_path / "new" / "folder" / "record.json")
        assert path == tmp_path / "new" / "folder" / "record.json"
        assert path.read_bytes().decode() == record.to_json()
        assert same(EvaluationRecord.load(str(path)), record)

    def test_what_an_evaluator_made(self, classifier, batches, one_of_each):
        evaluator = CorruptionEvaluator(
            classifier, lambda _: {"x": 0.5}, batches, module_types=[type(classifier.classifier)], progress=False
        )
        record = evaluator.evaluate(list(one_of_each.values()), trials=2)
        assert EvaluationRecord.from_json(record.to_json()) == record

    @for_each(
        ("text", "found"),
        [("[]", "list"), ("{}", "None"), ('{"format": 2}', "2"), ('"format"', "str"), ("null", "NoneType")],
    )
    def test_another_format(self, text, found):
        with pytest.raises(
            ValueError, match=rf"record: expected format 1, got '?{found}'?; measure again, or read it with"
        ):
            EvaluationRecord.from_json(text)

    @for_each("damage", ["clean", "corruptions", "model"])
    def test_a_missing_field(self, record, damage):
        data = json.loads(record.to_json())
        del data[damage]
        with pytest.raises(ValueError, match=f"expected all fields of format 1, got .*{damage}.* damaged"):
            EvaluationRecord.from_json(json.dumps(data))

    @for_each("value", [None, 3, "x", [1], {"metrics": {}}])
    def test_a_field_of_the_wrong_kind(self, record, value):
        data = {**json.loads(record.to_json()), "clean": value}
        with pytest.raises(ValueError, match="damaged"):
            EvaluationRecord.from_json(json.dumps(data))

    def test_any_value_of_another_type_is_found_when_it_is_read(self, record):
        """Not when a page is half drawn; of settings of others any plain value may be right."""

        def places(value, path=()):
            if isinstance(value, (dict, list)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, entry in items:
                    if key not in ("settings", "target", "flags"):
                        yield from places(entry, (*path, key))
            else:
                yield path

        described = CorruptionKind("Gaussian noise", "std", "σ", "σ={}")
        rows = tuple(replace(row, kind=described, settings={"std": 0.1}) for row in record.corruptions)
        whole = replace(record, corruptions=rows, evaluated_on=EvaluationData("dev.tsv"), task="t", weights_norm=1.0)
        found = list(places(json.loads(whole.to_json())))
        assert {path[-1] for path in found} >= {"label", "model", "parameters", "title", "name", "task"}
        for path in found:
            for other in ([[]], {"a": 1}):
                data = inner = json.loads(whole.to_json())
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = other
                with pytest.raises(ValueError, match="expected"):
                    EvaluationRecord.from_plain(data)
        data = json.loads(whole.to_json())
        for damage in ({}, {"std": {"is": 0.1}}, {"std": "wide"}, {"std": None}):
            data["corruptions"][0]["settings"] = damage
            with pytest.raises(ValueError, match="'std'"):
                EvaluationRecord.from_plain(data)
        data = json.loads(whole.to_json())
        data["clean"]["norm"] = 10**400
        with pytest.raises(ValueError, match="too large"):
            EvaluationRecord.from_plain(data)

    def test_a_record_of_another_kind_is_called_what_it_is(self):
        kinds = StoredRecord.__subclasses__()
        assert len(kinds) > 5
        for written in kinds:
            data = {one.name: None for one in fields(written)} | {"format": written.format}
            for read in kinds:
                if read is not written:
                    with pytest.raises(ValueError, match=f"got a {written.kind};"):
                        read.from_plain(data)

    def test_no_json(self):
        with pytest.raises(ValueError, match="Expecting value"):
            EvaluationRecord.from_json("accuracy: 0.9")


class TestMeanAndDeviation:
    @given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
    def test_against_statistics(self, values):
        row = CorruptionRecord("none", "", {}, tuple(range(len(values))), {"x": tuple(values)})
        assert row.mean("x") == statistics.fmean(values)
        assert row.deviation("x") == statistics.stdev(values)

    @for_each(
        ("values", "mean", "deviation"),
        [
            ((0.5,), 0.5, math.nan),
            ((0.5, math.nan), math.nan, math.nan),
            ((math.inf, 1.0), math.inf, math.nan),
            ((math.inf, -math.inf), math.nan, math.nan),
            ((1e308, 1e308), 1e308, 0.0),
            ((1.7e308, -1.7e308), 0.0, math.inf),
        ],
    )
    def test_what_is_not_finite_or_single(self, values, mean, deviation):
        row = CorruptionRecord("none", "", {}, tuple(range(len(values))), {"x": values})
        assert row.mean("x") == pytest.approx(mean, nan_ok=True)
        assert row.deviation("x") == pytest.approx(deviation, nan_ok=True)

    def test_an_unknown_metric(self, row):
        message = r"metric: expected one of accuracy, loss, got 'bleu', which 'Gaussian σ=0.1' lacks; pass metric="
        with pytest.raises(ValueError, match=message):
            row.mean("bleu")
        with pytest.raises(ValueError, match=message):
            row.deviation("bleu")


class TestPandas:
    def test_a_row_for_each_corruption_metric_and_trial(self, record):
        table = record.to_pandas()
        assert list(table.columns) == [
            "model",
            "corruption",
            "label",
            "metric",
            "seed",
            "value",
            "setting_std",
            "setting_bits",
        ]
        assert len(table) == 2 + 2 * 2 + 1
        assert set(table["model"]) == {"tiny"}
        accuracy = table[(table["metric"] == "accuracy") & (table["corruption"] == "gaussian")]
        assert accuracy["value"].tolist() == [0.5, 0.7]
        assert accuracy["seed"].tolist() == [0, 1]
        assert accuracy["setting_std"].tolist() == [0.1, 0.1]
        assert table["value"].isna().sum() == 1, "NaN is kept"

    def test_without_pandas(self, record, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match=r"to_pandas needs pandas"):
            record.to_pandas()


def test_records_are_frozen(record):
    with pytest.raises(AttributeError):
        record.model = "other"
    with pytest.raises(AttributeError):
        record.clean.label = "other"


def test_settings_of_every_corruption_survive(one_of_each):
    for name, corruption in one_of_each.items():
        row = CorruptionRecord(name, str(corruption), corruption.settings(), (0,), {"x": (0.0,)})
        back = EvaluationRecord.from_json(EvaluationRecord("m", {}, 1, row, ()).to_json()).clean
        assert back.settings == corruption.settings()
        if isinstance(corruption, GradientCorruption):
            assert back.settings["p"] == math.inf
