"""What `create_model_card` of the Trainer writes, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from card_text import read
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerState

from hf_parcor import GaussianNoise, ParameterDefenseMixin, Quantization, RobustnessCallback
from hf_parcor.cards import ModelFacts
from hf_parcor.cards.mixin import MeasuredWeights, PublishingMixin
from hf_parcor.cards.text import read_card
from hf_parcor.evaluation.identity.fingerprint import fingerprint_of_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("quick_picture"),
]


class TestCreateModelCard:
    def test_the_stock_card_and_then_ours(self, trained, make, tmp_path):
        trained.create_model_card()
        stock = make(Trainer, output_dir=str(tmp_path / "stock" / "tiny"))
        stock.state = trained.state
        (tmp_path / "stock" / "tiny").mkdir(parents=True, exist_ok=True)
        stock.create_model_card()
        card, theirs = (read_card(read(folder)) for folder in (tmp_path / "tiny", tmp_path / "stock" / "tiny"))
        assert card.before.rstrip("\n") == theirs.before.rstrip("\n")
        assert "| Training Loss | Epoch | Step | Validation Loss | Accuracy |" in card.before
        data = ModelCard(read(tmp_path / "tiny")).data
        assert {"generated_from_trainer", "hf_parcor", "adversarial-parameter-defense"} <= set(data.tags)
        assert data.pipeline_tag == "text-classification"
        record = trained.robustness_records["eval"]
        assert [one.metric_value for one in data.eval_results] == [row.mean("accuracy") for row in record.rows()]
        facts = ModelFacts.load(tmp_path / "tiny" / "robustness_facts.json")
        assert facts.corruptions[0].metrics["accuracy"].values == record.corruptions[0].metrics["accuracy"]
        assert facts.defense["settings"]["constraint"]["epsilon"] == 0.1
        assert (record.task, record.evaluated_on.rows) == (facts.task, 12) == ("text-classification", 12)

    def test_is_written_anew_while_nobody_touches_it(self, trained, tmp_path):
        trained.create_model_card()
        first = read(tmp_path / "tiny")
        trained.create_model_card()
        assert read(tmp_path / "tiny") == first
        trained.args.max_steps = 5
        trained.train()
        trained.create_model_card()
        assert "training_steps: 5" in read(tmp_path / "tiny")
        assert "training_steps: 3" not in read(tmp_path / "tiny")

    @pytest.mark.parametrize("change", ["More information needed", "library_name: transformers\n"])
    def test_what_a_person_changed_is_kept(self, trained, tmp_path, change):
        trained.create_model_card()
        path = tmp_path / "tiny" / "README.md"
        theirs = read(tmp_path / "tiny").replace(change, f"{change[:-1]}D # by hand\n", 1)
        path.write_bytes(theirs.encode())
        trained.args.max_steps = 5
        trained.create_model_card()
        assert read_card(read(tmp_path / "tiny")).before == read_card(theirs).before
        assert read_card(theirs).front_matter.splitlines()[0] in read(tmp_path / "tiny")
        assert "training_steps: 5" in read_card(read(tmp_path / "tiny")).section, "how it was trained now"
        assert "#### Training hyperparameters" in read_card(read(tmp_path / "tiny")).section

    def test_results_are_said_of_the_measured_weights_only(self, trained, tmp_path):
        trained.create_model_card()
        with torch.no_grad():
            trained.model.classifier.bias += 1
        trained.create_model_card()
        assert "has not been measured" in read(tmp_path / "tiny")
        assert not ModelCard(read(tmp_path / "tiny")).data.eval_results
        assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["README.md"], "old results are gone"

    def test_the_data_are_those_that_were_measured(self, make, labelled_rows, monkeypatch):
        class Rows(list):
            split = "test"

        rows = Rows(labelled_rows[:8])
        trainer = make()
        trainer.evaluate_robustness([GaussianNoise(0.5)], trials=1, eval_dataset=rows)
        assert trainer.robustness_facts().evaluated_on.split == "test"
        assert trainer.robustness_facts(dataset="org/reviews").evaluated_on.id == "org/reviews"
        trainer.evaluate_robustness([GaussianNoise(0.5)], trials=1)
        assert trainer.robustness_facts().evaluated_on.split == ""
        said = []
        monkeypatch.setattr("hf_parcor.cards.mixin.logger.warning", said.append)
        trainer.evaluate_robustness([GaussianNoise(0.5)], trials=1, eval_dataset={"one": rows, "two": rows[:4]})
        assert trainer.robustness_facts().evaluated_on.rows == 8
        assert ["eval_one alone" in line for line in said] == [True]
        watched = make()
        watched.add_callback(RobustnessCallback(watched, [Quantization(4)]))
        watched.evaluate(rows)
        assert watched.robustness_facts().evaluated_on.split == "test"

    @pytest.mark.parametrize("origin", ["org/bert", "a-folder", "", None])
    def test_the_model_that_it_was_made_from_is_named_if_it_has_a_name_on_the_hub(
        self, trained, tmp_path, monkeypatch, origin
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a-folder").mkdir()
        trained.model.config._name_or_path = str(tmp_path) if origin is None else origin
        trained.create_model_card()
        assert trained.robustness_facts().base_model == (origin if origin == "org/bert" else "")
        assert ModelCard(read(tmp_path / "tiny")).data.base_model == (origin if origin == "org/bert" else None)

    def test_without_a_defense(self, make, tmp_path):
        trainer = make()
        trainer.defense = None
        trainer.create_model_card()
        assert "not defended" in read(tmp_path / "tiny")
        assert "adversarial-parameter-defense" not in ModelCard(read(tmp_path / "tiny")).data.tags

    def test_an_interruption_leaves_the_old_card(self, trained, tmp_path, monkeypatch):
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / "README.md").write_text("# Mine\n")
        monkeypatch.setattr(Trainer, "create_model_card", lambda self, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained.create_model_card()
        assert read(tmp_path / "tiny") == "# Mine\n"
        assert trained.args.output_dir == str(tmp_path / "tiny")

    def test_of_peft_is_kept(self, make, model, tmp_path):
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        trainer = make(trained=adapted)
        trainer.save_model()
        theirs = read_card(read(tmp_path / "tiny"))
        trainer.evaluate_robustness([GaussianNoise(0.5)])
        trainer.create_model_card()
        card = read_card(read(tmp_path / "tiny"))
        assert card.before.startswith(theirs.before)
        data = ModelCard(read(tmp_path / "tiny")).data
        assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
        assert "lora" in data.tags
        trainer.save_model()  # PEFT writes its part again
        again = read_card(read(tmp_path / "tiny"))
        assert again.section == card.section
        assert again.is_untouched

    def test_of_sentence_transformers_is_kept(self, trained, tmp_path):
        theirs = "---\ntags:\n- sentence-transformers\nlibrary_name: sentence-transformers\n---\n\n# S\n\n## Usage\n"
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / "README.md").write_text(theirs)
        trained.create_model_card()
        assert "\n---\n\n# S\n\n## Usage\n" in read(tmp_path / "tiny")
        assert ModelCard(read(tmp_path / "tiny")).data.library_name == "sentence-transformers"

    def test_of_any_trainer(self, make, tmp_path):
        class Own(Trainer):
            def create_model_card(self, model_name=None):
                place = Path(self.args.output_dir)
                words = f"# {model_name}\n\n## Training procedure\n\nOwn.\n\n## Citation\n"
                (place / "README.md").write_text(words, encoding="utf-8")
                (place / "curve.svg").write_text("<svg/>", encoding="utf-8")

        class Defended(ParameterDefenseMixin, PublishingMixin, Own):
            pass

        make(Defended).create_model_card(model_name="own")
        assert "\n# own\n" in "\n" + read_card(read(tmp_path / "tiny")).before
        assert (tmp_path / "tiny" / "curve.svg").exists()


class TestOfACallback:
    @pytest.fixture
    def watched(self, make):
        """Return a Trainer that measures at each step, and whose best step is the first, of the largest loss."""
        every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        trainer = make(**every_step, **best, learning_rate=0.05)
        trainer.add_callback(RobustnessCallback(trainer, [Quantization(4)]))
        return trainer

    def test_the_best_step_is_the_one_on_the_card(self, watched, tmp_path):
        watched.train()
        assert watched.state.best_global_step == 1
        watched.create_model_card()
        [row] = ModelFacts.load(tmp_path / "tiny" / "robustness_facts.json").corruptions
        name = "eval_robustness_4_bit_quantization_loss"
        logged = {entry["step"]: entry[name] for entry in watched.state.log_history if name in entry}
        assert row.metrics["loss"].values == (logged[1],)
        assert logged[1] not in (logged[2], logged[3])
        assert "| 4-bit quantization |" in read(tmp_path / "tiny")

    def test_of_the_last_step_where_none_is_the_best(self, watched, tmp_path):
        watched.args.load_best_model_at_end = False
        watched.train()
        facts = watched.robustness_facts()
        assert facts.weights == (fingerprint_of_weights(watched.model),)
        with torch.no_grad():
            watched.model.classifier.bias += 1
        assert watched.robustness_facts() is None

    def test_what_was_asked_for_goes_before(self, watched):
        watched.train()
        watched.evaluate_robustness([GaussianNoise(0.5)], trials=1)
        watched.evaluate()
        assert [row.corruption for row in watched.robustness_facts().corruptions] == ["gaussian"]


class TestMeasuredWeights:
    def test_keeps_the_last_and_the_best(self):
        measured = MeasuredWeights()
        for step, best in [(1, None), (2, 1), (3, 2), (4, 2)]:
            state = TrainerState(global_step=step, best_global_step=best)
            measured.keep(state, f"weights {step}", {"eval": step}, instead=False)
        assert [measured.of(f"weights {step}") for step in (1, 2, 3, 4)] == [{}, {"eval": 2}, {}, {"eval": 4}]
        again = TrainerState(global_step=4, best_global_step=2)
        measured.keep(again, "weights 1", {"test": "of others"}, instead=False)
        assert measured.of("weights 1") == {"test": "of others"}, "not beside what is of other weights"
        measured.keep(again, "weights 2", {"eval": "asked"}, instead=True)
        measured.keep(again, "weights 2", {"eval": "beside", "test": "beside"}, instead=False)
        assert measured.of("weights 2") == {"eval": "asked", "test": "beside"}
        assert measured.of("weights 4") == {}
