"""Four users' ways through the project, from files on disk to a model card; what is said is computed again by hand.

A practitioner at the command line, a Trainer user, a translator, and a loop with Accelerate. By hand means with
PyTorch and Transformers alone, one example at a time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from example_program import run_example
from local_models import save_bert, write_rows
from trainings import QUIET, accuracy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_parcor import (
    CorruptionConstraint,
    EvaluationRecord,
    GaussianNoise,
    MultiStepRisk,
    ParameterDefenseTrainer,
    Quantization,
    SweepRecord,
)
from hf_parcor.cli import main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

THINGS = ("film", "plot", "Film", "Ende")
SENTENCES = [
    (f"{a} {word} {b}".strip(), int(word == "good"))
    for a in ("the", "a", "")
    for b in THINGS
    for word in ("good", "bad")
]
DEV = [*SENTENCES[::3], ("the bad plot", 1), ("good bad", 0)]  # no model gets all of them right


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as a new user has it: a model, sentences to train on, sentences to measure on."""
    monkeypatch.chdir(tmp_path)
    save_bert(tmp_path / "model")
    write_rows(tmp_path / "train.tsv", ["sentence", "label"], SENTENCES)
    write_rows(tmp_path / "dev.tsv", ["sentence", "label"], DEV)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line; return what it printed."""

    def command(line, *words):
        capsys.readouterr()
        code = main([*line.split(), *map(str, words)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return command


def classifier(path):
    return AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def accuracy_by_hand(model, tokenizer, rows=DEV):
    guesses = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in rows]
    return sum(guess == label for guess, (_, label) in zip(guesses, rows, strict=True)) / len(rows)


@torch.no_grad()
def quantize_by_hand(parameters, bits):
    for weight in parameters:
        unit = weight.abs().max() / (2 ** (bits - 1) - 1)
        if unit > 0:
            weight.copy_((weight / unit).round() * unit)


def percent(share):
    return f"{100 * share:.1f}"


def results_on(card):
    """What the front matter of a card says, by the label of the corruption."""
    front = yaml.safe_load(Path(card).read_text(encoding="utf-8").split("---")[1])
    metrics = [metric for result in front["model-index"][0]["results"] for metric in result["metrics"]]
    return front, {metric["name"].partition(", ")[2]: metric["value"] for metric in metrics}


TRAINING = (
    *("--train-dataset", "train.tsv", "--dataset", "dev.tsv", "--num-train-epochs", 8, "--learning-rate", 0.02),
    *("--per-device-train-batch-size", 8, "--skip-corruptions"),
    *("--use-cpu", "--disable-tqdm", "true", "--report-to", "none", "--save-strategy", "no"),
)


@pytest.mark.slow
def test_a_practitioner_at_the_command_line(folder, run):
    trained = {
        "plain": run("train", "model", "--output-dir", "plain", "--defense", "none", *TRAINING),
        "defended": run("train", "model", "--output-dir", "defended", "--defense-epsilon", 0.05, *TRAINING),
    }
    records, clean = {}, {}
    for name, printed in trained.items():
        model, tokenizer = classifier(name)
        clean[name] = accuracy_by_hand(model, tokenizer)
        assert clean[name] > 0.5, "it learned"
        assert percent(clean[name]) in printed
        printed = run(
            *("evaluate", name, "--dataset", "dev.tsv", "--quiet", "--output-dir", name),
            *("--corruptions", "quantization=3", "gradient=1"),
        )
        records[name] = EvaluationRecord.load(f"{name}/robustness.json")
        assert records[name].clean.mean("accuracy") == pytest.approx(clean[name])
        quantize_by_hand(model.parameters(), 3)
        quantized = accuracy_by_hand(model, tokenizer)
        assert records[name].corruptions[0].mean("accuracy") == pytest.approx(quantized)
        assert percent(quantized) in printed

    run("probe plain --dataset dev.tsv --group layers --corruptions quantization=2 --output-dir plain")
    for layer, record in SweepRecord.load("plain/probe.json").records.items():
        model, tokenizer = classifier("plain")
        quantize_by_hand(model.get_submodule(layer).parameters(), 2)
        assert record.corruptions[0].mean("accuracy") == pytest.approx(accuracy_by_hand(model, tokenizer))
    assert "bert.encoder.layer.1" in Path("plain/probe.md").read_text()

    run("report", "plain", "--pages", "report.html", "report.md")
    assert percent(clean["plain"]) in Path("report.md").read_text()
    assert Path("report.html").read_text().startswith("<!DOCTYPE html>")
    run("compare", "plain=plain", "defended=defended", "--pages", "compare.md")
    compared = Path("compare.md").read_text()
    for name, record in records.items():
        assert name in compared
        assert all(percent(row.mean("accuracy")) in compared for row in record.rows())

    steps = 8 * len(SENTENCES) // 8
    for name, record in records.items():
        run("card", name)
        front, said = results_on(f"{name}/README.md")
        assert said == {row.label: pytest.approx(row.mean("accuracy")) for row in record.rows()}
        card = Path(f"{name}/README.md").read_text(encoding="utf-8")
        assert ("adversarial-parameter-defense" in front["tags"]) is (name == "defended")
        assert (f"in all of its {steps} steps" in card) is (name == "defended")


def encoded(tokenizer, rows):
    return [{**tokenizer(text), "labels": label} for text, label in rows]


@pytest.mark.slow
def test_a_trainer_user(folder):
    """The script that this user has is that of `transformers.Trainer`, with another class."""
    from transformers import TrainingArguments

    model, tokenizer = classifier("model")
    arguments = TrainingArguments(
        **{"output_dir": "run", "num_train_epochs": 8, "learning_rate": 0.02, "per_device_train_batch_size": 8},
        **QUIET,
    )
    trainer = ParameterDefenseTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded(tokenizer, SENTENCES),
        eval_dataset=encoded(tokenizer, DEV),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        defense=MultiStepRisk(CorruptionConstraint(epsilon=0.05), start_epoch=2),
        target_modules="last-encoder-layer",
    )
    trainer.train()
    measured = trainer.evaluate_robustness([GaussianNoise(0.3), Quantization(2)], trials=2)
    trainer.save_model()
    trainer.create_model_card()

    saved, tokenizer = classifier("run")
    clean = accuracy_by_hand(saved, tokenizer)
    assert clean > 0.5
    quantize_by_hand(saved.parameters(), 2)
    (record,) = trainer.robustness_records.values()
    shown = {row.label: row.mean("accuracy") for row in record.rows()}
    assert measured["eval_accuracy"] == pytest.approx(clean)
    assert shown["no corruption"] == pytest.approx(clean)
    assert shown["2-bit quantization"] == pytest.approx(accuracy_by_hand(saved, tokenizer))
    front, said = results_on("run/README.md")
    assert {label: value for label, value in said.items() if label in shown} == pytest.approx(shown)
    assert "adversarial-parameter-defense" in front["tags"]
    of_an_epoch = len(SENTENCES) // 8
    counts = json.loads(Path("run/defense_config.json").read_text())
    assert (counts["defended_steps"], counts["trained_steps"]) == (6 * of_an_epoch, 8 * of_an_epoch)
    assert re.search(rf"\b{6 * of_an_epoch} of .*\b{8 * of_an_epoch}\b", Path("run/README.md").read_text())
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert all(entry["eval_accuracy"] == pytest.approx(clean) for entry in logged)


WORDS = {"Hund": "dog", "Katze": "cat", "rot": "red", "sieht": "sees", "und": "and", "Haus": "house"}


@pytest.mark.slow
def test_a_translator(tmp_path, monkeypatch, run):
    pytest.importorskip("datasets")
    sacrebleu = pytest.importorskip("sacrebleu")

    monkeypatch.chdir(tmp_path)
    german = [f"{a} {b} {c}." for a in WORDS for b in list(WORDS)[:3] for c in list(WORDS)[:2]]
    english = [" ".join(WORDS[word] for word in line.rstrip(".").split()) + "." for line in german]
    for name, part in {"train": slice(None), "validation": slice(5), "test": slice(5, 11)}.items():
        write_rows(tmp_path / f"{name}.tsv", ["de", "en"], list(zip(german[part], english[part], strict=True)))
    size = "encoder_layers=1,decoder_layers=2,d_model=16,encoder_ffn_dim=16,decoder_ffn_dim=16"
    settings = {
        **{f"{name}_file": f"{name}.tsv" for name in ("train", "validation", "test")},
        **{"vocabulary_size": 40, "config_overrides": f"{size},max_position_embeddings=64", "max_tokens": 200},
        **{"num_train_epochs": 60, "learning_rate": 0.02, "generation_max_length": 25, "generation_num_beams": 1},
        **{"defense_epsilon": 0.05, "defense_target_modules": "last-decoder-layer", "output_dir": "out"},
        **{"report_to": "none", "disable_tqdm": "true", "save_strategy": "no"},
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    run_example(
        ROOT / "examples" / "train_translation.py",
        [*flags, "--use_cpu", "--do_train", "--do_eval", "--do_predict"],
        monkeypatch,
    )
    hypotheses = Path("out/generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    results = json.loads(Path("out/test_results.json").read_text())
    by_hand = sacrebleu.corpus_bleu(hypotheses, [english[5:11]]).score
    assert by_hand > 10, "it learned"
    assert len(hypotheses) == results["test_samples"] == 6
    assert results["test_bleu"] == pytest.approx(by_hand, abs=0.01)

    common = (
        "--task",
        "translation",
        "--dataset",
        "test.tsv",
        "--column",
        "source=de",
        "--column",
        "target=en",
        "--quiet",
    )
    common = (*common, "--max-length", 24)  # new tokens, beside the first of generation_max_length
    run("evaluate", "out", *common, "--corruptions", "quantization=2", "--output-dir", "measured")
    record = EvaluationRecord.load("measured/robustness.json")
    assert record.clean.mean("bleu") == pytest.approx(by_hand, abs=0.01)
    run(
        "probe out --corruptions gaussian=0.5 --trials 1 --target-modules last-decoder-layer --output-dir probed",
        *common,
    )
    probed = SweepRecord.load("probed/probe.json")
    assert probed.clean.mean("bleu") == pytest.approx(by_hand, abs=0.01)
    assert set(probed.records) == {"last-decoder-layer"}
    run("report", "measured", "--pages", "report.md")
    assert "BLEU" in Path("report.md").read_text().upper()

    Path("out/robustness.json").write_bytes(Path("measured/robustness.json").read_bytes())
    run("card", "out")
    front, said = results_on("out/README.md")
    assert said["no corruption"] == pytest.approx(record.clean.mean("bleu"))
    assert "adversarial-parameter-defense" in front["tags"]
    assert json.loads(Path("out/defense_config.json").read_text())["defended_steps"] > 0


LOOP = """
import sys
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from hf_parcor import CorruptionConstraint, MultiStepRisk, defended_backward, select_parameters
from hf_parcor.tasks import read_file

set_seed(0)
accelerator = Accelerator(cpu=True)
tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForSequenceClassification.from_pretrained("model")
rows = [{**tokenizer(row["sentence"]), "labels": int(row["label"])} for row in read_file("train.tsv")]
loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
defense = MultiStepRisk(CorruptionConstraint(epsilon=0.05), start_epoch=float(sys.argv[1]))
parameters = select_parameters(accelerator.unwrap_model(model), "last-encoder-layer")
defended = 0
for epoch in range(8):
    for batch in loader:
        loss = defended_backward(accelerator, defense, model, lambda: model(**batch).loss, parameters, epoch=epoch)
        optimizer.step()
        optimizer.zero_grad()
        defended += loss.defended
accelerator.print(f"{accelerator.num_processes} processes, {defended} steps defended")
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained("looped")
    tokenizer.save_pretrained("looped")
accelerator.end_training()
"""


def launch(script, *words):
    """`accelerate launch` with the configuration for two CPUs, as a user does it."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    config = ROOT / "examples" / "accelerate_configs" / "two_cpus.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", config]
    return subprocess.run([*command, script, *words], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_loop_with_accelerate(folder, run):
    Path("loop.py").write_text(LOOP)
    done = launch("loop.py", "2")
    assert done.returncode == 0, done.stderr
    of_an_epoch = len(SENTENCES) // 4 // 2  # two processes share the batches
    assert done.stdout.split("\n")[0] == f"2 processes, {6 * of_an_epoch} steps defended"
    assert "did nothing" not in done.stderr

    model, tokenizer = classifier("looped")
    clean = accuracy_by_hand(model, tokenizer)
    assert clean > 0.5
    run("evaluate looped --dataset dev.tsv --corruptions quantization=2 --output-dir looped --quiet")
    record = EvaluationRecord.load("looped/robustness.json")
    quantize_by_hand(model.parameters(), 2)
    assert record.clean.mean("accuracy") == pytest.approx(clean)
    assert record.corruptions[0].mean("accuracy") == pytest.approx(accuracy_by_hand(model, tokenizer))
    run("probe looped --dataset dev.tsv --target-modules last-encoder-layer --output-dir probed --quiet")
    run("report", "looped", "--pages", "report.md")
    assert percent(clean) in Path("report.md").read_text()
    run("card", "looped")
    front, said = results_on("looped/README.md")
    assert said["no corruption"] == pytest.approx(clean)
    assert "adversarial-parameter-defense" not in front["tags"], "nothing beside the weights says so"
