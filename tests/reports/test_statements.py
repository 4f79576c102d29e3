"""Each statement of a report: records of which it holds, records of which it does not, and it is said of the first."""

import re
from dataclasses import replace

import pytest
from for_each import for_each

from hf_parcor import RobustnessReport
from hf_parcor.records import EvaluationData

nan = float("nan")
compare = RobustnessReport.compare
SHIFTS = (-0.01, 0.0, 0.01)
SEEDS = (-0.01, 0.0, 0.012, 0.02)


def probe(of, **groups):
    """Return a probe: the metric of each group at ε = 1 and 2; a tuple in place of a number is one a trial."""
    return {
        group: of(dict(zip((1.0, 2.0), values, strict=False)), target=[group], corruption="random")
        for group, values in groups.items()
    }


def trials(of, value, **settings):
    return of({1.0: [value + shift for shift in SHIFTS]}, corruption="random", **settings)


def groups(of, **values):
    return {group: trials(of, value, target=[group]) for group, value in values.items()}


def trainings(of, value, count=3):
    return [of({1.0: value + shift}, 0.9 + shift, model=f"m{shift}", corruption="random") for shift in SEEDS[:count]]


def both(of, random, gradient, **settings):
    """Return a record with a random corruption of three trials and one along the gradient."""
    first, second = trials(of, random, **settings), of({1.0: gradient}, **settings)
    return replace(first, corruptions=first.corruptions + second.corruptions)


def two(of, random, gradient):
    """Return a record with two kinds of corruption of three trials each."""
    first, second = trials(of, random), of({1.0: [gradient + shift for shift in SHIFTS]})
    return replace(first, corruptions=first.corruptions + second.corruptions)


def sized(records, **sizes):
    return {name: replace(record, parameters=sizes.get(name, 10)) for name, record in records.items()}


def noted(record, note):
    return replace(record, corruptions=tuple(replace(row, notes=(note,)) for row in record.corruptions))


def with_data(of, data, named):
    return {
        name: replace(of({1.0: value}, data=one), evaluated_on=source)
        for name, value, one, source in zip("ab", (0.5, 0.6), data, named, strict=True)
    }


NAMED = EvaluationData("dev.tsv", rows=6)
WEAK = {"a": (0.85, 0.85), "b": (0.8, 0.8), "c": (0.4, 0.2)}

# Words of a statement; the report that has it; the nearest one that must not.
ONE_MODEL = {
    "no strength in common": (
        lambda of: RobustnessReport({"a": of({1.0: 0.5}), "b": of({2.0: 0.5})}),
        lambda of: RobustnessReport({"a": of({1.0: 0.5}), "b": of({1.0: 0.5})}),
    ),
    "others gets better": (
        lambda of: RobustnessReport(probe(of, a=(0.95, 0.95), b=(0.95, 0.95), c=(0.4, 0.2))),
        lambda of: RobustnessReport(probe(of, a=(0.9, 0.9), b=(0.9, 0.9), c=(0.4, 0.2))),
    ),
    "So is the drop of d": (
        lambda of: RobustnessReport(groups(of, a=0.8, b=0.8, c=0.2, d=0.3)),
        lambda of: RobustnessReport(groups(of, a=0.8, b=0.8, c=0.2, d=0.8)),
    ),
    "and 1 more": (
        lambda of: RobustnessReport(probe(of, x=(0.5, 0.5), y=(0.5, 0.5), **{f"g{i}": (nan, 0.5) for i in range(6)})),
        lambda of: RobustnessReport(probe(of, x=(0.5, 0.5), y=(0.5, 0.5), **{f"g{i}": (nan, 0.5) for i in range(5)})),
    ),
    "efend it with `ParameterDefenseTrainer(..., target_modules=['c'])`": (
        lambda of: RobustnessReport(probe(of, **WEAK)),
        lambda of: RobustnessReport(
            {
                name: replace(record, target={**record.target, "exclude_modules": ["c.0"]})
                for name, record in probe(of, **WEAK).items()
            }
        ),
    ),
    "It gets better, too": (
        lambda of: RobustnessReport(of({1.0: 0.95, 2.0: 0.5})),
        lambda of: RobustnessReport(of({1.0: 0.905, 2.0: 0.5})),
    ),
    "though one does at one of these": (
        lambda of: RobustnessReport(probe(of, a=(0.95, 0.85), b=(0.9, 0.9))),
        lambda of: RobustnessReport(probe(of, a=(0.905, 0.895), b=(0.9, 0.9))),
    ),
    "at ε=1;": (
        lambda of: RobustnessReport(probe(of, a=(0.85,), b=(0.8,))),
        lambda of: RobustnessReport(probe(of, a=(0.85, 0.8), b=(0.8, 0.8))),
    ),
    # What is not ranked is no part of "no group": it may be the worst.
    "no group makes": (
        lambda of: RobustnessReport(probe(of, a=(0.95, 0.85), b=(0.9, 0.9))),
        lambda of: RobustnessReport(probe(of, a=(0.95, 0.85), b=(0.9, 0.9), c=(nan, nan))),
    ),
    "b is the weakest, 1.1 times": (
        lambda of: RobustnessReport(probe(of, a=(0.6, 0.5), b=(0.6, 0.4))),
        lambda of: RobustnessReport(probe(of, a=(0.6, 0.5), b=(0.6, 0.4), c=(nan, nan))),
    ),
    "no difference between the groups is": (
        lambda of: RobustnessReport(groups(of, a=0.5, b=0.505)),
        lambda of: RobustnessReport(groups(of, a=0.5, b=0.505, c=nan)),
    ),
    # A mean over repetitions hides what single ones lose.
    "stays within 1 % of its value without corruption, 90.0 %, at every strength.": (
        lambda of: RobustnessReport(of({1.0: 0.9})),
        lambda of: RobustnessReport(of({1.0: (0.8, 1.0)}, corruption="random")),
    ),
    "is it worse by more than 1 % of its value without corruption.": (
        lambda of: RobustnessReport(of({1.0: 0.95, 2.0: 0.9})),
        lambda of: RobustnessReport(of({1.0: (0.95, 0.95), 2.0: (0.8, 1.0)}, corruption="random")),
    ),
    "without corruption, 90.0 %: none is fragile": (
        lambda of: RobustnessReport(probe(of, a=(0.9,), b=(0.9,))),
        lambda of: RobustnessReport(probe(of, a=((0.8, 1.0),), b=((0.9, 0.9),))),
    ),
    "measured once or came out the same": (
        lambda of: RobustnessReport(probe(of, **WEAK)),
        lambda of: RobustnessReport({"a": trainings(of, 0.8), "b": trainings(of, 0.8, 2), "c": trainings(of, 0.2)}),
    ),
    "not all groups were measured as often": (
        lambda of: RobustnessReport({"a": trainings(of, 0.8), "b": trainings(of, 0.8, 2), "c": trainings(of, 0.2)}),
        lambda of: RobustnessReport(probe(of, **WEAK)),
    ),
    # Notes
    "Repetitions are 3 records": (
        lambda of: RobustnessReport(trainings(of, 0.5)),
        lambda of: RobustnessReport(trials(of, 0.5)),
    ),
    "trials of random corruptions of the same trained weights": (
        lambda of: RobustnessReport(trials(of, 0.5)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "Everything was measured once": (
        lambda of: RobustnessReport(of({1.0: 0.5})),
        lambda of: RobustnessReport(trials(of, 0.5)),
    ),
    "Fragility is the mean drop": (
        lambda of: RobustnessReport(probe(of, **WEAK)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "judged by Welch's t-test, one-sided": (
        lambda of: RobustnessReport(groups(of, a=0.5, b=0.6)),
        lambda of: RobustnessReport(probe(of, **WEAK)),
    ),
    "Every group was corrupted with the same strengths": (
        lambda of: RobustnessReport(sized(probe(of, a=(0.5, 0.4), b=(0.5, 0.4)), a=20)),
        lambda of: RobustnessReport(sized({"a": of({1.0: 0.5, 2.0: 0.4}), "b": of({1.0: 0.5})}, a=20)),
    ),
    "with the same strengths, though their": (
        lambda of: RobustnessReport(sized({"a": both(of, 0.5, 0.4), "b": both(of, 0.5, 0.4)}, a=20)),
        lambda of: RobustnessReport(sized({"a": both(of, 0.5, 0.4), "b": of({1.0: 0.5})}, a=20)),
    ),
    "sizes differ: 10 to 20 weights": (
        lambda of: RobustnessReport(sized({"a": of({1.0: 0.5, 2.0: 0.4}), "b": of({1.0: 0.5})}, a=20)),
        lambda of: RobustnessReport({"a": of({1.0: 0.5, 2.0: 0.4}), "b": of({1.0: 0.5})}),
    ),
    "Noticed while measuring: slow": (
        lambda of: RobustnessReport(of({1.0: 0.5}, notes=("slow",))),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "Noticed while measuring: random L2 ε=1: slow": (
        lambda of: RobustnessReport(noted(trials(of, 0.5), "slow")),
        lambda of: RobustnessReport(trials(of, 0.5)),
    ),
    "measuring: 2 more notes": (
        lambda of: RobustnessReport(of({1.0: 0.5}, notes=tuple("abcdefghij"))),
        lambda of: RobustnessReport(of({1.0: 0.5}, notes=tuple("abcdefgh"))),
    ),
    # Tables, and their captions
    "95 % confidence interval": (
        lambda of: RobustnessReport(trials(of, 0.5)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "| fragility": (
        lambda of: RobustnessReport(probe(of, **WEAK)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "mean from 0 on": (
        lambda of: RobustnessReport(of({1.0: 0.5})),
        lambda of: RobustnessReport(of({0.0: 0.9, 1.0: 0.5})),
    ),
    "guessed: unit": (
        lambda of: RobustnessReport(of({1.0: 0.5})),
        lambda of: RobustnessReport(of({1.0: 0.5}), unit="share"),
    ),
    "data | dev.tsv": (
        lambda of: RobustnessReport(replace(of({1.0: 0.5}), evaluated_on=NAMED)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "task | translation": (
        lambda of: RobustnessReport(replace(of({1.0: 0.5}), task="translation")),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "(SHA-256) | not given": (
        lambda of: RobustnessReport(of({1.0: 0.5})),
        lambda of: RobustnessReport(of({1.0: 0.5}, data="12ab")),
    ),
    "seeds of trials | 0, 1, 2 ": (
        lambda of: RobustnessReport(trials(of, 0.5)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "records per group | 3 ": (
        lambda of: RobustnessReport(trainings(of, 0.5)),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
    "targets | {'target_modules': ['head']}": (
        lambda of: RobustnessReport(of({1.0: 0.5}, target=["head"])),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
}

SEVERAL = {
    "no such difference in the others": (
        lambda of: compare({"x": two(of, 0.5, 0.5), "y": two(of, 0.8, 0.5)}),
        lambda of: compare({"x": two(of, 0.5, 0.5), "y": two(of, 0.8, 0.8)}),
    ),
    # What was measured once is no difference that was judged.
    "; no such difference": (
        lambda of: compare({"x": two(of, 0.5, 0.5), "y": two(of, 0.8, 0.5)}),
        lambda of: compare({"x": both(of, 0.5, 0.5), "y": both(of, 0.8, 0.2)}),
    ),
    "No difference is beyond the spread over trials in 2 comparisons.": (
        lambda of: compare({"x": two(of, 0.5, 0.5), "y": two(of, 0.505, 0.505)}),
        lambda of: compare({"x": both(of, 0.5, 0.5), "y": both(of, 0.505, 0.1)}),
    ),
    "no spread to judge the rest by": (
        lambda of: compare({"x": both(of, 0.5, 0.5), "y": both(of, 0.505, 0.1)}),
        lambda of: compare({"x": two(of, 0.5, 0.5), "y": two(of, 0.505, nan)}),
    ),
    "There is no spread to judge that by": (
        lambda of: compare({"x": of({1.0: 0.5}), "y": of({1.0: 0.6})}),
        lambda of: compare({"x": trials(of, 0.5), "y": trials(of, 0.6)}),
    ),
    "cannot be told in 1, where": (
        lambda of: compare({"x": both(of, 0.5, 0.5), "y": both(of, 0.8, nan)}),
        lambda of: compare({"x": both(of, 0.5, 0.5), "y": both(of, 0.8, 0.5)}),
    ),
    "; not beyond the spread, p": (
        lambda of: compare({"x": trials(of, 0.5), "y": trials(of, 0.505)}),
        lambda of: compare({"x": trials(of, 0.5), "y": trials(of, 0.8)}),
    ),
    "; beyond the spread, p": (
        lambda of: compare({"x": trials(of, 0.5), "y": trials(of, 0.8)}),
        lambda of: compare({"x": trials(of, 0.5), "y": trials(of, 0.505)}),
    ),
    "no spread is known": (
        lambda of: compare({"x": of({1.0: 0.5}), "y": of({1.0: 0.8})}),
        lambda of: compare({"x": trainings(of, 0.5), "y": trainings(of, 0.8)}),
    ),
    "so there is no difference to tell": (
        lambda of: compare({"x": of({1.0: 0.5}), "y": of({1.0: nan})}),
        lambda of: compare({"x": of({1.0: 0.5}), "y": of({1.0: 0.6})}),
    ),
    "judged by Welch's t-test, two-sided": (
        lambda of: compare({"x": trials(of, 0.5), "y": trials(of, 0.8)}),
        lambda of: compare({"x": of({1.0: 0.5}), "y": of({1.0: 0.8})}),
    ),
    "Repetitions are 2 to 3 records": (
        lambda of: compare({"x": trainings(of, 0.5), "y": trainings(of, 0.8, 2)}),
        lambda of: compare({"x": trainings(of, 0.5), "y": trainings(of, 0.8)}),
    ),
    # Beside seeds a single record has its trials, one by one.
    "spread over records in": (
        lambda of: compare({"x": trainings(of, 0.5), "y": trainings(of, 0.8)}),
        lambda of: compare({"x": trainings(of, 0.5), "y": trials(of, 0.8)}),
    ),
    "trials within a record count as their mean.": (
        lambda of: compare({"x": trainings(of, 0.5), "y": of({1.0: 0.8}, corruption="random")}),
        lambda of: compare({"x": trainings(of, 0.5), "y": trials(of, 0.8)}),
    ),
    "one by one": (
        lambda of: compare({"x": trainings(of, 0.5), "y": trials(of, 0.8)}),
        lambda of: compare({"x": trainings(of, 0.5), "y": trainings(of, 0.8)}),
    ),
    "do not all say": (
        lambda of: compare(with_data(of, "12", (NAMED, None))),
        lambda of: compare(with_data(of, "12", (NAMED, EvaluationData("copy", "org/copy", rows=6)))),
    ),
    "may be of different data": (
        lambda of: compare(with_data(of, "12", (NAMED, EvaluationData("copy", "org/copy", rows=6)))),
        lambda of: compare(with_data(of, "11", (NAMED, NAMED))),
    ),
    "as many rows": (
        lambda of: compare(with_data(of, "12", (NAMED, NAMED))),
        lambda of: compare(with_data(of, "12", (replace(NAMED, rows=None),) * 2)),
    ),
    "layer corrupted: accuracy": (
        lambda of: compare({name: {"layer": of({1.0: value}), "head": of({1.0: 0.5})} for name, value in SIDES}),
        lambda of: compare({name: {"layer": of({1.0: value})} for name, value in SIDES}),
    ),
    "| x: model": (
        lambda of: compare({"x": of({1.0: 0.5}), "y": of({1.0: 0.6})}),
        lambda of: RobustnessReport(of({1.0: 0.5})),
    ),
}
# Beside colours and curves, which Markdown has not.
PICTURES = {
    "The stronger the colour": (
        lambda of: RobustnessReport(of({1.0: 0.5})),
        lambda of: RobustnessReport(of({1.0: 0.9, 2.0: 0.95})),
    ),
    "since one strength was measured or nothing changes": (
        lambda of: RobustnessReport(of({1.0: 0.5})),
        lambda of: RobustnessReport(of({1.0: 0.5, 2.0: 0.4})),
    ),
    "Bars are 95 % confidence intervals": (
        lambda of: RobustnessReport(of({1.0: (0.5, 0.6), 2.0: (0.3, 0.4)}, corruption="random")),
        lambda of: RobustnessReport(of({1.0: 0.5, 2.0: 0.4}, corruption="random")),
    ),
    'class="legend"': (
        lambda of: compare({"x": of({1.0: 0.5, 2.0: 0.4}), "y": of({1.0: 0.6, 2.0: 0.5})}),
        lambda of: RobustnessReport(of({1.0: 0.5, 2.0: 0.4})),
    ),
    "corruptions, in the order of the table": (
        lambda of: RobustnessReport(of({1.0: 0.5, 2.0: 0.4}, corruption="mine")),
        lambda of: RobustnessReport(of({1.0: 0.5, 2.0: 0.4})),
    ),
}
SIDES = (("x", 0.5), ("y", 0.8))


@pytest.mark.slow
@for_each("words", [*ONE_MODEL, *SEVERAL, *PICTURES])
def test_is_said_where_it_holds_and_nowhere_else(record_of, tmp_path, words):
    def said(of_records):
        report = of_records(record_of)
        page = report.to_html(tmp_path / "a.html") if words in PICTURES else report.to_markdown(tmp_path / "a.md")
        return re.sub(" +", " ", page.read_text(encoding="utf-8").replace("\\", ""))

    holds, does_not = {**ONE_MODEL, **SEVERAL, **PICTURES}[words]
    assert words in said(holds)
    assert words not in said(does_not)
