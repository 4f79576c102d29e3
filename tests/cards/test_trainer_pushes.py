"""What the Trainer's pushes write on the Hub, at the end and while it trains, and what they leave."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
from card_text import OURS, read
from for_each import for_each
from hub_server import TOKEN, Failure, Repository
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainerCallback

from hf_parcor import Quantization, RobustnessCallback
from hf_parcor.cards import ModelFacts
from hf_parcor.cards import mixin as publishing
from hf_parcor.cards.text import HEAT_MAP

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("quick_picture"),
]


@pytest.fixture(autouse=True)
def _hub(hub, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=hub.endpoint))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def warnings():
    """Return what is warned of."""
    messages = []
    publishing.logger.addHandler(handler := _Keep(messages))
    yield messages
    publishing.logger.removeHandler(handler)


class StockTrainer:
    """A stand-in for the Trainer of Transformers before 5.23, whose pushes know no `private`."""

    args = types.SimpleNamespace(hub_token=None, hub_revision=None)
    hub_model_id = push_in_progress = None

    def is_world_process_zero(self):
        return True

    def init_hf_repo(self, token=None):
        self.hub_model_id = "me/tiny"

    def push_to_hub(self, commit_message, blocking, token, revision, **kwargs):
        return kwargs


def test_what_is_not_given_is_not_handed_on(monkeypatch):
    class Publishing(publishing.PublishingMixin, StockTrainer):
        pass

    for name in ("_finish_current_push", "_take_card_of_hub", "_remove_old_results"):
        monkeypatch.setattr(Publishing, name, lambda *_: [], raising=False)
    assert Publishing().push_to_hub(tags=["a"]) == {"tags": ["a"]}


class TestPushToHub:
    @pytest.fixture
    def pushed(self, trained, hub):
        trained.push_to_hub()
        return hub.repositories["me/tiny"]

    @pytest.mark.slow
    def test_model_card_and_results(self, pushed, hub, trained, tmp_path):
        assert {"README.md", "model.safetensors", "defense_config.json", "robustness_facts.json"} <= set(pushed.files)
        assert OURS in pushed.files["README.md"].decode()
        assert pushed.files["README.md"] == (tmp_path / "tiny" / "README.md").read_bytes()
        assert not any(TOKEN.encode() in content for content in pushed.files.values())

    @pytest.mark.slow
    def test_the_token_is_that_of_the_arguments_unless_one_is_given(self, pushed, trained, monkeypatch):
        """The server lets nobody write with another one, nor remove what is old."""
        monkeypatch.delenv("HF_TOKEN")
        for of_arguments, given in ((TOKEN, None), ("hf_another", TOKEN)):
            trained.args.hub_token = of_arguments
            pushed.commit({**pushed.files, HEAT_MAP: b"of other weights"})
            trained.push_to_hub(token=given)
            assert HEAT_MAP not in pushed.files

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_what_a_person_wrote_on_the_hub_is_kept(self, pushed, trained):
        theirs = pushed.files["README.md"].replace(b"More information needed", b"Words of a person.", 1)
        pushed.commit({**pushed.files, "README.md": theirs})
        trained.args.max_steps = 5
        trained.train()
        trained.push_to_hub()
        assert b"Words of a person." in pushed.files["README.md"]
        assert b"training_steps: 5" in pushed.files["README.md"]

    @pytest.mark.slow
    def test_a_card_that_was_there_before_the_first_push(self, trained, hub):
        hub.repositories["me/tiny"] = repository = Repository()
        repository.commit({**repository.files, "README.md": b"# Mine\n\nWords."})
        trained.push_to_hub()
        assert b"---\n# Mine\n\nWords.\n\n<!-- hf_parcor:begin" in repository.files["README.md"]

    @pytest.mark.slow
    @for_each(
        ("there", "warned"), [("Words there.", True), ("Words here.", False), ("More information needed", False)]
    )
    def test_changed_on_both_sides(self, pushed, trained, warnings, there, warned):
        """A warning says where the words of a person are that are not pushed, and only then."""
        folder = Path(trained.args.output_dir)
        text = read(folder)
        here = text.replace("More information needed", "Words here.", 1)
        (folder / "README.md").write_bytes(here.encode())
        theirs = text.replace("More information needed", there, 1).replace(OURS, f"{OURS}, earlier", 1)
        head = pushed.commit({**pushed.files, "README.md": theirs.encode()})
        trained.push_to_hub()
        assert any(head in message for message in warnings) == warned
        assert b"Words here." in pushed.files["README.md"]
        assert there.encode() in pushed.at(head)["README.md"], "in the history"

    @pytest.mark.slow
    @pytest.mark.parametrize("status", [401, 412, 429])
    def test_a_failure_loses_nothing_and_the_next_one_succeeds(self, trained, hub, tmp_path, status):
        hub.failures.append(Failure("POST .*/commit/", status, message="not now"))
        with pytest.raises(HfHubHTTPError, match=str(status)):
            trained.push_to_hub()
        assert OURS in read(tmp_path / "tiny")
        assert (tmp_path / "tiny" / "model.safetensors").exists()
        trained.push_to_hub()
        assert OURS in hub.repositories["me/tiny"].files["README.md"].decode()

    @pytest.mark.slow
    def test_results_of_other_weights_are_removed(self, pushed, trained):
        assert "robustness_facts.json" in pushed.files
        trained.args.max_steps = 5
        trained.train()
        trained.push_to_hub()
        assert not any(name.startswith("robustness") for name in pushed.files)
        assert b"has not been measured" in pushed.files["README.md"]


class _Person(TrainerCallback):
    """Changes the card on the Hub before a step, when all that was pushed has arrived."""

    def __init__(self, trainer, repository, words):
        self.trainer, self.repository, self.words = trainer, repository, words

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()
        if state.global_step in self.words:
            card = self.repository.files.get("README.md", b"# Mine\n") + self.words[state.global_step]
            self.repository.commit({**self.repository.files, "README.md": card})


class TestPushWhileTraining:
    @pytest.fixture
    def start(self, make, hub):
        """Return a Trainer that pushes at each step, and its repository."""

        def build(strategy="every_save", words=None):
            trainer = make(
                push_to_hub=True,
                hub_strategy=strategy,
                hub_model_id="me/tiny",
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
            )
            repository = hub.repositories["me/tiny"]
            trainer.add_callback(_Person(trainer, repository, words or {}))
            return trainer, repository

        return build

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("strategy", "pushed"),
        [("every_save", False), ("every_save", True), ("checkpoint", True), ("all_checkpoints", False), ("end", True)],
    )
    def test_what_a_person_writes_meanwhile_is_kept(self, start, strategy, pushed):
        trainer, repository = start(strategy, {1: b"First.\n", 2: b"Second.\n"})
        if pushed:
            trainer.push_to_hub()
            del repository.files["model.safetensors"]
        trainer.train()
        trainer._finish_current_push()
        card = repository.files["README.md"].decode()
        assert card.count("First.\n") == card.count("Second.\n") == 1
        assert (OURS in card) == (pushed or strategy != "end")
        assert ("model.safetensors" in repository.files) == (strategy != "end")
        assert ("last-checkpoint/model.safetensors" in repository.files) == (strategy == "checkpoint")
        trainer.push_to_hub()
        final = repository.files["README.md"].decode()
        assert "First.\n" in final
        assert "Second.\n" in final
        assert OURS in final

    @pytest.mark.slow
    def test_no_card_is_made_as_with_the_trainer(self, start):
        trainer, repository = start()
        trainer.train()
        trainer._finish_current_push()
        assert "model.safetensors" in repository.files
        assert "README.md" not in repository.files

    @pytest.mark.slow
    def test_results_are_those_of_the_pushed_weights(self, start, trained):
        trained.push_to_hub()  # results of an earlier training in the same folder
        trainer, repository = start(words={2: b"Words."})
        trainer.args.max_steps = 2
        trainer.train()
        trainer._finish_current_push()
        assert b"has not been measured" in repository.files["README.md"]
        assert "robustness_facts.json" not in repository.files
        trainer.add_callback(RobustnessCallback(trainer, [Quantization(4)]))
        trainer.args.max_steps = 3
        trainer.train()
        trainer._finish_current_push()
        facts = ModelFacts.from_json(repository.files["robustness_facts.json"].decode())
        [logged] = [
            value
            for entry in trainer.state.log_history
            for name, value in entry.items()
            if name == "eval_robustness_4_bit_quantization_loss" and entry["step"] == 3
        ]
        assert facts.corruptions[0].metrics["loss"].values == (logged,)
        assert facts.name == "tiny"

    @pytest.mark.parametrize("trouble", ["the Hub", "the card"])
    def test_a_card_that_cannot_be_kept_stops_no_training(self, start, hub, warnings, trouble):
        broken = b"---\ntags: [open\n---\n# Mine\n"
        trainer, repository = start()
        trainer.create_model_card()
        repository.commit({**repository.files, "README.md": broken})
        if trouble == "the Hub":
            hub.failures.append(Failure("GET /api/models", 403, message="not now", times=99))
        trainer.train()
        trainer._finish_current_push()
        assert trainer.state.global_step == 3
        assert repository.files["README.md"] == broken
        assert "model.safetensors" not in repository.files
        assert len(warnings) == 3
        assert all("Nothing is pushed at this step" in message for message in warnings)


class _Keep(logging.Handler):
    def __init__(self, messages):
        super().__init__()
        self.messages = messages

    def emit(self, record):
        self.messages.append(record.getMessage())
