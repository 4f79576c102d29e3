"""Tasks of lm-eval as a metric, on a task of our own: the numbers are those of a loop over its choices.

`scripts/set_up.sh` installs lm-eval beside the environment, in `.venv/lm-eval`.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
from local_models import save_gpt2

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    EvaluationRecord,
    GaussianNoise,
    GradientCorruption,
    Quantization,
    sensitivity,
)
from hf_parcor.cli import main
from hf_parcor.cli.main import build_parser
from hf_parcor.evaluation import LmEvalMetric
from hf_parcor.evaluation.identity.settings import settings_of

FOLDER = Path(sys.prefix) / "lm-eval"
ROWS = [
    {"question": question, "choices": ["film", "plot a", "bad good film"], "gold": index % 3}
    for index, question in enumerate(["the good", "a bad", "good", "the", "bad bad a", "film the a", "plot", "a good"])
]
TASK = {
    "task": "films",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    "metadata": {"version": 2.0},
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Return a folder with a model and a task in a YAML file, where lm-eval is there to read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(FOLDER)])
        pytest.importorskip(
            "lm_eval", reason="lm-eval is not installed; `bash scripts/test.sh` puts it into .venv/lm-eval"
        )
        datasets = pytest.importorskip("datasets")
        folder = tmp_path_factory.mktemp("films")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        save_gpt2(folder / "model")
        data = folder / "films.jsonl"
        data.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
        task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / "films.yaml").write_text(json.dumps(task))  # which is YAML
        yield folder


@pytest.fixture
def model(films):
    model = transformers.AutoModelForCausalLM.from_pretrained(films / "model").eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # so that choices differ
    return model


@pytest.fixture
def tokenizer(films):
    return transformers.AutoTokenizer.from_pretrained(films / "model")


@pytest.fixture
def metric_of(films, tokenizer):
    def made(tasks="films", **settings):
        return LmEvalMetric(tasks, tokenizer, include_path=films, **{"batch_size": 4, **settings})

    return made


def by_hand(model, tokenizer, rows=ROWS):
    """Return how often the likeliest choice is the right one, also by the mean over its characters."""
    right, right_by_length = [], []
    for row in rows:
        sums = []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            tokens = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logits = model(tokens).logits[0].log_softmax(-1)
            places = range(start, tokens.shape[1])
            sums.append(sum(logits[place - 1, tokens[0, place]].item() for place in places))
        means = [one / len(choice) for one, choice in zip(sums, row["choices"], strict=True)]
        right.append(max(range(3), key=sums.__getitem__) == row["gold"])
        right_by_length.append(max(range(3), key=means.__getitem__) == row["gold"])
    return {"films/acc": sum(right) / len(rows), "films/acc_norm": sum(right_by_length) / len(rows)}


def matthews(right, answers):
    """Return the correlation of two lists of classes, by the covariances of their indicators."""

    def covariance(one, other):
        first, second = (torch.nn.functional.one_hot(torch.tensor(classes), 3).double() for classes in (one, other))
        return float(((first - first.mean(0)) * (second - second.mean(0))).sum())

    return covariance(right, answers) / math.sqrt(covariance(right, right) * covariance(answers, answers))


@pytest.mark.slow  # importing lm-eval takes seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
class TestOwnTask:
    def test_clean_and_corrupted_it_is_the_loop_by_hand(self, model, tokenizer, metric_of):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        corruptions = [Quantization(2), GaussianNoise(0.5), GradientCorruption(CorruptionConstraint(epsilon=3.0))]
        batches = [{"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[3, 4, 5, 6]])}]
        evaluator = CorruptionEvaluator(model, metric_of(), batches, progress=False)
        record = evaluator.evaluate(corruptions, trials=1)
        same = CorruptionEvaluator(
            model, lambda corrupted: by_hand(corrupted, tokenizer), batches, progress=False
        ).evaluate(corruptions, trials=1)
        assert record.clean.metrics == same.clean.metrics
        assert [row.metrics for row in record.corruptions] == [row.metrics for row in same.corruptions]
        assert len({json.dumps(row.metrics) for row in (record.clean, *record.corruptions)}) > 1
        info = record.info("films/acc")
        assert (info.greater_is_better, info.unit, info.guessed) == (True, "share", ())
        assert any("lm-eval" in note and "version 2.0" in note for note in record.notes)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_corruption_along_the_gradient_needs_batches(self, model, metric_of):
        evaluator = CorruptionEvaluator(model, metric_of(limit=1), progress=False)
        with pytest.raises(ValueError, match="batches"):
            evaluator.evaluate([GradientCorruption(CorruptionConstraint(epsilon=1.0))])

    def test_the_sensitivity_of_a_task(self, model, tokenizer, metric_of):
        batches = [{"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[3, 4, 5, 6]])}]
        groups = {"first": "transformer.h.0", "second": "transformer.h.1"}
        record = sensitivity(model, metric_of(), [Quantization(2)], groups, batches=batches, budget=1, progress=False)
        assert record.metric == "films/acc"
        assert {name: record.clean[name] for name in ("films/acc", "films/acc_norm")} == by_hand(model, tokenizer)
        assert record.clean["loss"] == pytest.approx(model(**batches[0]).loss.item(), rel=1e-5)
        assert sum(bool(cell.measured) for cell in record.cells) == 1

    def test_what_is_not_finite_is_wrong(self, model, metric_of):
        metric = metric_of()
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(math.nan)
        found = metric(model)
        # lm-eval by itself takes the first choice, which is right in three of eight.
        assert found == {"films/acc": 0.0, "films/acc_norm": 0.0, "predictions_not_finite": 1.0}
        assert "process_results" not in vars(metric._tasks["films"])

    def test_it_is_where_a_number_is_made_of_all_choices(self, model, metric_of, films):
        """F1 and Matthews' correlation get pairs of choices, of which lm-eval makes the first one the answer."""
        task = json.loads((films / "films.yaml").read_text())
        entry = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
        metric = metric_of({**task, "metric_list": [entry]})
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(math.nan)
        found = metric(model)
        right = [row["gold"] for row in ROWS]
        assert found["films/mcc"] == pytest.approx(matthews(right, [int(gold == 0) for gold in right]))
        assert found["films/mcc"] < -0.3

    def test_limits_examples_and_random_numbers(self, model, tokenizer, metric_of):
        state, python = torch.get_rng_state(), random.getstate()
        assert metric_of(limit=3)(model) == by_hand(model, tokenizer, ROWS[:3])
        assert metric_of(limit=0.5)(model) == by_hand(model, tokenizer, ROWS[:4])
        metric = metric_of(num_fewshot=1, limit=4, model_settings={"max_length": 16})
        assert metric(model) == metric(model)
        assert torch.equal(state, torch.get_rng_state())
        assert python == random.getstate()
        assert tokenizer.pad_token == "[PAD]"

    def test_examples_in_a_chat_are_those_of_lm_eval(self, model, tokenizer, metric_of, films):
        """The command of lm-eval and `simple_evaluate` make a turn of each example, and `evaluate` puts all in one."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'the ' if m['role'] == 'user' else 'plot ' }}{{ m['content'] }} {% endfor %}"
        )
        settings = {"num_fewshot": 1, "apply_chat_template": True}
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer)),
            tasks=["films"],
            task_manager=lm_eval.tasks.TaskManager(include_path=str(films), include_defaults=False),
            bootstrap_iters=0,
            **settings,
        )["results"]["films"]
        found = metric_of(**settings)(model)
        assert found == {f"films/{name}": theirs[f"{name},none"] for name in ("acc", "acc_norm")}
        assert found != metric_of(**settings, fewshot_as_multiturn=False)(model)

    def test_on_the_command_line(self, model, tokenizer, films, tmp_path):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text("the good film\nbad plot a\n")
        words = ["evaluate", str(tmp_path / "model"), "--dataset", str(tmp_path / "text.txt"), "--output-dir"]
        words += [str(tmp_path / "out"), "--corruptions", "gradient=3", "--quiet", "--metric"]
        words = [*words, f"lm-eval=films:limit=5,include-path={films}"]
        assert main(words) == 0
        record = EvaluationRecord.load(tmp_path / "out" / "robustness.json")
        assert {name: one for name, (one,) in record.clean.metrics.items()} == by_hand(model, tokenizer, ROWS[:5])
        assert record.evaluated_on.name == "lm-eval: films"
        [command] = re.findall("`(hf-parcor .*)`", (tmp_path / "out" / "robustness.md").read_text())
        asked_for = build_parser().parse_args(shlex.split(command)[1:])
        assert (asked_for.dataset, asked_for.metric) == ("text.txt", words[-1])
        for wrong in ("lm-eval=filmz:", "lm-eval=films:limmit=5,", "lm-eval=films:limit=five,"):
            assert main([*words[:-1], f"{wrong}include-path={films}"]) == 2, wrong
        assert main([*words[:-1], "lm-eval=films", "--task", "translation"]) == 2

    def test_what_is_trained_is_measured_on_them(self, model, tokenizer, films, tmp_path):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text("the good film\nbad plot a\n")
        words = ["train", str(tmp_path / "model"), "--dataset", str(tmp_path / "text.txt"), "--train-dataset"]
        words += [str(tmp_path / "text.txt"), "--validation-split", "0.5", "--max-steps", "1", "--use-cpu", "true"]
        words += ["--corruptions", "gradient=3", "--disable-tqdm", "true", "--report-to", "none", "--output-dir"]
        assert main([*words, str(tmp_path / "out"), "--metric", f"lm-eval=films:limit=5,include-path={films}"]) == 0
        trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        record = EvaluationRecord.load(tmp_path / "out" / "robustness.json")
        assert {name: one for name, (one,) in record.clean.metrics.items()} == by_hand(trained, tokenizer, ROWS[:5])
        assert [row.corruption for row in record.corruptions] == ["gradient"]

    def test_what_decides_the_numbers(self, metric_of):
        first = settings_of(metric_of())
        assert settings_of(metric_of()) == first
        for changed in ({"limit": 3}, {"num_fewshot": 1}, {"model_settings": {"max_length": 8}}):
            assert settings_of(metric_of(**changed)) != first, changed
        assert settings_of(metric_of(batch_size=2)) == first  # which changes no number
        for count in (1, 3):  # of the command line they come as 1.0 and 3.0
            assert json.dumps(settings_of(metric_of(limit=float(count)))) == json.dumps(
                settings_of(metric_of(limit=count))
            )

    def test_a_task_that_is_none(self, metric_of):
        with pytest.raises(ValueError, match=r"tasks: expected .*filmz"):
            metric_of("filmz")
        with pytest.raises(ValueError, match="tasks: expected at least one"):
            metric_of([])


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"hf-parcor\[lm-eval\]"):
        LmEvalMetric("arc_easy", None)
