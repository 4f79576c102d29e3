"""Facts of a small model, and a Hub on this machine."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from trainings import QUIET, accuracy
from transformers import TrainingArguments

from hf_parcor import (
    CorruptionRecord,
    EvaluationRecord,
    GaussianNoise,
    MetricInfo,
    ParameterDefenseTrainer,
    RecipeRecord,
    SensitivityRecord,
    SweepRecord,
)
from hf_parcor.cards import EvaluationData, facts_of
from hf_parcor.cards.text import CURVES, HEAT_MAP
from hf_parcor.records import Choice, FormatScore, WeightGroup

_PLACE = Path(__file__).with_name("hub_server.py")
_SPECIFICATION = importlib.util.spec_from_file_location("hub_server", _PLACE)
hub_server = sys.modules["hub_server"] = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(hub_server)


INFOS = {"accuracy": MetricInfo(True, "share"), "loss": MetricInfo(False)}


def make_record(model="org/bert", clean=0.9, values=(0.75, 0.5), label="Gaussian σ=0.02"):
    untouched = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (clean,), "loss": (0.3,)})
    noisy = {"accuracy": tuple(values), "loss": (0.7,) * len(values)}
    rows = (
        CorruptionRecord("gaussian", label, {"std": 0.02}, tuple(range(len(values))), noisy),
        CorruptionRecord(
            "gradient",
            "gradient-based L∞ ε=0.1",
            {"p": float("inf"), "epsilon": 0.1, "top_n": None},
            (0,),
            {"accuracy": (0.25,), "loss": (float("nan"),)},
        ),
    )
    asked, versions = {"target_modules": "all"}, {"torch": "2.0"}
    return EvaluationRecord(model, asked, 1234, untouched, rows, "ab12", versions, metric_info=INFOS)


WEIGHTS = "14ade2b0" * 8


def make_probe(weights=WEIGHTS, groups=("layer.0", "layer.1", "layer.2"), notes=()):
    """Return a probe whose second group is the weak one: it loses 60 points, the others 20."""
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {"accuracy": (0.9,), "loss": (0.3,)})
    records = {}
    for place, group in enumerate(groups):
        values = {"accuracy": (0.3 if place == 1 else 0.7,), "loss": (0.5,)}
        settings = {"p": 2.0, "epsilon": 0.5, "top_n": None}
        row = CorruptionRecord("gradient", "gradient-based L2 ε=0.5", settings, (0,), values, notes=tuple(notes))
        records[group] = EvaluationRecord("org/bert", {"target_modules": [group]}, 10, clean, (row,), "ab12")
    return SweepRecord(records, weights, trials=1, seed=0)


def make_facts(record=None, **options):
    chosen = {
        "name": "tiny-bert",
        "base_model": "org/bert",
        "datasets": ["org/reviews"],
        "task": "text-classification",
        "evaluated_on": EvaluationData("Reviews", "org/reviews", split="test"),
        "defense": {
            "defense": "multi_step_risk",
            "settings": {"constraint": {"p": 2.0, "epsilon": 0.1, "top_n": None}, "steps": 1},
            "target_modules": None,
            "hf_parcor_version": "0.1.0",
        },
        "command": "python train.py --seed 1",
    }
    return facts_of(record or make_record(), **{**chosen, **options})


@pytest.fixture
def record_of():
    return make_record


@pytest.fixture
def probe_of():
    return make_probe


def make_recipe(weights=WEIGHTS, metric="accuracy"):
    """Return scores, a recipe and its measurement: of four parts one stays, and two get 3 bits."""
    formats = {
        f"{bits}-bit quantization": {"corruption": "quantization", "settings": {"bits": bits}} for bits in (4, 3)
    }
    groups = {f"layer.{place}": WeightGroup({f"layer.{place}.weight": 1000 * place}, 32.0) for place in range(1, 5)}
    cells = tuple(
        FormatScore(group, label, float(label[0]), {"fisher": (1 + place) / 10}, {metric: 0.9 - place / 100})
        for group in groups
        for place, label in enumerate(formats)
    )
    scores = SensitivityRecord("org/bert", groups, formats, cells, {metric: 0.9}, metric, metric_info=INFOS)
    chosen = ("4-bit quantization", None, *["3-bit quantization"] * 2)
    choice = {
        group: Choice(label, 32.0 if label is None else float(label[0]))
        for group, label in zip(groups, chosen, strict=True)
    }
    recipe = RecipeRecord("org/bert", groups, formats, choice, {"bits": 10.0}, metric, {metric: 0.02})
    rows = tuple(
        CorruptionRecord("mixed_quantization", name, {"bits": bits, "by": metric}, (0,), {metric: (value,)})
        for name, bits, value in (("recipe", recipe.bits, 0.85), ("3-bit quantization", 3.0, 0.6))
    )
    clean = CorruptionRecord("none", "no corruption", {}, (0,), {metric: (0.9,)})
    measured = EvaluationRecord("org/bert", {}, 10_000, clean, rows, weights=weights, metric_info=INFOS)
    return scores, recipe, measured


@pytest.fixture
def recipe_of():
    return make_recipe


@pytest.fixture
def probed_record():
    """The record of an evaluation of the weights that `probe_of` has."""
    return replace(make_record(), weights=WEIGHTS)


@pytest.fixture
def facts_with():
    return make_facts


@pytest.fixture
def facts():
    return make_facts()


@pytest.fixture
def quick_picture(monkeypatch):
    """No drawing, where it is not what the test is about."""

    def pictures(facts):
        names = {CURVES: facts.corruptions, HEAT_MAP: facts.probe}
        return {name: f"{name} of {facts.name}".encode() for name, there in names.items() if there}

    monkeypatch.setattr("hf_parcor.cards.folder.pictures_of", pictures)


@pytest.fixture
def hub(quick_picture, monkeypatch, tmp_path):
    """A server, to which the client of this process talks, without waiting between attempts."""
    with hub_server.HubServer() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", server.waited.append)
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub_server.TOKEN)


@pytest.fixture
def model(tiny_bert):
    torch.manual_seed(0)
    return tiny_bert(vocab_size=30, num_labels=3)


@pytest.fixture
def make(tmp_path, model, labelled_rows):
    rows = labelled_rows[:12]

    def build(kind=ParameterDefenseTrainer, trained=model, **options):
        defaults = {
            **QUIET,
            "output_dir": str(tmp_path / "tiny"),
            "eval_strategy": "epoch",
            "logging_steps": 1,
            "max_steps": 3,
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
