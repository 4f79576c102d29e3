"""What campaigns share: where models are trained and measured, shown by the programs that they would start."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from for_each import for_each

pytest.importorskip("matplotlib", reason="figures need the extra 'plots'")
pytest.importorskip("sacrebleu", reason="BLEU needs the extra 'translation'")

from hf_parcor import EvaluationRecord
from scripts import campaigns, reproduce

RESULTS_OF_TRAINING = {"train_collapsed": 0, "train_runtime": 1.0, "train_samples": 1}


@pytest.fixture
def trained_in(monkeypatch, tmp_path):
    """Return the folders in which a command would train its plain models, in its default folder of work."""
    monkeypatch.chdir(tmp_path)

    def of(line: str) -> set[Path]:
        folders = set()

        def started(command, **_):
            folders.add(Path(command[command.index("--output_dir") + 1]))
            raise InterruptedError("not trained here")

        monkeypatch.setattr(campaigns.subprocess, "run", started)
        name, *arguments = line.split()
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--data", "data", "--output", str(tmp_path / "records")])
        with pytest.raises((InterruptedError, RuntimeError), match="not trained here"):
            importlib.import_module(f"scripts.{name}").main()
        return folders

    return of


SST2 = "reproduce_sst2 --model M --seeds 1 --arms plain"
IMAGES = "reproduce_images --size full --seeds 1 --arms plain"
CELLS = "reproduce_detection --seeds 1 --arms plain"
BITS = "which_bits --model M --seeds 1 --system"


@for_each(
    ("first", "second"),
    [
        (SST2, f"{SST2} --size sentences"),
        (SST2, f"{SST2} --train-samples 64"),
        (SST2, SST2.replace("--model M", "--model N")),
        (f"{BITS} sst2", f"{BITS} translation"),
        (IMAGES, f"{IMAGES} --depth 101"),
        (CELLS, f"{CELLS} --size full"),
        (CELLS, f"{CELLS} --train-samples 8"),
        ("reproduce_parser --arms plain", "reproduce_parser --arms plain --train-sentences 12544"),
        ("reproduce_translation --study multi30k --tables 2", "reproduce_translation --study tatoeba --tables 2"),
        ("usual_cases --case causal-lm --arms plain", "usual_cases --case seq2seq-tuned --arms plain"),
        ("usual_cases --case lora --model M --arms plain", "usual_cases --case lora --model of/M --arms plain"),
    ],
)
def test_models_of_two_studies_are_trained_in_two_folders(first, second, trained_in):
    """Else the second would find the models of the first, and record them as its own."""
    one, other = trained_in(first), trained_in(second)
    assert one
    assert other
    assert not one & other


@for_each("other", ["worst_bit_flips", "defend_for_less"])
def test_a_model_that_two_campaigns_have_is_trained_once(other, trained_in):
    assert trained_in(SST2) == trained_in(f"{other} --model M --seeds 1 --arms plain")


@for_each("name", ["reproduce_sst2", "deploy_sst2"])
def test_a_model_that_was_trained_and_not_measured_is_measured(name, monkeypatch, tmp_path):
    """A campaign may be killed between the two, and another one only trains."""
    script = importlib.import_module(f"scripts.{name}")
    started = []
    kept = reproduce.RESULTS / "sst2" / "plain-seed1.json"

    def run(command, **_):
        folder = Path(command[command.index("--output_dir") + 1])
        started.append({"--do_train", "--do_eval"} & set(command))
        if "--do_train" in command:
            folder.mkdir(parents=True)
            (folder / "train_results.json").write_text(json.dumps(RESULTS_OF_TRAINING))
            raise InterruptedError("killed")
        assert command[command.index("--model_name_or_path") + 1] == str(folder)
        (folder / "robustness.json").write_bytes(kept.read_bytes())

    monkeypatch.setattr(campaigns.subprocess, "run", run)
    folders = ["--data", "data", "--output", tmp_path / name, "--work", tmp_path / f"{name}-work"]
    monkeypatch.setattr(sys, "argv", [name, "--model", "M", "--seeds", "1", "--arms", "plain", *map(str, folders)])
    with pytest.raises(RuntimeError, match="killed"):
        script.main()
    script.main()
    assert started == [{"--do_train", "--do_eval"}, {"--do_eval"}]
    assert EvaluationRecord.load(tmp_path / name / "plain-seed1.json") == EvaluationRecord.load(kept)


@for_each(
    "line",
    [
        "which_bits --system images",
        "which_bits --system sst2 --model M --jobs 2",
        "search_epsilon_sst2 --model M --seeds 1 2",
        "reproduce_images --size small",
        "usual_cases --case lora",
        f"{SST2} --jobs x",
    ],
)
def test_what_is_refused_leaves_no_folder(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--data", "data", "--output", "records"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"scripts.{name}").main()
    assert not [*tmp_path.iterdir()]
