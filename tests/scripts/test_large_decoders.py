"""A small decoder goes through the script that measures a large one: what the record says of it can be counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from for_each import for_each

from hf_parcor.cli.main import build_parser
from scripts import large_decoders
from scripts.large_decoders import AS_IT_IS, COMMANDS, KILLED, MAP, MODEL, PROBE, TEXT, WENT_ON

HIDDEN, LAYERS, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 16, 12, 24, 4, 2, 40


@for_each("command", list(COMMANDS.values()))
def test_the_command_line_knows_its_flags(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(MAP).write_text('{"lm_head": "disk"}', encoding="utf-8")
    name, *flags = command.split()
    assert build_parser().parse_args([name, MODEL, "--dataset", TEXT, *flags]).model == MODEL


@pytest.mark.slow
def test_a_killed_probe_goes_on_and_weights_stay(monkeypatch, tmp_path):
    for part in ("train", "valid"):
        (tmp_path / f"ptb.{part}.txt").write_text(20 * "the cat sat on the <unk> mat\n", encoding="utf-8")
    sizes = {"hidden": HIDDEN, "layers": LAYERS, "intermediate": INTERMEDIATE, "heads": HEADS, "rows": 2, "length": 8}
    sizes |= {"key-value-heads": KEY_VALUE_HEADS, "vocabulary": VOCABULARY}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    folders = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    monkeypatch.setitem(COMMANDS, AS_IT_IS, COMMANDS["evaluate: noise"])  # one process less, and each takes seconds
    monkeypatch.setattr(sys, "argv", ["x", *flags, *folders, "--commands", AS_IT_IS, PROBE])
    large_decoders.main()
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    attention = 2 * HIDDEN**2 * (1 + KEY_VALUE_HEADS / HEADS)
    of_layer = attention + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    weights = 2 * VOCABULARY * HIDDEN + LAYERS * of_layer + HIDDEN
    assert record["model"] == {"weights": weights, "bytes": 2 * weights}
    found = {label: cost["found"] for label, cost in record["commands"].items()}
    assert found[AS_IT_IS]["corrupted_weights"] == weights
    assert found[AS_IT_IS]["came_back"]
    assert len({one["fingerprint_of_weights"] for one in found.values() if "fingerprint_of_weights" in one}) == 1
    assert found[WENT_ON]["kept"] == found[KILLED]["trials"] > large_decoders.BEFORE_THE_KILL
    assert found[WENT_ON]["kept"] + found[WENT_ON]["made_anew"] == 1 + 2 * LAYERS
    assert found[WENT_ON]["kept_as_they_were"]
    for cost in record["commands"].values():
        assert 2 * weights < cost["peak_anonymous"] <= cost["peak_resident"]
