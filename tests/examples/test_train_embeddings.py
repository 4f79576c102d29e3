"""The example script on a few pairs of texts, with scores and without; defended, measured, and on the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from example_program import TRAINS_AND_MEASURES, run_with, steps_logged
from local_models import SENTENCES, save_sentence_encoder, write_rows
from safetensors.torch import load_file

from hf_parcor import EvaluationRecord

REASON = "the example needs the extra 'embeddings'"
datasets = pytest.importorskip("datasets", reason=REASON)
st = pytest.importorskip("sentence_transformers", reason=REASON)

SCRIPT = Path(__file__).parents[2] / "examples" / "train_embeddings.py"
PAIRS = [(one, other, "the bad plot") for one, other in zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True)]


@pytest.fixture
def settings(tmp_path):
    rows = [(one, other) for one, other, _ in PAIRS]
    return {
        **TRAINS_AND_MEASURES,
        "model_name_or_path": save_sentence_encoder(tmp_path / "model", **tiny.STILL),
        "train_file": write_rows(tmp_path / "train.tsv", ["anchor", "positive"], rows),
        "validation_file": write_rows(tmp_path / "dev.tsv", ["anchor", "positive"], rows[:4]),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.02,
        "bf16": False,
        "corruptions": ["gradient=2", "quantization=2"],
    }


def test_searches(settings, monkeypatch):
    """Trained, measured by the library's own evaluator, and the card says both."""
    output = run_with(SCRIPT, settings, monkeypatch)
    steps = steps_logged(output)
    assert len(steps) == 2
    assert all(step["loss_corrupted"] != step["loss_clean"] for step in steps)
    record = EvaluationRecord.load(output / "robustness.json")
    assert [row.label for row in record.rows()] == ["no corruption", "gradient-based L2 ε=2", "2-bit quantization"]
    results = json.loads((output / "eval_results.json").read_text())
    assert record.clean.mean("cosine_ndcg@10") == pytest.approx(results["eval_cosine_ndcg@10"])
    card = (output / "README.md").read_text()
    assert "2-bit quantization" in card
    assert "sentence-transformers" in card
    loaded = st.SentenceTransformer(str(output), device="cpu")
    assert loaded.encode(SENTENCES).shape == (len(SENTENCES), 8)


@pytest.mark.parametrize("case", ["scores", "wrong documents"])
def test_other_rows(case, settings, tmp_path, monkeypatch):
    """With a score for each, and with a wrong document beside the right one."""
    column, values = ("score", [place / 10 for place in range(6)]) if case == "scores" else ("negative", ["a"] * 6)
    rows = [(one, other, value) for (one, other, _), value in zip(PAIRS, values, strict=True)]
    for name in ("train_file", "validation_file"):
        settings[name] = write_rows(tmp_path / f"{name}.tsv", ["query", "document", column], rows)
    output = run_with(SCRIPT, {**settings, "skip_corruptions": True, "max_seq_length": 8}, monkeypatch)
    results = json.loads((output / "eval_results.json").read_text())
    assert ("eval_spearman_cosine" if case == "scores" else "eval_cosine_mrr@10") in results
    assert st.SentenceTransformer(str(output), device="cpu").max_seq_length == 8


def test_a_radius_of_almost_nothing_is_the_stock_trainer(settings, tmp_path, monkeypatch):
    losses = []
    for number, more in enumerate(({"defense": "none"}, {"defense_epsilon": 1e-9})):
        changed = {**settings, **more, "do_eval": False, "output_dir": str(tmp_path / f"out-{number}")}
        losses.append([step["loss"] for step in steps_logged(run_with(SCRIPT, changed, monkeypatch))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_whole_run(settings, tmp_path, monkeypatch):
    changed = {**settings, "do_eval": False, "save_strategy": "steps", "save_steps": 1}
    whole = run_with(SCRIPT, changed, monkeypatch)
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(whole / "checkpoint-1")}
    resumed = run_with(SCRIPT, {**changed, **again}, monkeypatch)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.slow
def test_the_best_checkpoint_is_the_model_in_the_end(settings, tmp_path, monkeypatch):
    """The first of two is, if a large loss is called good."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    output = run_with(SCRIPT, {**settings, **best, **every, "skip_corruptions": True}, monkeypatch)
    found = {place: load_file(output / place / "model.safetensors") for place in (".", "checkpoint-1", "checkpoint-2")}
    state = json.loads((output / "trainer_state.json").read_text())
    losses = [step["eval_loss"] for step in state["log_history"] if "eval_loss" in step]
    assert losses[0] > losses[1]
    assert all(torch.equal(weight, found["checkpoint-1"][name]) for name, weight in found["."].items())
    assert not all(torch.equal(weight, found["checkpoint-2"][name]) for name, weight in found["."].items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_file": None}, "train: expected --train_file or --dataset_name, got none"),
        ({"do_train": False, "do_eval": False}, "expected --do_train, --do_eval or both, got none"),
    ],
)
def test_what_is_missing(change, says, settings, monkeypatch):
    settings = {name: value for name, value in {**settings, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=says):
        run_with(SCRIPT, settings, monkeypatch)
