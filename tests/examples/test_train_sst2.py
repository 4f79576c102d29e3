"""The example script, on a tiny model in a folder and local files."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
import tiny
import torch
from example_program import TRAINS_AND_MEASURES, pushes_of, run_example, run_with, steps_logged
from local_hub import local_hub
from local_models import word_tokenizer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from hf_parcor import EvaluationRecord

pytest.importorskip("datasets", reason="the examples need the extra 'examples'")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_sst2.py"
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "the", "a"]
ROWS = [("the good film", 1), ('a "bad" plot', 0), ("good good", 1), ("bad bad film", 0)] * 4

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def files(tmp_path):
    word_tokenizer(WORDS, pad_token="[PAD]").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in ROWS)
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "dev.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def settings(folder: Path) -> dict[str, object]:
    return {
        **TRAINS_AND_MEASURES,
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.tsv.gz"),
        "validation_file": str(folder / "dev.tsv.gz"),
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
        "max_train_samples": 12,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 2,
        "corruption_trials": 2,
    }


def check(folder: Path, defended: bool) -> None:
    out = folder / "out"
    log = steps_logged(out)
    assert len(log) == 6
    assert all(("loss_corrupted" in entry) == defended for entry in log)
    assert json.loads((out / "train_results.json").read_text())["train_samples"] == 12
    assert json.loads((out / "eval_results.json").read_text())["eval_samples"] == 16
    record = EvaluationRecord.load(out / "robustness.json")
    assert record.model == f"{folder.name}/out", "the trained model, not the one that it began as"
    assert {row.corruption for row in record.corruptions} >= {"gradient", "multi_step", "quantization", "bit_flips"}
    assert record.clean.mean("accuracy") == json.loads((out / "eval_results.json").read_text())["eval_accuracy"]


@pytest.mark.slow
def test_flags(files, monkeypatch, capsys):
    flags = []
    for name, value in settings(files).items():
        flags += [f"--{name}", str(value)]
    run_example(SCRIPT, [*flags, "--defense_target_modules", "last-encoder-layer"], monkeypatch)
    check(files, defended=True)
    assert "| gradient-based L2 ε=0.1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_corruptions_that_are_named_are_trained_against_and_measured(files, monkeypatch):
    words = ["quantization=4,3", "gradient=0.1"]
    given = {"defense": "corruption", "defense_corruption": words, "corruptions": words}
    given |= {"watched_corruptions": ["quantization=4"], "eval_strategy": "epoch"}
    run_with(SCRIPT, {**settings(files), **given}, monkeypatch)
    record = EvaluationRecord.load(files / "out" / "robustness.json")
    assert [row.label for row in record.corruptions] == [
        "4-bit quantization",
        "3-bit quantization",
        "gradient-based L2 ε=0.1",
    ]
    log = json.loads((files / "out" / "trainer_state.json").read_text())["log_history"]
    watched = [entry[name] for entry in log if (name := "eval_robustness_4_bit_quantization_accuracy") in entry]
    assert len(watched) == log[-1]["epoch"]
    assert watched[-1] == record.corruptions[0].mean("accuracy")
    config = json.loads((files / "out" / "defense_config.json").read_text())
    assert [list(entry) for entry in config["settings"]["corruption"]] == [["quantization"]] * 2 + [["gradient"]]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_the_model_is_pushed_once_when_it_is_measured(rank, files, monkeypatch):
    """What was watched before is no more what the card says; adapters are pushed as they were trained."""
    if rank is not None:
        pytest.importorskip("peft", reason="adapters need the extra 'peft'")
    pushes = pushes_of(monkeypatch)
    asked = {"push_to_hub": True, "lora_rank": rank, "corruptions": ["quantization=4"], "num_train_epochs": 1}
    asked |= {"watched_corruptions": ["quantization=2"], "eval_strategy": "epoch", "hub_strategy": "end"}
    out = run_with(SCRIPT, {**settings(files), **asked}, monkeypatch)
    ((weights, facts),) = pushes
    assert any("lora_A" in name for name in weights) == (rank is not None)
    assert [row.label for row in facts.corruptions] == ["4-bit quantization"]
    measured = EvaluationRecord.load(out / "robustness.json").corruptions[0]
    assert facts.corruptions[0].metrics["accuracy"].values == measured.metrics["accuracy"]


@pytest.mark.slow
def test_one_json_file(files, monkeypatch):
    run_with(SCRIPT, {**settings(files), "defense": "none"}, monkeypatch)
    check(files, defended=False)


@pytest.mark.slow
def test_adapters_are_trained_and_all_of_what_they_are_merged_into_is_measured(files, monkeypatch):
    peft = pytest.importorskip("peft", reason="adapters need the extra 'peft'")
    run_with(
        SCRIPT, {**settings(files), "lora_rank": 2, "corruptions": ["quantization=4", "gradient=0.1"]}, monkeypatch
    )
    base = BertForSequenceClassification.from_pretrained(files / "model")
    merged = peft.PeftModel.from_pretrained(base, files / "out").merge_and_unload()
    record = EvaluationRecord.load(files / "out" / "robustness.json")
    weights = list(merged.parameters())
    assert record.parameters == sum(weight.numel() for weight in weights)
    assert record.weights_norm == pytest.approx(sum(float(weight.double().pow(2).sum()) for weight in weights) ** 0.5)
    assert not record.notes, "nothing was left out"


@pytest.mark.slow
def test_a_data_set_that_is_still_a_script(files, monkeypatch):
    import datasets

    packed = io.BytesIO()
    rows = [{"sentence": sentence, "label": label} for sentence, label in ROWS]
    datasets.Dataset.from_list(rows).to_parquet(packed)
    copy = {f"default/{split}/0000.parquet": packed.getvalue() for split in ("train", "validation")}
    given = {"train_file": None, "validation_file": None, "dataset_name": "STT/two", "skip_corruptions": True}
    repositories = {"STT/two": {"main": {"two.py": b""}, "refs/convert/parquet": copy}}
    with local_hub(repositories, monkeypatch, files):
        run_with(SCRIPT, {**settings(files), **given, "defense": "none"}, monkeypatch)
    assert json.loads((files / "out" / "eval_results.json").read_text())["eval_samples"] == len(ROWS)


@pytest.mark.slow
def test_a_finished_model_is_measured_by_its_own_numbers_of_the_classes(files, monkeypatch):
    """The same model with its classes the other way round finds the same."""
    model = BertForSequenceClassification.from_pretrained(files / "model")
    torch.nn.init.normal_(model.classifier.weight)
    losses = []
    for order in (["bad", "good"], ["good", "bad"]):
        model.config.id2label = dict(enumerate(order))
        model.config.label2id = {name: number for number, name in enumerate(order)}
        model.save_pretrained(files / "model")
        text = "sentence\tlabel\n" + "".join(f"{sentence}\t{('bad', 'good')[label]}\n" for sentence, label in ROWS)
        (files / "dev.tsv").write_text(text)
        given = {"do_train": False, "train_file": None, "validation_file": str(files / "dev.tsv")}
        run_with(SCRIPT, {**settings(files), **given, "corruptions": ["quantization=8"]}, monkeypatch)
        record = EvaluationRecord.load(files / "out" / "robustness.json")
        losses.append(record.clean.mean("loss"))
        found = json.loads((files / "out" / "eval_results.json").read_text())["eval_loss"]
        assert found == pytest.approx(losses[-1], rel=1e-4)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.copy_(parameter.flip(0))
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_file": None, "validation_file": None, "dataset_name": None}, "expected --dataset_name"),
        ({"train_file": "nowhere.tsv"}, "nowhere.tsv: expected a file, found none"),
        ({"defense_target_modules": ["last-decoder-layer"]}, "last-decoder-layer"),
        ({"defense_epsilon": -0.1}, "epsilon: expected"),
        ({"text_column_name": "text"}, "text_column_name: expected one of sentence, label, got 'text'"),
        ({"label_column_name": "stars"}, "label_column_name: expected one of sentence, label, got 'stars'"),
        ({"train_file": "one.tsv"}, "train: expected two classes or more, got '1' alone in column 'label'"),
        ({"train_file": "numbers.tsv"}, "expected one class a row, got a regression in 'label'"),
        ({"train_file": "empty.tsv"}, "expected at least one row, got none"),
        ({"validation_file": "third.tsv"}, r"validation: expected a label of the model \(0 = 0, 1 = 1\), got 2"),
        ({"train_file": "held-back.tsv"}, "train: expected labels from 0 on, got -1"),
        ({"do_train": False, "do_eval": False}, "expected --do_train, --do_eval or both, got none"),
        ({"do_train": False, "do_eval": False, "do_predict": True}, "got --do_predict alone"),
        (
            {"do_train": False, "train_file": None, "model_name_or_path": "several"},
            "model_name_or_path: expected a classifier of one class a row, got one for multi_label_classification",
        ),
        ({"max_eval_samples": 0}, "max_eval_samples: expected a whole number >= 1, got 0"),
        ({"max_seq_length": 0}, "max_length: expected 1 token or more, got 0"),
    ],
)
def test_bad_input(files, monkeypatch, change, says):
    monkeypatch.chdir(files)
    for name, labels in {
        "one": [1, 1],
        "empty": [],
        "third": [0, 2],
        "held-back": [0, 1, -1],
        "numbers": [0.5, 2],
    }.items():
        Path(f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(f"good\t{label}\n" for label in labels))
    several = BertForSequenceClassification.from_pretrained("model", problem_type="multi_label_classification")
    several.save_pretrained("several")
    word_tokenizer(WORDS, pad_token="[PAD]").save_pretrained("several")
    with pytest.raises(ValueError, match=says):
        run_with(SCRIPT, {**settings(files), **change}, monkeypatch)
    assert not (files / "out" / "robustness.json").exists()


def test_a_decoder_whose_configuration_names_no_padding_is_measured(files, monkeypatch):
    torch.manual_seed(0)
    GPT2ForSequenceClassification(GPT2Config(**tiny.gpt2(len(WORDS)))).save_pretrained(files / "model")
    given = {"train_file": None, "do_train": False, "skip_corruptions": True, "per_device_eval_batch_size": 16}
    out = run_with(SCRIPT, {**settings(files), **given}, monkeypatch)
    found = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    given |= {"per_device_eval_batch_size": 1, "output_dir": str(files / "again")}
    again = run_with(SCRIPT, {**settings(files), **given}, monkeypatch)
    assert json.loads((again / "eval_results.json").read_text())["eval_loss"] == pytest.approx(found, rel=1e-5)
