"""Tables: what stands in the cells is what stands in the records, and they read well as plain text."""

import itertools
import math
import re
from dataclasses import replace
from textwrap import dedent
from unicodedata import category
from unicodedata import east_asian_width as width

import pytest
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

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
from hf_parcor.reports.content import difference_table, panels, settings
from hf_parcor.reports.markup import printable, text_of
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.study import Study
from hf_parcor.reports.tables import comparison_table, group_table, markdown_table


def record_of(rows, metric="accuracy"):
    """Return a record from labels and values; the first row is the clean one."""
    rows = [
        CorruptionRecord("any", label, {}, tuple(range(len(values))), {metric: values})
        for label, values in rows.items()
    ]
    return EvaluationRecord("m", {}, 1, rows[0], tuple(rows[1:]))


PLAIN = record_of({"no corruption": (0.92345,), "Gaussian σ=0.1": (0.5, 0.6, 0.7), "4-bit quantization": (0.75,)})
DEFENDED = record_of({"no corruption": (0.923,), "Gaussian σ=0.1": (0.8, 0.8, 0.8), "4-bit quantization": (0.5,)})


def cells_of(table):
    """Return the cells of a Markdown table, line by line, as a reader of Markdown sees them."""
    lines = [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in table.splitlines()]
    return [[re.sub(r"\\([\W_])", r"\1", cell.strip()) for cell in line] for line in (lines[0], *lines[2:])]


def test_two_records():
    """Letter by letter."""
    assert comparison_table({"plain": PLAIN, "defended": DEFENDED}) == dedent(
        """\
        | accuracy (%)       |       plain |   defended | change |
        | :----------------- | ----------: | ---------: | -----: |
        | no corruption      |        92.3 |       92.3 |    0.0 |
        | Gaussian σ=0.1     | 60.0 ± 10.0 | 80.0 ± 0.0 |  +20.0 |
        | 4-bit quantization |        75.0 |       50.0 |  −25.0 |"""
    )


def test_every_difference_has_a_row_and_settings_name_a_model_where_there_are_several():
    study = Study.of({"plain": PLAIN, "defended": DEFENDED}, "accuracy")
    found = {row[0]: row[1:] for row in difference_table(study, Numbers("share")).rows}
    assert len(found) == 3
    for name, row in found.items():
        model, first, second, change = (part.replace("−", "-") for part in row[:4])
        (corruption,) = [one for one in PLAIN.rows() if one.label in name]
        expected = [one.mean("accuracy") * 100 for one in (corruption, by_label(DEFENDED)[corruption.label])]
        assert model == "defended"
        assert [float(first.rstrip(" %")), float(second.rstrip(" %"))] == pytest.approx(expected, abs=0.05)
        assert float(change.split()[0]) == pytest.approx(expected[1] - expected[0], abs=0.1)
        assert (change[0] == "+") == (expected[1] > expected[0] + 0.1)
    of_a_group = Study.of({"plain": {"head": PLAIN}, "defended": {"head": DEFENDED}}, "accuracy")
    assert not [name for name, *_ in difference_table(of_a_group, Numbers("share")).rows if "head" in name]
    for panel in panels(study):  # of no corruption is the strength known: they stand in the order of the table
        assert {name: [point.strength for point in line.points] for name, line in panel.lines.items()} == {
            "plain": [1.0, 2.0],
            "defended": [1.0, 2.0],
        }
    of_both = {name for name, _ in settings(study).rows}
    of_one = {name for name, _ in settings(Study.of({"plain": PLAIN}, "accuracy")).rows}
    assert {name.removeprefix("plain: ").removeprefix("defended: ") for name in of_both} == of_one
    assert len(of_both) > len(of_one)


def by_label(record):
    return {row.label: row for row in record.rows()}


def test_one_record_has_no_change():
    assert [len(line) for line in cells_of(comparison_table({"plain": PLAIN}))] == [2] * 4


def test_between_three_there_is_no_one_change():
    table = comparison_table({"a": PLAIN, "b": PLAIN, "c": DEFENDED})
    assert cells_of(table)[-1] == ["4-bit quantization", "75.0", "75.0", "50.0"]


def test_a_metric_that_is_no_share():
    record = record_of({"no corruption": (0.3466,), "Gaussian σ=0.1": (1.0, 1.5)}, "loss")
    assert cells_of(comparison_table({"loss of the model": record}, "loss")) == [
        ["loss", "loss of the model"],
        ["no corruption", "0.3466"],
        ["Gaussian σ=0.1", "1.25 ± 0.3536"],
    ]


def test_a_metric_is_chosen_where_none_is_named():
    rows = {"no corruption": (20.0,), "Gaussian σ=0.1": (25.0,)}
    text = replace(record_of(rows, "loss"), task="text-generation")
    both = [replace(row, metrics={**row.metrics, "perplexity": row.metrics["loss"]}) for row in text.rows()]
    text = replace(text, clean=both[0], corruptions=tuple(both[1:]))
    assert comparison_table({"m": text}) == comparison_table({"m": text}, "perplexity")
    assert group_table({"m": text}) == group_table({"m": text}, "perplexity")
    assert comparison_table({"m": record_of(rows, "x")}) == comparison_table({"m": record_of(rows, "x")}, "x")


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
    assert cells_of(comparison_table({"x": first, "y": second})) == [
        ["accuracy (%)", "x", "y", "change"],
        ["none", "nan", "50.0", "nan"],
        ["a", "nan", "50.0 ± 0.0", "nan"],
        ["b", "∞", "50.0", "−∞"],
    ]


@given(st.lists(st.lists(st.text(max_size=50), min_size=3, max_size=3), min_size=2, max_size=5))
def test_any_text_stays_in_its_cell_and_columns_are_in_line(lines):
    table = markdown_table(lines[0], lines[1:])
    assert cells_of(table) == [[printable(cell) for cell in line] for line in lines]
    cells = [text_of(cell) for line in lines for cell in line]
    of_one_place = all(width(letter) not in "WF" and category(letter) not in ("Mn", "Me") for letter in "".join(cells))
    if of_one_place and all(len(cell) <= 40 for cell in cells):
        bars = [[at.start() for at in re.finditer(r"(?<!\\)(?:\\\\)*\|", line)] for line in table.splitlines()]
        assert len({len(line) for line in table.splitlines()}) == 1
        assert len(bars) == len(lines) + 1


@for_each(
    ("name", "columns"), [("模型", 4), ("한국어", 6), ("😀", 2), ("cafe\u0301", 4), ("❤\ufe0f", 1), ("ｗｉｄｅ", 8)]
)
def test_columns_are_in_line_where_letters_take_two_places_or_none(name, columns):
    """As terminals show them: a name takes as much room as so many plain letters."""
    table, plain = (markdown_table(["model", "n"], [[one, "1"], ["bert-base", "2"]]) for one in (name, "x" * columns))
    assert table.replace(name, "x" * columns) == plain
    records = [{one * 40: record_of({"no corruption": (0.5,), "4 bits": (0.25,)})} for one in (name, "x" * columns)]
    of_name, of_plain = map(comparison_table, records)
    assert of_name.replace(name, "x" * columns) == of_plain


@pytest.mark.parametrize("word", ["layer_norm", "_a_", "a__b", "x_", "é_ü", "a_*_b", "_", "2_3"])
def test_a_renderer_shows_underscores_as_they_are(word):
    rendered = MarkdownIt("commonmark").enable("table").render(markdown_table([word, word], [[word, word]]))
    assert re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", rendered) == [word] * 4


def test_a_long_cell_widens_no_other():
    table = markdown_table(["setting", "value"], [["versions", "x" * 300], ["seeds", "0, 1"]])
    assert sorted(map(len, table.splitlines()))[:3] == [20] * 3


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


def test_a_long_label_widens_its_column_where_the_terminal_has_room():
    """And runs out of it where it has not, so that no other line is broken."""
    label = str(Quantization(4, 32, symmetric=False))
    record = record_of(dict.fromkeys(["no corruption", label, str(Quantization(4))], (0.5,)))
    alone = comparison_table({"a model": record}).splitlines()
    assert len({len(line) for line in alone}) == 1
    assert len({line.rindex(" | ") for line in alone}) == 1
    assert label in " ".join(alone)
    beside = comparison_table({name * 12: record for name in "abc"}).splitlines()
    assert len(beside[3]) > 80 >= max(len(line) for line in beside if label not in line)


NAMES = ["a", "b", "c", "d"]


@for_each("first", [names for count in (1, 2, 3) for names in itertools.permutations(NAMES[:3], count)])
@for_each("second", [names for count in (1, 2, 3) for names in itertools.permutations(NAMES[1:], count)])
def test_two_records_are_compared_in_what_they_share(first, second):
    """Whatever their orders, with the value that each has under that name."""
    values = {name: (0.1 * place, 0.05 * place) for place, name in enumerate(NAMES, start=1)}
    records = [
        record_of({"no corruption": (0.9,), **{name: (values[name][at],) for name in names}})
        for at, names in enumerate((first, second))
    ]
    shared = [name for name in first if name in second]
    if not shared:
        return
    _, clean, *rows = cells_of(comparison_table(dict(zip("xy", records, strict=True))))
    assert clean[0] == "no corruption"
    assert [row[0] for row in rows] == shared
    for name, *cells in rows:
        one, other = values[name]
        assert [float(cell.replace("−", "-")) for cell in cells] == pytest.approx(
            [100 * one, 100 * other, 100 * (other - one)]
        )


def test_what_one_of_three_lacks_is_a_dash():
    rows = [{"a": (0.1,), "b": (0.2,)}, {"b": (0.3,)}, {"b": (0.4,), "a": (0.5,), "c": (0.6,)}]
    records = {str(place): record_of({"no corruption": (0.9,), **row}) for place, row in enumerate(rows)}
    assert cells_of(comparison_table(records))[2:] == [["a", "10.0", "–", "50.0"], ["b", "20.0", "30.0", "40.0"]]


class TestErrors:
    def test_no_records(self):
        with pytest.raises(ValueError, match="expected one or more, got none"):
            comparison_table({})

    @for_each(
        "rows",
        [{"no corruption": (0.5,)}, {"no corruption": (0.5,), "Gaussian σ=0.2": (0.5,), "3-bit quantization": (0.5,)}],
    )
    def test_nothing_in_common(self, rows):
        with pytest.raises(ValueError, match="got nothing in common but the clean model"):
            comparison_table({"plain": PLAIN, "defended": record_of(rows)})

    def test_an_unknown_metric(self):
        with pytest.raises(ValueError, match="expected one of accuracy, got 'f1'"):
            comparison_table({"plain": PLAIN}, "f1")


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
        title, nothing, *table = group_table(self.records(["a", "b|c"], [0.1, 0.2])).splitlines()
        assert (title, nothing) == ("gradient-based, L2", "")
        assert cells_of("\n".join(table)) == [
            ["accuracy (%)", "ε=0.1", "ε=0.2"],
            ["no corruption", "90.0", "90.0"],
            ["a", "10.0", "20.0"],
            ["b|c", "11.0", "21.0"],
        ]

    @for_each("width", range(36, 81))
    def test_no_line_is_longer_than_the_terminal_and_none_is_begun_without_need(self, width):
        epsilons = [index / 100 for index in range(1, 20)]
        table = group_table(self.records(["a", "a.long.name.of.it"], epsilons), width=width)
        lines = table.splitlines()
        assert max(map(len, lines)) <= width
        heads = [line for line in lines if "(%)" in line]
        for head, following in itertools.pairwise(heads):
            assert len(head) + len(following.split("|")[2]) + 1 > width, "the next column would have had no room"
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

    @pytest.mark.parametrize("length", [5, 39, 41, 90])
    def test_every_line_is_as_long_whatever_the_names(self, length):
        for table in group_table(self.records(["a", "b" * length], [0.1, 0.2])).split("\n\n")[1::2]:
            assert len({len(line) for line in table.splitlines()}) == 1

    def test_groups_of_different_corruptions(self):
        with pytest.raises(ValueError, match="same corruptions"):
            group_table({**self.records("a", [0.1]), **self.records("b", [0.2])})
        with pytest.raises(ValueError, match="same corruptions"):
            group_table({})
