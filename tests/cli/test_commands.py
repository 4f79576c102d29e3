"""Every sub-command, from a command line to its files, on tiny models; numbers are those of the library."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import shutil
from collections import UserList
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from example_program import pushes_of
from for_each import for_each
from local_hub import local_hub
from local_models import (
    LABELS,
    MANY_LANGUAGES,
    SAVED,
    SENTENCES,
    WORDS,
    save_bert,
    save_llama,
    save_tokenizer,
    write_pairs,
    write_rows,
    write_sentences,
)
from safetensors.torch import load_file

import hf_parcor.trainers
from hf_parcor import (
    SAM,
    BitFlips,
    ConductanceDrift,
    CorruptionConstraint,
    CorruptionEvaluator,
    CorruptionRecord,
    DefenseConfig,
    EvaluationRecord,
    FirstLookReport,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    MetricInfo,
    MultiStepCorruption,
    ParameterDefenseTrainer,
    ParameterDefenseTrainingArguments,
    Pruning,
    Quantization,
    RecipeRecord,
    RecipeReport,
    SensitivityRecord,
    SweepRecord,
    by_kind,
    select_parameters,
)
from hf_parcor.cli import flags as shared_flags
from hf_parcor.cli.main import COMMANDS
from hf_parcor.cli.probe import GROUPS
from hf_parcor.cli.train import _training_and_validation
from hf_parcor.corruptions import CORRUPTIONS, RandomCorruption, corruptions_of_table_1
from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.errors import InputError
from hf_parcor.evaluation import DEFAULT_TRIALS, ClassificationMetric
from hf_parcor.records import EvaluationData
from hf_parcor.tasks import TASKS
from hf_parcor.tasks.text_generation import TextGeneration

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def batches_by_hand(folder, size):
    """Return sentences and labels as the command line should batch them: shortest first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = sorted(enumerate(SENTENCES), key=lambda row: len(row[1].split()))
    return [
        {
            **tokenizer([text for _, text in rows[start : start + size]], padding=True, return_tensors="pt"),
            "labels": torch.tensor([number % 2 for number, _ in rows[start : start + size]]),
        }
        for start in range(0, len(rows), size)
    ]


def model_of(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.slow
def test_names_that_help_shows_are_those_of_the_catalogues():
    assert tuple(TASKS) == shared_flags.TASKS
    assert {role for task in TASKS.values() for role in task.roles} == set(shared_flags.ROLES)
    assert len(set(shared_flags.ROLES)) == len(shared_flags.ROLES)
    assert [name for name, task in TASKS.items() if "stride" in task.takes] == [shared_flags.WINDOWED]
    assert shared_flags.TRIALS == DEFAULT_TRIALS
    assert tuple(name.replace("_", "-") for name in CORRUPTIONS) == shared_flags.CORRUPTIONS


def test_the_page_names_every_corruption():
    page = (Path(hf_parcor.__file__).parent / "cli" / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"\*\*Corruptions\*\* are (.*?)\.", page, re.DOTALL).group(1)
    assert re.findall(r"`([\w-]+)`", listed) == [name.replace("_", "-") for name in CORRUPTIONS]


def test_corruptions_from_words():
    nine = CorruptionConstraint(p=math.inf, epsilon=0.5, top_n=9)
    table = {
        "quantization=4,3:per=channel": [Quantization(4, "channel"), Quantization(3, "channel")],
        "quantization=4:per=32,symmetric=false,zero-point=float": [
            Quantization(4, 32, symmetric=False, zero_point="float")
        ],
        "quantization:code_range=full": [Quantization(8, code_range="full"), Quantization(5, code_range="full")],
        "float-quantization=mxfp4,nf4": [FloatQuantization("mxfp4"), FloatQuantization("nf4")],
        "float-quantization=fp8_e4m3:per=channel": [FloatQuantization("fp8_e4m3", "channel")],
        "gaussian=1e-3:relative-to=weight": [GaussianNoise(1e-3, "weight")],
        "drift=3600:nu-mean=0.06": [ConductanceDrift(3600, nu_mean=0.06)],
        "pruning=0.5:per=4": [Pruning(0.5, 4)],
        "pruning=0.9,1:per=all": [Pruning(0.9, "all"), Pruning(1.0, "all")],
        "multi-step=1:steps=3": [MultiStepCorruption(CorruptionConstraint(epsilon=1.0), steps=3)],
        "gradient=0.5:norm=inf,top-n=9": [GradientCorruption(nine)],
        "bit-flips=1e-7:bits=sign": [BitFlips(rate=1e-7, bits="sign")],
        "random=0.1:norm=inf,top-n=100": [RandomCorruption(CorruptionConstraint(p=math.inf, epsilon=0.1, top_n=100))],
        "multi-step=1:norm=inf,steps=3": [MultiStepCorruption(CorruptionConstraint(p=math.inf, epsilon=1.0), steps=3)],
    }
    for word, expected in table.items():
        assert read_corruptions([word], [8.0, 5.0]) == expected, word
    named = read_corruptions(["random=1", "random=1:norm=inf"], norm=1.0, top_n=3)
    assert named == [RandomCorruption(CorruptionConstraint(p=p, epsilon=1, top_n=3)) for p in (1.0, math.inf)]
    assert read_corruptions(["gaussian"], [0.123456789]) == [GaussianNoise(0.123456789)]


@for_each("name", CORRUPTIONS)
def test_what_a_mistake_is_told_to_write_can_be_read(name):
    """What is a strength of one corruption is none of another."""
    mistakes = [name, f"{name}="] + [f"{name}=strong"] * (
        name != "float_quantization"
    )  # whose message lists the words
    for mistake in mistakes:
        with pytest.raises(InputError) as raised:
            read_corruptions([mistake])
        (proposed,) = re.findall(rf"(?:give|as) ({name}=\S*\w)[,;] ", str(raised.value))
        assert {type(found) for found in read_corruptions([proposed])} == {CORRUPTIONS[name]}


def gradient(*strengths, **constraint):
    return [GradientCorruption(CorruptionConstraint(epsilon=strength, **constraint)) for strength in strengths]


@for_each(
    ("line", "corruptions"),
    [
        ("evaluate", corruptions_of_table_1()),
        ("evaluate --strengths 0.3", gradient(0.3)),
        ("evaluate --corruptions gradient=0.1 --norm inf --top-n 5", gradient(0.1, p=math.inf, top_n=5)),
        ("probe", gradient(0.1, 0.2, 0.5)),
        ("probe --corruptions quantization --strengths 4", [Quantization(4)]),
    ],
)
def test_what_the_flags_corrupt_by(run, monkeypatch, line, corruptions):
    found = []
    for command in ("evaluate", "probe"):
        monkeypatch.setattr(f"hf_parcor.cli.{command}.measure", lambda flags, asked, *_: found.append(asked()))
    assert run(line).code == 0
    assert found == [corruptions]


@for_each(
    ("flags", "expected"),
    [
        ("", lambda model: "layers"),
        ("--target-modules classifier", lambda model: {"classifier": ["classifier"]}),
        (
            "--group kinds --target-modules classifier",
            lambda model: {**by_kind(model), "classifier": ["classifier"]},
        ),
        ("--group modules", lambda model: "modules"),
    ],
)
def test_what_the_flags_probe(run, monkeypatch, classifier, flags, expected):
    found = []
    monkeypatch.setattr("hf_parcor.cli.probe.measure", lambda *asked: found.append(asked[-1]))
    monkeypatch.setattr("hf_parcor.evaluation.LayerProbe", lambda model, metric, targets: targets)
    assert run(f"probe {flags}").code == 0
    [build] = found
    assert build(SimpleNamespace(model=classifier, metric=None), {}) == expected(classifier)


class TestProbe:
    @pytest.mark.slow
    def test_json_is_the_record_of_the_library(self, run, classifier_folder, sentences):
        result = run(
            *("probe", classifier_folder, "--dataset", sentences, "--group", "kinds", "--strengths", 0.5, 1, "--json"),
            *("--corruptions", "gradient", "gaussian=0.1", "--trials", 2, "--seed", 3, "--batch-size", 4),
        )
        model, batches = model_of(classifier_folder), batches_by_hand(classifier_folder, 4)
        probe = LayerProbe(
            model,
            ClassificationMetric(batches),
            batches,
            targets="kinds",
            progress=False,
            evaluated_on=EvaluationData(Path(sentences).name, rows=len(SENTENCES)),
        )
        gradient = [GradientCorruption(CorruptionConstraint(epsilon=epsilon)) for epsilon in (0.5, 1.0)]
        expected = probe.evaluate([*gradient, GaussianNoise(0.1)], trials=2, seed=3)
        assert result.code == 0
        found = SweepRecord.from_json(result.out)
        assert found.data == expected.data
        assert found == expected

    def test_a_folder_has_record_and_reports_and_goes_on(self, run, classifier_folder, sentences):
        command = ("probe", classifier_folder, "--dataset", sentences, "--output-dir", "out", "--strengths", 1)
        result = run(*command)
        assert result.code == 0
        record = SweepRecord.load("out/probe.json")
        assert list(record.records) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        assert "gradient-based, L2\n\n| accuracy (%)" in result.out
        assert "none is fragile at ε=1." in result.out  # the verdict
        assert max(map(len, result.out.splitlines())) <= 80
        assert Path("out/probe.html").read_text().startswith("<!DOCTYPE html>")
        assert "# How robust" in Path("out/probe.md").read_text()
        lines = Path("out/probe.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == 4  # what is measured, clean, two layers
        Path("out/probe.jsonl").write_bytes(b"".join(lines[:-1]))
        Path("out/probe.json").unlink()
        assert run(*command).out == result.out
        assert SweepRecord.load("out/probe.json") == record

    def test_another_model_part_by_part(self, run, classifier_folder, models_of_seeds, sentences):
        """With all of its weights a model is the other one."""
        one, other = models_of_seeds["other"], models_of_seeds["last"]
        called = [Path(name).name for name in (one, other)]
        data = ("--dataset", sentences, "--batch-size", 4, "--quiet", "--json")
        words = ("--towards", one, other, "--shares", 0.5, 1)
        result = run("probe", classifier_folder, *data, *words, "--target-modules", "all", "classifier")
        assert result.code == 0
        sweep = SweepRecord.from_json(result.out)
        assert [row.label for row in sweep.records["all"].corruptions] == [
            label for name in called for label in (f"0.5 of the way to {name}", f"weights of {name}")
        ]
        everything, classifier = (sweep.records[part].corruptions for part in ("all", "classifier"))
        for name, row, in_part in zip((one, other), everything[1::2], classifier[1::2], strict=True):
            alone = EvaluationRecord.from_json(run("evaluate", name, *data, "--corruptions", "quantization=8").out)
            assert row.metrics == alone.clean.metrics
            model = model_of(classifier_folder)
            model.classifier.load_state_dict(model_of(name).classifier.state_dict())
            expected = ClassificationMetric(batches_by_hand(classifier_folder, 4))(model)
            assert {key: values[0] for key, values in in_part.metrics.items()} == expected
        both = run(
            "evaluate", classifier_folder, *data[:-1], *words, "--corruptions", "gaussian=0.1", "--output-dir", "out"
        )
        assert both.code == 0
        assert max(map(len, both.out.splitlines())) <= 80
        record = EvaluationRecord.load("out/robustness.json")
        assert [row.label for row in record.corruptions][:2] == ["Gaussian σ=0.1", f"0.5 of the way to {called[0]}"]
        page = Path("out/robustness.md").read_text(encoding="utf-8")
        assert f"--corruptions gaussian=0.1 --towards {' '.join(called)} --shares 0.5 1.0 --trials 3" in page

    @pytest.mark.slow
    def test_an_earlier_version_on_the_hub(
        self, run, classifier_folder, models_of_seeds, sentences, monkeypatch, tmp_path
    ):
        versions = {"main": classifier_folder, "v1": models_of_seeds["other"]}
        files = {
            branch: {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            for branch, folder in versions.items()
        }
        data = ("--dataset", sentences, "--batch-size", 4, "--quiet", "--json")
        earlier = EvaluationRecord.from_json(run("evaluate", versions["v1"], *data, "--corruptions", "gaussian=0").out)
        with local_hub({"models/me/model": files}, monkeypatch, tmp_path / "cache"):
            result = run("evaluate", "me/model", *data, "--towards", "me/model@v1", "me/model")
            refused = run("evaluate", "me/model", *data, "--towards", "me/model@v2")
        first, second = EvaluationRecord.from_json(result.out).corruptions
        assert (first.label, second.label) == ("weights of me/model@v1", "weights of me/model")
        assert first.metrics == earlier.clean.metrics
        assert second.changed == 0
        assert refused.code == 2
        assert "v2" in refused.err.splitlines()[-1]

    @for_each("name", ["@v1", "me/model@"])
    def test_half_a_revision(self, run, classifier_folder, sentences, name):
        result = run("evaluate", classifier_folder, "--dataset", sentences, "--towards", name)
        assert result.code == 2
        assert f"--towards: expected NAME@REVISION, got {name!r}" in result.err

    @pytest.mark.filterwarnings("ignore::FutureWarning:peft")
    def test_an_adapter_is_merged_where_it_is_the_other_model(self, run, classifier_folder, sentences, tmp_path):
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
        peft.get_peft_model(model_of(classifier_folder), settings).save_pretrained(tmp_path / "adapter")
        data = ("--dataset", sentences, "--batch-size", 4, "--quiet", "--json")
        alone = EvaluationRecord.from_json(run("evaluate", "adapter", *data, "--corruptions", "gaussian=0").out)
        towards = EvaluationRecord.from_json(run("evaluate", classifier_folder, *data, "--towards", "adapter").out)
        (row,) = towards.corruptions
        assert row.mean("loss") == pytest.approx(alone.clean.mean("loss"), rel=1e-5)
        assert row.mean("loss") != towards.clean.mean("loss")
        assert row.changed == 2 * 8 * 8, "the queries of two layers"

    @pytest.mark.slow
    def test_a_recipe_goes_into_a_folder_and_a_budget_out_of_reach_names_the_nearest(
        self, run, classifier_folder, sentences
    ):
        command = ("probe", classifier_folder, "--dataset", sentences, "--quiet", "--output-dir", "plan", "--cells", 5)
        formats = ("--corruptions", "quantization=8,4,2:per=channel,code-range=full,arithmetic=weight")
        refused = run(*command, *formats, "--recipe", "bits=1")
        assert refused.code != 0
        nearest = re.search(r"expected ([\d.]+) or more", refused.err)[1]
        budget = f"bits={float(nearest) + 1}"
        result = run(*command, *formats, "--recipe", budget)
        assert result.code == 0
        assert result.out.startswith("Quantize everything")
        assert max(map(len, result.out.splitlines())) <= 80
        chosen = RecipeRecord.load("plan/recipe.json")
        assert chosen.bits <= float(nearest) + 1
        scores = SensitivityRecord.load("plan/sensitivity.json")
        assert sum(bool(cell.measured) for cell in scores.cells) == 5
        assert chosen.pairs, "which parts interact is measured unless told otherwise"
        measured = EvaluationRecord.load("plan/recipe_measured.json")
        assert {"recipe", *scores.formats, "by fit"} <= {row.label for row in measured.corruptions}
        assert "<svg" in Path("plan/recipe.html").read_text()
        written = {path.name for path in Path("plan").iterdir()}
        assert {"torchao.json", "bitsandbytes.yaml", "llm_compressor.yaml", "recipe.md"} <= written
        again = run(*command, *formats, "--recipe", budget, "--json")
        assert RecipeRecord.from_json(again.out) == chosen, "and nothing is measured again"
        wider = f"bits={float(nearest) + 2}"
        for more in (("--recipe", wider), ("--recipe", budget, "--cells", 8), ("--recipe", wider, "--pairs", 12)):
            assert run(*command, *formats, *more).code == 0, "another one goes on in the same folder"
            assert (
                RecipeReport(
                    SensitivityRecord.load("plan/sensitivity.json"),
                    RecipeRecord.load("plan/recipe.json"),
                    EvaluationRecord.load("plan/recipe_measured.json"),
                    files=[path.name for path in Path("plan").iterdir()],
                )
                .to_markdown("page.md")
                .read_text()
                == Path("plan/recipe.md").read_text()
            )
        assert len(RecipeRecord.load("plan/recipe.json").pairs) == 12
        as_it_is = run(*command, *formats, "--recipe", "bits=1000")
        assert as_it_is.out.startswith("Quantize nothing")
        assert not Path("plan/torchao.json").exists(), "which would be of another recipe"

    @pytest.mark.slow
    def test_a_first_look(self, run, classifier_folder, sentences):
        command = ("probe", classifier_folder, "--dataset", sentences, "--quiet", "--quick", "--output-dir", "look")
        result = run(*command, "--group", "modules")
        assert result.code == 0, result.err
        scores = SensitivityRecord.load("look/quick.json")
        report = FirstLookReport(scores)
        assert result.out.split() == " ".join(report.verdict).split()
        assert max(map(len, result.out.splitlines())) <= 80
        measured = {cell.group for cell in scores.cells if cell.measured}
        by_score = sorted(scores.cells, key=lambda cell: -cell.scores["fisher"])
        assert measured == {cell.group for cell in by_score[:5]}
        assert list(scores.formats) == [str(Quantization(4, "channel", code_range="full"))]
        assert "<table" in Path("look/quick.html").read_text()
        assert Path("look/quick.md").read_text().startswith("# Which part")
        again = run(*command, "--group", "modules", "--json")
        assert SensitivityRecord.from_json(again.out) == scores

    def test_quiet_shows_no_bar(self, run, classifier_folder, sentences):
        line = ("evaluate", classifier_folder, "--dataset", sentences, "--corruptions", "quantization=3", "--limit", 2)
        assert "Loading" in run(*line).err
        assert "Loading" not in run(*line, "--quiet").err
        assert "Loading" in run(*line).err, "of this call alone"

    @pytest.mark.slow
    @pytest.mark.parametrize("group", [*GROUPS[:3]])
    def test_every_group(self, run, classifier_folder, sentences, group):
        result = run(
            *("probe", classifier_folder, "--dataset", sentences, "--group", group, "--corruptions", "quantization=3"),
            *("--target-modules", "all", "--json", "--quiet"),
        )
        from hf_parcor.targets import GROUPINGS

        assert tuple(GROUPINGS) == GROUPS
        expected = GROUPINGS[group](model_of(classifier_folder))
        assert list(SweepRecord.from_json(result.out).records) == [*expected, "all"]

    @pytest.mark.filterwarnings("ignore::FutureWarning:peft")
    def test_adapters(self, run, classifier_folder, sentences, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        peft.get_peft_model(model_of(classifier_folder), config).save_pretrained(tmp_path / "adapter")
        save_tokenizer(tmp_path / "adapter")
        result = run(
            *("probe", tmp_path / "adapter", "--dataset", sentences, "--group", "adapters", "--json"),
            *("--corruptions", "gaussian=1", "--trials", 1, "--output-dir", "out"),
        )
        assert result.code == 0, result.err
        (record,) = SweepRecord.from_json(result.out).records.items()
        assert (record[0], record[1].model) == ("default", f"{tmp_path.name}/adapter"), "it is not its base"

    @pytest.mark.filterwarnings("ignore::FutureWarning:peft")
    @pytest.mark.parametrize("base", [True, False])
    def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(
        self, run, classifier_folder, sentences, tmp_path, base
    ):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        peft.get_peft_model(model_of(classifier_folder), config).save_pretrained(tmp_path / "adapter")
        command = (
            "evaluate",
            tmp_path / "adapter",
            "--dataset",
            sentences,
            "--corruptions",
            "quantization=4",
            "--json",
        )
        if not base:  # a tokenizer of its own is not passed over, though it be broken
            (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
            assert "tokenizer" in (result := run(*command)).err
            assert result.code != 0
            return
        without = EvaluationRecord.from_json(run(*command).out)
        save_tokenizer(tmp_path / "adapter")
        assert without.clean.metrics == EvaluationRecord.from_json(run(*command).out).clean.metrics

    @pytest.mark.slow
    @pytest.mark.parametrize("task", TASKS)
    def test_every_task(self, run, task, tmp_path):
        pytest.importorskip("sacrebleu")
        pytest.importorskip("PIL")
        save_model, write_data, file = SAVED[task]
        folder, data = save_model(tmp_path / "model"), write_data(tmp_path / file)
        length = "--max-length 6" if "max_length" in TASKS[task].takes and "audio" not in TASKS[task].roles else ""
        result = run(f"probe {folder} --dataset {data} --corruptions gradient=1 {length} --output-dir out")
        assert result.code == 0
        assert f"hf-parcor: {task}: " in result.err
        metric = TASKS[task].metrics[0]
        assert f"| {metric}" in result.out
        assert metric in SweepRecord.load("out/probe.json").clean.metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["query", r".*\.query", "attention", "encoder.layer.1", r"bert\.encoder\.layer\.\d\.out.*"]
)
def test_a_target_is_the_same_in_every_command(run, classifier_folder, sentences, name):
    wanted = select_parameters(model_of(classifier_folder), [name])
    flags = ("--limit", 2, "--corruptions", "quantization=3", "--json", "--quiet", "--target-modules", name)
    common = (classifier_folder, "--dataset", sentences, *flags)
    evaluated = EvaluationRecord.from_json(run("evaluate", *common).out)
    probed = SweepRecord.from_json(run("probe", *common).out).records[name]
    trained = transformers.HfArgumentParser(ParameterDefenseTrainingArguments).parse_args_into_dataclasses(
        ["--output-dir", "out", "--use-cpu", "--defense-target-modules", name]
    )[0]
    trainer = ParameterDefenseTrainer(model=model_of(classifier_folder), args=trained)
    assert list(trainer.defended_parameters()) == list(wanted)
    assert evaluated.parameters == probed.parameters == sum(value.numel() for value in wanted.values())
    assert evaluated.target == probed.target == {"target_modules": [name]}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--defense-start-epoch", 9), "start at epoch 9, and training ends at epoch 1"),
        (("--defense-steps", 0), "steps=0 is the stock"),
        (("--defense-epsilon", 0), "epsilon=0 is the stock"),
        (("--defense", "none"), None),
        (("--defense", "none", "--defense-epsilon", 0.1), None),  # the default of the flag
    ],
)
def test_a_defense_that_does_nothing_says_so(run, classifier_folder, sentences, tmp_path, caplog, flags, says):
    others = write_sentences(tmp_path / "others.tsv")
    result = run(
        f"train {classifier_folder} --dataset {sentences} --train-dataset {others} --output-dir out "
        "--num-train-epochs 1 --skip-corruptions --use-cpu --report-to none --save-strategy no",
        *flags,
    )
    assert result.code == 0
    said = [record.getMessage() for record in caplog.records if "does nothing" in record.getMessage()]
    assert len(said) == (says is not None)
    assert all(says in message for message in said)
    assert ("not defended, since --defense none" in result.err) == (says is None)


class TestEvaluate:
    def test_table_1_is_the_default(self, run, classifier_folder, sentences):
        result = run("evaluate", classifier_folder, "--dataset", sentences, "--json", "--trials", 1)
        record = EvaluationRecord.from_json(result.out)
        assert [row.label for row in record.corruptions] == list(map(str, corruptions_of_table_1()))
        assert "the record is in" not in result.err

    def test_modules_and_corruptions_that_are_named(self, run, classifier_folder, sentences):
        result = run(
            f"evaluate {classifier_folder} --dataset {sentences} --target-modules attention --exclude-modules value "
            "--limit 4 --corruptions quantization=2,3 --metric loss --output-dir out"
        )
        model = model_of(classifier_folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(classifier_folder)
        order = sorted(range(4), key=lambda index: len(SENTENCES[index].split()))
        texts = [SENTENCES[index] for index in order]
        batch = {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": torch.tensor([i % 2 for i in order])}
        evaluator = CorruptionEvaluator(
            model,
            ClassificationMetric([batch]),
            [batch],
            target_modules=["attention"],
            exclude_modules=["value"],
            progress=False,
            evaluated_on=EvaluationData(Path(sentences).name, split="[:4]", rows=4),
        )
        assert EvaluationRecord.load("out/robustness.json") == evaluator.evaluate([Quantization(2), Quantization(3)])
        assert result.out.startswith("| loss ")
        assert "the record is in out/robustness.json, its pages are out/robustness.html and" in result.err

    @pytest.mark.slow  # loading evaluate takes seconds
    def test_the_page_names_the_metric_whatever_its_numbers_are_called(
        self, run, classifier_folder, sentences, tmp_path, monkeypatch
    ):
        pytest.importorskip("evaluate")
        (tmp_path / "share_of_right").mkdir()
        (tmp_path / "share_of_right" / "share_of_right.py").write_text(_OWN_METRIC)
        monkeypatch.chdir(tmp_path)
        words = [classifier_folder, "--dataset", sentences, "--corruptions", "quantization=2", "--output-dir", "out"]
        assert run("evaluate", *words, "--metric", tmp_path / "share_of_right").code == 0
        record = EvaluationRecord.load("out/robustness.json")
        assert list(record.clean.metrics) == ["right"]
        _, *again = shlex.split(re.search("`(hf-parcor .*)`", Path("out/robustness.md").read_text())[1])
        assert again[again.index("--metric") + 1] == "share_of_right"
        again[again.index("--dataset") + 1] = str(sentences)
        again[1] = str(classifier_folder)
        assert EvaluationRecord.from_json(run(*again, "--json").out).corruptions == record.corruptions


_OWN_METRIC = """
import datasets
import evaluate


class ShareOfRight(evaluate.Metric):
    def _info(self):
        whole = datasets.Value("int32")
        features = datasets.Features({"predictions": whole, "references": whole})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"right": sum(map(int.__eq__, predictions, references)) / len(references)}
"""

ON_THE_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    **{f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)},
}


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    """Return a folder with a tiny Llama in float32, and a text."""
    folder = tmp_path_factory.mktemp("decoder")
    save_llama(folder / "llama")
    (folder / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    return folder


class TestLoading:
    """In another precision, and on a map of devices; offloaded weights are measured with, and not corrupted."""

    CORRUPTIONS = ("--corruptions", "gradient=1", "gaussian=0.3", "quantization=2", "--trials", 1)

    @pytest.fixture
    def words(self, decoder_folder, monkeypatch, run):
        monkeypatch.chdir(decoder_folder)
        return ["llama", "--dataset", "text.txt", "--quiet", *self.CORRUPTIONS]

    @pytest.fixture
    def loaded(self, monkeypatch):
        """Return the models that commands load, each with its weights as they were."""
        found = []
        load = TextGeneration.load_model

        def kept(task, *arguments, **settings):
            model = load(task, *arguments, **settings)
            found.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
            return model

        monkeypatch.setattr(TextGeneration, "load_model", kept)
        return found

    @pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
    def test_precision(self, run, words, dtype, loaded):
        found = EvaluationRecord.from_json(run("evaluate", *words, "--json", "--dtype", dtype).out)
        [(model, before)] = loaded
        assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        by_hand = transformers.AutoModelForCausalLM.from_pretrained("llama", dtype=model.dtype)
        batch = torch.tensor([transformers.AutoTokenizer.from_pretrained("llama")(SENTENCES[0])["input_ids"]])
        assert torch.equal(model(batch).logits, by_hand(batch).logits)
        assert found.flags == ({} if dtype == "auto" else {"dtype": dtype})

    @pytest.mark.slow
    def test_a_map_gives_the_numbers_of_the_whole_model(self, run, words, loaded, tmp_path):
        words += ["--dtype", "bfloat16"]
        whole = SweepRecord.from_json(run("probe", *words, "--json").out)
        (tmp_path / "map.json").write_text(json.dumps(ON_THE_DISK))
        maps = {"auto": "auto", str(tmp_path / "map.json"): None}
        for given, resident in maps.items():
            spread = SweepRecord.from_json(run("probe", *words, "--json", "--device-map", given).out)
            layers = list(whole.records) if resident else ["model.layers.0", "model.layers.2"]
            assert list(spread.records) == layers
            assert spread.clean == whole.clean
            for layer, record in spread.records.items():
                assert record.corruptions == whole.records[layer].corruptions, (given, layer)
                assert record.flags == {"dtype": "bfloat16", "device_map": resident or ON_THE_DISK}
                assert bool([note for note in record.notes if "on the meta device" in note]) is (resident is None)
            model, before = loaded[-1]
            after = {name: value for name, value in model.state_dict().items() if not value.is_meta}
            assert len(after) < len(before) or resident
            assert all(torch.equal(value, before[name]) for name, value in after.items())

    @pytest.mark.slow
    def test_the_page_has_a_command_that_measures_the_same(self, run, words, decoder_folder, tmp_path):
        words += ["--dtype", "bfloat16", "--device-map", json.dumps(ON_THE_DISK), "--offload-folder", tmp_path / "off"]
        words += [
            "--max-length",
            8,
            "--stride",
            4,
            "--column",
            "text=text",
            "--no-greater-is-better",
            "--unit",
            "nats",
        ]
        for command, name in (("evaluate", "robustness"), ("probe", "probe")):
            assert run(command, *words, "--output-dir", tmp_path / "out").code == 0
            page = (tmp_path / "out" / f"{name}.md").read_text()
            program, *again = shlex.split(re.search("`(hf-parcor .*)`", page)[1])
            result = run(*again, "--quiet", "--json")
            assert (program, result.out) == ("hf-parcor", (tmp_path / "out" / f"{name}.json").read_text())

    @pytest.mark.slow
    def test_a_first_look_and_a_recipe(self, run, words, tmp_path):
        words = [*words[:4], "--device-map", json.dumps(ON_THE_DISK), "--output-dir", tmp_path / "out"]
        assert run("probe", *words, "--quick").code == 0
        scores = SensitivityRecord.load(tmp_path / "out" / "quick.json")
        assert list(scores.groups) == ["model.layers.0", "model.layers.2"]
        assert any("model.layers.1 was left out" in note for note in scores.notes)
        assert run("probe", *words, "--recipe", "bits=12", "--corruptions", "quantization=4").code == 0
        measured = EvaluationRecord.load(tmp_path / "out" / "recipe_measured.json")
        assert measured.flags == scores.flags == {"device_map": ON_THE_DISK}
        assert "--device-map" in (tmp_path / "out" / "recipe.md").read_text()
        result = run("probe", *words, "--quick", "--target-modules", "model.layers.1")
        assert (result.code, "--target-modules: expected weights that can be corrupted" in result.err) == (2, True)


class TestReportAndCompare:
    @pytest.fixture
    def outputs(self, run, models_of_seeds, sentences):
        for name, folder in models_of_seeds.items():
            run(
                *("evaluate", folder, "--dataset", sentences, "--output-dir", name),
                *("--corruptions", "gaussian=0.2,0.4", "--trials", 2),
            )

    @pytest.mark.slow
    def test_report(self, run, outputs):
        result = run(
            "report", "plain", "--pages", "page.html", "page.md", "--title", "Wie robust?", "--metric", "loss"
        )
        assert result.code == 0
        assert "Wie robust?" in Path("page.html").read_text()
        assert "Wie robust?" in Path("page.md").read_text()
        assert "loss" in result.out

    @pytest.mark.slow
    def test_records_of_several_seeds(self, run, outputs):
        pytest.importorskip("scipy")
        result = run("report", "plain", "defended/robustness.json", "--pages", "page.md")
        assert result.code == 0
        assert "accuracy" in result.out
        assert "seeds" in result.err
        assert "hf-parcor compare" in result.err, "what was perhaps meant"
        assert "seeds" not in run("report", "plain").err

    @pytest.mark.slow
    def test_compare(self, run, outputs):
        pytest.importorskip("scipy")
        result = run("compare", "plain", "b=defended/robustness.json", "--pages", "page.html")
        assert result.code == 0
        assert re.search(r"\| accuracy \(%\) +\| +plain \| +b \| +change \|", result.out)
        assert Path("page.html").is_file()

    @pytest.mark.slow
    def test_json_has_the_verdict_and_every_mean_of_the_records(self, run, outputs):
        records = {name: EvaluationRecord.load(f"{name}/robustness.json") for name in ("plain", "defended")}
        for words, shown in (("report plain", ["plain"]), ("compare plain defended", ["plain", "defended"])):
            printed = run(*words.split(), "--pages", "page.md")
            assert "page.md" in printed.err, "what was written is said"
            result = run(*words.split(), "--json", "--metric", "loss")
            found = json.loads(result.out)
            assert (found["metric"], found["greater_is_better"]) == ("loss", False)
            flat = re.sub(r"\s+", " ", run(*words.split(), "--metric", "loss").out)
            assert len(found["verdict"]) > 0
            assert [sentence for sentence in found["verdict"] if sentence not in flat] == []
            expected = [row for name in shown for row in records[name].rows()]
            assert [mean["mean"] for mean in found["means"]] == [pytest.approx(row.mean("loss")) for row in expected]
            assert [tuple(mean["values"]) for mean in found["means"]] == [row.metrics["loss"] for row in expected]

    @pytest.mark.slow
    def test_compare_several_seeds(self, run, outputs):
        pytest.importorskip("scipy")
        result = run("compare", "a=plain,other", "b=defended,last")
        assert result.code == 0
        assert "| accuracy" not in result.out
        assert result.out.strip()

    def test_compare_what_records_share(self, run):
        def record(name, corruptions, value):
            rows = [CorruptionRecord("any", label, {}, (0,), {"accuracy": (value,)}) for label in corruptions]
            clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,)})
            EvaluationRecord(name, {}, 1, clean, tuple(rows)).save(f"{name}.json")

        record("plain", ["one", "two", "three"], 0.5)
        record("other", ["four", "three", "two"], 0.6)
        record("apart", ["five"], 0.6)
        printed = run("compare plain.json other.json --pages page.md").out
        rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:]
        assert rows == ["no corruption", "two", "three"]
        for said in (printed, Path("page.md").read_text(), run("compare plain.json other.json --json").out):
            assert "one" in said
            assert "four" in said
        for flags in ("", " --json", " --pages none.md"):
            result = run(f"compare plain.json apart.json{flags}")
            assert (result.code, result.out, Path("none.md").exists()) == (2, "", False)
            assert "in common" in result.err

    @pytest.mark.slow
    def test_what_the_metric_means_is_what_the_flags_say(self, run, outputs):
        result = run("report", "plain", "--metric", "loss", "--unit", "nats", "--greater-is-better")
        assert result.code == 0
        assert " nats" in result.out
        result = run("compare", "plain", "defended", "--unit", "points", "--no-greater-is-better")
        assert "| accuracy (of 100) " in result.out
        assert run("compare", "plain", "defended", "--unit").code != 0

    @pytest.mark.slow
    def test_they_are_in_the_record_of_a_measurement(self, run, classifier_folder, sentences):
        (Path("config.yaml")).write_text("greater-is-better: false\nunit: points\n")
        words = (classifier_folder, "--dataset", sentences, "--json", "--corruptions", "quantization=3")
        info = MetricInfo(False, "points")
        for command, kind in (("evaluate", EvaluationRecord), ("probe", SweepRecord)):
            flagged = run(command, *words, "--no-greater-is-better", "--unit", "points")
            assert kind.from_json(flagged.out).info("accuracy") == info
            assert run(command, *words, "--config", "config.yaml").out == flagged.out
            assert kind.from_json(run(command, *words).out).info("accuracy") == MetricInfo(True, "share")

    @pytest.mark.slow
    def test_a_guess_is_told(self, run, outputs):
        record = EvaluationRecord.load("plain/robustness.json")
        rows = [replace(row, metrics={"score": row.metrics["accuracy"]}) for row in record.rows()]
        replace(record, clean=rows[0], corruptions=tuple(rows[1:]), metric_info={}).save("score.json")
        replace(record, metric_info={}).save("accuracy.json")
        assert "whether a large score is good" in re.sub(r"\s+", " ", run("report", "score.json").out)
        assert "unit of accuracy" in run("report", "accuracy.json").err
        assert "guess" not in str(run("report", "plain"))
        assert "guess" not in str(run("report", "score.json", "--greater-is-better"))

    @pytest.mark.slow
    def test_rows_that_are_not_the_same_are_no_comparison(self, run, outputs, models_of_seeds, sentences):
        few = ("evaluate", models_of_seeds["defended"], "--dataset", sentences, "--corruptions", "gaussian=0.2,0.4")
        run(*few, "--trials", 2, "--limit", 4, "--output-dir", "few")
        for words in (
            ("compare", "plain", "few"),
            ("report", "plain", "few"),
            ("compare", "a=plain,few", "b=defended"),
        ):
            result = run(*words, "--pages", "page.html")
            assert result.code == 2
            assert "same data" in result.err
            assert (result.out, Path("page.html").exists()) == ("", False)

    @pytest.mark.slow
    def test_models_of_different_defenses_are_no_seeds(self, run, outputs):
        """What was meant is compare, which takes them; and seeds of one defense are averaged."""
        for name in ("plain", "defended", "other"):
            Path(name, "config.json").write_text("{}")
        for name, steps in (("defended", 5), ("other", 7)):
            DefenseConfig(SAM(CorruptionConstraint(epsilon=0.1)), None, None, None, steps, 8).save_pretrained(name)
        for words in ("report plain defended", "compare a=plain,defended b=other,last", "card plain --seeds defended"):
            result = run(*words.split())
            assert result.code == 2
            assert "hf-parcor compare plain defended" in result.err
        for words in ("report other defended", "compare plain defended", "card other --seeds defended"):
            assert run(*words.split()).code == 0
        DefenseConfig(SAM(CorruptionConstraint(epsilon=0.1)), None, None, None, 0, 8).save_pretrained("defended")
        assert run("report", "plain", "defended").code == 0, "it never ran"

    @pytest.mark.slow
    def test_a_folder_may_hold_both_records(self, run, models_of_seeds, sentences):
        """As a card wants it. It stands for its evaluation, unless all else are probes."""
        pytest.importorskip("scipy")
        flags = ("--dataset", sentences, "--corruptions", "quantization=3", "--output-dir")
        run("evaluate", models_of_seeds["plain"], *flags, "both")
        before = {path: path.read_bytes() for path in Path("both").iterdir()}
        run("probe", models_of_seeds["plain"], *flags, "both")
        run("probe", models_of_seeds["defended"], *flags, "probed")
        run("evaluate", models_of_seeds["defended"], *flags, "evaluated")
        kinds = ("robustness", "probe")
        assert {str(path) for path in Path("both").iterdir()} == {
            f"both/{kind}.{suffix}" for kind in kinds for suffix in ("json", "jsonl", "html", "md")
        }
        assert {path: path.read_bytes() for path in before} == before
        for line, kind, chosen in (
            ("report both", "robustness", True),
            ("report both/robustness.json", "robustness", False),
            ("report both/probe.json", "probe", False),
            ("compare a=both b=evaluated", "robustness", True),
            ("compare a=both b=probed", "probe", True),
            ("compare a=evaluated b=probed", None, False),
        ):
            result = run(*line.split(), "--pages", "page.md")
            assert result.code == (2 if kind is None else 0), line
            assert (f"of which {kind}.json" in result.err) is chosen
            if kind is not None:
                assert ("encoder.layer.1" in Path("page.md").read_text()) is (kind == "probe"), line
        assert run("card", "both").code == 0

    @pytest.mark.slow
    def test_a_record_counts_once(self, run, outputs):
        for words in (("report", "plain", "plain/robustness.json"), ("compare", "a=plain,plain", "b=defended")):
            result = run(*words)
            assert result.code == 2
            assert " twice" in result.err
        assert "'a' and 'b'" in run("compare", "a=plain", "b=plain/robustness.json").err


class TestTrain:
    @pytest.mark.slow
    def test_a_classifier_gets_its_head_from_the_data(self, run, tmp_path, sentences):
        torch.manual_seed(0)
        folder = save_bert(tmp_path / "body", transformers.BertModel, initializer_range=0.02)
        copied = shutil.copy(sentences, "copy.tsv")
        result = run(
            f"train {folder} --task text-classification --train-dataset {sentences} --dataset {copied} "
            "--output-dir out --num-train-epochs 40 --learning-rate 0.01 --defense-target-modules attention --use-cpu "
            "--logging-steps 20 --save-strategy no --report-to none --trials 1 --disable-tqdm 1"
        )
        assert result.code == 0
        model = model_of(tmp_path / "out")
        assert model.config.label2id == {"0": 0, "1": 1}
        assert "the new head has 2 classes: 0, 1\n" in result.err, "a label that is mistyped would be one more"
        record = EvaluationRecord.load("out/robustness.json")
        batches = batches_by_hand(tmp_path / "out", 8)
        assert ClassificationMetric(batches)(model.eval())["accuracy"] == record.clean.mean("accuracy") == 1.0
        assert [row.label for row in record.corruptions] == list(map(str, corruptions_of_table_1()))
        assert result.out.startswith("| accuracy (%)")
        assert "loss_corrupted" in result.err
        assert "loss_corrupted" in Path("out/trainer_state.json").read_text()

    @for_each("measured", [True, False])
    def test_records_of_the_weights_before_are_no_records_of_those_that_were_trained(
        self, run, classifier_folder, sentences, measured
    ):
        """They lie where the new model goes: a card would say what another model lost."""
        again = "--corruptions gaussian=0.1" if measured else "--skip-corruptions"
        corrupted = "--corruptions gaussian=0.1 --trials 1 --quiet"
        for command in ("evaluate", "probe"):
            flags = f"--dataset {sentences} --output-dir out {corrupted}"
            assert run(f"{command} {classifier_folder} {flags}").code == 0
        old = [Path("out", name).read_bytes() for name in ("robustness.json", "probe.json")]
        assert (
            self.train(run, classifier_folder, "--dataset", sentences, "--output-dir", "out", *again.split()).code == 0
        )
        assert [Path("out", name).read_bytes() for name in ("robustness.before.json", "probe.before.json")] == old
        assert Path("out/robustness.json").exists() == measured
        assert not Path("out/probe.json").exists()
        assert run("card out --dry-run").code == (0 if measured else 2)

    @pytest.mark.filterwarnings("ignore::FutureWarning:peft")
    def test_it_is_pushed_once_when_it_is_measured(self, run, classifier_folder, sentences, monkeypatch):
        pushes = pushes_of(monkeypatch)
        flags = f"--dataset {sentences} --output-dir out --push-to-hub --hub-strategy end --corruptions quantization=4"
        assert self.train(run, classifier_folder, *flags.split()).code == 0
        ((_, facts),) = pushes
        assert [row.label for row in facts.corruptions] == ["4-bit quantization"]

    def test_an_adapter_is_trained_on_and_saved(self, run, classifier_folder, sentences):
        """By PEFT: Transformers saves adapters of some versions alone, and loads those of others too."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        peft.get_peft_model(model_of(classifier_folder), config).save_pretrained("adapter")
        flags = ["--dataset", sentences, "--output-dir", "out", "--skip-corruptions", "--learning-rate", 0.1]
        result = self.train(run, "adapter", *flags)
        assert result.code == 0, result.err
        before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "out"))
        assert before.keys() == after.keys()
        assert all("lora_" in name or "classifier" in name for name in after)
        assert all(not torch.equal(before[name], weight) for name, weight in after.items() if "lora_B" in name)
        assert run("evaluate", "out", "--dataset", sentences, "--corruptions", "quantization=4").code == 0

    def train(self, run, *words):
        usual = "--use-cpu --save-strategy no --report-to none --max-steps 1 --disable-tqdm 1 --defense none"
        return run("train", *words, *usual.split(), "--trials", 1)

    @pytest.mark.parametrize(
        "flags",
        [
            "--corruptions gaussian=0.1 quantization=4 --trials 3",
            "--corruptions gaussian=0.1,0.2 --trials 2 --limit 5",
            "--corruptions quantization=4 --defense none",
            pytest.param("--defense none", marks=pytest.mark.slow),
            "--skip-corruptions",
            "--corruptions",
        ],
    )
    def test_how_much_is_measured_is_said_before_the_training(
        self, run, classifier_folder, sentences, tmp_path, flags
    ):
        data = ("--train-dataset", sentences, "--dataset", shutil.copy(sentences, tmp_path / "copy.tsv"))
        usual = "--use-cpu --save-strategy no --report-to none --max-steps 1 --disable-tqdm 1 --output-dir out"
        if flags == "--corruptions":  # none is no list
            assert run("train", classifier_folder, *data, *usual.split(), flags).code == 2
            return
        result = run("train", classifier_folder, *data, *usual.split(), *flags.split())
        assert result.code == 0, result.err
        before = result.err.split("train_runtime")[0]
        said = re.search(r"measured (\d+) times on (\d+) rows", before)
        if "skip" in flags:
            assert said is None
            return
        record = EvaluationRecord.load("out/robustness.json")
        assert tuple(map(int, said.groups())) == (
            sum(len(row.seeds) for row in record.rows()),
            record.evaluated_on.rows,
        )
        assert all(flag in before for flag in ("--skip-corruptions", "--corruptions", "--limit"))
        assert ("--trials 1" in before) == any(len(row.seeds) > 1 for row in record.rows())

    def test_what_it_measures_on_a_file_it_has_not_trained_on(self, run, tmp_path, monkeypatch):
        """A file is both only once: the rows of training and of measuring are the file, and share none."""
        seen = {}

        class Watched(hf_parcor.trainers.ParameterDefenseTrainer):
            def __init__(self, *args, train_dataset, **kwargs):
                seen["trained"] = [tuple(row["input_ids"]) for row in train_dataset]
                super().__init__(*args, train_dataset=train_dataset, **kwargs)

        def measured(metric, model):
            seen["measured"] = [tuple(ids) for batch in metric.batches for ids in batch["input_ids"].tolist()]
            seen["sizes"] = {len(batch["labels"]) for batch in metric.batches}
            return {"accuracy": 0.5, "loss": 0.5}

        monkeypatch.setattr(hf_parcor.trainers, "ParameterDefenseTrainer", Watched)
        body = save_bert(tmp_path / "body", transformers.BertModel)
        pairs = list(itertools.product(WORDS[3:9], repeat=2))
        rows = [(" ".join(pair), "-".join(pair)) for pair in pairs]  # classes that only one of both parts has
        file = write_rows(tmp_path / "rows.tsv", ["sentence", "label"], rows)
        words = (body, "--task", "text-classification", "--dataset", file, "--output-dir", "out", "--skip-corruptions")
        parts, heads = set(), []
        for seed, split_seed, limit in ((0, 0, 99), (1, 0, 99), (0, 1, 20), (0, 0, 99)):
            with monkeypatch.context() as patched:
                patched.setattr(ClassificationMetric, "__call__", measured)
                flags = ("--validation-split", 0.25, "--split-seed", split_seed, "--train-limit", limit)
                result = self.train(run, *words, "--seed", seed, *flags, "--per-device-eval-batch-size", 3)
            assert result.code == 0
            assert "9 of the 36 rows" in result.err
            assert (len(seen["measured"]), seen["sizes"]) == (9, {3})
            assert not Path("out/robustness.json").exists(), "nothing was to be measured but the clean model"
            assert not set(seen["trained"]) & set(seen["measured"])
            assert len({*seen["trained"], *seen["measured"]}) == 9 + min(27, limit)
            parts.add(frozenset(seen["measured"]))
            trained = model_of("out")
            assert set(trained.config.label2id) == {label for _, label in rows}, "of all rows"
            heads.append(trained.classifier.weight)
        assert len(parts) == 2, "another seed of training is measured on the same rows, another draw on others"
        assert torch.equal(heads[0], heads[3]), "a new head is drawn by the seed, too"
        assert not torch.equal(heads[0], heads[1])

    @pytest.mark.slow
    def test_its_record_says_on_which_rows(self, run, classifier_folder, sentences):
        words = (classifier_folder, "--dataset", sentences, "--output-dir", "out", "--validation-split", 0.5)
        self.train(run, *words)
        record = EvaluationRecord.load("out/robustness.json")
        assert (record.evaluated_on.name, record.evaluated_on.rows) == (Path(sentences).name, 3)
        assert "held out" in record.evaluated_on.split
        run("evaluate", "out", "--dataset", sentences, "--output-dir", "all", "--trials", 1)
        assert "same data" in run("compare", "out", "all").err
        self.train(run, classifier_folder, "--train-dataset", sentences, "--dataset", *words[2:], "--limit", 2)
        assert EvaluationRecord.load("out/robustness.json").evaluated_on.split.endswith("[:2]")

    def test_it_says_how_many_rows_it_trains_and_measures_on(self, run, classifier_folder, sentences, tmp_path):
        others = write_sentences(tmp_path / "others.tsv")
        words = (classifier_folder, "--dataset", sentences, "--output-dir", "out", "--skip-corruptions")
        half = ("--validation-split", 0.5)
        for flags, trained, measured in (
            (half, 3, "and measured on"),
            ((*half, "--train-dataset", os.path.relpath(sentences)), 3, "and measured on"),  # the same file
            ((*half, "--split-seed", 7), 3, "with seed 7"),
            ((*half, "--limit", 2), 3, "the first 2 of them measured on"),
            ((*half, "--limit", 3, "--train-limit", 2), 2, "and measured on"),
            (("--train-dataset", others), 6, None),
            (("--train-dataset", others, "--train-limit", 4), 4, None),
        ):
            result = self.train(run, *words, *flags, "--metric", "loss")
            said = result.err
            assert result.out.startswith("| loss")
            assert f"column 'label'; {trained} rows" in said
            assert ("3 of the 6 rows" in said and "held out" in said) == (measured is not None) == ("drawn" in said)
            assert (measured or "") in said

    @for_each(
        ("sources", "splits", "found"),
        [
            (("org/a", None), ("validation", "train"), "others"),
            (("org/a", "org/a"), ("validation", "train"), "others"),
            (("org/a", None), ("train[:9%]", "train[9%:]"), "others"),
            (("org/a", "org/b"), ("train[:9%]", "train"), "others"),
            (("org/a", "org/b"), ("train", "train"), "others"),
            (("org/a", None), ("train[:9%]", "train"), "refused"),
            (("org/a", None), ("train", "train[9%:]"), "refused"),
            (("org/a", None), ("train", "train"), "held out"),
            (("org/a", None), ("validation", "train+validation"), "refused"),
            (("org/a", None), ("validation", "train+test"), "others"),
            (("org/a", None), ("train[:10%]", "train[5%:]"), "refused"),
            (("org/a", None), ("train[:10%]", "test+train[10%:]"), "others"),
            (("org/a", None), ("train[-2:]", "train[:19]"), "refused"),
            (("org/a", None), ("train[-2:]", "train[:18]"), "others"),
        ],
    )
    @for_each("known", [True, False])
    def test_which_rows_of_the_hub_are_trained_on(self, sources, splits, found, known):
        """No row is measured that was trained on, unless slices of a split of unknown length say so themselves."""
        pytest.importorskip("datasets")
        sliced = all("[" in split for split in splits)
        if not known and sliced and found == "refused":
            found = "others"
        given = SimpleNamespace(
            **dict(zip(("dataset", "train_dataset"), sources, strict=True)),
            **dict(zip(("split", "train_split"), splits, strict=True)),
            **{"validation_split": 0.1, "split_seed": 5, "limit": None},
        )
        held_out = SimpleNamespace(entries=[1])
        lengths = {name: SimpleNamespace(num_examples=20) for name in ("train", "validation", "test")}
        rows = SimpleNamespace(entries=UserList([1, 2]), split_off=lambda *asked: (asked, held_out))
        if known:
            rows.entries.info = SimpleNamespace(splits=lengths)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_parcor.cli.train.read_data", lambda arguments: (rows, {"text": "a"}))
            patch.setattr("hf_parcor.cli.train.rows_of", lambda arguments, source, split: (source, split))
            if found == "refused":
                with pytest.raises(InputError, match="--split: expected rows that are not trained on"):
                    _training_and_validation(given)
                return
            trained, measured, columns = _training_and_validation(given)
        assert columns == {"text": "a"}
        assert measured is (held_out if found == "held out" else rows)
        assert trained == ((0.1, 5) if found == "held out" else (sources[1] or "org/a", splits[1]))

    @pytest.mark.parametrize(
        "task", [name for name, task in TASKS.items() if name != "text-classification" and not task.trained_by]
    )
    def test_other_tasks(self, run, task, tmp_path):
        pytest.importorskip("sacrebleu")
        pytest.importorskip("PIL")
        save_model, write_data, file = SAVED[task]
        folder, data = save_model(tmp_path / "model"), write_data(tmp_path / file)
        length = "--max-length 6" if "max_length" in TASKS[task].takes and "audio" not in TASKS[task].roles else ""
        result = run(
            f"train {folder} --dataset {data} --output-dir out {length} --max-steps 2 --train-dataset {data} "
            "--train-limit 4 --use-cpu --save-strategy no --report-to none --skip-corruptions --disable-tqdm true"
        )
        assert result.code == 0
        assert f"| {TASKS[task].metrics[0]}" in result.out
        assert Path("out/model.safetensors").is_file()
        said = json.loads(Path("out/train_results.json").read_text())
        assert said["train_collapsed"] in (0.0, 1.0)
        assert said["train_samples"] > 0

    @pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.trained_by])
    def test_models_that_another_trainer_trains(self, run, task, tmp_path):
        save_model, write_data, file = SAVED[task]
        folder, data = save_model(tmp_path / "model"), write_data(tmp_path / file)
        result = run("train", folder, "--dataset", data, "--output-dir", "out")
        assert result.code == 2
        assert f"class Defended(ParameterDefenseMixin, {TASKS[task].trained_by})" in result.err
        assert not Path("out").exists()

    @pytest.mark.parametrize(
        ("flags", "greater"),
        [
            (["--no-greater-is-better"], False),
            (["--greater_is_better", "False", "--metric_for_best_model", "accuracy"], False),
            (["--greater-is-better", "False", "--metric-for-best-model", "eval_accuracy"], False),
            (["--greater-is-better", "False", "--metric-for-best-model", "loss"], True),  # said of another metric
        ],
    )
    def test_what_the_metric_means(self, run, classifier_folder, sentences, flags, greater, monkeypatch):
        monkeypatch.setattr("hf_parcor.corruptions.corruptions_of_table_1", lambda: [Quantization(3)])
        result = run(
            *("train", classifier_folder, "--dataset", sentences, "--output-dir", "out", "--max-steps", 1),
            *("--use-cpu", "--save-strategy", "no", "--report-to", "none", "--unit", "points", *flags),
        )
        assert result.code == 0
        assert "| accuracy (of 100) " in result.out
        assert EvaluationRecord.load("out/robustness.json").info("accuracy") == MetricInfo(greater, "points")

    @pytest.mark.parametrize(
        ("flags", "measured"),
        [((), ["2-bit", "3-bit"]), (("--corruptions", "quantization=5", "gaussian=0.1"), ["5-bit", "Gaussian"])],
    )
    def test_what_is_trained_against_is_measured_or_what_is_named(
        self, run, classifier_folder, sentences, flags, measured, monkeypatch
    ):
        monkeypatch.setattr("hf_parcor.corruptions.corruptions_of_table_1", lambda: [Quantization(2)])
        result = run(
            *(
                "train",
                classifier_folder,
                "--dataset",
                sentences,
                "--output-dir",
                "out",
                "--max-steps",
                1,
                "--trials",
                1,
            ),
            *("--use-cpu", "--save-strategy", "no", "--report-to", "none", "--trials", 1, "--defense", "corruption"),
            *("--defense-corruption", "quantization=2,3", "--corruption-seed", 7, *flags),
        )
        assert result.code == 0
        record = EvaluationRecord.load("out/robustness.json")
        assert (record.clean.seeds, record.task) == ((7,), "text-classification")
        assert json.loads(Path("out/eval_results.json").read_text())["eval_loss"] == record.clean.mean("loss")
        labels = [row.label for row in record.corruptions]
        assert [label.split()[0] for label in labels] == measured
        assert DefenseConfig.from_pretrained("out").defense.corruptions == (Quantization(2), Quantization(3))

    def test_its_record_is_of_the_data_that_evaluate_measures_on(self, run, classifier_folder, sentences):
        """Whatever their batches: both sort rows by length, and compare has nothing to say of the data."""
        copied = shutil.copy(sentences, "copy.tsv")
        trained = self.train(
            run,
            *(classifier_folder, "--train-dataset", copied, "--dataset", sentences, "--output-dir", "out"),
            *("--corruptions", "quantization=4", "--per-device-eval-batch-size", 4),
        )
        measured = run(
            f"evaluate {classifier_folder} --dataset {sentences} --output-dir plain --batch-size 1 "
            "--corruptions quantization=4"
        )
        assert trained.code == measured.code == 0
        records = [EvaluationRecord.load(f"{folder}/robustness.json") for folder in ("plain", "out")]
        assert records[0].data == records[1].data
        assert records[0].weights != records[1].weights
        assert "data" not in run("compare plain out").out

    @pytest.mark.parametrize("place", ["runs/out", "{}/runs/out"])
    def test_its_record_has_the_name_that_evaluate_gives_the_trained_model(
        self, run, classifier_folder, sentences, place, tmp_path
    ):
        """So tables do not call it by what it began with, and the command on a page measures it."""
        copied, place = shutil.copy(sentences, "copy.tsv"), place.format(tmp_path)
        words = ("--dataset", sentences, "--corruptions", "quantization=4")
        trained = self.train(run, classifier_folder, "--train-dataset", copied, "--output-dir", place, *words)
        measured = run("evaluate", place, "--output-dir", "again", *words)
        assert trained.code == measured.code == 0
        records = [EvaluationRecord.load(f"{folder}/robustness.json") for folder in (place, "again")]
        assert records[0].model == records[1].model
        assert records[0].weights == records[1].weights
        assert run("report", place, "--pages", "page.md").code == 0
        assert "hf-parcor evaluate runs/out " in Path("page.md").read_text(encoding="utf-8")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["translation", "object-detection"])
    def test_labels_are_smoothed_or_the_flag_is_refused(self, run, tmp_path, name):
        save_model, write_data, file = SAVED[name]
        flags = ("--dataset", write_data(tmp_path / file), "--output-dir", "out", "--skip-corruptions")
        result = self.train(run, save_model(tmp_path / "model"), *flags, "--label-smoothing-factor", 0.1)
        if name == "translation":
            assert result.code == 0, result.err
        else:
            assert result.code == 2
            assert f"--label-smoothing-factor: expected none for {name}" in result.err
            assert not Path("out").exists()

    def test_labels_of_the_model_are_kept(self, run, tmp_path, classifier_folder, sentences):
        run(
            f"train {classifier_folder} --dataset {sentences} --output-dir out --max-steps 1 --use-cpu "
            "--save-strategy no --report-to none --skip-corruptions --defense none"
        )
        assert model_of(tmp_path / "out").config.label2id == LABELS


class TestLanguages:
    @pytest.fixture(params=MANY_LANGUAGES)
    def words(self, request, tmp_path):
        pytest.importorskip("sacrebleu")
        folder = MANY_LANGUAGES[request.param](tmp_path / "model")
        return (folder, "--task", "translation", "--dataset", write_pairs(tmp_path / "rows.tsv"), "--max-length", 16)

    def pair(self, words):
        tokenizer = transformers.AutoTokenizer.from_pretrained(words[0])
        return ("eng_Latn", "deu_Latn") if "eng_Latn" in tokenizer.get_vocab() else ("en_XX", "de_DE")

    @pytest.mark.slow
    @pytest.mark.parametrize("command", ["evaluate", "probe", "train"])
    def test_without_them_nothing_is_measured(self, run, words, command, tmp_path):
        more = ("--output-dir", "out", "--use-cpu", "--report-to", "none") if command == "train" else ()
        for given in ((), ("--target-lang", "klingon")):
            result = run(command, *words, *more, *given)
            assert result.code == 2
            assert "language" in result.err
            assert result.out == ""
        assert not (tmp_path / "out" / "model.safetensors").exists()

    @pytest.mark.slow
    def test_chrf_is_that_of_pipelines(self, run, words):
        """Transformers' own way to name languages, text by text."""
        from sacrebleu import corpus_chrf

        source, target = self.pair(words)
        result = run(
            *("evaluate", *words, "--source-lang", source, "--target-lang", target, "--metric", "chrf", "--json"),
            *("--corruptions", "gaussian=0.5", "--trials", 1),
        )
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(words[0]).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(words[0])
        texts = []
        for text in SENTENCES:
            inputs = tokenizer._build_translation_inputs(
                text, return_tensors="pt", src_lang=source, tgt_lang=target, truncation=True, max_length=16
            )
            begun = {}
            if isinstance(tokenizer, transformers.MBartTokenizer):  # its text begins with the language
                begun = {"decoder_start_token_id": inputs.pop("forced_bos_token_id")}
            tokens = model.generate(**inputs, **begun, max_new_tokens=16, do_sample=False)
            texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
        tokenizer.tgt_lang = target
        cut = tokenizer(text_target=["gut Film Ende"] * len(texts), truncation=True, max_length=16)["input_ids"]
        expected = corpus_chrf(texts, [[tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]]).score
        assert EvaluationRecord.from_json(result.out).clean.mean("chrf") == pytest.approx(expected)
        assert expected > 0

    @pytest.mark.slow
    def test_what_was_trained_needs_no_flags_any_more(self, run, words):
        source, target = self.pair(words)
        trained = run(
            *("train", *words, "--train-dataset", words[4], "--source-lang", source, "--target-lang", target),
            *("--output-dir", "out", "--max-steps", 1, "--use-cpu", "--report-to", "none", "--save-strategy", "no"),
            *("--skip-corruptions", "--disable-tqdm", "true"),
        )
        assert trained.code == 0
        flags = ("--corruptions", "gaussian=0.5", "--trials", 1, "--json")
        found = [
            run("evaluate", "out", *words[1:], *flags, *given)
            for given in ((), ("--source-lang", source, "--target-lang", target))
        ]
        records = [EvaluationRecord.from_json(result.out) for result in found]
        assert records[0].clean.metrics == records[1].clean.metrics

    def test_a_classifier_has_none(self, run, classifier_folder, sentences):
        result = run("evaluate", classifier_folder, "--dataset", sentences, "--source-lang", "de")
        assert result.code == 2
        assert "--source-lang" in result.err


class TestHelp:
    """The example that `--help` shows, with names on the Hub replaced by local ones."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["evaluate", "probe", "train"])
    def test_examples_of_measuring_run(self, run, name, classifier_folder, sentences, tmp_path):
        words = self.words(name)
        replaced = {"stanfordnlp/sst2": sentences, words[1]: classifier_folder}  # the model comes first
        more = ["--use-cpu", "--save-strategy", "no", "--report-to", "none"] if name == "train" else ["--trials", 1]
        result = run(*(replaced.get(word, word) for word in words), *more)
        assert result.code == 0
        assert result.out.startswith("| accuracy" if name != "probe" else "gradient-based, L2")

    def test_examples_of_reading_run(self, run, models_of_seeds, sentences):
        for folder, model in {"robustness": models_of_seeds["other"], **models_of_seeds}.items():
            run("evaluate", model, "--dataset", sentences, "--corruptions", "quantization=3", "--output-dir", folder)
        for name in ("report", "compare", "card"):
            assert run(*self.words(name)).code == 0
        assert Path("report.html").is_file()
        assert Path("comparison.html").is_file()

    def test_every_command_has_one(self):
        assert list(COMMANDS) == ["train", "evaluate", "probe", "report", "compare", "card"]

    @pytest.mark.parametrize("name", COMMANDS)
    def test_it_fits_a_terminal(self, run, name, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        result = run(name, "--help")
        assert result.code == 0
        assert f"hf-parcor {name}" in result.out
        assert [line for line in result.out.splitlines() if len(line) > 80] == []

    def test_all_flags_of_training(self, run):
        out = run("train", "--help-all").out
        assert all(flag in out for flag in ("--learning-rate", "--defense-epsilon", "--train-dataset"))

    @staticmethod
    def words(name):
        return [name, *shlex.split(COMMANDS[name].example.replace("\\\n", " "))]
