"""The campaign on a speech recognizer: its sentences, and a run of all arms on a tiny model."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from example_program import run_here
from local_models import save_wav2vec2, write_commands, write_wave

from hf_parcor import EvaluationRecord, Quantization
from scripts import campaigns
from scripts import defend_speech as script

pytest.importorskip("soundfile", reason="recordings need the extra 'audio'")
pytest.importorskip("jiwer", reason="word error rates need the extra 'audio'")

WORDS = ["good", "bad", "film", "plot", "the"]


@pytest.fixture
def tatoeba(tmp_path):
    """Write sentences of 3 to 9 words, each with two translations."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, begin in (("train", "a"), ("test", "the")):
        lengths = [2 + number % 7 for number in range(42)]
        words = [[WORDS[(number + place) % 5] for place in range(length)] for number, length in enumerate(lengths)]
        texts = [" ".join([begin, *of_one]) for of_one in words]
        lines = ["en\tde", *(f"{text}\t{which}" for text in texts for which in ("eins", "zwei"))]
        (folder / f"{part}.tsv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return folder


def test_sentences_are_neither_short_nor_long_and_spread(tatoeba, monkeypatch):
    monkeypatch.setattr(script, "SENTENCES", {"train": 5, "test": 3})
    for split, count in script.SENTENCES.items():
        chosen = script.sentences(tatoeba, split)
        assert len(set(chosen)) == count
        assert all(6 <= len(text.split()) <= 14 for text in chosen)


def test_without_the_program_that_speaks(tatoeba, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt install flite"):
        script.speak(tmp_path / "speech", tatoeba)


@pytest.mark.slow
def test_the_campaign(tatoeba, tmp_path, monkeypatch):
    """Each arm is trained and measured with each seed, and none a second time."""
    spoken = []

    def speak(words, **_):
        spoken.append((words[2], words[4]))
        write_wave(Path(words[6]), np.random.default_rng(len(spoken)).uniform(-0.5, 0.5, 6_000))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script.subprocess, "run", speak)
    monkeypatch.setattr(script, "SENTENCES", {"train": 8, "test": 4})
    monkeypatch.setattr(script, "CORRUPTIONS", [Quantization(2)])
    model = save_wav2vec2(tmp_path / "model", **tiny.STILL)
    person = Path(write_commands(tmp_path / "model" / "sounds.csv"))
    lines = ["audio\ttext", *(f"{line.partition(',')[0]}\tthe film" for line in person.read_text().splitlines()[1:])]
    (tmp_path / "model" / "human.tsv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "records"
    flags = ["--model", model, "--data", tatoeba, "--output", output, "--work", tmp_path / "work", "--seeds", 1, 2]
    run_here(campaigns, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["defend_speech", *map(str, flags)])
    script.main()
    assert [voice for voice, _ in spoken] == [*script.VOICES] * 3
    runs = {f"{arm}-seed{seed}" for arm in script.ARMS for seed in (1, 2)}
    assert json.loads((output / "runs.json").read_text()).keys() == runs
    records = {path.stem for path in output.glob("*-*.json")}
    assert records == {f"{name}-{heard}" for name in (*runs, script.AS_IT_IS) for heard in script.HEARD}
    assert EvaluationRecord.load(output / "plain-seed1-human.json").clean.metrics["wer"]
    table = (output / "table.md").read_text()
    assert table.count("| passes a step | 1 | 2 | 2 |") == 2
    assert "| t: defended ≥ plain | K = 1 | half 4 bits |" in table
    assert "wav2vec2.encoder.layers.1" in table
    monkeypatch.setattr(campaigns, "run_example", None)
    monkeypatch.setattr(sys, "argv", ["defend_speech", *map(str, flags)])
    importlib.import_module("scripts.defend_speech").main()
    assert (output / "table.md").read_text() == table
