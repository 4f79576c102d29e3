"""The page of a recipe: the answer first, every number from the records, and nothing runs out of the page."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from browser import WIDTHS, check_it_fits, look
from for_each import for_each

import hf_parcor
from hf_parcor import EvaluationRecord, MetricInfo, RecipeReport, SensitivityRecord, recipe
from hf_parcor.recipes import exports, front
from hf_parcor.records import Choice, CorruptionRecord, FormatScore, PairCost, RecipeRecord, WeightGroup

BITS = {"8-bit quantization": 8, "4-bit quantization": 4, "3-bit quantization": 3}
FORMATS = {label: {"corruption": "quantization", "settings": {"bits": bits}} for label, bits in BITS.items()}
WEAK = "model.decoder.layers.7.a_module_with_a_long_name"


def scores_of(drop, parts: int = 12) -> SensitivityRecord:
    """Return the scores of parts, of which one is weak; accuracy falls by `drop(weak, bits)`."""
    names = [f"model.decoder.layers.{index}.a_module_with_a_long_name" for index in range(parts)]
    groups = {name: WeightGroup({f"{name}.weight": 1000}, 16.0) for name in names}
    cells = []
    for place, name in enumerate(names):
        for label, bits in BITS.items():
            lost = drop(name == WEAK, bits)
            scores = {"first_order": (-1) ** place * lost, "fisher": lost + place * 1e-4}
            cells.append(FormatScore(name, label, bits, scores, {"accuracy": 0.9 - lost, "loss": 0.3 + lost}))
    clean = {"accuracy": 0.9, "loss": 0.3}
    return SensitivityRecord("m", groups, FORMATS, tuple(cells), clean, "accuracy", parameters=20_000)


def one_weak_part(weak: bool, bits: int) -> float:
    return {8: 0.0, 4: 0.06 if weak else 0.0002, 3: 0.3 if weak else 0.05}[bits]


def measured_of(recipes: dict[str, RecipeRecord], together: float = 1.0) -> EvaluationRecord:
    """Return the record of recipes whose costs add up, but for a factor."""
    rows = tuple(
        CorruptionRecord(
            "MixedQuantization",
            name,
            {"name": name, "bits": one.bits, "by": one.by if one.budget else "", "formats": {}},
            (0,),
            {"accuracy": (0.9 - together * one.expected["accuracy"],), "loss": (0.3 + one.expected["loss"],)},
        )
        for name, one in recipes.items()
    )
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,), "loss": (0.3,)})
    return EvaluationRecord("m", {}, 12_000, clean, rows)


def report(bits: float = 4.5, drop=one_weak_part, **options) -> RecipeReport:
    scores = scores_of(drop)
    chosen = recipe(scores, bits=bits)
    return RecipeReport(scores, chosen, measured_of(front(scores, chosen), **options))


def rows_of(page: Path) -> list[list[str]]:
    """Return the cells of all tables of a page in Markdown."""
    lines = page.read_text(encoding="utf-8").replace("\\", "").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_the_answer_names_what_is_spared_and_what_either_way_costs() -> None:
    answer = report().answer
    assert f"but {WEAK} (8 bits) to 4 bits" in answer
    assert "−0.2 points" in answer, "11 parts lose 0.02 points each"
    assert "with it −6.2 points" in answer
    worse = report(together=2.0).verdict[1]
    assert "−0.2 points" in worse
    assert "−0.4 points" in worse, "what adds up, and what was measured"


def test_the_answer_says_how_much_of_the_model_it_is_about() -> None:
    """Also on a terminal: of a mixture of experts the linear modules are a tenth, and "everything" means them."""
    assert "in 12,000 of 20,000 weights: all others stay as they are" in " ".join(str(report()).split())


def test_the_heat_map_shows_what_the_recipe_was_chosen_by(tmp_path) -> None:
    """Accuracies of single parts are chance; a divergence that was measured is what the parts are coloured by."""
    scores = scores_of(one_weak_part)
    cells = tuple(
        replace(cell, measured={**cell.measured, "divergence": 0.0123 if cell.group == WEAK else 0.001})
        for cell in scores.cells
    )
    infos = {"divergence": MetricInfo(False, "nats")}
    scores = replace(scores, cells=cells, clean={**scores.clean, "divergence": 0.0}, metric_info=infos)
    page = RecipeReport(scores, recipe(scores, bits=4.5), None)
    text = page.to_markdown(tmp_path / "a.md").read_text(encoding="utf-8")
    assert "rise of divergence" in text
    assert re.search(r"\| +12 ", text), "thousandths"
    html = page.to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert "the strongest is 12 thousandths of a nat." in html
    by_loss = RecipeReport(scores, recipe(scores, bits=4.5, by="loss"), None)
    assert "drop of accuracy" in by_loss.to_markdown(tmp_path / "b.md").read_text(encoding="utf-8")


def test_tables_have_a_row_for_everything_that_was_measured(tmp_path) -> None:
    scores = scores_of(one_weak_part)
    chosen = recipe(scores, bits=4.5)
    recipes = front(scores, chosen)
    rows = rows_of(RecipeReport(scores, chosen, measured_of(recipes)).to_markdown(tmp_path / "recipe.md"))
    uniform = [row for row in rows if row[0].startswith("one format for all")]
    assert len({name for name, *_ in uniform}) == len(FORMATS)
    for label, count in BITS.items():
        (row,) = [row for row in uniform if row[0].endswith(f"{count} bits")]
        assert float(row[2]) == pytest.approx(90 - 100 * recipes[label].expected["accuracy"], abs=0.06)
    drawn = [row for row in rows if row[0] == "as it is" or row[0].startswith("recipes by ")] + uniform
    expected = [["–", 90.0], *([f"{one.bits:.3g}", 90 - 100 * one.expected["accuracy"]] for one in recipes.values())]
    found = sorted([bits, float(value)] for _, bits, value in drawn if bits != "–")
    assert found == [[bits, pytest.approx(value, abs=0.06)] for bits, value in sorted(expected[1:])]
    assert ["as it is", "–", "90.0"] in drawn
    for score in ("first_order", "fisher"):
        (row,) = [row for row in rows if row[0] == score]
        found = float(row[1].replace("−", "-"))
        assert found == pytest.approx(scores.correlations("loss")[score], abs=0.006)


def test_the_front_begins_with_the_model_as_it_is_and_ends_with_one_format_for_all(tmp_path) -> None:
    rows = rows_of(report().to_markdown(tmp_path / "page.md"))
    first = next(place for place, row in enumerate(rows) if row[0] == "chosen") + 2
    kinds = [row[0].partition(":")[0] for row in rows[first:] if len(row) == 3]
    kinds = kinds[: max(place for place, kind in enumerate(kinds) if kind == "one format for all") + 1]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        "as it is",
        "recipes by loss",
        "recipes by first_order",
        "recipes by fisher",
        "one format for all",
    ]


def test_what_was_chosen_has_a_mark_and_what_gains_a_sign(tmp_path) -> None:
    scores = scores_of(lambda weak, bits: {8: 0.0, 4: 0.002, 3: 0.004}[bits])
    chosen = recipe(scores, bits=5.0)
    rows = rows_of(RecipeReport(scores, chosen).to_markdown(tmp_path / "page.md"))
    head = next(row for row in rows if row[0] == "part")
    marked = {row[0]: head[place] for row in rows for place, cell in enumerate(row) if cell.endswith("✓")}
    assert marked == {
        name.removeprefix("model.decoder.layers."): f"{BITS[one.format]} bits" for name, one in chosen.choice.items()
    }
    assert "accuracy −" in RecipeReport(scores, chosen).answer
    better = report(drop=lambda weak, bits: -0.002)
    assert "accuracy +2.4 points" in better.answer, "12 parts gain 0.2 points each"
    assert "add up to +2.4 points; together they have +2.4 points" in " ".join(better.verdict)


@for_each("metric", ["accuracy", "loss"])
def test_scores_are_ranked_by_the_loss_and_by_what_the_page_is_about(metric, tmp_path) -> None:
    scores = scores_of(one_weak_part)
    scores = replace(scores, clean={**scores.clean, "f1": 0.9})
    page = RecipeReport(scores, recipe(scores, bits=4.5), metric=metric).to_markdown(tmp_path / "page.md")
    (head,) = [row for row in rows_of(page) if row[0] == "score"]
    ranked = [cell.rpartition(" ")[2] for cell in head if cell.startswith("rank correlation")]
    assert ranked == list(dict.fromkeys(["loss", metric]))


def test_settings_are_those_of_the_records(tmp_path) -> None:
    scores = replace(scores_of(one_weak_part), weights="w" * 8, data="d" * 8, task="text-classification")
    chosen = recipe(scores, bits=4.5)
    for told, known in ((scores, True), (replace(scores, weights="", data="", task=""), False)):
        found = dict(
            row for row in rows_of(RecipeReport(told, chosen).to_markdown(tmp_path / "a.md")) if len(row) == 2
        )
        for name, value in (("weights", "w" * 8), ("data", "d" * 8), ("task", "text-classification")):
            (shown,) = [cell for key, cell in found.items() if key.split(" (")[0] == name]
            assert (shown == value) == known, name
        assert found["budget"] == "bits = 4.5"
        assert found["chosen by"] == chosen.by


@for_each("without", [["recipe"], BITS, ["recipe", *BITS]])
def test_a_page_of_what_was_measured_in_part(without, tmp_path) -> None:
    scores = scores_of(one_weak_part)
    chosen = recipe(scores, bits=4.5)
    measured = measured_of(front(scores, chosen))
    left = tuple(row for row in measured.corruptions if row.label not in without)
    made = RecipeReport(scores, chosen, replace(measured, corruptions=left))
    compared = [said for said in made.verdict if said.startswith("One format for all")]
    assert not compared, "of the recipe with one format"
    rows = rows_of(made.to_markdown(tmp_path / "page.md"))
    assert sum(row[0].endswith("a_module_with_a_long_name") for row in rows) == 2 * len(chosen.groups)


@for_each(
    "lost, strongest",
    [
        ((0.2, 0.01), "20.0"),
        ((-0.05, 0.01), "1.0"),
        ((math.inf, 0.004), "0.4"),
        ((math.inf, -0.001), "∞"),
        ((-0.05, -0.001), ""),
    ],
)
def test_the_strongest_colour_is_of_the_largest_drop_that_is_one(lost, strongest, tmp_path) -> None:
    page = report(drop=lambda weak, bits: lost[0] if weak else lost[1]).to_html(tmp_path / "page.html").read_text()
    said = re.search(r"the strongest is ([\d.∞]+) points", page)
    assert (said[1] if said else "") == strongest
    assert ("No cell has a colour" in page) == (not strongest)


def test_one_format_that_takes_just_as_many_bits_is_within_them() -> None:
    assert any("(4.00 bits a weight)" in said for said in report(bits=4.0).verdict)


def test_whether_all_cells_were_measured_is_said() -> None:
    scores = scores_of(one_weak_part)
    first = scores.cells[0]
    base = recipe(scores, bits=4.5).choice[first.group].format
    for label, count, estimated in ((None, 36, 0), ("8-bit quantization", 35, 0), (base, 35, 1)):
        cells = [
            replace(cell, measured={}) if (cell.group, cell.format) == (first.group, label) else cell
            for cell in scores.cells
        ]
        made = RecipeReport(some := replace(scores, cells=tuple(cells)), recipe(some, bits=4.5))
        (said,) = [note for note in made.notes if f"{count} of 36" in note]
        assert ("estimated" in said) == (count < 36)
        assert (f"add up, {estimated} of 12 estimated, to" in " ".join(made.verdict)) == (estimated > 0)


@for_each("rows, word", [("these", "same rows"), ("others", "owe nothing to the choice")])
def test_where_it_was_judged_is_said_and_its_own_start_counts(rows, word, tmp_path) -> None:
    scores = replace(scores_of(one_weak_part), data="these")
    chosen = recipe(scores, bits=4.5)
    measured = measured_of(front(scores, chosen))
    judged = replace(measured.clean, metrics={"accuracy": (0.8,), "loss": (0.3,)})
    rows_there = tuple(
        replace(row, metrics={**row.metrics, "accuracy": (row.mean("accuracy") - 0.1,)})
        for row in measured.corruptions
    )
    page = RecipeReport(scores, chosen, replace(measured, data=rows, clean=judged, corruptions=rows_there))
    assert word in page.to_markdown(tmp_path / "recipe.md").read_text(encoding="utf-8")
    assert page.answer == report().answer, "ten points fewer before and after: the same is lost"


@for_each(
    "bits, word",
    [(16.0, "as it is"), (4.0, "Quantize everything to 4 bits"), (3.5, "of 12 parts")],
)
def test_other_answers(bits, word) -> None:
    scores = scores_of(lambda weak, bits: 0.05 / bits if bits < 8 else 0.02)
    chosen = recipe(scores, bits=bits)
    assert word in RecipeReport(scores, chosen).answer


def test_of_many_exceptions_the_answer_names_the_costliest_and_how_many_get_more_fewer_and_as_they_are() -> None:
    """Counted by hand; those are named that 4 bits would cost most, whatever their order is."""
    costs = [0.01, 0.09, 0.02, 0.08, 0.03, 0.07, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    scores = scores_of(one_weak_part)
    names = list(scores.groups)
    cells = tuple(
        replace(one, measured={"accuracy": 0.9 - (costs[names.index(one.group)] if one.format[0] == "4" else 0.0)})
        for one in scores.cells
    )
    sizes = {
        name: replace(group, weights={name: 1000 if at < 8 else 9000})
        for at, (name, group) in enumerate(scores.groups.items())
    }
    scores = replace(scores, groups=sizes, cells=cells, clean={"accuracy": 0.9})
    labels = ["8"] * 5 + [None] + ["3"] * 2 + ["4"] * 4
    made = {
        name: Choice(None if label is None else f"{label}-bit quantization", 16.0 if label is None else float(label))
        for name, label in zip(names, labels, strict=True)
    }
    chosen = replace(recipe(scores, bits=4.5), by="accuracy", choice=made)
    answer = RecipeReport(scores, chosen).answer
    name = r"\.\S+_name"
    assert re.search(rf"but 5 of 12 parts to more bits \(1{name}, 3{name} and 3 others\)", answer)
    assert re.search(rf", 2 to fewer bits and 1 not at all \(5{name}\): accuracy", answer)
    assert answer.count("_name") == 3
    assert "with 4 bits for all −30.0 points" in answer
    few = replace(chosen, choice={**made, **{name: Choice("4-bit quantization", 4.0) for name in names[:6]}})
    assert "(3 bits)" in RecipeReport(scores, few).answer
    fewer = {name: Choice("3-bit quantization", 3.0) for name in names[:5]}
    rest = {name: Choice("4-bit quantization", 4.0) for name in names[5:]}
    only = RecipeReport(scores, replace(chosen, choice={**fewer, **rest})).answer
    assert re.search(r"but 5 of 12 parts to fewer bits \((\S+, ){2}\S+ and 2 others\): ", only)


def test_a_page_of_a_recipe_that_quantizes_nothing_says_nothing_of_its_parts(tmp_path) -> None:
    made = report(16.0, lambda weak, bits: 0.1)
    assert made.answer.startswith("Quantize nothing")
    assert not [sentence for sentence in made.verdict if "add up" in sentence or "To apply" in sentence]
    assert any("8 bits" in sentence for sentence in made.verdict), "what one format would cost is still told"
    assert "| as it is " in made.to_markdown(tmp_path / "page.md").read_text(encoding="utf-8")


def test_expectations_are_said_to_be_such_and_a_score_that_tells_nothing_has_no_rank() -> None:
    scores = scores_of(one_weak_part)
    alone = RecipeReport(scores, recipe(scores, bits=4.5))
    assert "expected" in alone.answer
    assert any("assumption" in note for note in alone.notes)
    assert scores.correlations("loss")["fisher"] > 0.7 > abs(scores.correlations("loss")["first_order"])
    flat = scores_of(lambda weak, bits: 0.0)
    assert all(map(math.isnan, (flat.correlations("loss")["first_order"],)))


def test_the_pages_begin_with_the_answer(tmp_path) -> None:
    made = report()
    text = made.to_markdown(tmp_path / "page.md").read_text()
    assert text.index("Quantize everything") < text.index("## Front") < text.index("## Heat map")
    assert "by fisher" in text.replace("\\", "")
    page = made.to_html(tmp_path / "page.html").read_text()
    assert page.index("Quantize everything") < page.index("<svg") < page.index("Heat map")
    assert "<script" not in page


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_page(tmp_path, width) -> None:
    page = report().to_html(tmp_path / "recipe.html")
    check_it_fits(look(page, width, tmp_path / f"recipe-{width}.png"), width)


def test_a_recipe_that_gains_nothing_over_one_format_is_said_to() -> None:
    scores = scores_of(one_weak_part)
    chosen = recipe(scores, bits=4.5)
    measured = measured_of(front(scores, chosen))
    others = tuple(row for row in measured.corruptions if row.label != "recipe")
    (four,) = [row for row in others if row.label == "4-bit quantization"]
    for accuracy, gains in ((0.9, True), (four.mean("accuracy"), False), (0.1, False)):
        of_recipe = replace(four, label="recipe", metrics={"accuracy": (accuracy,), "loss": (0.3,)})
        made = RecipeReport(scores, chosen, replace(measured, corruptions=(of_recipe, *others)))
        (said,) = [one for one in made.verdict if one.startswith("One format for all")]
        assert ("nothing is gained" in said) != gains


def test_divergences_have_two_digits_and_no_exponent_where_they_are_large(tmp_path) -> None:
    scores = scores_of(one_weak_part)
    scores = replace(scores, clean={**scores.clean, "divergence": 0.0})
    chosen = replace(recipe(scores, bits=4.5), pairs=(PairCost(*list(scores.groups)[:2], "divergence", 0.1249, 0.3),))
    text = RecipeReport(scores, chosen).to_markdown(tmp_path / "page.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("|") and " + " in line]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["300", "120", "−180"]


def test_pairs_are_said_with_what_they_cost_together_and_apart(tmp_path) -> None:
    scores = scores_of(one_weak_part)
    chosen = recipe(scores, bits=4.5)
    names = list(chosen.choice)
    for together, others, word in ((0.03, 0.02, "Parts interact"), (0.0205, 0.0201, "hardly interact")):
        costs = dict(zip(names[1:3], (together, others), strict=True))
        pairs = tuple(PairCost(names[0], name, "accuracy", cost, 0.02) for name, cost in costs.items())
        made = RecipeReport(scores, replace(chosen, pairs=pairs), None)
        (said,) = [sentence for sentence in made.verdict if "interact" in sentence]
        assert word in said
        assert ("3.0 together and 2.0 apart" in said) == (together == 0.03)
        for page in (made.to_markdown(tmp_path / "page.md"), made.to_html(tmp_path / "page.html")):
            assert "Parts that interact" in page.read_text()


@pytest.mark.parametrize("written", [None, [], ["torchao.json"], ["bitsandbytes.yaml", "llm_compressor.yaml"]])
def test_the_page_names_the_files_that_there_are_and_what_reads_them(written) -> None:
    """By names that exist: the function that writes them, and the classes that read them."""
    readers = {
        "torchao.json": "TorchAoConfig",
        "bitsandbytes.yaml": "BitsAndBytesConfig",
        "llm_compressor.yaml": "llm-",
    }
    assert readers.keys() <= exports._EXPORTS.keys()
    assert all(hasattr(transformers, name) for name in readers.values() if name.endswith("Config"))
    for drop, applied in ((one_weak_part, True), (lambda weak, bits: 0.1, False)):
        scores = scores_of(drop)
        notes = " ".join(RecipeReport(scores, recipe(scores, bits=16.0), files=written).notes)
        for file, reader in readers.items():
            assert (file in notes) == (reader in notes) == (applied and file in (written or [])), file
        assert ("export_recipe" in notes) == (applied and not written)
    assert callable(hf_parcor.export_recipe)


def test_what_the_recipe_noticed_is_among_what_is_said_first() -> None:
    scores = scores_of(one_weak_part)
    chosen = replace(recipe(scores, bits=4.5), notes=("Scales are not free.",))
    assert "Scales are not free." in RecipeReport(scores, chosen, None).verdict
