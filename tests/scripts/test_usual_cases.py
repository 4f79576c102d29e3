"""Usual ways to train: what is tuned is trained once for all seeds, and what is finished is kept."""

from __future__ import annotations

import gzip
import json
import random
import sys
from dataclasses import replace

import pytest
from example_program import run_here
from for_each import for_each

pytest.importorskip("datasets", reason="the examples need the extra 'examples'")

import itertools

from scripts import campaigns
from scripts import usual_cases as script


@for_each("case", list(script.CASES.values()))
def test_radii_are_four_times_as_large_each(case):
    plain, *defended = (arm for name, arm in case.arms.items() if name != "base-4-bits")
    epsilons = [arm.defense.constraint.epsilon for name, arm in case.arms.items() if name.startswith("radius")]
    assert plain.defense is None
    assert len(epsilons) == 3
    assert [second / first for first, second in itertools.pairwise(epsilons)] == pytest.approx([4.0, 4.0])
    assert {arm.defense.steps for arm in defended} == {1}
    starts = {name: arm.defense.start_epoch for name, arm in case.arms.items() if arm in defended}
    assert starts.pop("from-0", 0) == 0
    assert len(set(starts.values())) == 1


def test_what_adapters_begin_with_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--case", "lora", "--data", "d", "--output", "o"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "--model: expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_campaign(tmp_path, monkeypatch, capsys):
    draw = random.Random(0)
    for name in ("first", "second", "dev"):
        lines = (" ".join(draw.choices("abcdefgh", k=6)) for _ in range(60))
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    run_here(campaigns, monkeypatch)
    sizes = "hidden_size=32,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
    quick = {"block_size": 7, "num_train_epochs": 2, "learning_rate": 0.02, "use_cpu": True, "disable_tqdm": True}
    case = replace(
        script.CASES["causal-lm-tuned"],
        settings={**quick, "train_file": "second.txt.gz", "validation_file": "dev.txt.gz"},
        begins_with={**quick, "train_file": "first.txt.gz", "model_type": "llama", "config_overrides": sizes},
        arms=script.radii(0.1, 0.4),
        corruptions=["gradient=0.5"],
    )
    monkeypatch.setitem(script.CASES, "causal-lm-tuned", case)
    output, work = tmp_path / "records", tmp_path / "work"
    command = ["usual", "--case", "causal-lm-tuned", "--data", tmp_path, "--output", output, "--work", work]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--seeds", "1", "2", *more])
        script.main()
        return (output / "table.md").read_text(encoding="utf-8")

    trained = []
    monkeypatch.setattr(
        script, "run_example", lambda *given, **more: trained.append(given) or campaigns.run_example(*given, **more)
    )
    table = run()
    begun, *tuned = [settings for _, settings, *_ in trained]
    assert len(tuned) == 6
    assert {settings["model_name_or_path"] for settings in tuned} == {str(begun["output_dir"])}
    assert json.loads((output / "runs.json").read_text()).keys() == {
        f"{arm}-seed{seed}" for arm in case.arms for seed in (1, 2)
    }
    assert len([line for line in table.splitlines() if "±" in line]) == 1 + 2  # what is said above, and two rows
    trained.clear()
    assert run() == run("--arms", "plain") == table
    assert not trained, "what is finished is kept"
