"""Which records belong side by side: what is known to be different is refused, what is not known is not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from for_each import for_each

from hf_parcor import CorruptionRecord, EvaluationRecord, RobustnessReport
from hf_parcor.cards import facts_of
from hf_parcor.records import EvaluationData
from hf_parcor.records.comparable import check_comparable, check_repetitions
from hf_parcor.reports.tables import comparison_table

FILE = EvaluationData("dev.tsv", rows=120)
HUB = EvaluationData("sst2", "org/sst2", "small", "validation", "abc", 120)
ELSEWHERE = {"name": "other", "id": "org/other", "config": "large", "split": "test", "revision": "def", "rows": 256}


def record(accuracy=0.5, **settings):
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
    row = CorruptionRecord("gradient", "g", {"p": 2.0, "epsilon": 0.1, "top_n": None}, (0,), {"accuracy": (accuracy,)})
    return EvaluationRecord(
        **{"model": "m", "target": {}, "parameters": 3, "clean": clean} | settings, corruptions=(row,)
    )


def readers():
    """Return whatever sets two records side by side."""
    return [
        lambda *pair: check_comparable(dict(zip("ab", pair, strict=True))),
        lambda *pair: RobustnessReport.compare(dict(zip("ab", pair, strict=True))),
        lambda *pair: RobustnessReport(list(pair)),
        lambda *pair: RobustnessReport({"first": pair[0], "second": pair[1]}),
        lambda *pair: comparison_table(dict(zip("ab", pair, strict=True))),
        lambda *pair: facts_of(list(pair)),
    ]


@pytest.mark.parametrize("reader", readers())
@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_difference_of_the_data_is_refused(name, reader):
    """And with it taken back, nothing is: one name after the other."""
    data = replace(HUB, id="") if name == "name" else HUB
    first, other = (record(value, evaluated_on=data, weights=str(value)) for value in (0.5, 0.6))
    reader(first, other)
    with pytest.raises(ValueError, match=r"expected all measured on the same data, got .*"):
        reader(first, replace(other, evaluated_on=replace(data, **{name: ELSEWHERE[name]})))


def test_the_table_above_has_all_that_data_have():
    assert set(ELSEWHERE) == {field.name for field in fields(EvaluationData)}


@for_each(
    ("first", "other"),
    [
        (None, FILE),
        (EvaluationData(), FILE),
        (replace(FILE, rows=None), FILE),
        (replace(HUB, config="", split="", revision=""), HUB),
        (FILE, replace(FILE, name="sst2", id="org/sst2")),  # a copy of it, perhaps
    ],
)
def test_what_is_not_known_is_no_difference(first, other):
    check_comparable({"a": record(evaluated_on=first), "b": record(evaluated_on=other)})
    check_comparable({"a": record(evaluated_on=other), "b": record(evaluated_on=first)})


def test_the_same_batches_are_the_same_data_whatever_they_are_called():
    other = replace(FILE, name="copy.csv")
    check_comparable({"a": record(evaluated_on=FILE, data="12"), "b": record(evaluated_on=other, data="12")})


def test_the_same_batches_for_gradients_do_not_make_other_rows_the_same():
    more = replace(FILE, rows=256)
    with pytest.raises(ValueError, match=r"120 rows for 'a' and dev\.tsv, 256 rows for 'b'"):
        check_comparable({"a": record(evaluated_on=FILE, data="12"), "b": record(evaluated_on=more, data="12")})


def test_other_tasks_are_refused():
    tasks = "translation", "summarization", "text2text-generation", ""
    for name in tasks:
        for other in tasks:
            pair = {"a": record(task=name), "b": record(task=other)}
            if {name, other} == {"translation", "summarization"}:
                with pytest.raises(ValueError, match="expected all of one task, got"):
                    check_comparable(pair)
            else:
                check_comparable(pair)


class TestRepetitions:
    """n counts trainings: whatever is no other training of the same is refused."""

    @for_each(
        ("changes", "says"),
        [
            ({"weights": "1"}, "different seeds, got one twice"),
            ({"weights": "2", "parameters": 4}, "with the same targets, got 3 weights of m"),
            ({"weights": "2", "target": {"target_modules": ["a"]}}, r"\(all\) and 3 of m \(a\)"),
            ({"weights": "2", "target": {"exclude_modules": ["a"]}}, r"\(all, exclude_modules a\)"),
            ({"weights": "2", "target": {"layers": 0}}, r"\(all, layers 0\)"),
        ],
    )
    def test_are_refused(self, changes, says):
        first = record(weights="1")
        other = replace(record(0.6, weights="1"), **changes)
        with pytest.raises(ValueError, match=says):
            check_repetitions({"": [first, other]})
        with pytest.raises(ValueError, match=says):
            RobustnessReport([first, other])
        check_repetitions({"": [first, record(0.6, weights="2", target={"target_modules": "all"})]})

    def test_a_record_from_before_weights_were_kept_counts_once(self):
        with pytest.raises(ValueError, match="got one twice"):
            check_repetitions({"": [record(), record()]})
        with pytest.raises(ValueError, match="got one twice"):
            facts_of([record(), record()])
        check_repetitions({"": [record(), record(model="other seed")]})

    def test_of_a_probe_all_groups_say_it_together(self):
        """A group that nothing disturbs has the same record in each training."""
        groups = {"calm": [record(), record()], "weak": [record(), record(0.1)]}
        check_repetitions(groups)
        with pytest.raises(ValueError, match="got one twice"):
            check_repetitions({**groups, "weak": [record(), record()]})

    def test_one_record_is_not_two_models(self):
        one, other = record(weights="1"), record(0.6, weights="2")
        RobustnessReport.compare({"a": one, "b": other})
        with pytest.raises(ValueError, match="got the same for 'a' and 'b', of the same weights; name one"):
            RobustnessReport.compare({"a": one, "b": record(weights="1")})
