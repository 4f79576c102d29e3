"""Facts of a small model, and a Hub on this machine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from hf_parcor import CorruptionRecord, EvaluationRecord
from hf_parcor.model_card import EvaluationData, facts_of

_PLACE = Path(__file__).with_name("hub_server.py")
_SPECIFICATION = importlib.util.spec_from_file_location("hub_server", _PLACE)
hub_server = sys.modules["hub_server"] = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(hub_server)


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
    return EvaluationRecord(model, {"target_modules": "all"}, 1234, untouched, rows, "ab12", {"torch": "2.0"})


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
def facts_with():
    return make_facts


@pytest.fixture
def facts():
    return make_facts()


@pytest.fixture
def quick_picture(monkeypatch):
    """No drawing, where it is not what the test is about."""
    monkeypatch.setattr("hf_parcor.model_card.folder.picture_of", lambda facts: f"picture of {facts.name}".encode())


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
