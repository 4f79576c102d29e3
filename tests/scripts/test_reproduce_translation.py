"""The tables of paper 2 on translation: what is beside what, and one of them made from nothing, then from records."""

from __future__ import annotations

import argparse
import gzip
import json
import re
from dataclasses import replace

import pytest
from example_program import run_here

pytest.importorskip("matplotlib", reason="the figure needs the extra 'plots'")
pytest.importorskip("sacrebleu", reason="BLEU needs the extra 'translation'")

from hf_parcor.records import EvaluationRecord
from scripts import campaigns
from scripts import reproduce_translation as script
from scripts import translation_studies as paper
from scripts.translation_studies import STUDIES


@pytest.mark.parametrize("name", ["de-en", "en-vi"])
def test_the_papers_numbers_fit_the_rows(name):
    study = STUDIES[name]
    assert len(paper.TABLE_1[name]) == 1 + len(study.table_1)
    assert len(paper.TABLE_3[name]) == 1 + len(study.table_3)
    assert len(paper.TABLE_4[name]) == len(script.DEFENSES)
    assert set(paper.TABLE_6[name]) == set(script.TARGETS)
    assert paper.TABLE_1[name][0][0] == paper.TABLE_3[name][0][0] == paper.TABLE_6[name]["plain"][0]


def test_table_2_names_arms():
    assert set(paper.TABLE_2) == set(STUDIES["de-en"].arms) - {"last-layer", "acrt", "awp"}


@pytest.mark.parametrize("name", STUDIES)
def test_arms(name):
    study = STUDIES[name]
    arms = study.arms
    assert arms["plain"].defense is None
    for arm in arms.values():
        assert arm.defense is None or 0 <= arm.defense.start_epoch < study.epochs
    assert {arms[f"start-{start}"].defense.start_epoch for start in study.other_starts} == set(study.other_starts)
    assert arms["last-layer"].arguments.defense_target_modules == ["last-decoder-layer"]
    assert arms["defended"].defense.steps == study.max_norm[1]
    assert arms["random-2"].defense.random_start
    assert arms["l2"].defense.constraint.p == 2


def test_the_papers_settings():
    """Appendix A.2.1 and A.2.2."""
    german, vietnamese = STUDIES["de-en"], STUDIES["en-vi"]
    assert (german.epochs, german.start_epoch, german.max_norm, german.last_layer) == (70, 30, (0.0006, 2), (0.002, 1))
    assert german.arms["awp"].defense.start_epoch == 10
    assert (vietnamese.epochs, vietnamese.start_epoch) == (52, 35)
    assert (vietnamese.max_norm, vietnamese.last_layer) == ((0.00045, 2), (0.0015, 3))
    assert german.training["vocabulary_size"] == 10_149
    assert [vietnamese.training[f"{side}vocabulary_size"] for side in ("", "target_")] == [7_669, 6_669]


def test_files_are_found_packed_or_not(tmp_path):
    (tmp_path / "train.de").write_text("")
    (tmp_path / "train.en.gz").write_text("")
    found = [script.file_of(tmp_path, "train", language).name for language in ("de", "en")]
    assert found == ["train.de", "train.en.gz"]


def test_a_split_is_read_from_lines_or_from_a_table(tmp_path):
    for name, content in (
        ("val.de", "ein Hund\nrot\n"),
        ("val.en", "a dog\nred\n"),
        ("dev.tsv.gz", "en\tde\na dog\tein Hund\nred\trot\n"),
    ):
        encoded = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith(".gz") else encoded)
    options = argparse.Namespace(data=tmp_path)
    for study in ("multi30k", "tatoeba"):
        text = script.read(options, STUDIES[study], "validation")
        assert (list(text.sources), list(text.targets)) == (["ein Hund", "rot"], ["a dog", "red"])
    assert set(script.files_of(options, STUDIES["multi30k"], "train")) == {"train_source_file", "train_target_file"}
    assert script.files_of(options, STUDIES["tatoeba"], "train") == {"train_file": tmp_path / "train.tsv.gz"}


WORDS = ["Hund", "Katze", "rot", "sieht", "und", "Haus"]
OVERRIDES = (
    "encoder_layers=1,decoder_layers=2,d_model=16,encoder_ffn_dim=16,decoder_ffn_dim=16,max_position_embeddings=128"
)


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    """A campaign of 4 epochs on a few lines, of which the last two are defended."""
    lines = [f"{a} {b} {c}." for a in WORDS for b in WORDS[:3] for c in WORDS[:2]]
    for stem, texts in {"train": lines, "val": lines[:4], "test_2016_flickr": lines[4:10]}.items():
        for language in ("de", "en"):
            (tmp_path / f"{stem}.{language}").write_text("\n".join(texts) + "\n")
    small = {"vocabulary_size": 40, "config_overrides": OVERRIDES, "max_tokens": 100, "warmup_steps": 2}
    quiet = {"use_cpu": "true", "disable_tqdm": "true", "logging_steps": 1}
    study = STUDIES["multi30k"]
    study = replace(
        study,
        training={**study.training, **small, **quiet},
        epochs=4,
        start_epoch=2,
        whole=study.whole[1:3],
        last=study.last[1:3],
        max_new_tokens=6,
        other_starts=(0,),
    )
    monkeypatch.setitem(STUDIES, "multi30k", study)
    folders = {"data": tmp_path, "output": tmp_path / "records", "work": tmp_path / "work"}
    options = argparse.Namespace(study="multi30k", **folders, seeds=[1], test_sentences=5)
    options.output.mkdir()

    run_here(campaigns, monkeypatch)
    return script.Campaign(options)


@pytest.mark.slow
def test_table_6_and_figure_3(campaign, monkeypatch):
    output, work = campaign.options.output, campaign.options.work
    starts = [line.split("|")[1:-1] for line in script.starts(campaign).splitlines()]
    assert [row[0].strip() for row in starts[2:]] == ["from epoch 0 on", "from epoch 2 on", "nothing"]
    state = json.loads((work / "plain-seed1" / "trainer_state.json").read_text())["log_history"]
    of_epoch_2 = [entry["loss"] for entry in state if "loss" in entry and 1 < entry["epoch"] <= 2]
    shown = [row[1].strip() for row in starts[2:]]
    assert shown[0] == "-"
    assert float(shown[1]) == pytest.approx(sum(of_epoch_2) / len(of_epoch_2), abs=0.006)
    alone, shared = (len(list((work / f"{name}-seed1").glob("checkpoint-*"))) for name in ("start-0", "defended"))
    assert (alone, shared) == (4, 2), "what starts late goes on from the plain training, which comes first"

    noted = json.loads((output / "runs.json").read_text())
    plain = noted.pop("plain-seed1")
    (output / "runs.json").write_text(json.dumps(noted))  # as where the campaign was killed before it was written
    script.train(campaign.options, campaign.study, script.Run("plain", campaign.study.arms["plain"], 1))
    again = json.loads((output / "runs.json").read_text())
    assert again == {**noted, "plain-seed1": {**plain, "train_seconds": None}}

    table = script.table_6(campaign)
    assert table.count("\n") == 4
    assert "| whole: multi-step" in table
    assert "| last layer: gradient-based" in table
    whole, last = (
        EvaluationRecord.load(output / f"last-layer-seed1-table6-{part}.json") for part in ("whole", "last")
    )
    assert whole.parameters > last.parameters
    assert whole.clean.metrics == last.clean.metrics
    assert any("tok:13a" in note for note in whole.notes)

    # The defended arms begin at the plain one's checkpoint of epoch 2.
    steps = {
        name: sorted(int(path.name.split("-")[1]) for path in (work / f"{name}-seed1").glob("checkpoint-*"))
        for name in script.TARGETS
    }
    assert steps["defended"] == steps["last-layer"] == steps["plain"][2:]
    written = json.loads((work / "last-layer-seed1" / "defense_config.json").read_text())
    assert (written["defense"], written["target_modules"]) == ("multi_step_risk", ["last-decoder-layer"])
    assert set(json.loads((output / "runs.json").read_text())) == {
        f"{name}-seed1" for name in (*script.TARGETS, "start-0")
    }

    figure = script.figure_3(campaign)
    assert re.search(r"\| model.decoder.layers.1 +\|", figure)
    assert (output / "figure-3.png").stat().st_size > 5_000

    # Everything is there now: nothing is trained or measured again.
    monkeypatch.setattr(script, "train", lambda *arguments: pytest.fail("trained again"))
    again = script.Campaign(campaign.options)
    assert script.table_6(again) == table
    assert script.figure_3(again) == figure
