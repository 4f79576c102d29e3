"""The campaign on an embedding model: its pairs, and a run of all arms on a tiny model."""

from __future__ import annotations

import gzip
import importlib
import json
import sys

import pytest
import tiny
from example_program import run_here
from local_models import save_sentence_encoder

from hf_parcor import EvaluationRecord, Quantization
from scripts import campaigns
from scripts import defend_embeddings as script

pytest.importorskip("sentence_transformers", reason="the example needs the extra 'embeddings'")

WORDS = ["good", "bad", "film", "plot", "the"]


@pytest.fixture
def tatoeba(tmp_path):
    """Write German sentences with two translations each, of which some are shared, and others that are no pairs."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(24):
        text = " ".join(WORDS[(number // 5**place) % 5] for place in range(3))
        rows += [(f"a {text} a", f"de {number}"), (f"the {text} the", f"de {number}"), (f"a {text}", f"de {number}")]
    rows += [("a good bad film plot", "de 0"), ("too short", "short"), ("too short as well", "short")]
    rows += [("a a a a a", "alone"), (rows[3][0], "shared"), ("the film the film the film", "shared")]
    for part, chosen in (("train", rows[::2]), ("dev", rows[1::2]), ("test", [])):
        lines = ["en\tde", *("\t".join(row) for row in chosen)]
        (folder / f"{part}.tsv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return folder


def test_no_sentence_is_trained_on_and_searched(tatoeba, tmp_path):
    script.write_pairs(tmp_path, tatoeba)
    pairs = {}
    for name in ("train", "test"):
        header, *lines = (tmp_path / f"{name}.tsv").read_text().splitlines()
        assert header == "anchor\tpositive"
        pairs[name] = [tuple(line.split("\t")) for line in lines]
        assert all(one != other and len(one.split()) >= 5 for one, other in pairs[name])
    sentences = {name: {text for pair in of_part for text in pair} for name, of_part in pairs.items()}
    assert sentences["train"].isdisjoint(sentences["test"])
    assert (len(pairs["train"]), len(pairs["test"])) == (17, 7)  # of 25, one shares a sentence with the last one


def test_arms():
    plain, one_step, two_bits = (arm.defense for arm in script.ARMS.values())
    assert plain is None
    assert (one_step.constraint.p, one_step.constraint.epsilon, one_step.steps) == (2, 0.1, 1)
    assert (two_bits.corruptions, two_bits.clean_weight) == ((Quantization(2, "channel", code_range="full"),), 0.5)


@pytest.mark.slow
def test_the_campaign(tatoeba, tmp_path, monkeypatch):
    """Each arm is trained and measured with each seed, and none a second time."""
    model = save_sentence_encoder(tmp_path / "model", **tiny.STILL)
    output = tmp_path / "records"
    flags = ["--model", model, "--data", tatoeba, "--output", output, "--work", tmp_path / "work", "--seeds", 1, 2]
    monkeypatch.setattr(script, "CORRUPTIONS", ["quantization=2"])
    run_here(campaigns, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["defend_embeddings", *map(str, flags)])
    script.main()
    records = {path.stem: EvaluationRecord.load(path) for path in output.glob("*-seed?.json")}
    assert records.keys() == {f"{arm}-seed{seed}" for arm in script.ARMS for seed in (1, 2)}
    assert json.loads((output / "runs.json").read_text()).keys() == records.keys()
    table = (output / "table.md").read_text()
    assert "| passes a step | 1 | 2 | 2 |" in table
    assert "| 2-bit quantization |" in table
    monkeypatch.setattr(campaigns, "run_example", None)
    monkeypatch.setattr(sys, "argv", ["defend_embeddings", *map(str, flags)])
    importlib.import_module("scripts.defend_embeddings").main()
    assert (output / "table.md").read_text() == table
