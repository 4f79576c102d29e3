"""Tables, letter by letter."""

import math
import re
import sys
from dataclasses import replace
from textwrap import dedent

import pytest

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionRecord,
    EvaluationRecord,
    GradientCorruption,
    MetricInfo,
    MultiStepCorruption,
    Quantization,
)
from hf_parcor.reports.terminal_tables import comparison_table, group_table


def record_of(rows, metric="accuracy"):
    """Return a record from labels and values; the first row is the clean one."""
    rows = [
        CorruptionRecord("any", label, {}, tuple(range(len(values))), {metric: values})
        for label, values in rows.items()
    ]
    return EvaluationRecord("m", {}, 1, rows[0], tuple(rows[1:]))


PLAIN = record_of({"no corruption": (0.92345,), "Gaussian σ=0.1": (0.5, 0.6, 0.7), "4-bit quantization": (0.75,)})
DEFENDED = record_of({"no corruption": (0.923,), "Gaussian σ=0.1": (0.8, 0.8, 0.8), "4-bit quantization": (0.5,)})


def table_of(text):
    return dedent(text).strip("\n")


def test_two_records():
    assert comparison_table({"plain": PLAIN, "defended": DEFENDED}) == table_of(
        """
        | accuracy (%)       |       plain |   defended |   change |
        |:-------------------|------------:|-----------:|---------:|
        | no corruption      |        92.3 |       92.3 |     +0.0 |
        | Gaussian σ=0.1     | 60.0 ± 10.0 | 80.0 ± 0.0 |    +20.0 |
        | 4-bit quantization |        75.0 |       50.0 |    -25.0 |
        """
    )


def test_one_record_has_no_change():
    assert comparison_table({"plain": PLAIN}) == table_of(
        """
        | accuracy (%)       |       plain |
        |:-------------------|------------:|
        | no corruption      |        92.3 |
        | Gaussian σ=0.1     | 60.0 ± 10.0 |
        | 4-bit quantization |        75.0 |
        """
    )


def test_the_change_is_from_the_first_to_the_last_of_three():
    table = comparison_table({"a": PLAIN, "b": PLAIN, "c": DEFENDED})
    assert table.splitlines()[-1] == "| 4-bit quantization |        75.0 |        75.0 |       50.0 |    -25.0 |"


def test_a_metric_that_is_no_share():
    record = record_of({"no corruption": (0.3466,), "Gaussian σ=0.1": (1.0, 1.5)}, "loss")
    assert comparison_table({"loss of the model": record}, "loss") == table_of(
        """
        | loss           |   loss of the model |
        |:---------------|--------------------:|
        | no corruption  |               0.347 |
        | Gaussian σ=0.1 |       1.250 ± 0.354 |
        """
    )


@pytest.mark.parametrize(
    ("unit", "head", "cell"),
    [
        ("share", "chrf (%)", "90.2"),
        ("points", "chrf (of 100)", "0.90"),
        ("nats", "chrf (nats)", "0.902"),
        ("", "chrf", "0.902"),
    ],
)
def test_the_unit_is_that_of_the_record(unit, head, cell):
    bare = record_of({"no corruption": (0.902,), "4-bit quantization": (0.902,)}, "chrf")
    stated = replace(bare, metric_info={"chrf": MetricInfo(True, unit)})
    table = comparison_table({"m": stated}, "chrf")
    assert f"| {head} " in table
    assert f" {cell} |" in table
    assert comparison_table({"m": bare}, "chrf", unit=unit) == table
    if unit:
        other = replace(bare, metric_info={"chrf": MetricInfo(True, "steps")})
        with pytest.raises(ValueError, match="one unit"):
            comparison_table({"m": stated, "n": other}, "chrf")


def test_what_is_not_finite():
    first = record_of({"none": (math.nan,), "a": (0.5, math.nan), "b": (math.inf,)})
    second = record_of({"none": (0.5,), "a": (0.5, 0.5), "b": (0.5,)})
    assert comparison_table({"x": first, "y": second}) == table_of(
        """
        | accuracy (%)   |   x |          y |   change |
        |:---------------|----:|-----------:|---------:|
        | none           | nan |       50.0 |      nan |
        | a              | nan | 50.0 ± 0.0 |      nan |
        | b              | inf |       50.0 |     -inf |
        """
    )


def test_nothing_in_a_name_can_break_the_table():
    record = record_of({"no\ncorruption": (0.5,), "a|b": (0.5,)}, "f|1")
    assert comparison_table({"x|y": record}, "f|1") == table_of(
        r"""
        | f\|1          |   x\|y |
        |:--------------|-------:|
        | no corruption |  0.500 |
        | a\|b          |  0.500 |
        """
    )


@pytest.mark.parametrize("unit", ["share", "points", ""])
def test_fits_a_terminal(unit):
    corruptions = [
        BitFlips(rate=1e-8),
        BitFlips(count=100_000, bits="exponent"),
        GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=5e-4)),
        GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=5e-4, top_n=1000)),
        MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=5e-4), steps=10),
        Quantization(4),
    ]
    labels = ["no corruption", *map(str, corruptions)]
    assert "bit flips rate=1e-08 (any)" in labels
    assert "gradient-based L∞ ε=0.0005" in labels
    record = record_of(dict.fromkeys(labels, (0.55, 0.75, 0.95)))
    lines = comparison_table({"plain": record, "defended": record}, unit=unit).splitlines()
    assert len(lines) == 2 + len(labels)
    assert max(map(len, lines)) <= 80


class TestErrors:
    def test_no_records(self):
        with pytest.raises(ValueError, match="expected one or more of the same corruptions"):
            comparison_table({})

    @pytest.mark.parametrize(
        "rows",
        [
            {"no corruption": (0.5,)},
            {"no corruption": (0.5,), "4-bit quantization": (0.5,), "Gaussian σ=0.1": (0.5,)},
            {"no corruption": (0.5,), "Gaussian σ=0.2": (0.5,), "4-bit quantization": (0.5,)},
        ],
        ids=["fewer", "another order", "another strength"],
    )
    def test_records_of_different_corruptions(self, rows):
        with pytest.raises(ValueError, match="in the same order; evaluate them alike"):
            comparison_table({"plain": PLAIN, "defended": record_of(rows)})

    def test_an_unknown_metric(self):
        with pytest.raises(ValueError, match="expected one of accuracy, got 'f1'"):
            comparison_table({"plain": PLAIN}, "f1")

    def test_without_tabulate(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tabulate", None)
        with pytest.raises(
            ImportError, match=r"tables need tabulate; install it with: pip install 'hf-parcor\[tables\]'"
        ):
            comparison_table({"plain": PLAIN})


class TestGroupTable:
    def records(self, groups, epsilons, corruption="gradient"):
        clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})

        def row(epsilon, index):
            settings = {"p": 2.0, "epsilon": epsilon, "top_n": None}
            return CorruptionRecord(
                corruption, f"{corruption} {epsilon}", settings, (0,), {"accuracy": (epsilon + index / 100,)}
            )

        return {
            group: EvaluationRecord("m", {}, 1, clean, tuple(row(epsilon, index) for epsilon in epsilons))
            for index, group in enumerate(groups)
        }

    def test_the_whole_table(self):
        assert group_table(self.records(["a", "b|c"], [0.1, 0.2])).splitlines() == [
            "gradient-based, L2",
            "",
            "| accuracy (%)   |   ε=0.1 |   ε=0.2 |",
            "|:---------------|--------:|--------:|",
            "| no corruption  |    90.0 |    90.0 |",
            "| a              |    10.0 |    20.0 |",
            r"| b\|c           |    11.0 |    21.0 |",
        ]

    @pytest.mark.parametrize("width", [40, 60, 80])
    def test_no_line_is_longer_than_the_terminal(self, width):
        epsilons = [index / 100 for index in range(1, 20)]
        table = group_table(self.records(["a", "a.long.name.of.it"], epsilons), width=width)
        lines = table.splitlines()
        assert max(map(len, lines)) <= width
        assert [level for line in lines if "(%)" in line for level in re.findall(r"ε=([\d.]+)", line)] == [
            f"{epsilon:g}" for epsilon in epsilons
        ]

    def test_other_corruptions_have_a_table_of_their_own(self):
        first, second = self.records("ab", [0.1]), self.records("ab", [0.2], "random")
        both = {
            name: replace(first[name], corruptions=first[name].corruptions + second[name].corruptions) for name in "ab"
        }
        assert [line for line in group_table(both).splitlines() if "L2" in line] == [
            "gradient-based, L2",
            "random, L2",
        ]

    def test_groups_of_different_corruptions(self):
        with pytest.raises(ValueError, match="same corruptions"):
            group_table({**self.records("a", [0.1]), **self.records("b", [0.2])})
        with pytest.raises(ValueError, match="same corruptions"):
            group_table({})
