"""The papers' tables on images: their settings, and a campaign of tiny images made from nothing, then from records."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from example_program import run_here
from for_each import for_each
from modeling_small_resnet import SmallResNetConfig, SmallResNetForImageClassification
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_parcor import EvaluationRecord
from hf_parcor.corruptions.catalogue import read_corruptions
from scripts import campaigns
from scripts import reproduce_images as script


def test_the_papers_settings():
    """Paper 1, appendix, and paper 2, A.1.1."""
    assert script.ARMS["plain"].defense is None
    acrt, one_step, penalty = (script.ARMS[name].defense for name in ("acrt", "multi_step_risk-1", "penalty"))
    assert (acrt.constraint.p, acrt.constraint.epsilon, acrt.alpha) == (2, 0.5, 0.5)
    assert (one_step.constraint.p, one_step.constraint.epsilon, one_step.steps) == (2, 0.1, 1)
    assert (penalty.p, penalty.weight) == (2, acrt.alpha * acrt.constraint.epsilon)
    for name in ("sam-half", "awp-half", "awp-late"):
        variant = script.ARMS[name].defense
        assert (variant.constraint.p, 2 * variant.constraint.epsilon) == (2, one_step.constraint.epsilon)
    full = script.SIZES["full"]
    (start,) = full.starts.values()
    assert (full.depth, start.tuned, start.start_epoch) == (34, False, 10)
    assert start.settings == {"num_train_epochs": 200, "learning_rate": 0.1}
    assert full.measure["per_device_train_batch_size"] == 128
    defense = script.TINY_IMAGENET.arms["acrt-inf"].defense
    assert (defense.constraint.p, defense.constraint.epsilon, defense.alpha) == (float("inf"), 2e-5, 0.5)
    assert (script.SGD["optim_args"], script.SGD["weight_decay"]) == ("momentum=0.9", 5e-4)


@for_each(
    ("size", "start", "begins"),
    [("small", "tuned", (0, 0.5)), ("small", "scratch", (0, 1.5)), ("full", "scratch", (10, 100))],
)
def test_where_defenses_begin(size, start, begins):
    begun = script.SIZES[size].starts[start]
    arms = [begun.begin(name, script.ARMS[name]) for name in ("awp-half", "awp-late")]
    assert tuple(arm.defense.start_epoch for arm in arms) == begins


@for_each("images", [script.CIFAR_10, script.TINY_IMAGENET])
def test_each_row_is_one_corruption(images):
    """So that what a paper says of a row stands beside that row of the record."""
    found = [read_corruptions([words]) for words in images.corruptions]
    assert [len(of_words) for of_words in found] == [1] * len(found)
    assert len({str(corruption) for (corruption,) in found}) == len(found)
    rows = {script.CLEAN, *images.corruptions}
    assert all(rows >= set(of_paper) for of_paper in images.beside.values())


def save_pack(path: Path) -> None:
    """Save dark and bright images."""
    labels = np.arange(24) % 2
    pixels = np.random.default_rng(0).integers(0, 100, (24, 8, 8, 3)) + 150 * labels[:, None, None, None]
    contents = []
    for image in pixels.astype(np.uint8):
        held = io.BytesIO()
        Image.fromarray(image).save(held, "PNG")
        contents.append(held.getvalue())
    offsets = np.cumsum([0, *map(len, contents)])
    names = np.array(["dark", "bright"])
    np.savez(path, jpeg=np.frombuffer(b"".join(contents), np.uint8), offsets=offsets, labels=labels, names=names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_campaign(tmp_path, monkeypatch, capsys):
    for name in script.CIFAR_10.files:
        save_pack(tmp_path / name)
    model = SmallResNetForImageClassification(SmallResNetConfig(depth=8, num_labels=2))
    save_file(model.state_dict(), tmp_path / "resnet8.safetensors")
    run_here(campaigns, monkeypatch)
    small = script.SIZES["small"]
    quick = {"max_train_samples": 16, "num_train_epochs": 2, "warmup_steps": 0, "use_cpu": True, "disable_tqdm": True}
    starts = {name: replace(start, settings={**start.settings, **quick}) for name, start in small.starts.items()}
    starts["tuned"] = replace(starts["tuned"], settings={**quick, "learning_rate": 0.0, "weight_decay": 0.0})
    measure = {**small.measure, "per_device_train_batch_size": 8, "max_eval_samples": 20}
    arms = {name: script.ARMS[name] for name in ("plain", "awp-late")}
    kept = ("gradient=0.1", "quantization=4")
    beside = {
        paper: {words: of_paper[words] for words in (script.CLEAN, *kept) if words in of_paper}
        for paper, of_paper in small.images.beside.items()
    }
    images = replace(small.images, arms=arms, beside=beside, more=())
    monkeypatch.setitem(script.SIZES, "small", script.Size(8, starts, measure, images))
    output, work = tmp_path / "records", tmp_path / "work"
    command = ["reproduce_images", "--weights", tmp_path, "--data", tmp_path, "--output", output, "--work", work]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--seeds", "1", "2", *more])
        script.main()
        return (output / "table.md").read_text(encoding="utf-8")

    table = run()
    runs = {f"{start}-{arm}-seed{seed}" for start in ("tuned", "scratch") for arm in arms for seed in (1, 2)}
    assert set(json.loads((output / "runs.json").read_text())) == runs
    before = load_file(tmp_path / "resnet8.safetensors")
    (trained,) = work.iterdir()
    for name in runs:
        record = EvaluationRecord.load(output / f"{name}.json")
        assert [row.corruption for row in record.rows()] == ["none", "gradient", "quantization"]
        after = load_file(trained / name / "model.safetensors")
        same = [bool((after[key] == before[key]).all()) for key in before if key.endswith("weight")]
        assert all(same) == name.startswith("tuned"), "a rate of 0 keeps the weights that a tuned one begins with"
    defended = json.loads((trained / "scratch-awp-late-seed1" / "defense_config.json").read_text())
    assert (defended["defense"], defended["settings"]["start_epoch"]) == ("awp", 1)
    rows = [line for line in table.splitlines() if "L2 ε=0.1" in line]
    assert len(rows) == 2
    assert all("82.8" in row and "89.8" in row for row in rows), "the papers' numbers of this row"

    # Everything is there now: nothing is trained again.
    monkeypatch.setattr(script, "run_example", lambda *_, **__: pytest.fail("trained again"))
    assert run() == run("--arms", "plain") == table
    (output / "scratch-awp-late-seed2.json").unlink()
    tuned, scratch = run("--arms", "plain").split("## ")[1:]
    late = script.ARMS["awp-late"].label
    assert (late in tuned, late in scratch) == (True, False), "an arm that lacks a record is left out"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*map(str, [*command[:1], *command[3:]])])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "--weights" in capsys.readouterr().err
