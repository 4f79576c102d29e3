"""Cards as text: what others wrote, the marks, the metadata, and one card as a whole."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from for_each import for_each
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_parcor import CorruptionRecord, EvaluationRecord, MetricInfo, RecipeReport, RobustnessReport
from hf_parcor.cards import EvaluationData, ModelFacts, facts_of, with_probe, with_recipe, write_card
from hf_parcor.cards.folder import card_of, is_ours
from hf_parcor.cards.front_matter import (
    beside_earlier_results,
    eval_result_file,
    merged_front_matter,
    metadata_of,
    model_index,
)
from hf_parcor.cards.text import CURVES, HEAT_MAP, pictures_of, read_card, section_of, updated_card
from hf_parcor.reports.markup import text_of

WHOLE = Path(__file__).with_name("whole_card.md")
BEGIN, END = "<!-- hf_parcor:begin", "<!-- hf_parcor:end -->"

# Cards of others. What stands in them has to be there afterwards, byte for byte.
CARDS = {
    "a person's": "---\nlicense: mit # mine\n\n# a comment\nlanguage: [en, de]\n---\n\n# Mine\n\nWords, *words*.\n",
    "without metadata": "# Mine\n\nWords.\n",
    "without a last newline": "# Mine\n\nWords.",
    "Windows line endings": "---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\nWords.\r\n",
    "old Mac line endings": "---\rlicense: mit\r---\r\n# Mine\r",
    "old Mac line endings alone": "# Mine\r\rWords.\r",
    "an old Mac line ending at the end": "# Mine\nWords.\r",
    "only metadata, old Mac line endings": "---\rlicense: mit\r---",
    "mixed line endings": "---\nlicense: mit\r\n---\n# Mine\r\n\nWords.\n\r\n",
    "byte order mark": "\ufeff---\nlicense: mit\n---\n# Mine\n",
    "only metadata": "---\nlicense: mit\n---",
    "blank lines and spaces": "---\nlicense: mit\n---  \n\n\n   # Mine  \n\t\n\n",
    "rules and fences": "---\nlicense: mit\n---\n# Mine\n\n---\n\n```yaml\n---\ntags: [x]\n---\n```\n",
    "unicode": "---\nauthor: Søren 名前 🙂\n---\n# Größe\n\n\u2028line separator\x0band tab\n",
    "PEFT": "---\nbase_model: org/bert\nlibrary_name: peft\ntags:\n- base_model:adapter:org/bert\n- lora\n---\n\n"
    "# Model Card for Model ID\n\n<!-- Provide a quick summary. -->\n\n### Framework versions\n\n- PEFT 0.21.2",
    "sentence-transformers": "---\ntags:\n- sentence-transformers\n- dense\npipeline_tag: sentence-similarity\n"
    "library_name: sentence-transformers\nmetrics:\n- cosine_accuracy\nmodel-index:\n- name: s\n  results:\n"
    "  - task:\n      type: triplet\n      name: Triplet\n    dataset:\n      name: dev\n      type: dev\n"
    "    metrics:\n    - type: cosine_accuracy\n      value: 0.5\n      name: Cosine Accuracy\n---\n\n"
    "# SentenceTransformer\n",
}


def parts_of(text):
    """Return the text before and after our section, without the front matter."""
    card = read_card(text)
    return card.before, card.after


class TestWhatOthersWrote:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", CARDS)
    def test_the_text_survives_byte_for_byte(self, name, facts):
        theirs = CARDS[name]
        card = card_of(facts, {}, theirs)
        body = read_card(theirs).before
        assert read_card(card).before.startswith(body)
        assert read_card(card).before[len(body) :].strip() == ""
        assert ModelCard(card.removeprefix("\ufeff")).data.tags[-1] == "hf_parcor"

    @pytest.mark.parametrize("name", CARDS)
    def test_a_second_update_changes_nothing(self, name, facts):
        once = card_of(facts, {}, CARDS[name])
        assert card_of(facts, {}, once) == once

    @pytest.mark.parametrize("name", CARDS)
    def test_metadata_that_are_there_stay(self, name, facts):
        theirs = ModelCard(CARDS[name].removeprefix("\ufeff")).data.to_dict()
        ours = ModelCard(card_of(facts, {}, CARDS[name]).removeprefix("\ufeff")).data.to_dict()
        for key, value in theirs.items():
            if key == "model-index":
                assert ours[key][0]["results"][0] == value[0]["results"][0]
            elif key in ("tags", "metrics", "datasets"):
                assert ours[key][: len(value)] == value
            else:
                assert ours[key] == value

    def test_the_section_stays_where_a_person_put_it(self, facts, facts_with):
        card = card_of(facts, {}, CARDS["a person's"])
        moved = read_card(card)
        text = moved.opening + moved.front_matter + moved.closing + moved.section + "\n\n# Below\n\nWords." + "\n"
        assert parts_of(card_of(facts_with(name="other"), {}, text)) == ("", "\n\n# Below\n\nWords.\n")

    def test_line_endings_are_those_of_the_card(self, facts):
        card = card_of(facts, {}, CARDS["Windows line endings"])
        assert card.count("\n") == card.count("\r\n")

    @pytest.mark.parametrize(
        "text",
        [BEGIN + " -->\nno end", END + "\n" + BEGIN + " -->", (BEGIN + " -->\n" + END + "\n") * 2],
        ids=["no end", "the wrong order", "two pairs"],
    )
    def test_marks_that_are_no_pair_are_refused(self, text, facts):
        with pytest.raises(ValueError, match="expected one line <!-- hf_parcor:begin -->"):
            card_of(facts, {}, text)

    @pytest.mark.parametrize("front_matter", ["a: [", "- a\n- b", "plain", "a: !unknown x"])
    def test_front_matter_that_is_no_mapping_is_refused(self, front_matter, facts, tmp_path):
        (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n", encoding="utf-8")
        with pytest.raises(ValueError, match="front matter: expected"):
            write_card(tmp_path, facts)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"], "nothing was written"

    def test_a_card_that_is_not_utf_8_is_refused(self, facts, tmp_path):
        (tmp_path / "README.md").write_bytes("# Größe".encode("latin-1"))
        with pytest.raises(ValueError, match="expected text in UTF-8"):
            write_card(tmp_path, facts)

    @for_each("newline", ["\n", "\r\n"])
    @for_each("end", range(4))
    @for_each("text", ["", "# A", "# A\n\nWords."])
    def test_a_blank_line_stands_before_our_section(self, text, end, newline):
        written = (text + "\n" * end).replace("\n", newline)
        before = read_card(updated_card(written, "## Ours", {})).before
        if newline not in written:
            newline = "\n"
        ends = max(end, 2) if written else 0
        assert before == text.replace("\n", newline) + ends * newline

    def test_who_touched_it(self):
        generated = updated_card("# A", "## Ours", {}, generated=True)
        kept = updated_card("# A", "## Ours", {})
        assert read_card(generated).is_generated
        assert read_card(kept).is_untouched
        assert not read_card(kept).is_generated
        assert not read_card(generated.replace("# A", "# B")).is_untouched
        assert not read_card(kept.replace("# A", "# B")).is_untouched
        assert not read_card("# A").is_untouched


MERGED = {
    "a new key goes to the end": ("a: 1", {"b": 2}, "a: 1\nb: 2"),
    "nothing there": ("", {"b": 2}, "b: 2"),
    "what is there wins": ("library_name: mine # c", {"library_name": "x"}, "library_name: mine # c"),
    "lists are united": ("tags: [a]\nz: 1", {"tags": ["b"]}, "tags:\n- a\n- b\nz: 1"),
    "a word becomes a list": ("tags: a", {"tags": ["b"]}, "tags:\n- a\n- b"),
    "all there already": ("tags:  [b,   a] # c", {"tags": ["a"]}, "tags:  [b,   a] # c"),
    "comments between keys": (
        "# x\ntags:\n- a # lost\n# kept\n\nz: 1 # y",
        {"tags": ["b"]},
        "# x\ntags:\n- a\n- b\n# kept\n\nz: 1 # y",
    ),
    "empty": ("tags:\nz: 1", {"tags": ["b"]}, "tags:\n- b\nz: 1"),
    "braces": ("{a: 1, tags: [x]}", {"tags": ["b"]}, "a: 1\ntags:\n- x\n- b"),
    "an anchor elsewhere": ("tags: &t [x]\nz: *t", {"tags": ["b"]}, "tags:\n- x\n- b\nz:\n- x"),
    "text with a hash": (
        "tags:\n- a\nz: |\n  # no comment\n\n  x",
        {"tags": ["b"]},
        "tags:\n- a\n- b\nz: |\n  # no comment\n\n  x",
    ),
    "other model index": (
        "model-index: broken",
        {"model-index": [{"name": "m", "results": [1]}]},
        "model-index:\n- name: m\n  results:\n  - 1",
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_front_matter_is_merged_as_text(name):
    block, ours, expected = MERGED[name]
    assert merged_front_matter(block, ours) == expected


class TestMetadata:
    def test_our_old_results_give_way_and_others_stay(self, facts, facts_with, record_of):
        card = card_of(facts_with(record_of(label="old")), {}, CARDS["sentence-transformers"])
        index = ModelCard(card_of(facts, {}, card)).data.to_dict()["model-index"]
        names = [metric["name"] for result in index[0]["results"] for metric in result["metrics"]]
        assert names == [
            "Cosine Accuracy",
            "accuracy, no corruption",
            "accuracy, Gaussian σ=0.02",
            "accuracy, gradient-based L∞ ε=0.1",
        ]

    def test_earlier_results_of_other_corruptions_and_data_stand_beside_ours(self, facts, facts_with, record_of):
        def said(index):
            results = [result for model in index for result in model["results"]]
            return [(result["dataset"]["name"], metric["name"]) for result in results for metric in result["metrics"]]

        ours = model_index(facts)
        earlier = model_index(facts_with(record_of(label="old")))
        elsewhere = model_index(facts_with(evaluated_on=EvaluationData("Others", "org/others", split="test")))
        theirs = [{"name": "m", "results": [{"dataset": {"name": "s"}, "metrics": [{"name": "Cosine Accuracy"}]}]}]
        found = said(beside_earlier_results([*earlier, *elsewhere, *theirs], ours))
        assert sorted(found) == sorted({*said(earlier), *said(elsewhere), *said(ours)}), "each of ours once"

    def test_a_record_again_has_a_seed_for_each_value(self, facts):
        for row in facts.as_record().rows():
            assert [len(values) for values in row.metrics.values()] == [len(row.seeds)] * len(row.metrics)

    def test_the_model_index_is_that_of_the_records(self, facts):
        data = ModelCard(card_of(facts, {})).data
        assert eval_results_to_model_index(facts.name, data.eval_results) == model_index(facts)
        values = {one.metric_name: one.metric_value for one in data.eval_results}
        assert values == {f"accuracy, {row.label}": row.metrics["accuracy"].mean for row in facts.rows()}
        noisy = data.eval_results[1]
        assert noisy.metric_args == {
            "parameter_corruption": "gaussian",
            "std": 0.02,
            "n": 2,
            "repetitions": "trials",
            "standard_deviation": facts.corruptions[0].metrics["accuracy"].deviation,
        }

    def test_the_client_writes_the_same_card_again(self, facts):
        card = card_of(facts, {})
        assert str(ModelCard(card)) == card

    def test_tags_say_only_what_holds(self, facts_with):
        assert metadata_of(facts_with(defense=None))["tags"] == ["parameter-corruption", "hf_parcor"]
        assert metadata_of(facts_with())["tags"][1] == "adversarial-parameter-defense"

    def test_names_that_are_not_on_the_hub_are_no_metadata(self, facts_with):
        found = metadata_of(facts_with(base_model="a b", datasets=["x y", "org/x"]))
        assert "base_model" not in found
        assert found["datasets"] == ["org/x"]


class TestFacts:
    def test_are_read_as_written(self, facts):
        assert ModelFacts.from_json(facts.to_json()).to_json() == facts.to_json()

    @pytest.mark.parametrize("number", ["mean", "deviation", "n", "change"])
    def test_a_number_changed_by_hand_is_noticed(self, facts, number):
        plain = yaml.safe_load(facts.to_json())
        plain["corruptions"][0]["metrics"]["accuracy"][number] = 7
        with pytest.raises(ValueError, match=f"expected {number}"):
            ModelFacts.from_plain(plain)

    def test_seeds_are_repetitions(self, record_of):
        facts = facts_of([record_of(clean=0.5), record_of(clean=0.75), record_of(clean=1.0)])
        clean = facts.clean.metrics["accuracy"]
        assert (clean.n, clean.mean, clean.deviation) == (3, 0.75, 0.25)
        assert facts.corruptions[0].metrics["accuracy"].values == (0.625,) * 3
        assert facts.corruptions[0].metrics["accuracy"].change == 0.625 - 0.75
        assert facts.repetitions == "trainings"

    def test_a_single_measurement_has_no_spread(self, facts):
        assert math.isnan(facts.clean.metrics["accuracy"].deviation)

    def test_records_that_are_not_alike_are_refused(self, record_of):
        with pytest.raises(ValueError, match="the same corruptions"):
            facts_of([record_of(), record_of(label="other")])

    def test_records_of_the_same_weights_are_no_seeds(self, record_of):
        with pytest.raises(ValueError, match="got one twice"):
            facts_of([replace(record_of(), weights="0" * 64)] * 2)

    def test_no_records(self):
        with pytest.raises(ValueError, match="at least one"):
            facts_of([])

    def test_data_and_task_are_those_of_the_record_unless_said_otherwise(self, record_of):
        data = EvaluationData("dev.tsv", rows=6)
        record = replace(record_of(), evaluated_on=data, task="text-classification")
        assert "on dev.tsv, 6 rows" in card_of(facts_of(record), {})
        assert model_index(facts_of(record))[0]["results"][0]["task"]["type"] == "text-classification"
        named = facts_of(record, evaluated_on=EvaluationData("Reviews", "org/reviews"), task="translation")
        assert "dev.tsv" not in card_of(named, {})
        assert model_index(named)[0]["results"][0]["task"]["type"] == "translation"
        assert "rows" not in card_of(facts_of(record_of()), {}).partition("### Defense")[0]

    @pytest.mark.parametrize(
        ("names", "shown"),
        [
            (["loss", "entropy", "mean_token_accuracy"], "mean_token_accuracy"),
            (["loss", "score"], "score"),
            (["loss", "perplexity"], "loss"),
            (["f1", "score", "accuracy"], "accuracy"),
        ],
    )
    def test_the_metric_that_is_shown_is_known_to_be_good_rather_than_guessed(self, names, shown):
        clean = CorruptionRecord("none", "no corruption", {}, (0,), dict.fromkeys(names, (0.5,)))
        assert facts_of(EvaluationRecord("org/bert", {"target_modules": "all"}, 10, clean, ())).metric == shown

    def test_what_has_an_entry_for_each_weight_stands_in_no_metadata_and_no_sentence(self, record_of):
        """As a recipe has them."""
        record = record_of()
        names = [f"layer.{place}.weight" for place in range(300)]
        rows = tuple(
            replace(row, settings={**row.settings, "formats": dict.fromkeys(names, "4 bits")})
            for row in record.corruptions
        )
        facts = facts_of(replace(record, corruptions=rows, target={"target_modules": names}))
        assert model_index(facts) == model_index(facts_of(record))
        card = card_of(facts, {})
        assert "(`layer.0.weight and 299 others`)" in card
        assert card.count(names[1]) == 1  # among what reproduces the card

    def test_an_unknown_metric(self, record_of):
        with pytest.raises(ValueError, match="expected one of accuracy, loss, got 'f1'"):
            facts_of(record_of(), metric="f1")


class TestLeaderboard:
    """What stands in `.eval_results` is shown beside other models: the clean result, and of a benchmark alone."""

    def test_the_result_without_corruption(self, facts_with, tmp_path, quick_picture):
        facts = facts_with(benchmark_task="stars")
        write_card(tmp_path, facts)
        [path] = (tmp_path / ".eval_results").iterdir()
        assert is_ours(path.relative_to(tmp_path).as_posix())
        (result,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        assert result == EvalResultEntry("org/reviews", "stars", facts.clean.metrics["accuracy"].mean)
        write_card(tmp_path, facts_with())
        assert not list((tmp_path / ".eval_results").iterdir()), "nobody says that it is a benchmark"

    def test_files_of_others_beside_it_stay(self, facts_with, tmp_path, quick_picture):
        folder = tmp_path / ".eval_results"
        folder.mkdir()
        names = ["mine.yaml", "hf_parcor.yaml", "hf_parcor-notes.txt"]
        for name in names:
            (folder / name).write_text("[]")
        for task in ("stars", ""):
            write_card(tmp_path, facts_with(benchmark_task=task))
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)

    def test_the_settings_of_the_others_stay_in_the_front_matter(self, facts_with):
        index = model_index(facts_with(benchmark_task="stars"))
        assert [len(result["metrics"]) for result in index[0]["results"]] == [3]

    @pytest.mark.parametrize(
        "change",
        [
            {"benchmark_task": ""},
            {"evaluated_on": EvaluationData("reviews.tsv")},
            {"evaluated_on": EvaluationData("Reviews", "org/reviews", split="test[:100]")},
            {"evaluated_on": EvaluationData("Reviews", "org/reviews", split="test, held out: 2 of 6 rows, seed 0")},
        ],
    )
    def test_what_is_no_result_of_a_benchmark(self, facts_with, change):
        assert eval_result_file(facts_with(benchmark_task="stars"))
        assert eval_result_file(facts_with(**{"benchmark_task": "stars", **change})) == {}

    def test_what_is_no_result_of_one_model(self, facts_with, record_of):
        for records in ([record_of(), record_of(clean=0.7)], record_of(clean=float("nan"))):
            assert eval_result_file(facts_with(records, benchmark_task="stars")) == {}


def spaced(text):
    """Return text whose columns are not in line."""
    return re.sub(" +", " ", text)


def with_a_curve(record):
    """Return a record with a second strength of one of its corruptions."""
    first = record.corruptions[0]
    stronger = replace(first, label="stronger", settings={"std": 0.04})
    return replace(record, corruptions=(*record.corruptions, stronger))


class TestWholeCard:
    def test_matches(self, facts):
        assert card_of(facts, {"robustness.png": b""}) == WHOLE.read_text(encoding="utf-8")

    def test_the_folder(self, facts, tmp_path, quick_picture):
        write_card(tmp_path, facts)
        assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
            "README.md",
            "robustness.png",
            "robustness_facts.json",
        ]

    def test_the_folder_of_a_download_leaves_the_cache_as_it_is(self, facts, tmp_path, quick_picture):
        """What the Hub's client downloads are links to files that it knows by what is in them."""
        (folder := tmp_path / "snapshot").mkdir()
        names = ("README.md", "robustness_facts.json", "robustness.png")
        for name in names:
            (tmp_path / name).write_text("# in the cache")
            (folder / name).symlink_to(tmp_path / name)
        write_card(folder, facts)
        assert {(tmp_path / name).read_text() for name in names} == {"# in the cache"}
        assert not any((folder / name).is_symlink() for name in names)

    def test_the_picture_is_one_where_there_is_a_curve(self, facts_with, record_of):
        [(name, content)] = pictures_of(facts_with(with_a_curve(record_of()))).items()
        assert name == CURVES
        assert content.startswith(b"\x89PNG\r\n")
        assert pictures_of(facts_with(record_of())) == {}, "of each kind one strength alone"


class TestMetric:
    """What a card says of its metric is what the record states, or said to be a guess."""

    @pytest.mark.parametrize(
        ("info", "said", "unsaid"),
        [
            (MetricInfo(True, "share"), [" fall when", "| accuracy (%) |", "90.0", "−65.0"], ["guess"]),
            (MetricInfo(True, "points"), [" fall when", "| accuracy (of 100) |", "| 0.90 |", "−0.65"], ["%", "guess"]),
            (MetricInfo(False, "nats"), [" rise when", "| accuracy (nats) |", "| 0.9 |"], ["%", "guess"]),
            (MetricInfo(True), [" fall when", "| accuracy |", "| 0.9 |"], ["%", "guess"]),
            (None, ["| accuracy (%) |", "Nothing states the unit of accuracy", "guess"], ["is good"]),
        ],
    )
    def test_unit_and_direction(self, record_of, info, said, unsaid):
        record = replace(record_of(), metric_info={} if info is None else {"accuracy": info})
        facts = facts_of(record)
        assert ModelFacts.from_json(facts.to_json()).info == facts.info
        section = spaced(section_of(facts))
        assert [part for part in said if part not in section] == []
        assert [part for part in unsaid if part in section] == []

    def test_a_direction_that_nobody_states_is_said_to_be_a_guess(self, record_of):
        record = record_of()
        rows = [replace(row, metrics={"score": row.metrics["accuracy"]}) for row in record.rows()]
        record = replace(record, clean=rows[0], corruptions=tuple(rows[1:]))
        assert "whether a large score is good" in section_of(facts_of(record))
        assert "guess" not in section_of(facts_of(record, greater_is_better=False))

    def test_an_argument_goes_before_the_record(self, record_of):
        assert facts_of(record_of(), greater_is_better=False, unit="").info == MetricInfo(False)

    def test_the_first_metric_of_which_more_is_better_is_shown(self, record_of):
        record = record_of()
        rows = [replace(row, metrics={"distance": (0.5,), "score": (0.5,)}) for row in record.rows()]
        infos = {"distance": MetricInfo(False), "score": MetricInfo(True)}
        record = replace(record, clean=rows[0], corruptions=tuple(rows[1:]), metric_info=infos)
        assert facts_of(record).metric == "score"

    def test_seeds_that_state_different_things_are_refused(self, record_of):
        other = replace(record_of(), metric_info={"accuracy": MetricInfo(True, "points")})
        with pytest.raises(ValueError, match="one unit"):
            facts_of([record_of(), other])
        assert facts_of([record_of(), other], unit="share").info.unit == "share"

    def test_a_probe_speaks_in_the_direction_of_the_metric(self, facts_with, probed_record, probe_of):
        better = facts_with(replace(probed_record, metric_info={"accuracy": MetricInfo(False, "share")}))
        verdicts = [with_probe(one, probe_of()).probe.verdict for one in (facts_with(probed_record), better)]
        assert ["the most fragile" in text or "times as fragile" in text for text in verdicts] == [True, False]
        assert ["gets better" in text for text in verdicts] == [False, True]


class TestProbe:
    def test_the_card_says_what_the_report_says(self, facts_with, probed_record, probe_of):
        facts = with_probe(facts_with(probed_record), probe_of(notes=["noted"]))
        assert facts.probe.verdict in RobustnessReport(probe_of()).verdict[0]
        assert facts.probe.verdict.startswith("gradient-based, L2: layer.1 is 3 times as fragile as the median")
        section = card_of(facts, {HEAT_MAP: b""}).split("### ")[1]
        assert section.splitlines()[2:] == [
            "Each group of weights was corrupted by itself; without corruption `accuracy` was 90.0 %.",
            "",
            text_of(facts.probe.verdict),
            "",
            "![accuracy of tiny-bert with each group of weights corrupted](robustness_heat_map.png)",
            "",
            "Noticed while measuring:",
            "",
            *(f"- layer.{index}: gradient-based L2 ε=0.5: noted" for index in range(3)),
            "",
        ]
        assert facts.probe.verdict.endswith("before you rely on it.")

    def test_on_other_data_says_so(self, facts_with, probed_record, probe_of):
        data = EvaluationData("dev.tsv", rows=6)
        sweep = probe_of()
        elsewhere = {group: replace(one, evaluated_on=data) for group, one in sweep.records.items()}
        for measured_on, said in ((data, False), (EvaluationData("all.tsv", rows=9), True)):
            facts = with_probe(facts_with(probed_record, evaluated_on=measured_on), replace(sweep, records=elsewhere))
            assert ("corrupted by itself on dev.tsv, 6 rows;" in card_of(facts, {})) is said

    def test_without_its_picture(self, facts_with, probed_record, probe_of):
        facts = with_probe(facts_with(probed_record), probe_of())
        assert "![" not in card_of(facts, {})
        assert "### Which part is weak?" in card_of(facts, {})

    @pytest.mark.slow
    def test_the_heat_map_is_that_of_the_record(self, facts_with, probed_record, probe_of):
        facts = with_probe(facts_with(with_a_curve(probed_record)), probe_of())
        pictures = pictures_of(ModelFacts.from_json(facts.to_json()))
        assert list(pictures) == [CURVES, HEAT_MAP]
        assert pictures[HEAT_MAP].startswith(b"\x89PNG\r\n")
        weaker = with_probe(facts, probe_of(groups=("layer.1", "layer.0", "layer.2")))
        assert pictures_of(weaker)[HEAT_MAP] != pictures[HEAT_MAP]
        assert pictures_of(weaker)[CURVES] == pictures[CURVES]

    def test_facts_are_read_as_written(self, facts_with, probed_record, probe_of):
        facts = with_probe(facts_with(probed_record), probe_of(notes=["noted"]))
        again = ModelFacts.from_json(facts.to_json())
        assert again.probe == facts.probe
        assert again.to_json() == facts.to_json()

    @pytest.mark.usefixtures("quick_picture")
    def test_a_recipe_says_what_its_page_says(self, facts_with, probed_record, recipe_of):
        scores, recipe, measured = recipe_of()
        facts = with_recipe(facts_with(probed_record), scores, recipe, measured)
        page = RecipeReport(scores, recipe, measured).verdict
        assert (facts.recipe.verdict, facts.recipe.size) == tuple(page[:2])
        assert "−5.0 points" in facts.recipe.verdict
        card = section_of(facts)
        assert text_of(facts.recipe.verdict) in card
        table = re.findall(r"^\| *([^|]+?) *\| +(\d+) \| +([\d,]+) \|$", card, re.MULTILINE)
        assert table == [
            ("4-bit quantization", "1", "1,000"),
            ("3-bit quantization", "2", "7,000"),
            ("as it is", "1", "2,000"),
        ]
        assert ModelFacts.from_json(facts.to_json()).recipe == facts.recipe

    def test_a_recipe_needs_no_library_that_its_page_needs(self, facts_with, probed_record, recipe_of, monkeypatch):
        pytest.importorskip("scipy")
        expected = with_recipe(facts_with(probed_record), *recipe_of()).recipe
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(ImportError, match="SciPy"):
            RecipeReport(*recipe_of())
        assert with_recipe(facts_with(probed_record), *recipe_of()).recipe == expected

    def test_a_recipe_without_the_metric_of_the_card_is_refused(self, facts_with, probed_record, recipe_of):
        with pytest.raises(ValueError, match="recipe: expected one that was measured in accuracy, got one in loss"):
            with_recipe(facts_with(probed_record), *recipe_of(metric="loss"))

    def test_an_old_heat_map_is_removed(self, facts_with, probed_record, probe_of, tmp_path):
        facts = facts_with(probed_record)
        write_card(tmp_path, with_probe(facts, probe_of()))
        assert (tmp_path / HEAT_MAP).is_file()
        write_card(tmp_path, facts)
        assert not (tmp_path / HEAT_MAP).exists()

    def test_facts_from_before_probes_were_kept(self, facts):
        plain = yaml.safe_load(facts.to_json())
        del plain["probe"], plain["weights"]
        assert ModelFacts.from_plain(plain).to_json() == facts.to_json()

    def test_alone(self, probe_of):
        facts = facts_of(probe_of(), name="tiny-bert")
        card = card_of(facts, {})
        assert pictures_of(facts).keys() == {HEAT_MAP}
        assert "| no corruption | 90.0 | – | 1 |" in spaced(card)
        assert "open to corruption" not in card
        assert f"\n- weights (SHA-256): {probe_of().weights}\n" in card

    def test_of_one_of_several_trainings(self, record_of, probed_record, probe_of):
        assert with_probe(facts_of([record_of(), probed_record]), probe_of()).probe.clean == 0.9

    @pytest.mark.parametrize("weights", ["", "67d4f666" * 8])
    def test_of_other_weights_is_refused(self, facts_with, probed_record, probe_of, weights):
        facts = facts_with(replace(probed_record, weights=weights))
        with pytest.raises(ValueError, match="expected one of the weights that were evaluated"):
            with_probe(facts, probe_of())

    def test_without_the_metric_of_the_card_is_refused(self, record_of, probe_of):
        record = replace(record_of(), weights=probe_of().weights)
        renamed = [replace(row, metrics={"f1": row.metrics["accuracy"]}) for row in record.rows()]
        facts = facts_of(replace(record, clean=renamed[0], corruptions=tuple(renamed[1:])))
        with pytest.raises(ValueError, match="got 'f1'"):
            with_probe(facts, probe_of())

    def test_a_guess_that_values_refute_is_none(self, facts_with, probed_record, probe_of):
        sweep = probe_of()
        row = sweep.records["layer.0"].corruptions[0]
        row = replace(row, metrics={**row.metrics, "accuracy": (-1.5,)})
        records = {**sweep.records, "layer.0": replace(sweep.records["layer.0"], corruptions=(row,))}
        facts = with_probe(facts_with(replace(probed_record, metric_info={})), replace(sweep, records=records))
        assert facts.info.unit == ""
        assert "| no corruption | 0.9 |" in spaced(card_of(facts, {}))
