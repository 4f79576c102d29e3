"""What `create_model_card` and `push_to_hub` of the Trainer write, and what they leave."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Failure, Repository
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer, TrainingArguments

from hf_parcor import GaussianNoise, ParameterDefenseMixin, ParameterDefenseTrainer
from hf_parcor.model_card import ModelFacts
from hf_parcor.model_card.card import read_card
from hf_parcor.training import publishing

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("quick_picture"),
]
OURS = "## Robustness to parameter corruption"


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def model(tiny_bert):
    torch.manual_seed(0)
    return tiny_bert(vocab_size=30, num_labels=3)


@pytest.fixture
def make(tmp_path, model, labelled_rows):
    rows = labelled_rows[:12]

    def build(kind=ParameterDefenseTrainer, trained=model, **options):
        defaults = {
            "output_dir": str(tmp_path / "tiny"),
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "eval_strategy": "epoch",
            "logging_steps": 1,
            "max_steps": 3,
            "dataloader_pin_memory": False,
        }
        arguments = TrainingArguments(**{**defaults, **options})
        return kind(trained, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)

    return build


@pytest.fixture
def trained(make):
    trainer = make()
    trainer.train()
    trainer.evaluate_robustness([GaussianNoise(0.5)], trials=2)
    return trainer


def read(folder):
    return (folder / "README.md").read_bytes().decode()


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

        class Defended(ParameterDefenseMixin, Own):
            pass

        make(Defended).create_model_card(model_name="own")
        assert "\n# own\n" in "\n" + read_card(read(tmp_path / "tiny")).before
        assert (tmp_path / "tiny" / "curve.svg").exists()


class TestPushToHub:
    @pytest.fixture(autouse=True)
    def _hub(self, hub, monkeypatch):
        monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=hub.endpoint))
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    @pytest.fixture
    def pushed(self, trained, hub):
        trained.push_to_hub()
        return hub.repositories["me/tiny"]

    def test_model_card_and_results(self, pushed, hub, trained, tmp_path):
        assert {"README.md", "model.safetensors", "defense_config.json", "robustness_facts.json"} <= set(pushed.files)
        assert OURS in pushed.files["README.md"].decode()
        assert pushed.files["README.md"] == (tmp_path / "tiny" / "README.md").read_bytes()
        assert not any(TOKEN.encode() in content for content in pushed.files.values())

    def test_the_model_is_loaded_back_by_another_process(self, pushed, hub, trained, tmp_path):
        program = (
            "from transformers import AutoModelForSequenceClassification as Model\n"
            "from hf_parcor import DefenseConfig\n"
            "print(Model.from_pretrained('me/tiny').classifier.bias.tolist())\n"
            "print(DefenseConfig.from_pretrained('me/tiny').defense.constraint.epsilon)"
        )
        environment = {
            **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"},
            **{"HF_HOME": str(tmp_path / "home"), "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
        }
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == [str(trained.model.classifier.bias.tolist()), "0.1"]

    def test_what_a_person_wrote_on_the_hub_is_kept(self, pushed, trained):
        theirs = pushed.files["README.md"].replace(b"More information needed", b"Words of a person.", 1)
        pushed.commit({**pushed.files, "README.md": theirs})
        trained.args.max_steps = 5
        trained.train()
        trained.push_to_hub()
        assert b"Words of a person." in pushed.files["README.md"]
        assert b"training_steps: 5" in pushed.files["README.md"]

    def test_a_card_that_was_there_before_the_first_push(self, trained, hub):
        hub.repositories["me/tiny"] = repository = Repository()
        repository.commit({**repository.files, "README.md": b"# Mine\n\nWords."})
        trained.push_to_hub()
        assert b"---\n# Mine\n\nWords.\n\n<!-- hf_parcor:begin" in repository.files["README.md"]

    def test_changed_on_both_sides(self, pushed, trained, tmp_path):
        for place in ("here", "there"):
            text = read(tmp_path / "tiny").replace("More information needed", f"Words {place}.", 1)
            if place == "here":
                (tmp_path / "tiny" / "README.md").write_bytes(text.encode())
            else:
                pushed.commit({**pushed.files, "README.md": text.replace("here.", "there.").encode()})
        head = pushed.head
        messages = []
        publishing.logger.addHandler(handler := _Keep(messages))
        try:
            trained.push_to_hub()
        finally:
            publishing.logger.removeHandler(handler)
        assert any(head in message for message in messages)
        assert b"Words here." in pushed.files["README.md"]
        assert b"Words there." in pushed.at(head)["README.md"], "in the history"

    @pytest.mark.parametrize("status", [401, 412, 429])
    def test_a_failure_loses_nothing_and_the_next_one_succeeds(self, trained, hub, tmp_path, status):
        hub.failures.append(Failure("POST .*/commit/", status, message="not now"))
        with pytest.raises(HfHubHTTPError, match=str(status)):
            trained.push_to_hub()
        assert OURS in read(tmp_path / "tiny")
        assert (tmp_path / "tiny" / "model.safetensors").exists()
        trained.push_to_hub()
        assert OURS in hub.repositories["me/tiny"].files["README.md"].decode()


class _Keep(logging.Handler):
    def __init__(self, messages):
        super().__init__()
        self.messages = messages

    def emit(self, record):
        self.messages.append(record.getMessage())
