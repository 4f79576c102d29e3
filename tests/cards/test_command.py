"""`hf-parcor card`, and the cards of our campaigns."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hub_server import TOKEN, Repository
from huggingface_hub import ModelCard
from local_models import SAVED

from hf_parcor import MetricInfo
from hf_parcor.cards import Destination, EvaluationData, ModelFacts
from hf_parcor.cards.folder import FACTS, card_of
from hf_parcor.cards.text import CURVES, HEAT_MAP
from hf_parcor.cli.main import MISTAKE, main
from hf_parcor.reports.markup import text_of
from hf_parcor.reports.plots import shows_curves
from hf_parcor.tasks import TASKS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("quick_picture"),
]


@pytest.fixture
def run_dir(tmp_path, record_of):
    folder = tmp_path / "tiny"
    record_of().save(folder / "robustness.json")
    return folder


@pytest.fixture
def repository(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["me/tiny"] = found = Repository()
    found.commit({**found.files, "README.md": b"# Mine\n"})
    return found


class TestCard:
    @pytest.mark.slow
    def test_writes_the_card(self, run_dir, capsys):
        (run_dir / "README.md").write_text("# Mine\n")
        assert main(["card", str(run_dir), "--base-model", "org/bert", "--evaluated-on", "org/reviews"]) == 0
        assert capsys.readouterr().out == f"{run_dir / 'README.md'}\n"
        data = ModelCard.load(run_dir / "README.md").data
        assert (data.base_model, data.eval_results[1].metric_value) == ("org/bert", 0.625)
        assert "# Mine\n" in (run_dir / "README.md").read_text()
        assert not (run_dir / ".eval_results").exists()
        for words in (("--benchmark-task", "stars", "--split", "test"), ()):  # then it is remembered
            assert main(["card", str(run_dir), *words]) == 0
            assert (run_dir / ".eval_results" / "hf_parcor-org_reviews.yaml").is_file()
        for words in (("--evaluated-on", "reviews of mine"), ("--split", "test[:2]")):  # of these there is none
            told = ["card", str(run_dir), "--benchmark-task", "stars", *words]
            assert main(told) == MISTAKE
            assert "--benchmark-task: expected a result on a whole split" in capsys.readouterr().err
        assert main(["card", str(run_dir), "--evaluated-on", "org/others"]) == 0
        assert not list((run_dir / ".eval_results").iterdir()), "it was the task of other data"

    def test_remembers_what_the_last_card_said(self, run_dir):
        said = "--base-model org/bert --name mine --datasets org/train --evaluated-on org/reviews --split test"
        main(["card", str(run_dir), *said.split()])
        assert main(["card", str(run_dir), "--evaluated-on", "org/reviews"]) == 0, "the split of the same data"
        first = (run_dir / "README.md").read_bytes()
        assert main(["card", str(run_dir)]) == 0
        assert (run_dir / "README.md").read_bytes() == first
        (run_dir / "robustness.json").unlink()
        assert main(["card", str(run_dir), "--task", "text-classification"]) == 0
        facts = ModelFacts.load(run_dir / FACTS)
        assert (facts.task, facts.name, facts.datasets) == ("text-classification", "mine", ("org/train",))
        assert facts.evaluated_on.split == "test"
        assert main(["card", str(run_dir), "--datasets", "org/other"]) == 0
        assert ModelFacts.load(run_dir / FACTS).datasets == ("org/other",)
        assert main(["card", str(run_dir), "--metric", "loss"]) == MISTAKE, "nothing is there to read it from"
        assert main(["card", str(run_dir), "--seeds", str(run_dir)]) == MISTAKE, "nor what to read beside the seeds"

    def test_the_command_of_other_numbers_is_forgotten(self, run_dir, record_of):
        """Of the same ones it is remembered."""
        main(["card", str(run_dir), "--command", "python first.py"])
        main(["card", str(run_dir)])
        assert ModelFacts.load(run_dir / FACTS).command == "python first.py"
        record_of(values=(0.7, 0.4)).save(run_dir / "robustness.json")
        main(["card", str(run_dir)])
        assert ModelFacts.load(run_dir / FACTS).command == ""
        main(["card", str(run_dir), "--command", "python second.py"])
        assert ModelFacts.load(run_dir / FACTS).command == "python second.py"
        record_of(values=(0.6, 0.4)).save(run_dir / "robustness.json")
        main(["card", str(run_dir), "--command", "python third.py"])
        assert ModelFacts.load(run_dir / FACTS).command == "python third.py", "said of these numbers"

    def test_what_the_metric_means_is_what_the_flags_say(self, run_dir, record_of):
        replace(record_of(values=(8.0, 7.0), clean=3.0), metric_info={}).save(run_dir / "robustness.json")
        main(["card", str(run_dir)])
        assert " fall when " in (run_dir / "README.md").read_text()
        assert main(["card", str(run_dir), "--no-greater-is-better", "--unit", "points"]) == 0
        first = (run_dir / "README.md").read_text()
        assert ModelFacts.load(run_dir / FACTS).info == MetricInfo(False, "points")
        assert re.search(r"\| accuracy \(of 100\) +\|", first)
        assert re.search(r"\| no corruption +\| 3.00 \|", first)
        assert " rise when " in first
        assert main(["card", str(run_dir), "--no-greater-is-better"]) == 0
        assert (run_dir / "README.md").read_text() == first, "the unit that the last card said"
        main(["card", str(run_dir), "--metric", "loss"])
        assert ModelFacts.load(run_dir / FACTS).info.unit == "", "which was another metric's"
        main(["card", str(run_dir), "--metric", "accuracy", "--unit", "points"])
        stated = {"accuracy": MetricInfo(True, "share")}
        replace(record_of(), metric_info=stated).save(run_dir / "robustness.json")
        main(["card", str(run_dir)])
        assert ModelFacts.load(run_dir / FACTS).info == stated["accuracy"], "the record says it now"

    def test_the_record_says_data_and_task(self, run_dir, record_of):
        data = EvaluationData("dev.tsv", rows=6)
        record = replace(record_of(), evaluated_on=data, task="translation")
        record.save(run_dir / "robustness.json")
        assert main(["card", str(run_dir)]) == 0
        facts = ModelFacts.load(run_dir / FACTS)
        assert (facts.evaluated_on, facts.task) == (data, "translation")
        assert main(["card", str(run_dir), "--evaluated-on", "org/reviews", "--task", "summarization"]) == 0
        assert ModelFacts.load(run_dir / FACTS).task == "summarization"
        named = EvaluationData("reviews", "org/reviews", rows=6)
        for _ in range(2):
            facts = ModelFacts.load(run_dir / FACTS)
            assert facts.evaluated_on == named
            assert main(["card", str(run_dir)]) == 0, "remembers what these data are called"
        replace(record, evaluated_on=EvaluationData("other.tsv"), data="cd34").save(run_dir / "robustness.json")
        assert main(["card", str(run_dir)]) == 0
        assert ModelFacts.load(run_dir / FACTS).evaluated_on.name == "other.tsv", "of other data it does not hold"
        replace(record, evaluated_on=EvaluationData("renamed.tsv"), data="cd34").save(run_dir / "robustness.json")
        assert main(["card", str(run_dir)]) == 0
        assert ModelFacts.load(run_dir / FACTS).evaluated_on.name == "renamed.tsv", "what has no name on the Hub"
        for name, words in (("one.tsv", ["--evaluated-on", "org/reviews"]), ("two.tsv", [])):
            replace(record, evaluated_on=EvaluationData(name), data="").save(run_dir / "robustness.json")
            assert main(["card", str(run_dir), *words]) == 0
        assert ModelFacts.load(run_dir / FACTS).evaluated_on.name == "two.tsv", "nobody knows that they are the same"

    def test_what_was_said_goes_before_a_task_that_stands_for_several(self, run_dir, record_of):
        replace(record_of(), task="text2text-generation").save(run_dir / "robustness.json")
        for words, task in (("", "text2text-generation"), ("--task translation", "translation"), ("", "translation")):
            assert main(["card", str(run_dir), *words.split()]) == 0
            assert ModelFacts.load(run_dir / FACTS).task == task

    @pytest.mark.parametrize("task", TASKS)
    def test_the_head_says_the_task_where_the_record_does_not(self, run_dir, task):
        pytest.importorskip("PIL")
        SAVED[task][0](run_dir)
        assert main(["card", str(run_dir)]) == 0
        several = task in ("summarization", "translation")  # what a T5 is for
        assert ModelFacts.load(run_dir / FACTS).task == ("text2text-generation" if several else task)

    @pytest.mark.parametrize("config", ["no JSON", "[]", "{}"])
    def test_a_head_that_is_not_said(self, run_dir, config):
        (run_dir / "config.json").write_text(config)
        assert main(["card", str(run_dir)]) == 0
        assert ModelFacts.load(run_dir / FACTS).task == ""

    def test_a_probe_is_no_seed(self, run_dir, tmp_path, probe_of, capsys):
        probe_of().save(tmp_path / "probe.json")
        assert main(["card", str(run_dir), "--seeds", str(tmp_path / "probe.json")]) == MISTAKE
        assert "expected the record of an evaluation" in capsys.readouterr().err

    def test_seeds(self, run_dir, tmp_path, record_of):
        record_of(clean=0.7).save(tmp_path / "other" / "robustness.json")
        assert main(["card", str(run_dir), "--seeds", str(tmp_path / "other")]) == 0
        assert ModelFacts.load(run_dir / FACTS).clean.metrics["accuracy"].values == (0.9, 0.7)

    def test_flags_say_what_seeds_differ_in(self, run_dir, tmp_path, record_of, capsys):
        for folder, unit in ((run_dir, "share"), (tmp_path / "other", "points")):
            replace(record_of(), metric_info={"accuracy": MetricInfo(True, unit)}).save(folder / "robustness.json")
        words = ["card", str(run_dir), "--seeds", str(tmp_path / "other")]
        assert main(words) == MISTAKE
        assert "state unit" in capsys.readouterr().err
        assert main([*words, "--unit", "share"]) == 0
        assert ModelFacts.load(run_dir / FACTS).info == MetricInfo(True, "share")

    def test_what_was_trained_otherwise_is_no_seed(self, run_dir, tmp_path, record_of, capsys):
        record_of(clean=0.7).save(tmp_path / "other" / "robustness.json")
        for folder, defense in ((run_dir, "sam"), (tmp_path / "other", "awp")):
            (folder / "defense_config.json").write_text(f'{{"defense": "{defense}", "settings": {{}}}}')
        assert main(["card", str(run_dir), "--seeds", str(tmp_path / "other")]) == MISTAKE
        assert "different defenses" in capsys.readouterr().err
        assert main(["card", str(run_dir)]) == 0
        assert ModelFacts.load(run_dir / FACTS).defense["defense"] == "sam"

    def test_a_probe_of_the_same_weights_is_shown(self, run_dir, probed_record, probe_of):
        probed_record.save(run_dir / "robustness.json")
        probe_of().save(run_dir / "probe.json")
        assert main(["card", str(run_dir)]) == 0
        assert (run_dir / HEAT_MAP).is_file()
        assert f"]({HEAT_MAP})" in (run_dir / "README.md").read_text()
        first = (run_dir / "README.md").read_bytes()
        (run_dir / "robustness.json").unlink()
        assert main(["card", str(run_dir)]) == 0, "of the last card's weights"
        assert (run_dir / "README.md").read_bytes() == first
        (run_dir / "probe.json").unlink()
        assert main(["card", str(run_dir)]) == 0
        assert (run_dir / "README.md").read_bytes() == first, "what the last card said"

    def test_a_probe_alone(self, run_dir, probe_of):
        (run_dir / "robustness.json").unlink()
        probe_of().save(run_dir / "probe.json")
        assert main(["card", str(run_dir)]) == 0
        assert ModelFacts.load(run_dir / FACTS).corruptions == ()
        assert {path.suffix for path in run_dir.iterdir()} == {".md", ".json", ".png"}

    @pytest.mark.parametrize("beside", [True, False])
    def test_a_recipe_alone_and_beside_an_evaluation(self, run_dir, probed_record, recipe_of, beside):
        """It stays on the card when its records are gone, as what the last card said."""
        (run_dir / "robustness.json").unlink()
        if beside:
            probed_record.save(run_dir / "robustness.json")
        for record, name in zip(recipe_of(), ("sensitivity", "recipe", "recipe_measured"), strict=True):
            record.save(run_dir / f"{name}.json")
        assert main(["card", str(run_dir)]) == 0
        card = (run_dir / "README.md").read_text()
        assert f"\n\n{text_of(ModelFacts.load(run_dir / FACTS).recipe.verdict)}\n\n" in card
        assert [row.label for row in ModelFacts.load(run_dir / FACTS).corruptions] == [
            row.label for row in probed_record.corruptions if beside
        ]
        for path in {*run_dir.glob("*.json")} - {run_dir / FACTS}:
            path.unlink()
        assert main(["card", str(run_dir)]) == 0
        assert (run_dir / "README.md").read_text() == card

    def test_a_recipe_of_other_weights_is_refused(self, run_dir, recipe_of, capsys):
        for record, name in zip(recipe_of(), ("sensitivity", "recipe", "recipe_measured"), strict=True):
            record.save(run_dir / f"{name}.json")
        assert main(["card", str(run_dir)]) == MISTAKE
        assert "recipe: expected one of the weights that were evaluated" in capsys.readouterr().err
        assert not (run_dir / "README.md").exists()

    def test_a_probe_of_other_weights_is_refused(self, run_dir, probe_of, capsys):
        probe_of().save(run_dir / "probe.json")
        assert main(["card", str(run_dir)]) == MISTAKE
        assert "expected one of the weights that were evaluated, unknown" in capsys.readouterr().err
        assert not (run_dir / "README.md").exists()

    def test_a_dry_run_writes_nothing(self, run_dir, capsys):
        assert main(["card", str(run_dir), "--dry-run"]) == 0
        assert "+## Robustness to parameter corruption" in capsys.readouterr().out
        assert [path.name for path in run_dir.iterdir()] == ["robustness.json"]
        (run_dir / "README.md").write_text("# Mine\n")
        main(["card", str(run_dir), "--dry-run"])
        assert " # Mine\n" in capsys.readouterr().out, "beside what is added"
        main(["card", str(run_dir)])
        capsys.readouterr()
        assert main(["card", str(run_dir), "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert len(said.splitlines()) == 1, "what was written is what would be"
        assert not said.startswith(("+", "-"))

    def test_pushes(self, run_dir, repository, capsys):
        assert main(["card", str(run_dir), "--push", "me/tiny"]) == 0
        assert "/me/tiny/commit/" in capsys.readouterr().out
        assert b"# Mine\n\n<!-- hf_parcor:begin" in repository.files["README.md"]
        assert (run_dir / "README.md").is_file(), "here, too"

    def test_where_it_pushes_is_what_the_flags_say(self, run_dir, monkeypatch, capsys):
        asked = []
        published = SimpleNamespace(url="there", difference="")
        monkeypatch.setattr("hf_parcor.cards.push_card", lambda facts, to: asked.append((facts.name, to)) or published)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.chdir(run_dir)
        assert main(["card", ".", "--push", "me/tiny", "--revision", "dev", "--create-pr"]) == 0
        assert asked == [("tiny", Destination("me/tiny", revision="dev", create_pr=True))]
        assert capsys.readouterr().out.endswith("there\n")

    def test_a_dry_run_of_a_push(self, run_dir, repository, capsys, hub):
        assert main(["card", str(run_dir), "--push", "me/tiny", "--dry-run"]) == 0
        assert "+## Robustness to parameter corruption" in capsys.readouterr().out
        assert not any(request.startswith("POST") for request in hub.requests)
        assert not (run_dir / "README.md").exists()

    def test_a_dry_run_of_a_push_that_changes_nothing_says_so(self, run_dir, repository, capsys):
        assert main(["card", str(run_dir), "--push", "me/tiny"]) == 0
        capsys.readouterr()
        assert main(["card", str(run_dir), "--push", "me/tiny", "--dry-run"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1

    @pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--results-only"]])
    def test_offline_is_told_before_anything_is_read_or_drawn(self, run_dir, monkeypatch, capsys, flags):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("hf_parcor.cli.card.facts_of_run", lambda *_: pytest.fail("records were read"))
        assert main(["card", str(run_dir), "--push", "me/tiny", *flags]) == 2
        assert "HF_HUB_OFFLINE" in capsys.readouterr().err
        assert not (run_dir / "README.md").exists()

    def test_pictures_wait_for_the_hub(self, run_dir, monkeypatch, capsys):
        """Without a connection nothing is drawn first."""
        monkeypatch.setattr("hf_parcor.cards.hub.files_beside", lambda _: pytest.fail("pictures were drawn"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("hf_parcor.cards.hub.card_on_hub", lambda *_: (_ for _ in ()).throw(ConnectionError()))
        assert main(["card", str(run_dir), "--push", "me/tiny", "--dry-run"]) == 2
        assert "ConnectionError" in capsys.readouterr().err

    def test_a_pull_request_with_one_result(self, run_dir, repository, capsys):
        words = ["--push", "me/tiny", "--results-only", "--only", "Gaussian σ=0.02", "--create-pr"]
        assert main(["card", str(run_dir), *words]) == 0
        assert capsys.readouterr().out.endswith("/me/tiny/discussions/1\n")
        text = repository.pull_requests[0][1]["README.md"].decode()
        assert "accuracy, Gaussian σ=0.02" in text
        assert "gradient" not in text
        assert not (run_dir / "README.md").exists(), "results alone"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "RUN_DIR: expected the folder of a run"),
            (["nowhere"], "RUN_DIR: expected a folder"),
            (["RUN", "--create-pr"], "add --push"),
            (["RUN", "--results-only"], "add --push"),
            (["RUN", "--revision", "main"], "add --push"),
            (["RUN", "--only", "x"], "--results-only"),
            (["RUN", "--metric", "f1"], "got 'f1'"),
            (["RUN", "--push", "me/tiny", "--results-only", "--only", "x"], "take them from the table"),
        ],
    )
    def test_mistakes(self, words, message, run_dir, capsys, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert main(["card", *(str(run_dir) if word == "RUN" else word for word in words)]) == MISTAKE
        assert message in capsys.readouterr().err

    def test_the_hub_refuses(self, run_dir, repository, monkeypatch, capsys):
        monkeypatch.setenv("HF_TOKEN", "hf_expired_token")
        assert main(["card", str(run_dir), "--push", "me/tiny"]) == MISTAKE
        said = capsys.readouterr()
        assert "status 401" in said.err
        assert "hf_expired_token" not in said.err + said.out
        assert not (run_dir / "README.md").exists(), "nothing local was changed, it says"


class TestCardsOfOurCampaigns:
    @pytest.mark.slow
    def test_are_those_of_the_records(self):
        from scripts import model_cards

        found = list(model_cards.all_facts())
        for facts in found:
            folder = model_cards.CARDS / facts.name
            assert (folder / FACTS).read_text(encoding="utf-8") == facts.to_json()
            drawn = {CURVES: shows_curves(facts.as_record(), facts.metric), HEAT_MAP: facts.probe is not None}
            pictures = [name for name, there in drawn.items() if there]
            card = card_of(ModelFacts.load(folder / FACTS), pictures)
            assert (folder / "README.md").read_text(encoding="utf-8") == card
            for picture in pictures:
                assert (folder / picture).read_bytes().startswith(b"\x89PNG")
            assert {path.name for path in folder.iterdir()} == {"README.md", FACTS, *pictures}
        assert (model_cards.CARDS / "README.md").read_text(encoding="utf-8") == model_cards.index(found)
        folders = {path.parent.name for path in model_cards.CARDS.glob(f"*/{FACTS}")}
        assert folders == {facts.name for facts in found}
