"""The solver against brute force, and budgets that cannot be met."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_parcor import Quantization, RecipeRecord, SensitivityRecord, recipe, sensitivity, uniform_recipe
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.recipes import BudgetError, check_bits, front
from hf_parcor.recipes.exports import torchao_settings
from hf_parcor.records import FormatScore, WeightGroup

KEPT = 16.0
LABELS = ("eight", "five", "four")


def scores_of(table: list[list[tuple[float, float] | None]], sizes: list[int]) -> SensitivityRecord:
    """Return scores of parts that have bits and costs in each format, or do not fit it."""
    cells = [
        FormatScore(f"part {place}", label, cell[0], {"fisher": max(0.0, cell[1])}, {"loss": 1 + cell[1]})
        for place, row in enumerate(table)
        for label, cell in zip(LABELS, row, strict=False)
        if cell is not None
    ]
    groups = {f"part {place}": WeightGroup({f"{place}.weight": size}, KEPT) for place, size in enumerate(sizes)}
    return SensitivityRecord("m", groups, {label: {} for label in LABELS}, tuple(cells), {"loss": 1.0}, "loss")


def every_choice(scores: SensitivityRecord) -> list[tuple[float, float]]:
    """Return average bits and cost of every choice there is."""
    costs, total = scores.costs("loss"), sum(group.parameters for group in scores.groups.values())
    options = [
        [
            (KEPT, 0.0),
            *((cell.bits, max(0.0, costs[place])) for place, cell in scores.by_place.items() if place[0] == group),
        ]
        for group in scores.groups
    ]
    sizes = [group.parameters for group in scores.groups.values()]
    return [
        (
            sum(bits * size for (bits, _), size in zip(chosen, sizes, strict=True)) / total,
            math.fsum(cost for _, cost in chosen),
        )
        for chosen in itertools.product(*options)
    ]


def cost_of(record: RecipeRecord, scores: SensitivityRecord) -> float:
    costs = scores.costs("loss")
    return math.fsum(
        max(0.0, costs[group, one.format]) for group, one in record.choice.items() if one.format is not None
    )


cell = st.tuples(st.sampled_from([2.0, 3.25, 4.5, 5.0, 8.5]), st.floats(-0.01, 1.0).map(lambda cost: round(cost, 6)))
tables = st.integers(1, 4).flatmap(
    lambda parts: st.tuples(
        st.lists(st.tuples(cell, cell, st.one_of(cell, st.none())).map(list), min_size=parts, max_size=parts),
        st.lists(st.sampled_from([1, 7, 64, 10**5]), min_size=parts, max_size=parts),
    )
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(tables, st.floats(2.0, 16.0), st.floats(0.0, 1.5), st.sampled_from([1.0, 1e-7, 1e6]))
def test_no_choice_is_better(table, bits, loss, unit) -> None:
    rows = [[None if one is None else (one[0], one[1] * unit) for one in row] for row in table[0]]
    scores, loss = scores_of(rows, table[1]), loss * unit
    choices = every_choice(scores)
    room = 1 + 1e-9  # a limit has as much, for the rounding of sums
    within = [cost for size, cost in choices if size <= bits * room]
    if within:
        chosen = recipe(scores, bits=bits)
        assert chosen.bits <= bits * room
        assert cost_of(chosen, scores) == pytest.approx(min(within), rel=1e-6, abs=1e-8 * unit)
    else:
        nearest = min(size for size, _ in choices)
        with pytest.raises(BudgetError, match="bits") as caught:
            recipe(scores, bits=bits)
        assert caught.value.nearest == pytest.approx(nearest)
        assert recipe(scores, bits=caught.value.nearest).bits == pytest.approx(nearest)
    chosen = recipe(scores, loss=loss)
    assert cost_of(chosen, scores) <= loss * room
    assert chosen.bits == pytest.approx(min(size for size, cost in choices if cost <= loss * room), rel=1e-6)


def with_risks(scores: SensitivityRecord, risks: list[list[float]]) -> SensitivityRecord:
    """Return the same scores, but for the Fisher scores of each part."""
    flat = dict(zip(scores.by_place, itertools.chain(*risks), strict=True))
    cells = [replace(cell, scores={"fisher": flat[cell.group, cell.format]}) for cell in scores.cells]
    return replace(scores, cells=tuple(cells))


risky = st.lists(
    st.tuples(*[st.tuples(st.sampled_from([0.0, -0.1, 0.25]), st.integers(0, 9).map(float))] * 3),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(risky, st.sampled_from([4.0, 5.0, 6.0, 8.0, 16.0]))
def test_of_what_costs_the_same_the_least_risky_is_chosen(table, bits) -> None:
    """As of measured gains, which all count as no cost: chance does not decide how few bits a part gets."""
    formats = (8.0, 5.0, 4.0)
    scores = scores_of(
        [[(size, cost) for size, (cost, _) in zip(formats, row, strict=True)] for row in table], [7] * len(table)
    )
    scores = with_risks(scores, [[risk for _, risk in row] for row in table])
    options = [
        [(KEPT, 0.0, 0.0), *((size, max(0.0, cost), risk) for size, (cost, risk) in zip(formats, row, strict=True))]
        for row in table
    ]
    sums = [[sum(part) for part in zip(*chosen, strict=True)] for chosen in itertools.product(*options)]
    least, risk = min((cost, risk) for size, cost, risk in sums if size <= bits * len(table))
    chosen = recipe(scores, bits=bits)
    assert cost_of(chosen, scores) == pytest.approx(least)
    cells = [(group, one.format) for group, one in chosen.choice.items() if one.format is not None]
    assert sum(scores.by_place[cell].scores["fisher"] for cell in cells) == pytest.approx(risk)


@pytest.mark.slow
@for_each("order", [*itertools.permutations([1e-4, 2e-4, 3e-4])])
@for_each("broken", [1.0, 1e6, 1e9, 1e15])
def test_a_part_that_costs_far_more_than_all_others_does_not_hide_their_differences(order, broken) -> None:
    scores = scores_of([[(4.0, broken)], *([(4.0, cost)] for cost in order)], [100] * 4)
    for bits, expected in ((7.0, 6e-4), (10.0, 3e-4), (13.0, 1e-4)):  # of four parts, so many may stay: 1, 2, 3
        assert cost_of(recipe(scores, bits=bits), scores) == pytest.approx(expected)
    within = recipe(scores, loss=3.5e-4)
    assert within.bits == 10.0
    assert cost_of(within, scores) == pytest.approx(3e-4)


def test_a_small_loss_beside_a_large_one_is_kept_without_trying_every_choice(monkeypatch) -> None:
    solved, milp = [], scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", lambda *given, **more: solved.append(1) or milp(*given, **more))
    scores = scores_of([[(4.0, 1e9)], *[[(4.0, 0.005)]] * 6], [100] * 7)
    assert [one.format for one in recipe(scores, loss=0.011).choice.values()].count("eight") == 2
    assert len(solved) <= 4


def test_what_the_solver_prints_is_not_in_the_output_of_a_program(monkeypatch, capfd) -> None:
    """HiGHS prints a line of its own where it corrects a solution, as of recipes for two hundred parts."""
    libc, milp = ctypes.CDLL(None), scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", lambda *given, **more: (libc.puts(b"solver"), milp(*given, **more))[1])
    libc.puts(b"before")
    recipe(scores_of([[(8.0, 0.1), (4.0, 0.2)]] * 2, [100, 300]), bits=5.0)
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


TABLE = [[(8.0, 0.1), (5.0, 0.2), (4.0, 0.9)], [(8.0, 0.0), (5.0, math.nan), (4.0, 0.3)]]


def test_what_breaks_the_model_is_no_choice_and_without_keeping_a_loss_may_be_out_of_reach() -> None:
    scores = scores_of(TABLE, [100, 300])
    assert recipe(scores, bits=4.6).choice["part 1"].format == "four"
    with pytest.raises(BudgetError, match=r"loss.*0\.1") as caught:
        recipe(scores, loss=0.05, keep=False)
    assert recipe(scores, loss=caught.value.nearest, keep=False).bits == 8.0
    kept = recipe(scores, loss=0.05)
    assert kept.choice["part 0"].format is None
    assert kept.spared == ["part 0"]


@for_each("keep", [True, False])
def test_a_part_that_breaks_the_model_is_never_chosen_whatever_it_is_chosen_by(keep) -> None:
    """An accuracy counts NaN as wrong, and a score may be small: what was measured as NaN is out all the same."""
    scores = scores_of([[(8.0, 0.1), (4.0, 0.2)]] * 3, [100, 300, 200])
    cells = tuple(
        replace(one, scores={"fisher": 1e-9}, measured={"loss": math.nan, "accuracy": 0.5})
        if (one.group, one.format) == ("part 1", "five")
        else replace(one, measured={**one.measured, "accuracy": 0.5})
        for one in scores.cells
    )
    scores = replace(scores, cells=cells, clean={"loss": 1.0, "accuracy": 0.5})
    everywhere = [replace(one, measured={"loss": math.nan}) if one.format == "five" else one for one in cells]
    (note,) = recipe(replace(scores, cells=tuple(everywhere)), bits=8.0, by="loss").notes
    assert "3 parts" in note
    for by in ("loss", "accuracy", "fisher"):
        chosen = recipe(scores, bits=6.5, by=by, keep=keep)
        assert chosen.choice["part 1"].format == "eight"
        (note,) = chosen.notes
        assert "five" in note
        assert "part 1" in note
        assert recipe(scores, bits=9.0, by=by, formats=["eight"]).notes == ()
    with pytest.raises(ValueError, match=r"part 1.*keep"):
        recipe(scores, bits=6.5, formats=["five"], keep=False)


def test_scores_that_are_not_finite_leave_the_others_as_they_are() -> None:
    scores = scores_of([[(8.0, 0.1), (4.0, 0.2)]] * 2, [100, 300])
    first, *others = scores.cells
    unknown = replace(others[-1], measured={})
    scores = replace(scores, cells=(replace(first, scores={"fisher": math.nan}), *others[:-1], unknown))
    assert scores.costs("loss")["part 1", "five"] == pytest.approx(0.2), "by the ratio of drops and scores, which is 1"
    assert recipe(scores, bits=4.0, by="loss").bits == 4.0
    assert front(scores, recipe(scores, bits=4.0, by="loss"))


def test_a_metric_that_the_model_as_it_is_has_not_is_no_cost() -> None:
    scores = replace(scores_of(TABLE, [100, 300]), clean={"loss": math.nan})
    with pytest.raises(ValueError, match=r"by: expected .*finite.*nan"):
        recipe(scores, bits=5.0, by="loss")


@pytest.mark.slow
@for_each("without", [math.nan, math.inf, -math.inf])
@for_each("budget", [{"bits": 6.0}, {"loss": 0.25}, {"drop": 0.25}])
def test_a_metric_that_the_model_as_it_is_has_not_leaves_the_others_to_choose_by(without, budget) -> None:
    scores = scores_of(TABLE, [100, 300])
    cells = tuple(replace(one, measured={**one.measured, "f1": without}) for one in scores.cells)
    beside = replace(scores, cells=cells, clean={"f1": without, **scores.clean})
    assert recipe(beside, **budget) == recipe(scores, **budget)
    assert front(beside, recipe(beside, **budget)).keys() == front(scores, recipe(scores, **budget)).keys()


@for_each("keep", [True, False])
def test_the_front_leaves_out_a_score_that_a_part_has_not(keep) -> None:
    scores = scores_of([[(8.0, 0.1), (4.0, 0.2)]] * 2, [100, 300])
    cells = tuple(
        replace(one, scores={**one.scores, "second_order": math.nan if one.group == "part 1" else 0.1})
        for one in scores.cells
    )
    scores = replace(scores, cells=cells)
    found = front(scores, recipe(scores, bits=5.0, keep=keep), keep=keep)
    assert "by fisher" in found
    assert "by second_order" not in found


def test_one_format_that_breaks_parts_in_both_directions_is_in_the_front() -> None:
    scores = scores_of([[(8.0, 0.1), (4.0, math.inf)], [(8.0, 0.1), (4.0, -math.inf)]], [100, 300])
    found = front(scores, recipe(scores, bits=8.0))
    assert math.isnan(found["five"].expected["loss"])
    assert found["eight"].expected["loss"] == pytest.approx(0.2)


def test_the_front_has_each_format_other_budgets_and_each_score() -> None:
    scores = scores_of([[(8.0, 0.1), (5.0, 0.2), (4.0, 0.9)]] * 2, [100, 300])
    chosen = recipe(scores, bits=5.0)
    found = front(scores, chosen, points=3)
    assert list(found)[:4] == ["recipe", *LABELS]
    assert [one.bits for one in found.values() if not one.budget] == [8.0, 5.0, 4.0]
    assert "by fisher" in found
    assert chosen.expected["loss"] == pytest.approx(0.4)
    assert RecipeRecord.from_json(chosen.to_json()) == chosen


@for_each("formats", [None, ["eight", "five"], "eight"])
def test_other_budgets_are_in_the_front_once_a_choice(formats) -> None:
    scores = scores_of([[(8.0, 0.1), (5.0, 0.2), (4.0, 0.9)], [(8.0, 0.3), (5.0, 0.9), None]], [100, 300])
    chosen = recipe(scores, bits=8.0, formats=formats)
    found = front(scores, chosen, points=9, formats=formats)
    alone = [uniform_recipe(scores, label) for label in LABELS if formats is None or label in formats]
    assert [one for one in found.values() if not one.budget] == alone
    ends = [one.bits for one in (chosen, *alone)][1:]
    others = [recipe(scores, bits=bits, formats=formats) for bits in np.linspace(min(ends), max(ends), 9)]
    budgets = [one.choice for name, one in found.items() if name.endswith("bits") or name == "recipe"]
    assert all(one.choice in budgets for one in others)
    assert len({tuple(choice.items()) for choice in budgets}) == len(budgets)


def test_the_front_of_formats_that_fit_nothing_is_the_recipe_alone() -> None:
    scores = replace(scores_of([[None, (5.0, 0.2)]], [100]), formats={"eight": {}})
    chosen = recipe(scores, bits=16.0, formats=["eight"])
    assert front(scores, chosen, formats=["eight"])["recipe"] == chosen
    assert not any(name.endswith("bits") for name in front(scores, chosen, formats=["eight"]))


@for_each("points", [1, 2, 5])
def test_other_budgets_lie_evenly_between_the_formats(points, monkeypatch) -> None:
    scores, asked = scores_of([[(8.0, 0.1), (5.0, 0.2), (3.0, 0.9)]] * 2, [100, 300]), []
    chosen = recipe(scores, bits=5.0)
    monkeypatch.setattr(
        "hf_parcor.recipes.choice.recipe",
        lambda *args, bits, **more: asked.append(bits) or recipe(*args, bits=bits, **more),
    )
    front(scores, chosen, points=points)
    assert asked[:points] == pytest.approx(list(np.linspace(3, 8, points)))


def test_what_was_not_measured_is_estimated_in_the_units_of_the_metric() -> None:
    groups = {name: WeightGroup({name: 10}, KEPT) for name in "abcd"}
    cells = (
        FormatScore("a", "four", 4.0, {"fisher": 1.0}, {"accuracy": 0.7}),
        FormatScore("b", "four", 4.0, {"fisher": 3.0}, {"accuracy": 0.3}),
        FormatScore("c", "four", 4.0, {"fisher": 0.5}),
        FormatScore("d", "four", 4.0, {"fisher": 0.0}, {"accuracy": 0.9}),
    )
    scores = SensitivityRecord("m", groups, {"four": {}}, cells, {"accuracy": 0.9}, "accuracy")
    assert scores.costs("accuracy") == pytest.approx(
        {
            ("a", "four"): 0.2,
            ("b", "four"): 0.6,
            ("c", "four"): 0.1,
            ("d", "four"): 0.0,
        }
    )
    chosen = recipe(scores, drop=0.31)
    assert [name for name, one in chosen.choice.items() if one.format] == ["a", "c", "d"]
    assert chosen.estimated == 1
    assert recipe(scores, bits=4.0, by="fisher").estimated == 1, "a score is for what the record's own metric misses"


@for_each(
    "options, word",
    [
        ({}, "one of them"),
        ({"bits": 4.0, "loss": 1.0}, "bits and loss"),
        ({"bits": -1.0}, "bits"),
        ({"bits": 4.0, "by": "speed"}, "speed"),
        ({"bits": 4.0, "formats": ["two"]}, "two"),
        ({"drop": 0.1, "by": "fisher"}, "score"),
    ],
)
def test_what_is_refused(options, word) -> None:
    with pytest.raises(ValueError, match=word):
        recipe(scores_of(TABLE, [100, 300]), **options)


def test_one_label_is_one_format() -> None:
    """Not its letters, nor those formats whose labels are parts of it."""
    scores = scores_of(TABLE, [100, 300])
    chosen = recipe(scores, bits=9.0, formats="eight", keep=False)
    assert chosen == recipe(scores, bits=9.0, formats=["eight"], keep=False)
    assert list(front(scores, chosen, formats="eight")) == list(front(scores, chosen, formats=["eight"]))
    with pytest.raises(ValueError, match="got eigh;"):
        recipe(scores, bits=9.0, formats="eigh")


def test_what_may_stay_as_it_is_is_not_advised_to() -> None:
    scores = scores_of(TABLE, [100, 300])
    for keep in (True, False):
        with pytest.raises(BudgetError, match="loss: expected") as caught:
            recipe(scores, loss=-1.0, keep=keep)
        assert ("keep=True" in str(caught.value)) == (not keep)
    with pytest.raises(ValueError, match="budget=1") as error:
        recipe(replace(scores, cells=tuple(replace(one, measured={}) for one in scores.cells)), drop=1.0)
    assert "call sensitivity" not in str(error.value), "which a command line cannot"


@for_each("keep", [True, False])
def test_bits_that_no_choice_meets_are_known_without_costs(keep) -> None:
    scores = scores_of(TABLE, [100, 300])
    blank = replace(scores, clean={}, cells=tuple(replace(one, scores={}, measured={}) for one in scores.cells))
    with pytest.raises(BudgetError) as expected:
        recipe(scores, bits=3.0, keep=keep)
    with pytest.raises(BudgetError) as found:
        check_bits(blank, 3.0, keep=keep)
    assert found.value.nearest == expected.value.nearest
    check_bits(blank, found.value.nearest, keep=keep)
    assert recipe(scores, bits=found.value.nearest, keep=keep)
    with pytest.raises(ValueError, match="bits"):
        check_bits(blank, 0.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**4), min_size=2, max_size=3), st.floats(1e-9, 1e9))
def test_the_nearest_budget_that_is_said_is_in_reach(sizes, cost) -> None:
    """Six digits do: none is below what they stand for."""
    scores = scores_of([[(8.0, cost), (5.0, cost), (4.1, cost)], *([[(3.3, cost / 3)]] * (len(sizes) - 1))], sizes)
    for name in ("bits", "loss"):
        with pytest.raises(BudgetError) as caught:
            recipe(scores, **{name: 1e-12}, keep=False)
        said = re.search(r"expected (\S+) or more", str(caught.value))[1]
        assert float(said) == pytest.approx(caught.value.nearest, rel=1e-5)
        assert recipe(scores, **{name: float(said)}, keep=False)


def test_a_format_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="eight"):
        uniform_recipe(scores_of(TABLE, [100, 300]), "two")


GROUPS_OF_32 = [Quantization(bits, 32) for bits in (8, 4, 3)]


def scored(dtype: torch.dtype, formats: list[Quantization]) -> SensitivityRecord:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)).to(dtype)
    batches = [torch.randn(3, 64, dtype=dtype)]
    return sensitivity(
        model, batches, formats, {"a": "0", "b": "1"}, budget=0, loss=lambda m, x: m(x).square().mean(), progress=False
    )


class TestScalesThatKeepAFormatOutOfABudget:
    """A budget of 4.5 bits is below 4 bits with a scale in float32 for each 32: 5 bits, by hand."""

    def test_it_is_said_and_each_way_out_is_one(self) -> None:
        scores = scored(torch.float32, GROUPS_OF_32)
        (note,) = recipe(scores, bits=4.5).notes
        assert uniform_recipe(scores, str(GROUPS_OF_32[1])).bits == 4 + 32 / 32
        assert "5 bits" in note
        (asked,) = map(float, re.findall(r"ask for bits=([\d.]+)", note))
        assert asked >= uniform_recipe(scores, str(GROUPS_OF_32[1])).bits
        assert recipe(scores, bits=asked).notes == ()
        narrow = scored(torch.bfloat16, GROUPS_OF_32)
        assert "bfloat16" in note
        assert uniform_recipe(narrow, str(GROUPS_OF_32[1])).bits == 4.5
        assert "(4.5 bits)" in note
        assert recipe(narrow, bits=4.5).notes == ()
        code = re.search(r"Quantization\(.*?\)", note)[0]
        channel = eval(code, {"Quantization": Quantization})
        assert channel.bits == 4
        assert (*read_corruptions([re.search(r"--corruptions ([\w=:,-]+\w)", note)[1]]),) == (channel,)
        assert torchao_settings(uniform_recipe(scored(torch.float32, [channel]), str(channel))), "torchao has it"
        wide = [GROUPS_OF_32[0], channel, GROUPS_OF_32[2]]
        assert [str(channel) in said for said in recipe(scored(torch.float32, wide), bits=4.5).notes] == [True]
        assert recipe(scored(torch.float32, wide), bits=4.9).notes == ()

    def test_a_budget_below_all_formats_says_it_too(self) -> None:
        scores = scored(torch.float32, GROUPS_OF_32)
        with pytest.raises(BudgetError, match="bfloat16") as caught:
            recipe(scores, bits=3.5, keep=False)
        assert caught.value.nearest == 4.0
        for keep in (True, False):
            with pytest.raises(BudgetError, match="bfloat16"):
                recipe(scores, bits=4.5, formats=[str(GROUPS_OF_32[1])], keep=keep)
        with pytest.raises(BudgetError) as caught:
            recipe(scores, bits=2.0)
        assert "bfloat16" not in str(caught.value), "no format has as few"

    def test_nothing_is_said_of_other_budgets_and_formats(self) -> None:
        scores = scored(torch.float32, GROUPS_OF_32)
        assert recipe(scores, loss=1.0).notes == ()
        assert recipe(scores, bits=4.5, formats=[str(GROUPS_OF_32[0]), str(GROUPS_OF_32[2])]).notes == ()
        assert recipe(scores, bits=9.5).notes == ()
