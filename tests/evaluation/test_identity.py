"""What decides a run's numbers, and what does not: a checkpoint goes on with the same alone."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from for_each import for_each
from torch import nn

from hf_parcor import CorruptionEvaluator, GaussianNoise
from hf_parcor.evaluation import (
    ClassificationMetric,
    GenerationMetric,
    Identified,
    PredictionMetric,
    SacrebleuScore,
    TrainerMetric,
)
from hf_parcor.evaluation.identity.settings import settings_of
from hf_parcor.evaluation.losses import model_loss
from hf_parcor.strict_json import to_plain
from hf_parcor.translation import BleuScores, tokenize_13a

LIMIT, TABLE = 0.5, {"a": 1}


class Tokenizer:
    def __init__(self, words="ab"):
        self._words = words

    def get_vocab(self):
        return {word: index for index, word in enumerate(self._words)}

    def decode(self, row, skip_special_tokens=True):
        return " ".join(map(str, row))


class Threshold:
    """A metric with attributes."""

    def __init__(self, limit=0.5, **others):
        self.limit, self._calls, self.others = limit, 0, others

    def __call__(self, model):
        self._calls += 1
        return {"x": self.limit}


class Says(Threshold):
    def identity(self):
        return {"of": self.limit}


class Thresholded(ClassificationMetric):
    """A subclass with a setting of its own."""

    def __init__(self, batches, limit):
        super().__init__(batches)
        self._limit = limit


class Weighted(nn.Module):
    def __init__(self, weight, scale=1):
        super().__init__()
        self.register_buffer("weight", torch.tensor([weight]))
        self.scale = scale

    def forward(self, model, batch):
        return model(**batch).loss * self.weight * self.scale


def closing_over(value):
    return lambda model: {"x": value}


def counting():
    calls = 0

    def metric(model):
        nonlocal calls
        calls += 1
        return {"x": calls}

    return metric


def of_globals(limit):
    names = {"LIMIT": limit}
    exec("def metric(model): return {'x': LIMIT or TABLE}", names)
    return names["metric"]


def calling(answer, *, of_module="theirs"):
    """Return a function that calls another one, of the same module unless told."""
    names: dict[str, object] = {"__name__": "theirs"}
    exec(f"def other(): return {answer}\ndef metric(model): return {{'x': other()}}", names)
    names["other"].__module__ = of_module
    return names["metric"]


def written(source):
    names: dict[str, object] = {}
    exec(source, names)
    return names["metric"]


def of_class(answer):
    names: dict[str, object] = {"__name__": "theirs"}
    exec(f"class Metric:\n    def __call__(self, model): return {answer}", names)
    return names["Metric"]()


def with_default(value):
    def metric(model, limit=value, *, other=value):
        return {"x": limit + other}

    return metric


@functools.lru_cache
def cached(model):
    return {"x": 1.0}


BATCHES = [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}]


def score(predictions, references):
    return {"share": float(len(predictions))}


def other_score(predictions, references):
    return {"share": float(len(predictions)) * 2}


def generation(tokenizer="ab", scored=score, **options):
    return GenerationMetric(Tokenizer(tokenizer), BATCHES, scored, **options)


# Within a row all are different, and each is the same when it is made again.
ROWS = {
    "generation": [
        lambda: generation(),
        lambda: generation(max_new_tokens=3),
        lambda: generation(max_new_tokens=9),
        lambda: generation(do_sample=True),
        lambda: generation(generation_config=transformers.GenerationConfig(num_beams=2)),
        lambda: generation(generation_config=transformers.GenerationConfig(num_beams=3)),
        lambda: generation("abc"),
        lambda: generation(scored=other_score),
        lambda: generation(scored=functools.partial(other_score)),
        lambda: generation(scored=SacrebleuScore("bleu")),
    ],
    "scores": [
        lambda: SacrebleuScore("bleu"),
        lambda: SacrebleuScore("chrf"),
        lambda: SacrebleuScore("chrf", word_order=2),
        lambda: SacrebleuScore("bleu", lowercase=True),
        lambda: BleuScores(),
        lambda: BleuScores(lowercase=True),
        lambda: BleuScores(tokenize=str.lower),
        lambda: BleuScores(tokenize=str.upper),
        lambda: BleuScores(detokenize=str.lower),
        lambda: BleuScores(tokenize=tokenize_13a, lowercase=True),
    ],
    "classes": [
        lambda: ClassificationMetric(BATCHES),
        lambda: PredictionMetric(BATCHES, score),
        lambda: PredictionMetric(BATCHES, other_score),
        lambda: Thresholded(BATCHES, 1),
        lambda: Thresholded(BATCHES, 2),
    ],
    "attributes": [
        lambda: Threshold(),
        lambda: Threshold(0.1),
        lambda: Threshold(math.nan),
        lambda: Threshold(None),
        lambda: Threshold("a"),
        lambda: Threshold("a" * 300),
        lambda: Threshold("b" * 300),
        lambda: Threshold([0.5]),
        lambda: Threshold(list(range(300))),
        lambda: Threshold(np.array([1.0])),
        lambda: Threshold(torch.tensor([1.0])),
        lambda: Threshold(torch.tensor([2.0])),
        lambda: Threshold(score),
        lambda: Threshold(other_score),
        lambda: Threshold({"a", "b", "c"}),
        lambda: Threshold(torch.float32),
        lambda: Threshold(1j),
        lambda: Threshold(a=1),
        lambda: Threshold(a={"b": 1}),
        lambda: Says(),
        lambda: Says(0.1),
        lambda: of_class({"x": 1}),
        lambda: of_class({"x": 2}),
    ],
    "functions": [
        lambda: score,
        lambda: other_score,
        lambda: model_loss,
        lambda: len,
        lambda: str.lower,
        lambda: cached,
        lambda: functools.partial(score, references=[1]),
        lambda: functools.partial(score, references=[2]),
        lambda: functools.partial(score, [1]),
        lambda: closing_over(1),
        lambda: closing_over(2),
        lambda: closing_over([1]),
        lambda: closing_over(closing_over(1)),
        lambda: closing_over(closing_over(2)),
        lambda: with_default(1),
        lambda: with_default(2),
        lambda: of_globals(1),
        lambda: of_globals(2),
        lambda: calling(1),
        lambda: calling(2),
        lambda: written("def metric(model): return {'x': 1}"),
        lambda: written("def metric(model): return {'x': 2}"),
        lambda: written("def metric(model): return {'x': 'a' in {'a', 'b', 'c'}}"),
        lambda: written("def metric(model): return {'x': [y + 1 for y in model]}"),
        lambda: written("def metric(model): return {'x': (lambda y: y + 1)(model)}"),
        lambda: written("def metric(model): return {'x': (lambda y: y + 2)(model)}"),
        lambda: written("def metric(model): return 'x'"),
        lambda: written("def metric(model): return 'y'"),
        lambda: Threshold().__call__,
        lambda: Threshold(0.1).__call__,
        lambda: functools.partial(Threshold().__call__),
        lambda: Weighted(1.0),
        lambda: Weighted(2.0),
        lambda: Weighted(2.0, 3),
    ],
}


@for_each("row", ROWS)
def test_settings_decide(row):
    found = [json.dumps(to_plain(settings_of(make()))) for make in ROWS[row]]
    assert found == [json.dumps(to_plain(settings_of(make()))) for make in ROWS[row]]
    assert [found.index(one) for one in found] == list(range(len(found)))


@for_each(
    ("one", "other"),
    [
        ("def metric(model): return {'x': 1}", "\n\ndef metric(model):\n    'Says it.'\n    return {'x': 1}"),
        ("def metric(model): 'A.'; return {'x': 1}", "def metric(model): 'B.'; return {'x': 1}"),
        ("def metric(model): y = 1; return y", "def metric(model): z = 1; return z"),
    ],
)
def test_what_does_not_decide(one, other):
    assert settings_of(written(one)) == settings_of(written(other))


class Judge:
    """A helper with a setting, and with counters; `calibrate` makes `level` none."""

    def __init__(self, threshold, level=0):
        self.threshold, self.level = threshold, level
        self.calls, self.seen, self._private, self.rows = 0, [], 0, list(range(1_000))

    def share(self, model):
        self.calls += 1
        self.seen.append(model)
        return {"x": self.threshold}

    def calibrate(self, level):
        self.level = level


class OtherJudge(Judge):
    def share(self, model):
        return {"x": -self.threshold}


class Data(torch.utils.data.Dataset):
    def __init__(self, seed):
        self.seed = seed


def of_global(helper):
    names = {"JUDGE": helper}
    exec("def metric(model): return JUDGE.share(model)", names)
    return names["metric"]


def by_default(helper):
    def metric(model, judge=helper):
        return judge.share(model)

    return metric


HOLDERS = {
    "a closure": lambda helper: lambda model: helper.share(model),
    "a global": of_global,
    "a default": by_default,
    "a list": lambda helper: closing_over([1, helper]),
    "an attribute": Threshold,
    "a method": lambda helper: helper.share,
    "a partial": lambda helper: functools.partial(lambda judge, model: judge.share(model), helper),
    "another helper": lambda helper: closing_over(Judge({"of": [helper]})),
}


@for_each("holder", HOLDERS)
def test_settings_of_helpers_decide_and_what_they_count_does_not(holder):
    hold = HOLDERS[holder]
    one, again, other, otherwise = (
        settings_of(hold(judge)) for judge in (Judge(0.1), Judge(0.1), Judge(0.9), OtherJudge(0.1))
    )
    assert one == again
    assert other != one != json.loads(json.dumps(otherwise).replace("OtherJudge", "Judge"))
    used = Judge(0.1)
    used.share(None)
    used._private = 1
    assert settings_of(hold(used)) == one


@for_each(
    ("one", "other"),
    [
        (lambda: Weighted(1.0), lambda: Weighted(2.0)),
        (lambda: Data(1), lambda: Data(2)),
        (lambda: np.random.default_rng(1), lambda: np.random.default_rng(2)),
        (lambda: [1] * 1_000, lambda: [2] * 1_000),
    ],
)
def test_data_and_objects_of_libraries_are_no_settings_of_helpers(one, other):
    assert settings_of(closing_over(Judge(one()))) == settings_of(closing_over(Judge(other())))


def test_helpers_that_hold_one_another():
    first, second = Judge(1), Judge(2)
    first.threshold, second.threshold = second, [first, 3]
    before = settings_of(closing_over(first))
    second.threshold = [first, 4]
    assert settings_of(closing_over(first)) != before
    chain = Judge(0)
    for _ in range(2_000):
        chain = Judge(chain)
    assert settings_of(closing_over(chain)) == settings_of(closing_over(chain))


def test_functions_of_another_module_are_known_by_the_call_alone():
    """A library's own, which may change with its version and nothing else."""
    one, other = (settings_of(calling(answer, of_module="a_library")) for answer in (1, 2))
    assert one == other


class Counting(ClassificationMetric):
    """Counts its calls in several ways."""

    left = 3

    def __init__(self, batches):
        super().__init__(batches)
        self.calls = self._calls = self.inner = self.limit = 0
        self.seen, self.kinds, self.by_name, self.names = [], {1}, {}, ["a"]

    @torch.no_grad()
    def of_batch(self, model, batch):
        self.left -= 1
        self._calls += 1
        self._count()
        self.seen.append(batch)
        self.seen.extend(self.names)
        self.kinds |= {2}
        self.by_name.update(a=1)
        return {"problem": "single_label_classification", "correct": 1, "loss": 1.0, "labels": 2, "not_finite": 0}

    def _count(self):
        self.calls += 1

        def inner():
            self.inner += 1

        inner()


def test_what_a_metric_counts_itself_is_no_setting():
    for metric in (counting(), Threshold(), Counting(BATCHES)):
        before = settings_of(metric)
        metric(None)
        assert settings_of(metric) == before
    metric.limit = 1
    limited = settings_of(metric)
    assert limited != before
    metric.names = ["b"]  # which calls only read
    assert settings_of(metric) != limited


def test_what_is_private_or_a_mode_is_no_setting():
    one, other = Weighted(1.0), Weighted(1.0).eval()
    other._noted = 1
    assert settings_of(one) == settings_of(other)


def test_what_holds_itself():
    metric = Threshold()
    metric.limit = metric
    assert settings_of(metric)["limit"] == settings_of(metric)["class"]


def test_who_says_it_itself():
    assert isinstance(Says(), Identified)
    assert all(isinstance(make(), Identified) for row in ("generation", "scores", "classes") for make in ROWS[row])
    assert not isinstance(Threshold(), Identified)


def test_an_identity_that_is_none():
    class Bad:
        def identity(self):
            return 3

    with pytest.raises(TypeError, match=r"expected identity\(\) of .*Bad to return settings by name, got 3"):
        settings_of(Bad())


PROGRAM = """
import json
from hf_parcor.evaluation.identity.settings import settings_of

LABELS = frozenset({"a", "b", "c", "d"})

def metric(model):
    return {"x": "e" in {"f", "g", "h"} or model in LABELS}

print(json.dumps(settings_of(metric)))
"""


@pytest.mark.slow
def test_another_process_finds_the_same():
    """Not by an address, and not by the order of a set, which differs from process to process."""
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


class TestEvaluate:
    def test_where_a_metric_keeps_its_files_does_not_count(self):
        evaluate = pytest.importorskip("evaluate", reason="needs the extra 'examples'")
        from hf_parcor.metric_modules import metric_module

        names = ("metric_drop", "area_under_robustness_curve")
        one, other = (evaluate.load(metric_module(name)).compute for name in names)
        np.random.seed(5)  # noqa: NPY002
        again = evaluate.load(metric_module(names[0]), experiment_id="another").compute
        assert settings_of(one) == settings_of(again) != settings_of(other)


class TestTrainer:
    @pytest.fixture
    def metric(self, tiny_bert, labelled_rows, tmp_path):
        model = tiny_bert(num_labels=3, vocab_size=30)

        def make(rows=labelled_rows, dataset=None, kind=transformers.Trainer, **options):
            parts = {name: options.pop(name) for name in ("compute_metrics", "data_collator") if name in options}
            arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, **options)
            return TrainerMetric(kind(model, arguments, eval_dataset=rows, **parts), dataset)

        return make

    @pytest.mark.parametrize(
        "changed",
        [
            {"per_device_eval_batch_size": 3},
            {"label_smoothing_factor": 0.1},
            {"dataloader_drop_last": True},
            {"remove_unused_columns": False},
            {"prediction_loss_only": True},
            {"compute_metrics": score},
            {"data_collator": transformers.DataCollatorWithPadding(None)},
            {"dataset": [{"labels": 0}]},
            {"kind": type("Own", (transformers.Trainer,), {})},
        ],
    )
    def test_what_an_evaluation_depends_on(self, metric, changed):
        assert settings_of(metric()) == settings_of(metric()) != settings_of(metric(**changed))

    def test_the_data(self, metric, labelled_rows):
        other = [*labelled_rows[:-1], {**labelled_rows[-1], "labels": 1 - labelled_rows[-1]["labels"]}]
        found = [settings_of(metric(rows))["data"] for rows in (labelled_rows, other, {"a": other})]
        assert found[0] != found[1]
        assert found[2] == {"a": found[1][""]}
        assert settings_of(metric({"a": other, "b": labelled_rows}, "b"))["data"] == found[0]

    def test_data_that_are_drawn_begin_with_the_same_numbers_and_there_may_be_none(self, metric):
        class Drawn:
            def __len__(self):
                return 3

            def __getitem__(self, index):
                return {"input_ids": torch.rand(2)}

        found, drawn = [], metric(Drawn())
        for _ in range(2):
            torch.rand(1)
            found.append(settings_of(drawn)["data"])
        assert found[0] == found[1]
        assert settings_of(metric(None))["data"] == {}

    def test_no_random_number_is_another_afterwards(self, metric):
        made, before = metric(), torch.get_rng_state()
        settings_of(made)
        assert torch.equal(torch.get_rng_state(), before)


class TestCheckpoint:
    @pytest.fixture
    def run(self, classifier, batches, tmp_path):
        def evaluate(metric=None, loss=model_loss, model=classifier):
            metric = PredictionMetric(batches, score) if metric is None else metric
            evaluator = CorruptionEvaluator(model, metric, batches, loss=loss, progress=False)
            return evaluator.evaluate([GaussianNoise(0.1)], trials=1, checkpoint=tmp_path / "run")

        return evaluate

    @pytest.mark.parametrize(
        ("metrics", "differing"),
        [
            ((Threshold(0.1), Threshold(0.2)), "metric.limit (0.1, now 0.2); give another path"),
            ((closing_over(1), closing_over(2)), "metric.closure.value (1, now 2); give another path"),
            ((Says(1), Says(2)), "metric.of (1, now 2); give another path"),
            ((closing_over(Judge(1)), closing_over(Judge(2))), "metric.closure.value.threshold (1, now 2); give"),
        ],
    )
    def test_what_differs_is_told(self, run, metrics, differing):
        run(metrics[0])
        with pytest.raises(ValueError, match=re.escape(f"got one with other {differing}")):
            run(metrics[1])

    def test_the_score_and_the_loss(self, run, batches):
        first = run()
        assert run() == first
        with pytest.raises(ValueError, match=r"got one with other metric\.score\.name \(.*score, now .*other_"):
            run(PredictionMetric(batches, other_score))
        with pytest.raises(ValueError, match=r"got one with other loss\.name "):
            run(loss=lambda model, batch: model(**batch).loss)

    def test_how_the_model_runs(self, run, classifier):
        run()
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match=r"with other autocast \(, now torch.bfloat16\)"),
        ):
            run()
        classifier.generation_config = transformers.GenerationConfig(num_beams=4)
        with pytest.raises(ValueError, match=r"with other generation\.num_beams \(null, now 4\)"):
            run()
