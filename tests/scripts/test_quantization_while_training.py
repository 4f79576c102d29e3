"""The loss after quantization, checkpoint by checkpoint: its curve, and a campaign of a tiny decoder."""

from __future__ import annotations

import gzip
import json
import random
import sys
from dataclasses import replace

import pytest
from example_program import run_here
from for_each import for_each
from safetensors.torch import load_file

from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.records import EvaluationRecord

pytest.importorskip("datasets", reason="the examples need the extra 'examples'")
pytest.importorskip("matplotlib", reason="the figure needs the extra 'plots'")

from scripts import campaigns
from scripts import quantization_while_training as script

FOUR = script.CHOSEN_BY


def curve_of(clean: list[float], four: list[float]) -> script.Curve:
    losses = {name: four if name == FOUR else clean for name in script.NAMES}
    return script.Curve(list(range(1, 1 + len(clean))), [0.5 * step for step in range(len(clean))], losses)


@for_each(
    "clean, four, best, rise",
    [
        ([4.0, 3.0, 2.0], [4.5, 3.5, 2.5], (2, 2), 0.0),  # both fall
        ([4.0, 3.0, 2.0], [4.5, 3.5, 3.75], (2, 1), 0.25),  # the observation
        ([4.0, 2.0, 3.0], [4.5, 3.5, 1.0], (1, 2), 0.0),  # what comes after the best one in float does not count
    ],
)
def test_how_far_a_format_has_risen_when_float_is_best(clean, four, best, rise):
    curve = curve_of(clean, four)
    assert (curve.best(script.FLOAT), curve.best(FOUR)) == best
    assert curve.rise(FOUR) == rise
    assert curve.rise(script.FLOAT) == 0
    assert [curve.harm(FOUR, place) for place in range(3)] == [q - c for q, c in zip(four, clean, strict=True)]


def test_arms_differ_in_one_thing_each():
    assert [len(read_corruptions([words])) for words in script.FORMATS] == [1] * len(script.FORMATS)
    constant, linear, *defended = script.ARMS.values()
    assert constant.flags[:-1] == linear.flags[:-1]
    assert [arm.flags[-2:] for arm in defended] == [linear.flags[-2:]] * 2
    risks = [replace(arm, flags=arm.flags[:-2]).defense for arm in defended]
    assert [(*map(str, risk.corruption), risk.clean_weight) for risk in risks] == [
        (script.FORMATS[f"quantization={bits}"], 0.5) for bits in (4, 3)
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_campaign(tmp_path, monkeypatch, capsys):
    draw = random.Random(0)
    for split, count in {"train": 60, "valid": 12, "test": 12}.items():
        lines = (" ".join(draw.choices("abcdefgh", k=6)) for _ in range(count))
        (tmp_path / f"ptb.{split}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    run_here(campaigns, monkeypatch)
    sizes = "hidden_size=32,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
    tiny = {"config_overrides": sizes, "block_size": 7, "learning_rate": 0.02, "warmup_steps": 0}
    quick = {"max_train_tokens": 400, "num_train_epochs": 2, "use_cpu": True, "disable_tqdm": True}
    monkeypatch.setattr(script, "SETTINGS", {**script.SETTINGS, **tiny, **quick})
    monkeypatch.setattr(script, "CHECKPOINTS", 4)
    monkeypatch.setattr(script, "ARMS", {name: script.ARMS[name] for name in ("constant", "linear-4-bits")})
    output, work = tmp_path / "records", tmp_path / "work"
    command = ["watch", "--data", tmp_path, "--output", output, "--work", work, "--seeds", "1"]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*map(str, command), *more])
        script.main()
        return (output / "table.md").read_text(encoding="utf-8")

    table = run()
    assert (output / "curves.png").stat().st_size > 10_000
    for name in ("constant-seed1", "linear-4-bits-seed1"):
        curve = script.Curve(**json.loads((output / f"{name}-curve.json").read_text()))
        assert len(curve.steps) == 4
        assert {len(losses) for losses in curve.losses.values()} == {4}
        # What the callback made the Trainer load is what the curve says.
        state = json.loads((work / name / "trainer_state.json").read_text())
        chosen = work / name / f"checkpoint-{curve.steps[curve.best(FOUR)]}"
        assert state["best_model_checkpoint"] == str(chosen)
        kept, best = load_file(work / name / "model.safetensors"), load_file(chosen / "model.safetensors")
        assert all(bool((kept[key] == best[key]).all()) for key in best)
        # The same checkpoint is judged on another text than it was chosen on, in the same formats.
        record = EvaluationRecord.load(output / f"{name}-by-4-bits.json")
        assert [row.label for row in record.rows()][1:] == list(script.FORMATS.values())
        assert record.clean.mean("loss") != pytest.approx(curve.losses[script.FLOAT][curve.best(FOUR)], rel=1e-6)
    assert table.count(FOUR + " ") >= 4
    trained = json.loads((work / "linear-4-bits-seed1" / "defense_config.json").read_text())
    assert trained["defense"] == "corruption"

    monkeypatch.setattr(script, "run_example", lambda *_, **__: pytest.fail("trained again"))
    assert run() == run("--arms", "constant") == table
    (output / "linear-4-bits-seed1-curve.json").unlink()
    assert run() == table, "killed while it was judged"
    (output / "linear-4-bits-seed1-curve.json").unlink()
    label = script.ARMS["linear-4-bits"].label
    assert label in table
    assert label not in run("--arms", "constant"), "an arm that is not finished is left out"
