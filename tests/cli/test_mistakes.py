"""What a user can do wrong: one line that says what to do, exit code 2, and nothing is touched."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from for_each import for_each
from local_models import SAVED, SENTENCES, save_bert, save_gpt2, write_rows, write_tags, write_texts
from safetensors.torch import load_file, save_file

from hf_parcor import CorruptionRecord, EvaluationRecord, SweepRecord
from hf_parcor.cli import main
from hf_parcor.cli.main import build_parser
from hf_parcor.cli.probe import Probe
from hf_parcor.cli.recipe import SCORES
from hf_parcor.cli.train import check_numbers
from hf_parcor.training import ParameterDefenseTrainingArguments

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
    broken = transformers.BertForSequenceClassification.from_pretrained(classifier_folder)
    broken.classifier.weight.data[0, 0] = torch.nan
    shutil.copytree(classifier_folder, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    no_labels = write_rows(tmp_path / "test.tsv", ["sentence", "label"], [(text, -1) for text in SENTENCES])
    weights = load_file(Path(classifier_folder) / "model.safetensors")
    for name, changed in {
        "partial": {key: weight for key, weight in weights.items() if "layer.1.output" not in key},
        "turned": {**weights, "classifier.weight": weights["classifier.weight"].mT.contiguous()},
    }.items():
        shutil.copytree(classifier_folder, tmp_path / name)
        save_file(changed, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(classifier_folder, tmp_path / "pointer")
    (tmp_path / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    shutil.copytree(classifier_folder, tmp_path / "wordless", ignore=shutil.ignore_patterns("*token*"))
    untied = transformers.GPT2LMHeadModel.from_pretrained(save_gpt2(tmp_path / "untied"), tie_word_embeddings=False)
    torch.nn.init.normal_(untied.lm_head.weight)
    untied.save_pretrained(tmp_path / "untied")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("seed: [1\n")
    (tmp_path / "typo.yaml").write_text("strength: [0.1]\n")
    (tmp_path / "type.yaml").write_text("trials: many\n")
    (tmp_path / "choice.yaml").write_text("group: layer\n")
    (tmp_path / "flag.yaml").write_text("json: 1\n")
    (tmp_path / "word.yaml").write_text("split: no\n")  # which YAML takes for false
    (tmp_path / "none.yaml").write_text("strengths: []\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nlimit: 2\nseed: 2\n")
    (tmp_path / "other.jsonl").write_text('{"kind": "other"}\n')
    for name in ("broken-defense", "broken-adapter"):
        (tmp_path / name).mkdir()
        record.save(tmp_path / name / "robustness.json")
        (tmp_path / name / "adapter_config.json").write_text("{}" if name == "broken-defense" else "{")
        (tmp_path / name / "defense_config.json").write_text("{")
    for name, settings in {"broken-encoder": "{", "listed-encoder": "[]"}.items():
        (tmp_path / name).mkdir()
        for file in ("config.json", "modules.json"):
            (tmp_path / name / file).write_text("{}")
        (tmp_path / name / "config_sentence_transformers.json").write_text(settings)
    return {
        "MODEL": classifier_folder,
        "DATA": sentences,
        "BROKEN": str(tmp_path / "broken"),
        "BODY": save_bert(tmp_path / "body", transformers.BertModel),
        "TAGGER": save_bert(tmp_path / "tagger", transformers.BertForTokenClassification),
        "WIDE": save_bert(tmp_path / "wide", intermediate_size=20),
        "CAUSAL": save_gpt2(tmp_path / "causal"),
        "TEXT": write_texts(tmp_path / "text.tsv"),
        "TAGS": write_tags(tmp_path / "tags.jsonl"),
        "UNLABELLED": unlabelled,
        "NOLABELS": no_labels,
        "ONEROW": write_rows(tmp_path / "one.tsv", ["sentence", "label"], [("good", "POSITIVE")]),
        "FOLDER": str(Path(write_rows(folder / "train.tsv", ["sentence", "label"], [("good", 1)] * 4)).parent),
        "FILE": str(tmp_path / "record.json"),
        "EMPTY": str(tmp_path / "empty"),
    }


PROBE = "probe MODEL --dataset DATA"
TRAIN = "train MODEL --dataset DATA --output-dir out --use-cpu --report-to none --max-steps 1"
# A command line, and words that its error has: what is wrong, what was found, and what is nearest to it.
MISTAKES = [
    ("evaluate MODEL --dataset DATA --corruptions quantization=4:per=7", "expected groups that divide the last"),
    ("probe MODEL --dataset DATA --corruptions quantization=4:per=7", "expected groups that divide the last"),
    ("train MODEL --dataset DATA --use-cpu --output-dir out --corruptions quantization=4:per=7", "groups that divide"),
    # records
    ("report nowhere.json", "nowhere.json"),
    ("report truncated.json", "truncated.json JSON"),
    ("report foreign.json", "foreign.json format None"),
    ("report damaged.json", "damaged.json corruptions"),
    ("report later.json", "later.json format 2"),
    ("report binary.json", "binary.json UTF-8"),
    ("report empty", "empty robustness.json probe.json evaluate --output-dir"),
    ("report record.json sweep.json", "record.json sweep.json both"),
    ("compare a=record.json b=sweep.json", "record.json sweep.json both"),
    ("report", "records: none"),
    ("report record.json --metric f1", "--metric: accuracy 'f1'"),
    ("report record.json --pages page.pdf", "--pages: .html .md page.pdf"),
    ("report record.json --pages FILE/page.md", "--pages: record.json"),
    ("compare record.json", "models: two 1 report"),
    ("compare a=record.json a=sweep.json", "models: 'a' twice"),
    ("report record.json record.json", "seeds twice"),
    ("report broken-defense broken-defense", "broken-defense/defense_config.json: JSON"),
    ("card broken-defense", "broken-defense/defense_config.json: JSON"),
    ("card record.json", "RUN_DIR: record.json"),
    # models
    ("probe broken-adapter --dataset DATA", "broken-adapter/adapter_config.json: JSON"),
    ("probe broken-encoder --dataset DATA", "model: broken-encoder config_sentence_transformers.json JSON"),
    ("probe listed-encoder --dataset DATA", "model: listed-encoder config_sentence_transformers.json JSON"),
    ("probe pointer --dataset DATA", "model: pointer SafetensorError"),
    ("probe turned --dataset DATA", "model: weights shapes configuration turned"),
    ("probe wordless --dataset DATA", "tokenizer: vocabulary wordless"),
    ("probe BODY --dataset DATA", "model: head text-classification"),
    ("probe TAGGER --task text-classification --dataset DATA", "model: head text-classification"),
    ("probe nobody/nothing --dataset DATA", "model: nobody/nothing"),
    ("probe EMPTY --dataset DATA", "model: folder"),
    ("probe --dataset DATA", "model: none"),
    ("probe MODEL", "--dataset: none"),
    (f"{PROBE} --revision v1", "--revision: Hub 'v1' folder leave"),
    # data
    ("probe MODEL --dataset nowhere.tsv", "nowhere.tsv"),
    ("probe MODEL --dataset nobody/nothing", "nobody/nothing"),
    ("probe MODEL --dataset UNLABELLED", "column label text-classification"),
    ("probe MODEL --dataset NOLABELS", "label NEGATIVE POSITIVE -1"),
    (f"{PROBE} --column label=stars", "sentence 'stars' label"),
    (f"{PROBE} --column lable=label", "--column: second_text 'lable' (did mean label?)"),
    (f"{PROBE} --column label", "--column: NAME=VALUE 'label'"),
    (f"{PROBE} --column label=label --column label=sentence", "--column: one label 'sentence'"),
    (f"{PROBE} --dataset-config sst2", "--dataset-config: 'sst2' --dataset"),
    (f"{TRAIN} --train-dataset DATA --dataset-config sst2", "--dataset-config: 'sst2' --dataset"),
    (f"{PROBE} --split test", "--split: 'test' --dataset"),
    (f"{TRAIN} --train-split train[:9]", "--train-split: 'train[:9]' --dataset"),
    (f"{TRAIN} --train-dataset DATA --train-split train[:9]", "--train-split: 'train[:9]' --train-dataset"),
    (f"{TRAIN} --train-dataset nowhere.tsv", "--train-dataset: nowhere.tsv"),
    # corruptions
    (f"{PROBE} --strengths", "gradient: strength none"),
    (f"{PROBE} --strengths 0.1,0.2", "write several apart: 0.1 0.2;"),
    (f"{PROBE} --strengths -0.1", "--corruptions gradient: epsilon:"),
    (f"{PROBE} --strengths small", "--strengths: number 'small'"),
    (f"{PROBE} --strengths nan", "epsilon:"),
    (f"{PROBE} --corruptions gradiant", "--corruptions: 'gradiant' (did mean gradient?)"),
    (f"{PROBE} --corruptions gradient=a", "--corruptions: gradient=0.1,0.2 'gradient=a'"),
    (f"{PROBE} --corruptions quantization=4.5", "--corruptions quantization=4.5: bits:"),
    (f"{PROBE} --corruptions quantization=4:per=row", "per: channel 'row'"),
    (f"{PROBE} --corruptions quantization=4:pre=32", "--corruptions: symmetric 'pre' (did mean per?)"),
    (f"{PROBE} --corruptions float-quantization=fp4", "format: nvfp4 'fp4'"),
    (f"{PROBE} --corruptions worst-bit-flips=1.5", "count:"),
    (f"{PROBE} --corruptions bit-flips=0.1:of=fp8", "of: float32 'fp8'"),
    (f"{PROBE} --corruptions worst-bit-flips=1:of=int8,search=data-free", "search: int8"),
    (f"{PROBE} --corruptions", "--corruptions: none"),
    (f"{PROBE} --corruptions multi-step --norm 3", "--corruptions multi-step: p"),
    (f"{PROBE} --norm 0.5", "norm: inf"),
    (f"{PROBE} --corruptions gradient=0.1,0.1", "--corruptions: twice"),
    (f"{PROBE} --epsilon 0.1", "--strengths"),
    (f"{PROBE} --max-length 5000", "--max-length: 16"),
    (f"{PROBE} --saved-on meta", "--saved-on: meta"),
    (f"{PROBE} --stride 4", "--stride: text-classification 4 leave"),
    (f"{PROBE} --between-rows newline", "--between-rows: text-classification leave"),
    (f"{PROBE} --target-lang de", "--target-lang: text-classification 'de' leave"),
    (f"{PROBE} --box-format voc", "--box-format: text-classification 'voc' leave"),
    ("probe TAGGER --dataset TAGS --prefix x", "--prefix: token-classification 'x' leave"),
    (f"{PROBE} --task translation --between-rows newline", "--between-rows: translation text-generation"),
    (f"{PROBE} --stride 9 --max-length 8", "--stride: 8 --max-length 9"),
    ("evaluate CAUSAL --dataset TEXT --stride 17", "--stride: 16 17 --max-length"),
    (f"{PROBE} --recipe drop=0.1 --choose-by fit", "--choose-by: 'fit'"),
    (f"{PROBE} --recipe bits=0.1", "--recipe: 0.1"),
    (f"{PROBE} --recipe bits=0", "--recipe: bits 0"),
    (f"{PROBE} --recipe bits=nan", "--recipe: bits nan"),
    (f"{PROBE} --recipe loss=inf", "--recipe: loss inf"),
    (f"{PROBE} --recipe drop=-0.1", "--recipe: drop -0.1 stay"),
    (f"{PROBE} --recipe bits=8 --choose-by second_order", "--choose-by: --probes second_order"),
    (f"{PROBE} --recipe drop=0.1 --cells 0", "--cells: --recipe drop 1 0"),
    (f"{PROBE} --recipe bits=8 --choose-by accuracy --cells 0", "--cells: --choose-by accuracy 1 0"),
    (f"{PROBE} --pairs 3", "--pairs: --recipe 3"),
    (f"{PROBE} --quick --choose-by fisher", "--choose-by: --recipe fisher"),
    (f"{PROBE} --choose-by fisher", "--choose-by: --recipe fisher"),
    (f"{PROBE} --cells 3", "--cells: --recipe --quick 3"),
    (f"{PROBE} --probes 3", "--probes: --recipe --quick 3"),
    (f"{PROBE} --recipe bits=8 --trials 3", "--trials: none --recipe 3"),
    (f"{PROBE} --quick --trials 2", "--trials: none --quick 2"),
    (f"{PROBE} --recipe bits=8 --top-n 3", "--top-n: gradient=0.1 3"),
    (f"{PROBE} --quick --norm inf", "--norm: gradient=0.1 inf"),
    (f"{PROBE} --recipe bits=8 --norm inf --corruptions quantization=8", "--norm: inf 8-bit"),
    ("evaluate MODEL --dataset DATA --corruptions gaussian=0.1 --top-n 3", "--top-n: Gaussian 3"),
    ("evaluate MODEL --dataset DATA --norm inf", "--norm: inf default"),
    (f"{PROBE} --recipe bits=8 --strengths 4 3", "--strengths: --corruptions quantization=4,3"),
    (f"{PROBE} --recipe bits=4 --corruptions gradient=1", "--corruptions: gradient-based"),
    ("probe BROKEN --dataset DATA --quick", "model: finite answers NaN batch --dtype float32"),
    ("probe BROKEN --dataset DATA --recipe bits=16 --cells 0", "model: finite gradients NaN --dtype float32"),
    (f"{PROBE} --quick --recipe bits=4", "--quick: --recipe"),
    (f"{PROBE} --quick --corruptions quantization=4,3", "--corruptions: one --quick 2"),
    (f"{PROBE} --quick --corruptions", "--corruptions: at least one none"),
    (f"{PROBE} --quick --corruptions gradient=1", "--corruptions: gradient-based"),
    (f"{PROBE} --quick --corruptions quantization=4:per=32", "--corruptions: group of 32 fits"),
    (f"{PROBE} --trials 0", "--trials: 1 0"),
    ("evaluate MODEL --dataset DATA --corruptions gaussian", "gaussian: strength none gaussian=0.1"),
    ("evaluate MODEL --dataset DATA --corruptions worst-bit-flips=99999", "count: 99999 fewer"),
    (f"{PROBE} --corruptions gradient=0.1 --strengths 0.2", "--strengths: --corruptions 0.2"),
    (f"{PROBE} --corruptions gradient=0.1:norm=inf quantization=4 --strengths 0.2 4", "--strengths: --corruptions"),
    (f"{PROBE} --shares 0.5", "--shares: --towards 0.5 alone"),
    (f"{PROBE} --towards MODEL MODEL", "--towards: once twice"),
    (f"{PROBE} --towards MODEL --shares 1 0.5 1", "--shares: once 1.0 twice"),
    (f"{PROBE} --towards MODEL --shares inf", "share: finite inf"),
    (f"{PROBE} --towards BODY", "model: head text-classification"),
    (f"{PROBE} --towards nobody/nothing", "model: nobody/nothing"),
    (f"{PROBE} --towards folder/nowhere.gguf", "--towards: folder/nowhere.gguf"),
    (f"{PROBE} --towards MODEL --norm inf", "--norm: inf"),
    (f"{PROBE} --recipe bits=8 --towards MODEL", "--towards: formats --recipe"),
    (f"{PROBE} --quick --towards MODEL --shares 1", "--towards: formats --quick"),
    (f"{PROBE} --towards partial", "--towards: none 'partial' for 4 of 16, layer.1.output.dense.weight"),
    ("evaluate CAUSAL --dataset TEXT --towards untied", "--towards: none 'untied' for 1 of transformer.wte.weight"),
    (f"{PROBE} --towards WIDE", "--towards: shape (20, 8) instead (16, 8)"),
    (f"{PROBE} --seed 4294967296", "--seed: 4294967295 4294967296"),
    # groups and targets
    (f"{PROBE} --group layer", "--group: adapters 'layer' (did mean layers?)"),
    (f"{PROBE} --group adapters", "PEFT BertForSequenceClassification --group"),
    (f"{PROBE} --target-modules querry", '--target-modules, "querry"'),
    ("evaluate MODEL --dataset DATA --target-modules querry", '"querry"'),
    # metrics, tasks, devices, folders
    (f"{PROBE} --metric acuracy", "--metric: accuracy loss acuracy"),
    (f"{PROBE} --task translate", "--task: 'translate' (did mean translation?)"),
    (f"{PROBE} --device tpu9", "--device: 'tpu9'"),
    (f"{PROBE} --dtype bf16", "--dtype: bfloat16 'bf16'"),
    (f"{PROBE} --device-map balance", "--device-map: auto 'balance' (did mean balanced?)"),
    (f"{PROBE} --device-map {{1}}", "--device-map: JSON {1}"),
    (f"{PROBE} --device-map FILE/map.json", "--device-map: JSON record.json"),
    (f"{PROBE} --device-map broken.yaml", "--device-map: JSON broken.yaml"),
    (f'{PROBE} --device-map {{"bert":null}}', "--device-map: devices None"),
    (f'{PROBE} --device-map {{"bert":"tpu9","classifier":"cpu"}}', "--device-map: 'tpu9'"),
    (f'{PROBE} --device-map {{"bert":"cpu"}}', "--device-map: classifier"),
    (f'{PROBE} --device-map {{"bert":"cpu","bert.pooler":"disk"}}', "--device-map: classifier"),
    (f'{PROBE} --device-map {{"bert":"cpu","classifier":"cpu","clasifier":"disk"}}', "--device-map: clasifier"),
    (f"{PROBE} --device-map cpu --device cpu", "--device: --device-map 'cpu'"),
    (f"{PROBE} --offload-folder out", "--offload-folder: --device-map 'out'"),
    (f"{PROBE} --device-map cpu --offload-folder FILE", "--offload-folder: record.json"),
    (f"{TRAIN} --device-map auto", "--device-map offloaded"),
    (f"{PROBE} --saved-on tpu9", "--saved-on: 'tpu9'"),
    (f"{PROBE} --output-dir FILE", "--output-dir: record.json"),
    # command lines and settings files
    ("prove MODEL", "COMMAND: train evaluate 'prove' (did mean probe?)"),
    ("--verison", "COMMAND"),
    (f"{PROBE} --strength 0.1", "--strength (did mean --strengths?) hf-parcor probe --help"),
    (f"{PROBE} --output_dir out", "--output_dir (did mean --output-dir?)"),
    (f"{PROBE} --config", "--config:"),
    (f"{PROBE} --config nowhere.yaml", "--config: nowhere.yaml"),
    (f"{PROBE} --config list.yaml", "--config: list.yaml [1]"),
    (f"{PROBE} --config broken.yaml", "--config: broken.yaml YAML"),
    (f"{PROBE} --config typo.yaml", "--config: typo.yaml 'strength' (did mean strengths?)"),
    (f"{PROBE} --config twice.yaml", "--config: twice.yaml seed once"),
    (f"{PROBE} --config type.yaml", "--config: type.yaml --trials: 'many'"),
    (f"{PROBE} --config choice.yaml", "--config: choice.yaml --group: 'layer' (did mean layers?)"),
    (f"{PROBE} --config flag.yaml", "--config: flag.yaml json 1"),
    (f"{PROBE} --config word.yaml", "--config: word.yaml split False quotes"),
    (f"{PROBE} --config none.yaml", "strength none"),
    # training
    (f"{TRAIN} --validation-split 1", "--validation-split: 0 1"),
    (f"{TRAIN} --train-dataset ONEROW --dataset ONEROW", "two"),
    (f"{TRAIN} --dataset FOLDER --split train[:2]", "--split: train[:2] --train-split"),
    (f"{TRAIN} --defense samm", "--defense: multi_step_risk 'samm'"),
    (f"{TRAIN} --defense-epsilon -1", "--defense-epsilon:"),
    (f"{TRAIN} --defense-norm 0.5", "--defense-norm: inf"),
    (f"{TRAIN} --defense awp --defense-per-tensor --defense-random-start", "--defense-random-start: per-tensor"),
    (f"{TRAIN} --rho 0.05", "--defense-epsilon"),
    (f"{TRAIN} --defense_rho=0.05", "--defense-epsilon"),
    (f"{TRAIN} --output-dir FILE", "--output-dir: record.json"),
    (
        f"{TRAIN} --defense corruption --defense-corruption quantisation=4",
        "--defense-corruption: quantization",
    ),
    (f"{TRAIN} --corruptions gradient", "gradient: strength none"),
    (f"{TRAIN} --defense-target-modules querry", '--defense-target-modules, "querry"'),
    (f"{TRAIN} --defense-epsillon 1", "--defense-epsillon (did mean --defense-epsilon?)"),
    (f"{TRAIN} --max_steps many", "--max-steps: 'many'"),
    ("train BODY --dataset DATA --use-cpu --output-dir out", "head --task"),
    ("train MODEL --dataset DATA", "--output-dir: none"),
    (f"{TRAIN} --per-device-train-batch-size 0", "--per-device-train-batch-size: 1 0"),
    (f"{TRAIN} --seed -1", "--seed: 0 -1"),
    (f"{TRAIN} --seed 4294967296", "--seed: 4294967295 4294967296"),
    (f"{TRAIN} --data-seed 99999999999999999999", "--data-seed: 4294967295"),
    (f"{TRAIN} --corruption-seed 4294967296", "--corruption-seed: 4294967295 4294967296"),
    (f"{TRAIN} --learning-rate -1", "--learning-rate: 0 -1"),
    (f"{TRAIN} --learning-rate nan", "--learning-rate: 0 NaN"),
    (f"{TRAIN} --num-train-epochs 0", "--num-train-epochs: 0"),
    (f"{TRAIN} --max-steps 0", "--max-steps: 1 0"),
    (f"{TRAIN} --adam-beta2 1", "--adam-beta2: 1"),
    (f"{TRAIN} --eval-on-start", "--eval-on-start:"),
    (f"{TRAIN} --eval-strategy epoch", "--eval-strategy: no epoch leave"),
    (f"{TRAIN} --load-best-model-at-end", "--load-best-model-at-end: False True leave"),
    (f"{TRAIN} --save-strategy best", "--save-strategy: best leave"),
    (f"{TRAIN} --corruptions quantization=4 --skip-corruptions", "--skip-corruptions: none --corruptions"),
    (f"{TRAIN} --batch-size 4", "--per-device-train-batch-size"),
    (f"{TRAIN} --lr 0.1", "--learning-rate"),
    (f"{TRAIN} --epochs 1", "--num-train-epochs"),
    (f"{TRAIN} --device cpu", "--use-cpu"),
    (f"{TRAIN} --json", "robustness.json"),
    (f"{TRAIN} --quiet", "--disable-tqdm"),
    (f"{TRAIN} --accelerator-config nowhere.json", "nowhere.json"),
    # what other libraries refuse when they get ready to train
    (f"{TRAIN} --resume-from-checkpoint nowhere", "train nowhere"),
    (f"{TRAIN} --dataloader-drop-last --per-device-train-batch-size 99", "--dataloader-drop-last: 99 rows, got"),
    (f"{TRAIN} --optim-args word", "train ValueError"),
    (f'{TRAIN} --lr-scheduler-type cosine --lr-scheduler-kwargs {{"cycles":1}}', "train 'cycles'"),
    (f"{TRAIN} --use-liger-kernel", "train liger-kernel"),
    (f"{TRAIN} --report-to swanlab", "train swanlab"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "says"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_one_line_and_exit_code_2(run, files, line, says):
    words = [files.get(word) or word.replace("FILE", files["FILE"]) for word in line.split()]
    result = run(*words)
    assert result.code == 2
    *told, error = result.err.splitlines()
    assert error.startswith("hf-parcor: error: ")
    assert [word for word in says.split() if word not in error] == [], error
    assert ";" in error or ", use " in error or "[Errno" in error  # what to do
    assert "Traceback" not in result.err
    assert not [entry for entry in told if "error" in entry.lower()]
    assert result.out == ""
    assert not list(Path().glob("*.partial"))
    assert python_spellings(error, words[0]) == []


@pytest.mark.slow
def test_a_budget_out_of_reach_is_refused_before_anything_is_run(run, files, monkeypatch):
    """By how many bits the formats take; the nearest one is in reach."""
    asked = []
    run_it = torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *args, **named: asked.append(1) or run_it(*args, **named))
    words = ("probe", files["MODEL"], "--dataset", files["DATA"], "--corruptions", "quantization=8,4:per=channel")
    result = run(*words, "--recipe", "bits=1.5")
    assert (result.code, asked) == (2, [])
    nearest = re.search(r"--recipe: expected ([\d.]+) or more", result.err)[1]
    assert run(*words, "--recipe", f"bits={nearest}", "--cells", "0").code == 0
    assert asked


@pytest.mark.slow
def test_a_recipe_by_a_metric_that_is_none_is_refused_on_the_first_batch(run, files, monkeypatch):
    """Not after hours of measurements; what it says is known can be chosen by."""
    asked = []
    model = transformers.BertForSequenceClassification
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **named: asked.append(1) or forward(*args, **named))
    words = ("probe", files["MODEL"], "--dataset", files["DATA"], "--batch-size", "1", "--quiet", "--probes", "1")
    words = (*words, "--corruptions", "quantization=8:per=channel", "--recipe", "bits=32", "--choose-by")
    result = run(*words, "acuracy")
    assert (result.code, asked) == (2, [1])
    assert "(did you mean accuracy?)" in result.err
    known = re.search(r"--choose-by: expected one of (.*), got 'acuracy'", result.err)[1].split(", ")
    assert {"loss", *SCORES} < set(known)
    assert [name for name in known if run(*words, name).code != 0] == []


def python_spellings(error, command):
    """Return what a message has of arguments as Python writes them, where the command has a flag for them."""
    parser = build_parser()
    [commands] = [action for action in parser._actions if isinstance(action.choices, dict)]
    if command not in commands.choices:
        return []
    known = {action.dest for action in commands.choices[command]._actions if action.option_strings}
    if command == "train":
        known |= {field.name for field in fields(ParameterDefenseTrainingArguments)}
        known |= {name.removeprefix("defense_") for name in known}
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"|\(.*\)|--\w+", "", error)
    found = re.findall(r"\b(\w+)=|\b([a-z]+(?:_[a-z]+)+)\b|error: (\w+):", unquoted)
    return sorted(known.intersection(name for names in found for name in names))


def test_a_checkpoint_of_another_run_is_kept(run, files):
    command = ("probe", files["MODEL"], "--dataset", files["DATA"], "--output-dir", "out", "--strengths")
    assert run(*command, 1).code == 0
    before = Path("out/probe.jsonl").read_bytes()
    result = run(*command, 2)
    assert result.code == 2
    assert "expected a checkpoint of this run, got one with other corruptions" in result.err
    assert Path("out/probe.jsonl").read_bytes() == before
    Path("out/probe.jsonl").write_text("no checkpoint")
    assert "expected a checkpoint of a measurement, got 'no checkpoint'" in run(*command, 2).err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("evaluate --corruptions quantization=2", "robustness.html"),
        ("probe --corruptions quantization=2", "probe.json"),
        ("probe --quick", "quick.md"),
        ("probe --recipe bits=16", "recipe.html"),
    ],
)
def test_what_cannot_be_written_names_a_flag_of_the_command(run, files, command, file):
    (Path("out") / file).mkdir(parents=True)
    name, *words = command.split()
    result = run(name, files["MODEL"], "--dataset", files["DATA"], "--quiet", "--output-dir", "out", *words)
    assert (result.code, result.out) == (2, "")
    assert "error: --output-dir: " in result.err
    assert file in result.err


@pytest.mark.slow
@for_each("command", ["evaluate", "train"])
@for_each("library", ["soundfile", "soxr", "jiwer"])
def test_what_recordings_need_and_is_not_installed(run, monkeypatch, tmp_path, command, library):
    save, write, file = SAVED["automatic-speech-recognition"]
    folder, data = save(tmp_path / "model"), write(tmp_path / file)
    monkeypatch.setitem(sys.modules, library, None)
    flags = "--output-dir out --use-cpu --report-to none" if command == "train" else ""
    result = run(f"{command} {folder} --dataset {data} {flags}")
    assert result.code == 2
    assert result.err.splitlines()[-1].endswith("install it with: pip install 'hf-parcor[audio]'")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_missing_is_one_line_whichever_process_opens_it(run, tmp_path, workers):
    pytest.importorskip("PIL")
    save_model, write_data, file = SAVED["image-classification"]
    folder, whole = save_model(tmp_path / "model"), write_data(tmp_path / file)
    data = write_rows(tmp_path / "other.csv", ["image", "label"], [("0.png", "negative"), ("9.png", "positive")])
    flags = "--output-dir out --use-cpu --report-to none --max-steps 1 --disable-tqdm 1"
    flags += f" --dataloader-num-workers {workers}"
    result = run("train", folder, "--train-dataset", data, "--dataset", whole, *flags.split())
    assert result.code == 2
    *_, error = result.err.splitlines()
    assert error.startswith(f"hf-parcor: error: {data}: expected an image, or the file of one, in row 2, got '9.png'")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, KeyError, ImportError])
def test_a_bug_keeps_its_traceback(kind, files, monkeypatch, classifier_folder, sentences):
    """Also where it looks like what a mistake raises: only what checks arguments is taken for the user's."""
    from hf_parcor.evaluation import LayerProbe

    def broken(self, *arguments, **settings):
        raise kind("expected 1, got 2; mend it")

    monkeypatch.setattr(LayerProbe, "evaluate", broken)
    with pytest.raises(kind, match="expected 1, got 2"):
        main(["probe", classifier_folder, "--dataset", sentences])


def refuse(self, *arguments, **settings):
    raise ValueError("Invalid learning rate")


def let_another_library_refuse(self, *arguments, **settings):
    torch.optim.SGD([torch.ones(1)], lr=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "broken"), [("create_optimizer", refuse), ("training_step", let_another_library_refuse)]
)
def test_a_bug_of_a_training_keeps_its_traceback(files, monkeypatch, tmp_path, method, broken):
    """What ours raises while it gets ready, and whatever is raised from the first step on."""
    monkeypatch.setattr(f"hf_parcor.trainers.ParameterDefenseTrainer.{method}", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        main([files.get(word, word) for word in TRAIN.split()])


@pytest.mark.parametrize(
    "name",
    [
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "adam_beta1", "adam_beta2"),
        *("adam_epsilon", "label_smoothing_factor", "dataloader_num_workers", "seed", "data_seed", "max_steps"),
        *("save_total_limit", "save_steps"),
    ],
)
def test_numbers_that_no_training_has(name):
    """The Trainer's own defaults pass, and -2 does not."""
    defaults = {field.name: field.default for field in fields(ParameterDefenseTrainingArguments)}
    check_numbers(SimpleNamespace(**defaults))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        check_numbers(SimpleNamespace(**{**defaults, name: -2}))


def test_ctrl_c_says_how_it_goes_on(run, files, monkeypatch):
    from hf_parcor.evaluation import LayerProbe

    def interrupted(self, *arguments, **settings):
        raise KeyboardInterrupt

    command = ("probe", files["MODEL"], "--dataset", files["DATA"])
    monkeypatch.setattr(LayerProbe, "evaluate", interrupted)
    result = run(*command, "--output-dir", "out")
    assert result.code == 130
    assert "interrupted; what is finished is in out/probe.jsonl; the same command goes on" in result.err
    without = run(*command)
    assert "nothing was kept; with --output-dir DIR" in without.err
    assert "what is finished" not in without.err
    assert "nothing was kept" not in result.err
    monkeypatch.setattr("hf_parcor.trainers.ParameterDefenseTrainer.train", interrupted)
    trained = run("train", *command[1:], "--output-dir", "trained", "--use-cpu", "--report-to", "none")
    assert "with --resume-from-checkpoint true the same command goes on" in trained.err
    assert "--resume-from-checkpoint" not in result.err + without.err
    monkeypatch.setattr(Probe, "run", interrupted)
    result = run(*command)
    assert (result.code, result.err) == (130, "hf-parcor: interrupted\n")
