"""The verdict says what the numbers say, and no more."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import scipy.stats
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st

from hf_parcor import CorruptionRecord, FloatQuantization, MetricInfo, Quantization, RobustnessReport, SweepRecord
from hf_parcor.records import EvaluationData, EvaluationRecord
from hf_parcor.records.metric_info import SHARE
from hf_parcor.reports.content import heat_map, panels, summary
from hf_parcor.reports.numbers import Numbers
from hf_parcor.reports.study import Curve, Point, Study
from hf_parcor.reports.verdict import adjusted_p_values, fragility, rows_counted
from hf_parcor.statistics import Alternative

nan, inf = math.nan, math.inf
REMEDY = "ParameterDefenseTrainer(..., target_modules=['c'])"


@pytest.fixture
def probe_of(record_of):
    """Return a builder of a probe: the metric of each group at ε = 1 and 2."""

    def build(groups, **settings):
        return {
            group: record_of(dict(zip((1.0, 2.0), values, strict=True)), target=[group], **settings)
            for group, values in groups.items()
        }

    return build


@pytest.mark.parametrize(
    ("corruptions", "rounds"),
    [
        ([("quantization", {"bits": 4})], Quantization(4)),
        (
            [("quantization", {"bits": 5, "per": 32}), ("quantization", {"bits": 4, "per": 32})],
            Quantization(4, per=32),
        ),
        ([("float_quantization", {"format": "nf4", "per": 64})], FloatQuantization("nf4", per=64)),
        ([("gaussian_noise", {"std": 0.1})], None),
        ([("quantization", {"bits": 4}), ("gaussian_noise", {"std": 0.1})], [Quantization(4), None]),
    ],
)
def test_what_few_bits_break_is_defended_for_them(corruptions, rounds):
    rows = [CorruptionRecord(name, name, settings, (0,), {"accuracy": (0.2,)}) for name, settings in corruptions]
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
    groups = {"a": 0.88, "b": 0.87, "c": 0.2}
    records = {}
    for group, value in groups.items():
        measured = tuple(replace(row, metrics={"accuracy": (value - place / 100,)}) for place, row in enumerate(rows))
        records[group] = EvaluationRecord("m", {"target_modules": [group]}, 1, clean, measured)
    said = " ".join(RobustnessReport(records).verdict)
    asked = re.findall(
        r"ParameterDefenseTrainer\(\.\.\., (?:defense=CorruptionRisk\((.*?)\), )?target_modules=\['c'\]", said
    )
    assert [eval(one) if one else None for one in asked] == (rounds if isinstance(rounds, list) else [rounds])


ONCE = {
    "clear": (
        {"a": (0.85, 0.85), "b": (0.8, 0.8), "c": (0.4, 0.2)},
        {},
        [
            "c is 8 times as fragile as the median of the others.",
            "falls by 60.0 points",
            "falls by 7.5 points",
            "If that",
        ],
        ["That is beyond the spread"],
    ),
    "others lose nothing": (
        {"a": (0.9, 0.9), "b": (0.9, 0.9), "c": (0.4, 0.2)},
        {},
        ["c is the most fragile, while the median of the others loses next to nothing.", REMEDY],
        ["times as fragile"],
    ),
    "alike": (
        {"a": (0.6, 0.5), "b": (0.6, 0.4), "c": (0.5, 0.4)},
        {},
        ["c is the weakest, 1.2 times as fragile as the median of the others;", "from 2 times on", "With c corrupted"],
        ["Trainer"],
    ),
    "all the same": (
        {"a": (0.5, 0.5), "b": (0.5, 0.5), "c": (0.4, 0.6)},
        {},
        ["no group is weaker than another: with any one corrupted, accuracy falls by 40.0 points on average over ε=1"],
        ["Trainer", "weakest", "times"],
    ),
    "two of the weakest": (
        {"a": (0.7, 0.5), "b": (0.6, 0.4), "c": (0.5, 0.5)},
        {},
        ["b, c are the weakest, 1.1 times as", "With b corrupted, as with c, accuracy falls by 40.0 points"],
        ["Trainer", "is the weakest"],
    ),
    "nothing lost": (
        {"a": (0.9, 0.9), "b": (0.895, 0.9), "c": (0.9, 0.892)},
        {},
        ["no group loses more than 1 % of the accuracy without corruption, 90.0 %: none is fragile", "ε=1 … ε=2"],
        ["Trainer", "weakest"],
    ),
    "a group is broken": (
        {"a": (0.85, 0.85), "b": (nan, 0.8), "c": (0.4, 0.2)},
        {},
        ["c is 12 times as fragile", "Not ranked, since accuracy is not a finite number: b."],
        [],
    ),
    "all are broken": (
        {"a": (nan, 0.5), "b": (0.5, nan)},
        {},
        ["fewer than two groups can be ranked"],
        ["fragile as"],
    ),
    "clean is NaN": ({"a": (0.5, 0.5), "b": (0.1, 0.1)}, {"clean": nan}, ["not a finite number without"], ["Trainer"]),
    "clean is 0": ({"a": (0.0, 0.0), "b": (0.0, 0.0)}, {"clean": 0.0}, ["there is nothing to lose"], ["Trainer"]),
    "one group": ({"c": (0.7, 0.4)}, {}, ["falls from 90.0 % to 40.0 % at ε=2"], ["Trainer", "times"]),
    "one group holds": ({"c": (0.9, 0.9)}, {}, ["stays within 1 %", "90.0 %"], ["falls"]),
    "one group unchanged": (
        {"c": (0.9, 0.9)},
        {"unchanged": (1.0, 2.0)},
        ["no weight of c changed at ε=1, ε=2: accuracy says nothing of it"],
        ["within"],
    ),
    "one group unchanged once": (
        {"c": (0.9, 0.4)},
        {"unchanged": (1.0,)},
        ["falls from 90.0 % to 40.0 % at ε=2. No weight changed at ε=1."],
        ["nothing of it"],
    ),
    "one broken group": ({"c": (0.9, nan)}, {}, ["accuracy is not a finite number at ε=2"], ["falls"]),
    "loss": (
        {"a": (1.1, 1.1), "b": (1.2, 1.2), "c": (4.0, 6.0)},
        {"clean": 1.0, "metric": "loss"},
        ["c is 27 times as fragile", "loss rises by 4 on average over ε=1 … ε=2"],
        ["points", "%"],
    ),
    "perplexity that falls": (
        {"a": (9.0, 8.0), "b": (9.0, 9.0), "c": (9.5, 9.0)},
        {"clean": 10.0, "metric": "eval_perplexity"},
        ["no group adds more than 1 % to the eval_perplexity", "gets better"],
        ["Trainer"],
    ),
}


@pytest.mark.parametrize(("groups", "settings", "said", "unsaid"), ONCE.values(), ids=ONCE)
def test_a_single_measurement(probe_of, groups, settings, said, unsaid):
    probe = probe_of(groups, **settings)
    [text] = RobustnessReport(probe, settings.get("metric", "accuracy")).verdict
    assert text.startswith("gradient-based, L2: ")
    assert [part for part in said if part not in text] == []
    assert [part for part in unsaid if part in text] == []


def seeds(probe_of, groups, shifts):
    return [
        probe_of({group: [value + shift * (1 + index) for value in values] for index, (group, values) in groups})
        for shift, groups in ((shift, list(enumerate(groups.items()))) for shift in shifts)
    ]


class TestRepetitions:
    def test_beyond_the_spread(self, probe_of):
        groups = {"a": (0.85, 0.85), "b": (0.8, 0.8), "c": (0.4, 0.2)}
        [text] = RobustnessReport(seeds(probe_of, groups, (-0.01, 0.0, 0.01))).verdict
        assert "c is 8 times as fragile as the median of the others." in text
        assert "beyond the spread over records (p" in text
        assert text.endswith(f" Defend it with {REMEDY}")
        assert "If that holds" not in text

    @pytest.mark.parametrize("rows", [None, 100, 872, 20_000, 10**9])
    @pytest.mark.parametrize("trials", [1, 500])
    @pytest.mark.parametrize("metric", ["accuracy", "f1"])
    def test_what_is_worth_defending_is_more_than_chance(self, record_of, rows, trials, metric):
        """Half a point is beyond the spread of 500 trials: not for its own sake is a part to be defended."""
        clean, seen = 0.9, set()
        least = 0.01 * clean
        if rows and metric == "accuracy":
            least = max(least, math.sqrt(clean * (1 - clean) / rows))
        for gap in (0.005, 0.0085, 0.0095, 0.0099, 0.0105, 0.028, 0.032, 0.2):
            values = {"a": 0.895, "b": 0.896, "c": 0.8955 - gap}
            spread = [1e-4 * (-1) ** trial for trial in range(trials)]
            probe = {
                name: replace(
                    record_of(
                        {1.0: [value + one for one in spread]},
                        clean,
                        metric=metric,
                        corruption="random",
                        target=[name],
                    ),
                    evaluated_on=EvaluationData("dev", rows=rows),
                )
                for name, value in values.items()
            }
            [text] = RobustnessReport(probe, metric, unit=SHARE).verdict
            assert ("Trainer" in text) == (gap >= least), (gap, text)
            assert ("Defend it" in text) == (gap >= least and trials > 1)
            if trials > 1 and "none is fragile" not in text:
                assert "beyond the spread" in text
                if "worth defending" in text:
                    assert Numbers(SHARE).difference(least) in text
            seen.add("Trainer" in text)
        assert seen == {True, False}

    def test_within_the_spread(self, probe_of):
        groups = {"a": (0.85, 0.85), "b": (0.8, 0.8), "c": (0.4, 0.2)}
        [text] = RobustnessReport(seeds(probe_of, groups, (-0.15, 0.0, 0.15))).verdict
        assert "no difference between the groups is beyond the spread over records (p = " in text
        assert "Trainer" not in text

    def test_records_that_are_equal_have_no_spread(self, probe_of):
        probe = probe_of({"a": (0.85, 0.85), "b": (0.8, 0.8), "c": (0.4, 0.2)})
        alike = [{group: replace(record, model=seed) for group, record in probe.items()} for seed in ("1", "2", "3")]
        [text] = RobustnessReport(alike).verdict
        assert "came out the same each time" in text

    def test_trials_are_named_as_such(self, record_of):
        values = {"a": (0.85, 0.84, 0.86), "b": (0.8, 0.81, 0.79), "c": (0.3, 0.32, 0.31)}
        probe = {name: record_of({1.0: trials}, corruption="random", target=[name]) for name, trials in values.items()}
        assert "beyond the spread over trials" in RobustnessReport(probe).verdict[0]

    def test_lists_by_group_are_lists_of_probes(self, probe_of):
        probes = seeds(probe_of, {"a": (0.8, 0.8), "b": (0.6, 0.4)}, (-0.01, 0.0, 0.02))
        by_group = {group: [probe[group] for probe in probes] for group in ("a", "b")}
        assert RobustnessReport(probes).verdict == RobustnessReport(by_group).verdict

    def test_what_a_probe_returned_is_taken_as_it_is(self, probe_of):
        groups = [{"a": (0.8, 0.8), "b": (value, 0.4)} for value in (0.5, 0.6, 0.7)]
        probes = [dict(probe_of(group)) for group in groups]
        sweeps = [SweepRecord(probe, "", 1, 0) for probe in probes]
        for found, plain in ((sweeps[0], probes[0]), (sweeps, probes)):
            assert RobustnessReport(found).verdict == RobustnessReport(plain).verdict
        compared = RobustnessReport.compare({"one": sweeps[:2], "two": sweeps[1:]})
        assert compared.verdict == RobustnessReport.compare({"one": probes[:2], "two": probes[1:]}).verdict
        with pytest.raises(ValueError, match="expected the same groups in each repetition"):
            RobustnessReport([sweeps[0], SweepRecord({"a": probes[1]["a"]}, "", 1, 0)])


def states(record, **info):
    """Return a record whose metric states what it means."""
    [metric] = record.clean.metrics
    return replace(record, metric_info={metric: MetricInfo(**info)})


CLEAN = 8.0
curves = st.lists(st.sampled_from([0.0, 4.0, 7.9, 7.95, 8.0, 8.05, 8.1, 12.0, 40.0]), min_size=1, max_size=3)


class TestDirection:
    """What is said of a metric follows from how much worse it is in its own direction."""

    @given(curves, st.booleans())
    def test_of_one_group_each_statement_is_what_the_numbers_say(self, record_of, values, greater):
        record = states(record_of(dict(enumerate(values, start=1)), CLEAN, metric="score"), greater_is_better=greater)
        [text] = RobustnessReport(record, "score").verdict
        worse, better = ("falls", "rises") if greater else ("rises", "falls")
        drops = [(CLEAN - value if greater else value - CLEAN) for value in values]
        limit = 0.01 * CLEAN
        assert ("stays within 1 %" in text) == all(abs(drop) <= limit for drop in drops)
        assert (f"{worse} from 8 to" in text) == any(drop > limit for drop in drops)
        assert (f"{better} from 8 to" in text) == any(drop < -limit for drop in drops) == ("better" in text)
        if max(drops) > limit:
            assert f"{worse} from 8 to {values[drops.index(max(drops))]:g} at" in text
        if min(drops) < -limit:
            assert f"{better} from 8 to {values[drops.index(min(drops))]:g} at" in text

    @given(
        st.lists(
            st.tuples(*[st.sampled_from([0.0, 4.0, 7.875, 7.9375, 8.0, 8.125, 12.0])] * 2), min_size=2, max_size=4
        )
    )
    def test_of_groups_each_statement_is_what_the_numbers_say(self, record_of, groups):
        probe = {
            name: states(
                record_of({1.0: first, 2.0: second}, CLEAN, metric="score", target=[name]), greater_is_better=True
            )
            for name, (first, second) in zip("abcd", groups, strict=False)
        }
        [text] = RobustnessReport(probe, "score").verdict
        drops = {name: CLEAN - sum(pair) / 2 for name, pair in zip(probe, groups, strict=True)}
        top = max(drops, key=drops.get)
        others = statistics.median(drop for name, drop in drops.items() if name != top)
        limit = 0.01 * CLEAN
        assert ("none is fragile" in text) == all(CLEAN - value <= limit for pair in groups for value in pair)
        same = [name for name, drop in drops.items() if drop == drops[top]]
        if "fragile as" in text or "the most fragile" in text:
            assert f"{top} is" in text or f"{', '.join(same)} are" in text
            assert (f"as with {', '.join(same[1:])}, score" in text) == (len(same) > 1)
            assert drops[top] > limit
        assert ("no group is weaker" in text) == (len(same) == len(drops) and drops[top] > limit)
        assert ("Trainer" in text) <= (drops[top] > limit)
        if "next to nothing" in text:
            assert abs(others) <= limit
        if "none is fragile" in text:
            gained = [name for name, pair in zip(probe, groups, strict=True) if max(pair) - CLEAN > limit]
            assert (f"gets better by more than that with {', '.join(gained)} corrupted" in text) == bool(gained)
        else:
            for drop in (drops[top], others):
                told = "stays as it is" if drop == 0 else f"{'falls' if drop > 0 else 'rises'} by {abs(drop):.4g}"
                assert told in text

    @given(st.lists(st.tuples(*[st.sampled_from([1.0, 7.95, 8.0, 9.0, 12.0])] * 2), min_size=1, max_size=3))
    def test_the_mirror_image_has_the_same_verdict(self, record_of, groups):
        def verdict(sign):
            probe = {
                name: states(
                    record_of({1.0: sign * one, 2.0: sign * two}, sign * CLEAN, metric="score", target=[name]),
                    greater_is_better=sign > 0,
                )
                for name, (one, two) in zip("abc", groups, strict=False)
            }
            return RobustnessReport(probe, "score").verdict

        words = {"falls": "rises", "rises": "falls", "loses more than 1 % of": "adds more than 1 % to"}
        pattern = re.compile("|".join(words))
        mirrored = [pattern.sub(lambda match: words[match.group()], text) for text in verdict(1)]
        assert mirrored == [text.replace("−", "") for text in verdict(-1)]

    @given(st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from([0.25, 0.5, 0.75]), st.booleans())
    def test_of_two_models(self, record_of, first, second, greater):
        models = {
            name: states(record_of({1.0: value}, 0.9, metric="score"), greater_is_better=greater)
            for name, value in (("plain", first), ("other", second))
        }
        text = RobustnessReport.compare(models, "score").verdict[0]
        better = (second > first) if greater else (second < first)
        assert f"better in {int(better)} of 1" in text
        assert f"worse in {int(second != first and not better)}" in text

    def test_an_improvement_is_called_one(self, record_of):
        [text] = RobustnessReport(record_of({1.0: 0.9}, 0.5)).verdict
        assert "rises from 50.0 % to 90.0 %" in text
        assert "stays" not in text

    def test_an_error_that_grows_is_said_to_grow(self, record_of):
        [text] = RobustnessReport(record_of({1.0: 0.9}, 0.1, metric="mse"), "mse").verdict
        assert "rises from 0.1 to 0.9" in text
        assert "stays" not in text

    def test_beyond_the_spread_for_the_better_is_not_fragile(self, record_of):
        trials = {"a": (12.0, 12.1, 12.2), "b": (20.0, 20.1, 20.2), "c": (21.0, 21.1, 21.2)}
        probe = {
            name: states(
                record_of({1.0: values, 2.0: (7.0,) * 3}, 8.0, metric="score", target=[name]), greater_is_better=True
            )
            for name, values in trials.items()
        }
        [text] = RobustnessReport(probe, "score").verdict
        assert "fragile" not in text
        assert "Trainer" not in text
        assert "though one does" in text

    def test_what_holds_for_several_corruptions_is_said_once(self, record_of):
        records = [
            record_of({0.1: value}, 0.0, corruption=kind) for kind, value in (("gradient", 0.0), ("random", 0.5))
        ]
        record = replace(records[0], corruptions=tuple(row for one in records for row in one.corruptions))
        assert RobustnessReport(record).verdict == [
            "gradient-based, L2; random, L2: accuracy is not above 0 without corruption: there is nothing to lose."
        ]

    @pytest.mark.parametrize(("unit", "lost"), [("share", True), ("points", True), ("", False), ("nats", False)])
    def test_only_what_ends_at_0_has_nothing_to_lose_there(self, record_of, unit, lost):
        record = states(record_of({1.0: -30.0}, -5.0, metric="score"), greater_is_better=True, unit=unit)
        [text] = RobustnessReport(record, "score").verdict
        assert ("nothing to lose" in text) == lost
        assert ("falls from −5" in text) != lost


class TestWhatIsGuessed:
    def test_a_direction_that_nobody_states_is_said_to_be_a_guess(self, record_of):
        record = record_of({1.0: 0.9}, 0.5, metric="score")
        report = RobustnessReport(record, "score")
        first, last = report.verdict
        assert "rises from 0.5 to 0.9" in first
        assert "guess" in last
        assert last in report.notes
        assert report.guesses == (last,)
        for greater in (True, False):
            for told in (
                RobustnessReport(record, "score", greater_is_better=greater),
                RobustnessReport(states(record, greater_is_better=greater), "score"),
            ):
                assert len(told.verdict) == 1
                assert told.guesses == ()
                assert ("better" in told.verdict[0]) == greater

    def test_so_is_a_unit(self, record_of):
        record = record_of({1.0: 0.4}, 0.5)
        [guess] = RobustnessReport(record).guesses
        assert "unit of accuracy" in guess
        assert guess in RobustnessReport(record).notes
        for report in (
            RobustnessReport(record, unit="share"),
            RobustnessReport(states(record, greater_is_better=True, unit="share")),
        ):
            assert report.guesses == ()
            assert report.verdict == RobustnessReport(record).verdict

    def test_records_that_state_different_things_are_refused_until_somebody_decides(self, record_of):
        one, other = (
            states(record_of({1.0: 0.4}, 0.5), greater_is_better=True, unit=unit) for unit in ("share", "points")
        )
        with pytest.raises(ValueError, match="one unit"):
            RobustnessReport([one, other])
        assert "of 100" in RobustnessReport([one, other], unit="points").verdict[0]


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        ("share", "falls from 95.0 % to 90.2 %"),
        ("points", "falls from 0.95 of 100 to 0.90 of 100"),
        ("nats", "falls from 0.95 nats to 0.902 nats"),
        ("", "falls from 0.95 to 0.902"),
    ],
)
def test_a_value_is_written_in_the_unit_of_its_metric(record_of, tmp_path, unit, said):
    record = states(record_of({1.0: 0.902}, 0.95, metric="chrf"), greater_is_better=True, unit=unit)
    report = RobustnessReport(record, "chrf")
    assert said in report.verdict[0]
    page = report.to_markdown(tmp_path / "report.md").read_text(encoding="utf-8")
    head = {"share": "chrf (%)", "points": "chrf (of 100)", "nats": "chrf (nats)", "": "chrf"}[unit]
    assert f"{head} under gradient-based" in page
    drop = {"share": "4.8 points", "points": "0.05 points", "nats": "0.048 nats", "": "0.048"}[unit]
    assert re.search(rf"\| +{drop} \|", page)
    assert ("unit: " + unit in page) == bool(unit)


@pytest.mark.parametrize(("greater", "word", "half"), [(True, "drop", "at half"), (False, "rise", "at twice")])
def test_tables_and_notes_name_what_is_bad(record_of, tmp_path, greater, word, half):
    probe = {
        name: states(
            record_of({1.0: 8.0 + by, 2.0: 8.0 - by}, 8.0, metric="x", target=[name]), greater_is_better=greater
        )
        for name, by in (("a", 4.0), ("b", 1.0))
    }
    page = RobustnessReport(probe, "x").to_markdown(tmp_path / "report.md").read_text(encoding="utf-8")
    other = {"drop": "rise", "rise": "drop"}[word]
    assert f"mean {word}" in page
    assert f"mean {other}" not in page
    assert half in page
    assert ("greater is better" in page) == greater
    html = RobustnessReport(probe, "x").to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"the strongest is a {word} of 4." in html


def test_what_is_infinitely_worse_has_a_colour_where_nothing_finite_is_worse(record_of, tmp_path):
    probe = {name: record_of({1.0: 19.0, 2.0: math.inf}, 20.0, metric="perplexity", target=[name]) for name in "ab"}
    html = RobustnessReport(probe, "perplexity").to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the strongest is a rise of ∞." in html
    assert html.count('style="--share:1"') == 2


@pytest.mark.parametrize("greater", [True, False])
def test_what_is_shown_as_lost_is_lost_in_the_direction_of_the_metric(record_of, greater):
    """Of seven groups whose curves go up and then down, the mildest has no line, and the worst is the darkest."""
    probe = {
        f"g{by}": states(
            record_of({1.0: 8.0 + by / 2, 2.0: 8.0 - by / 4}, 8.0, metric="x", target=[str(by)]),
            greater_is_better=greater,
        )
        for by in (range(7) if greater else range(1, 8))
    }
    study = Study.of({"": probe}, "x")
    [series] = study.curves
    drops = {name: (-1 if greater else 1) * int(name[1:]) / 8 for name in probe}  # mean over both
    [panel] = panels(study)
    assert set(panel.lines) == set(sorted(drops, key=drops.get, reverse=True)[:6])
    assert f"largest mean {'drop' if greater else 'rise'}" in panel.title
    largest = max(by / 4 if greater else by / 2 for by in (int(name[1:]) for name in probe))
    table = heat_map(study, series, Numbers())
    for row, shares in zip(table.rows, table.shares, strict=True):
        by = int(row[0][1:])
        up, down = (0.0, by / 4 / largest) if greater else (by / 2 / largest, 0.0)
        assert shares == pytest.approx((0.0, up, down))
    half = {row[0]: row[-1] for row in summary(study, series, Numbers()).rows}
    assert set(half.values()) == {"> 2"}, "nothing was halved or doubled"
    broken = states(record_of({1.0: 16.0, 2.0: 4.0}, 8.0, metric="x"), greater_is_better=greater)
    study = Study.of({"": broken}, "x")
    assert summary(study, series, Numbers()).rows[0][-1] == ("2" if greater else "1")


class TestComparison:
    def models(self, record_of, defended, spread=0.01, clean=0.88):
        def runs(value, at_rest):
            return [record_of({1.0: value + shift}, at_rest + shift) for shift in (-spread, 0.0, spread)]

        return {"plain": runs(0.5, 0.9), "defended": runs(defended, clean)}

    @pytest.mark.parametrize(
        ("defended", "said"),
        [
            (0.8, "Better beyond the spread over records in 1 of 1 comparison, worse in 0"),
            (0.3, "Better beyond the spread over records in 0 of 1 comparison, worse in 1"),
            (0.501, "No difference is beyond the spread over records in 1 comparison"),
        ],
    )
    def test_three_seeds(self, record_of, defended, said):
        first, *_, last = RobustnessReport.compare(self.models(record_of, defended)).verdict
        assert said in first
        assert last.startswith("no corruption: accuracy 88.0 % instead of 90.0 % (−2.0 points; ")

    def test_the_p_values_are_welchs_with_holms_correction(self, record_of):
        models = self.models(record_of, 0.53)
        _, corrupted, clean = RobustnessReport.compare(models).verdict
        first, second = (
            scipy.stats.ttest_ind([x - 0.01, x, x + 0.01], [y - 0.01, y, y + 0.01], equal_var=False).pvalue
            for x, y in ((0.53, 0.5), (0.88, 0.9))
        )
        assert f"p = {2 * first:.2g}" in corrupted
        assert f"p = {max(2 * first, second):.2g}" in clean

    def test_once(self, record_of):
        models = {"plain": record_of({1.0: 0.5}), "defended": record_of({1.0: 0.8})}
        first, second, last = RobustnessReport.compare(models).verdict
        assert "Its mean is better in 1 of 1 comparison, worse in 0. There is no spread to judge that by" in first
        assert "+30.0 points; no spread is known" in second
        assert "+0.0 points" in last

    def test_each_comparison_is_better_worse_the_same_or_cannot_be_told(self, record_of):
        values = (0.8, 0.7, 0.2, 0.5, math.inf, -math.inf, -math.inf, math.nan)
        models = {
            "plain": {f"part {place}": record_of({1.0: 0.5}) for place, _ in enumerate(values)},
            "other": {f"part {place}": record_of({1.0: value}) for place, value in enumerate(values)},
        }
        first, *_ = RobustnessReport.compare(models, unit="").verdict
        assert "better in 2 of 8 comparisons, worse in 1. It cannot be told in 4, " in first

    def test_of_a_loss_less_is_better(self, record_of):
        models = {
            "plain": record_of({1.0: 3.0}, 0.5, metric="loss"),
            "defended": record_of({1.0: 1.0}, 0.5, metric="loss"),
        }
        first, second, _ = RobustnessReport.compare(models, "loss").verdict
        assert "better in 1 of 1" in first
        assert "loss 1 instead of 3 (−2; " in second
        first, *_ = RobustnessReport.compare(models, "loss", greater_is_better=True).verdict
        assert "worse in 1" in first

    def test_nothing_in_common(self, record_of):
        models = {"plain": record_of({1.0: 0.5}), "other": record_of({1.0: 0.5}, corruption="random")}
        with pytest.raises(ValueError, match="got nothing in common but the clean model"):
            RobustnessReport.compare(models)
        both = record_of({1.0: 0.5})
        both = replace(both, corruptions=both.corruptions + models["other"].corruptions)
        assert "other and plain have no corruption of the same group in common." in (
            RobustnessReport.compare({**models, "both": both}).verdict
        )

    @pytest.mark.parametrize("order", [1, -1])
    def test_what_two_share_is_compared_and_the_rest_named(self, record_of, tmp_path, order):
        plain, other = record_of({0.1: 0.6, 0.2: 0.5, 0.3: 0.4}), record_of({0.2: 0.7, 0.3: 0.6, 0.4: 0.5})
        other = replace(other, corruptions=other.corruptions[::order])
        report = RobustnessReport.compare({"plain": plain, "other": other})
        alike = RobustnessReport.compare(
            {"plain": record_of({0.2: 0.5, 0.3: 0.4}), "other": record_of({0.2: 0.7, 0.3: 0.6})}
        )
        assert report.verdict[: len(alike.verdict)] == alike.verdict
        [told] = report.verdict[len(alike.verdict) :]
        assert [label for label in ("ε=0.1", "ε=0.2", "ε=0.3", "ε=0.4") if label in told] == ["ε=0.1", "ε=0.4"]
        assert "ε=0.1" in report.to_markdown(tmp_path / "page.md").read_text().partition("- ")[0]
        alone = json.loads(report.to_json())["in_one_alone"]
        assert alone == {"plain": ["gradient L2 ε=0.1"], "other": ["gradient L2 ε=0.4"]}
        assert json.loads(alike.to_json())["in_one_alone"] == {}


class TestData:
    """What the records do not settle is said, where it is read first; and gone where they settle it."""

    DEV = EvaluationData("dev.tsv", rows=120)

    @pytest.mark.parametrize(
        ("data", "named", "said"),
        [
            (("1", "2"), (None, None), "may be of different data"),
            (("1", "2"), (DEV, None), "may be of different data"),
            (("1", "2"), (DEV, DEV), "one name and as many rows"),
            (("1", "1"), (None, None), ""),
            (("1", "1"), (DEV, DEV), ""),
            (("1", ""), (None, None), ""),
            (("rows:1", "rows:2"), (None, None), "may be of different data"),
            (("rows:1", "rows:2"), (DEV, DEV), "their order differ"),
            (("rows:1", "rows:1"), (None, None), ""),
            (("rows:1", "2"), (None, None), ""),  # of which one is of batches: not known
        ],
    )
    def test_of_two_models(self, record_of, tmp_path, data, named, said):
        models = {
            name: replace(record_of({1.0: value}, data=of_batches), evaluated_on=of_file)
            for name, value, of_batches, of_file in zip("ab", (0.5, 0.6), data, named, strict=True)
        }
        report = RobustnessReport.compare(models)
        first = report.verdict[0]
        assert (said in first) if said else ("data" not in first)
        assert ("fingerprints" in report.to_markdown(tmp_path / "page.md").read_text()) == bool(said)

    def test_of_repetitions(self, record_of, tmp_path):
        seeds = [
            record_of({1.0: value}, model=model) for value, model in ((0.5, "runs/plain"), (0.8, "runs/defended"))
        ]
        page = RobustnessReport(seeds).to_markdown(tmp_path / "page.md").read_text()
        assert "trainings of one model" in page
        assert "runs/plain, runs/defended" in page, "the reader sees that these are two"
        alike = [replace(seed, model="bert", weights=name) for seed, name in zip(seeds, "ab", strict=True)]
        assert "different seeds;" in RobustnessReport(alike).to_markdown(tmp_path / "page.md").read_text()

    def test_of_other_targets_there_is_nothing_to_compare(self, record_of):
        whole = record_of({1.0: 0.5}, target="all")
        part = replace(record_of({1.0: 0.6}, target="all"), target={"target_modules": "all", "exclude_modules": ["a"]})
        with pytest.raises(ValueError, match=r"none in common \('whole': all; 'part': all, exclude_modules a\)"):
            RobustnessReport.compare({"whole": whole, "part": part})
        assert RobustnessReport.compare({"whole": whole, "again": replace(whole, weights="2"), "part": part}).verdict


def test_fragility_needs_groups():
    with pytest.raises(ValueError, match="expected two or more groups, got 1"):
        fragility({"a": 1.0})


def test_what_cannot_be_tested_is_left_out_of_the_correction():
    good = ([3.0, 3.2, 2.8], [1.0, 1.1, 0.9])
    alone = adjusted_p_values({"good": good}, Alternative.GREATER)
    pairs = {"nan": ([nan, 1.0], [0.0, 1.0]), "good": good, "once": ([1.0], [0.5])}
    assert adjusted_p_values(pairs, Alternative.GREATER) == alone


class TestStudy:
    """What is read from records before anything is said of them."""

    def test_points_go_from_the_weakest_to_the_strongest(self, record_of):
        rows = [
            CorruptionRecord(
                "quantization", f"{bits} bits", Quantization(bits).settings(), (0,), {"accuracy": (bits / 10,)}
            )
            for bits in (3, 8, 4)
        ]
        record = record_of({2.0: 0.4, 1.0: 0.6, 4.0: 0.2})
        study = Study.of({"": replace(record, corruptions=(*rows, *record.corruptions))}, "accuracy")
        for curves in study.curves.values():
            [curve] = curves.values()
            means = [point.mean for point in curve.points]
            assert means == sorted(means, reverse=True)
            assert len(means) == 3

    def test_broken_is_what_corruption_broke_in_any_trial(self, record_of):
        record = record_of({1.0: (0.5, 0.5)})
        others = {"loss": ((1.0,), (nan, 1.0)), "odd": ((nan,), (nan, nan)), "f1": ((0.9,), (0.5, 0.4))}
        clean, row = (
            replace(row, metrics={**row.metrics, **{name: values[place] for name, values in others.items()}})
            for place, row in enumerate(record.rows())
        )
        [curves] = Study.of({"": replace(record, clean=clean, corruptions=(row,))}, "accuracy").curves.values()
        assert [point.broken for curve in curves.values() for point in curve.points] == [("loss",)]

    @given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=3), min_size=1, max_size=3), st.booleans())
    def test_the_mean_drop_is_that_of_the_means(self, values, greater):
        points = tuple(Point(float(at), str(at), tuple(map(float, some))) for at, some in enumerate(values))
        curve = Curve(Point(0.0, "", (9.0,)), points, greater)
        expected = 9 - statistics.fmean(map(statistics.fmean, values))
        drops = curve.drops([point.name for point in points])
        assert statistics.fmean(drops) == pytest.approx(expected if greater else -expected)

    def test_the_same_weights_may_be_measured_twice(self, record_of):
        models = {name: replace(record_of({1.0: value}), weights="same") for name, value in (("a", 0.5), ("b", 0.6))}
        assert "better in 1 of 1" in RobustnessReport.compare(models).verdict[0]


class TestErrors:
    @pytest.mark.parametrize("records", [{}, [], {"a": []}, [{}], ["text"], {"a": "text"}, {"a": [3]}])
    def test_no_records(self, records):
        with pytest.raises(ValueError, match="expected an EvaluationRecord, a SweepRecord, a mapping"):
            RobustnessReport(records)

    def test_no_corruptions(self, record_of):
        with pytest.raises(ValueError, match="expected at least one with a corruption"):
            RobustnessReport(record_of({}))

    def test_an_unknown_metric(self, record_of):
        with pytest.raises(ValueError, match="expected one of accuracy, got 'f1'"):
            RobustnessReport(record_of({1.0: 0.5}), "f1")

    def test_repetitions_of_other_corruptions(self, record_of):
        with pytest.raises(ValueError, match="expected the same corruptions in each, got none"):
            RobustnessReport([record_of({1.0: 0.5}), record_of({2.0: 0.5})])

    def test_repetitions_are_taken_in_what_all_have(self, record_of, tmp_path):
        first, second = record_of({0.1: 0.6, 0.2: 0.5}), record_of({0.2: 0.4, 0.1: 0.3, 0.3: 0.2}, model="second seed")
        for runs, kept in (([first, second], (0.1, 0.2)), ([second, record_of({0.3: 0.1})], (0.3,))):
            report = RobustnessReport(runs)
            found = [mean for mean in json.loads(report.to_json())["means"] if mean["corruption"] != "none"]
            assert [mean["strength"] for mean in found] == [f"ε={epsilon:g}" for epsilon in kept]
            for mean, epsilon in zip(found, kept, strict=True):
                rows = [row for run in runs for row in run.corruptions if row.settings["epsilon"] == epsilon]
                assert mean["values"] == [row.mean("accuracy") for row in rows]
            left = {row.label for run in runs for row in run.corruptions if row.settings["epsilon"] not in kept}
            assert [label for label in left if not any(label in note for note in report.notes)] == []

    def test_probes_of_other_groups(self, record_of):
        with pytest.raises(ValueError, match="expected the same groups in each repetition"):
            RobustnessReport([{"a": record_of({1.0: 0.5})}, {"b": record_of({1.0: 0.5})}])
        with pytest.raises(ValueError, match="expected the same groups in each repetition"):
            RobustnessReport([{"a": record_of({1.0: 0.5})}, record_of({1.0: 0.5})])

    def test_one_model_is_no_comparison(self, record_of):
        with pytest.raises(ValueError, match="expected two or more to compare, got 1"):
            RobustnessReport.compare({"a": record_of({1.0: 0.5})})


def of_kinds(record_of, clean, **kinds):
    """A record with several kinds of corruptions, each with the metric at ε = 1, 2, …"""
    records = [
        record_of(dict(enumerate(values, start=1)), clean, corruption=corruption, target="all")
        for corruption, values in kinds.items()
    ]
    return replace(records[0], corruptions=tuple(row for record in records for row in record.corruptions))


class TestTheFirstSentence:
    def test_of_a_comparison_has_the_averages_of_each_family(self, record_of):
        """By hand: (0.2 + 0.3)/2 and 0.1 are two series of one family, each one number; noise loses."""
        plain = of_kinds(record_of, 0.9, gradient=(0.5, 0.3), multi_step=(0.4,), random=(0.8,), mine=(0.7,))
        other = of_kinds(record_of, 0.88, gradient=(0.7, 0.6), multi_step=(0.5,), random=(0.75,), mine=(0.7,))
        first = RobustnessReport.compare({"plain": plain, "defended": other}).verdict[0]
        assert first.startswith(
            "defended against plain: accuracy, on average, +17.5 points in the worst direction, "
            "−5.0 points under noise, +0.0 points under mine, −2.0 points without corruption."
        )

    def test_of_one_model_has_what_harms_most(self, record_of):
        report = RobustnessReport(of_kinds(record_of, 0.9, gradient=(0.5, 0.3), random=(0.9, 0.895), mine=(0.4,)))
        first, *others = report.verdict
        assert first == (
            "accuracy falls most under gradient-based, L2 at ε=2: from 90.0 % to 30.0 %. Under random, L2 it stays "
            "within 1 % of its value without corruption."
        )
        assert len(others) == 3
        broken = of_kinds(record_of, 0.9, gradient=(0.5, nan), random=(0.9, 0.895))
        assert len(RobustnessReport(broken).verdict) == 2, "what broke may harm most"

    @for_each(
        ("metric", "task", "count"),
        [
            ("accuracy", "", 48),
            ("eval_accuracy", "image-classification", 48),
            ("accuracy", "token-classification", 0),  # a row has many
            ("accuracy", "text-generation", 0),
            ("f1", "text-classification", 0),  # no row is worth the same
            ("map", "object-detection", 0),
        ],
    )
    def test_which_metrics_are_shares_of_rows(self, record_of, metric, task, count):
        record = replace(record_of({1.0: 0.5}), evaluated_on=EvaluationData("dev", rows=48), task=task)
        assert rows_counted([record, record], metric, Numbers(SHARE)) == count
        assert rows_counted([record], metric, Numbers("nats")) == 0
        assert rows_counted([record, replace(record, evaluated_on=None)], metric, Numbers(SHARE)) == 0

    @pytest.mark.parametrize(("rows", "worth"), [(48, "One of 48 rows is 2.1 points."), (None, None)])
    def test_says_what_one_row_is_worth(self, record_of, probe_of, rows, worth):
        on = EvaluationData("dev", rows=rows)
        probe = {
            group: replace(one, evaluated_on=on) for group, one in probe_of({"a": (0.6, 0.5), "b": (0.5, 0.5)}).items()
        }
        two = {name: replace(record_of({1.0: value}), evaluated_on=on) for name, value in (("x", 0.5), ("y", 0.6))}
        for report in (RobustnessReport(probe), RobustnessReport.compare(two)):
            first, *others = report.verdict
            assert (worth in first) if worth else "rows" not in first
            assert not any("rows" in text for text in others)


def test_what_repetitions_lack_is_said_of_the_group_that_lacks_it(record_of):
    def probe(value, lacking):
        return {
            group: record_of({e: value for e in (0.1, 0.2) if e != lacking.get(group)}, target=[group])
            for group in ("a", "b")
        }

    for lacking, said in (({"b": 0.2}, "ε=0.2 with b corrupted."), ({"a": 0.2, "b": 0.2}, "ε=0.2.")):
        [note] = [note for note in RobustnessReport([probe(0.8, {}), probe(0.7, lacking)]).notes if "Left" in note]
        assert note == f"Left out, since not all records have it: gradient L2 {said}"


MOVED = {"a": (1.0, 1.1), "b": (1.1, 1.2), "c": (1.6, 1.8)}


class TestWhatTheDataDoNotUse:
    def test_the_others_are_compared_as_if_it_were_not_there(self, probe_of):
        """Most groups may be such: layers for images, of a decoder that reads texts. Their median would be 0."""
        alone = RobustnessReport(probe_of(MOVED, metric="loss")).verdict
        unused = {f"image.{index}": (0.9, 0.9) for index in range(6)}
        records = probe_of({**unused, **MOVED}, metric="loss")
        *said, last = RobustnessReport(records).verdict
        assert said == alone
        assert "c is 4 times as fragile" in said[0]
        assert last.startswith("No metric moves at all with any of 6 groups such as image.0 corrupted")
        study = Study.of({"bert": records})
        of_some = Study.of({"bert": probe_of(MOVED, metric="loss")})
        (series,) = study.curves
        table, expected = (summary(one, series, Numbers(one.info.unit)) for one in (study, of_some))
        place = table.header.index("fragility")
        assert {row[0]: row[place] for row in table.rows} == {
            **dict.fromkeys(unused, "–"),
            **{row[0]: row[place] for row in expected.rows},
        }

    @for_each(
        ("groups", "metric"),
        [
            ({"a": (0.9, 0.9), "b": (0.9, 0.9)}, "loss"),  # a corruption that is too weak
            ({"a": (0.9, 0.9), **MOVED}, "accuracy"),  # answers may move, and no row change
            ({"a": (0.9, 0.9), **MOVED}, "score"),  # of whoever measures
            ({"a": (0.9, 0.91), **MOVED}, "loss"),
        ],
    )
    def test_what_may_be_used(self, probe_of, groups, metric):
        study = Study.of({"bert": probe_of(groups, metric=metric)})
        assert not study.unmoved
