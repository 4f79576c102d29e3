"""What a user can do wrong: one line that says what to do, exit code 2, and nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from local_models import SENTENCES, save_bert, write_rows

from hf_parcor import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.cli import main
from hf_parcor.cli.probe import Probe

pytest.importorskip("tabulate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def files(tmp_path, classifier_folder, sentences):
    """Return what rows below name: good files and bad ones, by the word that stands for them."""
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
    row = CorruptionRecord("gradient", "g", {"p": 2.0, "epsilon": 0.1, "top_n": None}, (0,), {"accuracy": (0.5,)})
    record = EvaluationRecord("model", {}, 1, clean, (row,))
    record.save(tmp_path / "record.json")
    SweepRecord({"layer": record}, "", 1, 0).save(tmp_path / "sweep.json")
    text = record.to_json()
    (tmp_path / "truncated.json").write_text(text[: len(text) // 2])
    (tmp_path / "foreign.json").write_text(json.dumps({"name": "package", "version": 1}))
    (tmp_path / "damaged.json").write_text(text.replace('"corruptions"', '"korruptions"'))
    (tmp_path / "later.json").write_text(text.replace('"format": 1', '"format": 2'))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty").mkdir()
    (folder := tmp_path / "folder").mkdir()
    unlabelled = write_rows(tmp_path / "unlabelled.tsv", ["sentence", "stars"], [(text, 1) for text in SENTENCES])
    no_labels = write_rows(tmp_path / "test.tsv", ["sentence", "label"], [(text, -1) for text in SENTENCES])
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("seed: [1\n")
    (tmp_path / "typo.yaml").write_text("epsilon: [0.1]\n")
    (tmp_path / "type.yaml").write_text("trials: many\n")
    (tmp_path / "flag.yaml").write_text("json: 1\n")
    (tmp_path / "none.yaml").write_text("epsilons: []\n")
    (tmp_path / "other.jsonl").write_text('{"kind": "other"}\n')
    return {
        "MODEL": classifier_folder,
        "DATA": sentences,
        "BODY": save_bert(tmp_path / "body", transformers.BertModel),
        "TAGGER": save_bert(tmp_path / "tagger", transformers.BertForTokenClassification),
        "UNLABELLED": unlabelled,
        "NOLABELS": no_labels,
        "ONEROW": write_rows(tmp_path / "one.tsv", ["sentence", "label"], [("good", "POSITIVE")]),
        "FOLDER": str(Path(write_rows(folder / "train.tsv", ["sentence", "label"], [("good", 1)] * 4)).parent),
        "FILE": str(tmp_path / "record.json"),
        "EMPTY": str(tmp_path / "empty"),
    }


PROBE = "probe MODEL --dataset DATA"
TRAIN = "train MODEL --dataset DATA --use_cpu --report_to none --max_steps 1"
MISTAKES = [
    # records
    ("report nowhere.json", "nowhere.json: expected a record that can be read, got No such file or directory; check"),
    ("report truncated.json", "truncated.json: record: expected JSON, got"),
    ("report foreign.json", "foreign.json: record: expected format 1, got None; measure again"),
    ("report damaged.json", "damaged.json: record: expected all fields of format 1, got KeyError('corruptions')"),
    ("report later.json", "later.json: record: expected format 1, got 2; measure again, or read it with the version"),
    ("report binary.json", "binary.json: expected a record in UTF-8"),
    ("report empty", "empty: expected a folder with one of probe.json and robustness.json, got 0 of them; name"),
    ("report record.json sweep.json", "expected those of a probe or those of an evaluation, got both"),
    ("report", "records: expected at least one, got none; name files"),
    ("report record.json --metric f1", "metric: expected one of accuracy, got 'f1'"),
    ("report record.json --output page.pdf", "--output: expected a file that ends in .html or .md, got page.pdf"),
    ("report record.json --output FILE/page.md", "record.json"),
    ("compare record.json", "models: expected two or more to compare, got 1"),
    ("compare a=record.json a=sweep.json", "models: expected each name once, got 'a' twice"),
    ("report record.json record.json", "expected models that were trained with different seeds, got one twice"),
    # models
    ("probe BODY --dataset DATA", "model: expected one with a head for text-classification, token-classification"),
    ("probe TAGGER --task text-classification --dataset DATA", "model: expected one with a head for text-classif"),
    ("probe nobody/nothing --dataset DATA", "model: expected a name on the Hub or a local folder"),
    ("probe EMPTY --dataset DATA", "model: expected a name on the Hub or a local folder"),
    ("probe --dataset DATA", "model: expected one, got none; name a folder"),
    ("probe MODEL", "dataset: expected one, got none; name --dataset dev.tsv"),
    # data
    ("probe MODEL --dataset nowhere.tsv", "nowhere.tsv: expected a file, found none; check its name"),
    ("probe MODEL --dataset nobody/nothing", "nobody/nothing: expected a data set on the Hub, a folder or a file"),
    ("probe MODEL --dataset UNLABELLED", "expected a column with the label for text-classification"),
    ("probe MODEL --dataset NOLABELS", "expected a label of the model (NEGATIVE = 0, POSITIVE = 1), got -1"),
    (f"{PROBE} --column label=stars", "expected one of the columns sentence, label, got 'stars' for label"),
    (f"{PROBE} --column lable=label", "expected one of the roles text, second_text, label, got 'lable' (did you mean"),
    (f"{PROBE} --column label", "--column: expected NAME=VALUE, got 'label'"),
    # corruptions
    (f"{PROBE} --epsilons", "--epsilons: expected at least one strength for gradient, got none; give --epsilons 0.1"),
    (f"{PROBE} --epsilons -0.1", "epsilon: expected"),
    (f"{PROBE} --epsilons small", "argument --epsilons: expected a number, got 'small'; see: hf-parcor probe --help"),
    (f"{PROBE} --epsilons nan", "epsilon: expected"),
    (f"{PROBE} --corruption gradiant", "got 'gradiant' (did you mean gradient?); name one of them"),
    (f"{PROBE} --corruption gradient=a", "expected strengths as gradient=0.1,0.2, got 'gradient=a'"),
    (f"{PROBE} --corruption quantization=4.5", "bits: expected"),
    (f"{PROBE} --corruption", "--corruption: expected at least one, got none"),
    (f"{PROBE} --corruption multi-step --norm 3", "expected"),
    (f"{PROBE} --trials 0", "argument --trials: expected a whole number from 1 on, got 0"),
    ("evaluate MODEL --dataset DATA --corruption gaussian", "expected at least one strength for gaussian, got none"),
    # groups and targets
    (f"{PROBE} --group layer", "expected one of layers, kinds, modules, adapters, got 'layer' (did you mean layers?)"),
    (f"{PROBE} --group adapters", "expected a model with PEFT adapters, got BertForSequenceClassification"),
    (f"{PROBE} --target querry", 'got "querry", which matches nothing'),
    ("evaluate MODEL --dataset DATA --target querry", 'got "querry", which matches nothing'),
    # metrics, tasks, devices, folders
    (f"{PROBE} --metric acuracy", "metric: expected one of accuracy, loss, or a metric of evaluate"),
    (f"{PROBE} --task translate", "expected one of text-classification"),
    (f"{PROBE} --device tpu9", "--device: expected a device that is here, got 'tpu9'"),
    (f"{PROBE} --output FILE", "record.json"),
    # command lines and settings files
    ("prove MODEL", "compare, card, got 'prove' (did you mean probe"),
    (f"{PROBE} --epsilon 0.1", "expected known flags, got --epsilon (did you mean --epsilons?); see: hf-parcor probe"),
    (f"{PROBE} --config nowhere.yaml", "--config: expected a YAML file, got 'nowhere.yaml' (No such file"),
    (f"{PROBE} --config list.yaml", "--config: expected flags by name in list.yaml, got [1]"),
    (f"{PROBE} --config broken.yaml", "--config: expected YAML in broken.yaml, got while parsing"),
    (f"{PROBE} --config typo.yaml", "got 'epsilon' (did you mean epsilons?); see: hf-parcor probe --help"),
    (f"{PROBE} --config type.yaml", "--config: trials: expected a whole number, got 'many'"),
    (f"{PROBE} --config flag.yaml", "--config: expected true or false for json, got 1"),
    (f"{PROBE} --config none.yaml", "--epsilons: expected at least one strength"),
    # training
    (f"{TRAIN} --validation-split 1", "--validation-split: expected a share between 0 and 1, got 1"),
    (f"{TRAIN} --train-dataset ONEROW --dataset ONEROW", "expected two rows or more, to train on one and measure on"),
    (f"{TRAIN} --dataset FOLDER --split train[:2]", "--split: expected rows that are not trained on, got train[:2]"),
    (f"{TRAIN} --defense samm", "defense: expected one of multi_step_risk"),
    (f"{TRAIN} --defense_epsilon -1", "epsilon: expected"),
    (f"{TRAIN} --defense_target_modules querry", 'got "querry", which matches nothing'),
    (f"{TRAIN} --defense_epsillon 1", "got --defense_epsillon (did you mean --defense_epsilon?)"),
    ("train BODY --dataset DATA --use_cpu", "fine-tune it, or say --task"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_one_line_and_exit_code_2(run, files, line, says):
    words = [files.get(word) or word.replace("FILE", files["FILE"]) for word in line.split()]
    result = run(*words)
    assert result.code == 2
    *told, error = result.err.splitlines()
    assert error.startswith("hf-parcor: error: ")
    assert says in error
    assert ";" in error or ", use " in error or "[Errno" in error  # what to do
    assert "Traceback" not in result.err
    assert not [entry for entry in told if "error" in entry.lower()]
    assert result.out == ""
    assert not list(Path().glob("*.partial"))


def test_a_checkpoint_of_another_run_is_kept(run, files):
    command = ("probe", files["MODEL"], "--dataset", files["DATA"], "--output", "out", "--epsilons")
    assert run(*command, 1).code == 0
    before = Path("out/probe.jsonl").read_bytes()
    result = run(*command, 2)
    assert result.code == 2
    assert "expected a checkpoint of this run, got one with other corruptions" in result.err
    assert Path("out/probe.jsonl").read_bytes() == before
    Path("out/probe.jsonl").write_text("no checkpoint")
    assert "expected a checkpoint of a measurement, got 'no checkpoint'" in run(*command, 2).err


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, KeyError, ImportError])
def test_a_bug_keeps_its_traceback(kind, files, monkeypatch, classifier_folder, sentences):
    """Also where it looks like what a mistake raises: only what checks arguments is taken for the user's."""
    from hf_parcor.evaluation import LayerProbe

    def broken(self, *arguments, **settings):
        raise kind("expected 1, got 2; mend it")

    monkeypatch.setattr(LayerProbe, "evaluate", broken)
    with pytest.raises(kind, match="expected 1, got 2"):
        main(["probe", classifier_folder, "--dataset", sentences])


def test_ctrl_c_says_how_it_goes_on(run, files, monkeypatch):
    from hf_parcor.evaluation import LayerProbe

    def interrupted(self, *arguments, **settings):
        raise KeyboardInterrupt

    command = ("probe", files["MODEL"], "--dataset", files["DATA"])
    monkeypatch.setattr(LayerProbe, "evaluate", interrupted)
    result = run(*command, "--output", "out")
    assert result.code == 130
    assert "interrupted; what is finished is in out/probe.jsonl; the same command goes on" in result.err
    assert "nothing was kept; with --output DIR" in run(*command).err
    monkeypatch.setattr(Probe, "run", interrupted)
    result = run(*command)
    assert (result.code, result.err) == (130, "hf-parcor: interrupted\n")
