"""Every command says how it is run, and campaigns draw from records the very tables that are kept beside them."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("matplotlib", reason="the figures need the extra 'plots'")

from hf_parcor.records import EvaluationRecord, SearchRecord
from hf_parcor.reports.tables import search_table
from scripts.campaigns import mean_and_deviation
from scripts.claims import CLEAN, USUAL, WORST, radius_of
from scripts.peer_trainers import PEERS
from scripts.reproduce import STUDIES
from scripts.usual_cases import CASES

SCRIPTS = Path(__file__).parents[2] / "scripts"
RESULTS = SCRIPTS / "results"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in SCRIPTS.glob("*.py")}
COMMANDS = sorted(name for name, text in SOURCES.items() if '__name__ == "__main__"' in text)
PARTS = sorted(set(SOURCES) - set(COMMANDS) - {"__init__"})
PAGE = (SCRIPTS / "README.md").read_text(encoding="utf-8")


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    importlib.import_module(f"scripts.{name}").main()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_to_run_it(name, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, name, "--help")
    assert re.search(rf"python -m scripts\.{name}\b|bash scripts/{name}\.sh\b", capsys.readouterr().out)


def test_a_peer_is_the_trainer_of_the_example(monkeypatch):
    example, trained = importlib.import_module("examples.train_sst2"), []
    monkeypatch.setattr(example, "ParameterDefenseTrainer", None)
    monkeypatch.setattr(example, "main", lambda: trained.append((example.ParameterDefenseTrainer, sys.argv[1:])))
    run(monkeypatch, "peer_trainers", "looksam", "--do_train")
    assert trained == [(PEERS["looksam"], ["--do_train"])]


def test_the_page_has_every_file():
    assert [name for name in COMMANDS + PARTS if f"`{name}.py`" not in PAGE] == []


@pytest.mark.parametrize("name", PARTS)
def test_a_part_belongs_to_commands_and_knows_none(name):
    assert any(f"from scripts.{name} import" in SOURCES[command] for command in COMMANDS)
    assert set(re.findall(r"from scripts\.(\w+) import", SOURCES[name])) <= set(PARTS)


CAMPAIGN = "--model none --data none --output"
STARTS = "--tables starts --test-sentences 500 --data none --output"
TRANSLATION = "--tables 6 figure-3 --test-sentences 500 --data none --output"


def test_the_page_shows_the_detectors_table():
    kept = (RESULTS / "detection" / "table.md").read_text(encoding="utf-8").splitlines()
    section = PAGE[PAGE.index("## Detection") : PAGE.index("## Quantization while")].replace("* |", " |")
    shown = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(shown) == 11
    assert set(shown) <= set(kept)


def test_the_page_shows_the_usual_cases():
    """Each number of its table, from the records: clean, and what is gained along the gradient, seed by seed."""
    shown = PAGE[PAGE.index("## Where to begin") :]
    for place, case in enumerate(USUAL):
        metric, radii = CASES[case].metric, [radius_of(case, arm) for arm in ("radius-2", "radius-3")]
        sign, scale = (-1, 1) if metric == "loss" else (1, 100 if metric == "accuracy" else 1)
        digits = 3 if metric == "loss" else 1

        def values(arm, rows, case=case, metric=metric, scale=scale):
            folder = RESULTS / "usual_cases" / case
            records = [EvaluationRecord.load(folder / f"{arm}-seed{seed}.json") for seed in (1, 2, 3)]
            return [scale * fmean(row.mean(metric) for row in record.rows() if rows(row)) for record in records]

        plain = values("plain", WORST)
        expected = {"plain, no corruption": [mean_and_deviation(values("plain", CLEAN), digits)]}
        expected |= {
            "no corruption": [],
            "gained along the gradient": [],
            "of the": [f"{radius:g}" for radius in radii],
        }
        for arm in ("radius-2", "radius-3"):
            expected["no corruption"].append(mean_and_deviation(values(arm, CLEAN), digits))
            gains = [sign * (gain - before) for gain, before in zip(values(arm, WORST), plain, strict=True)]
            written = ", ".join(f"{gain:.{2 if metric == 'loss' else 1}f}" for gain in gains)
            expected["gained along the gradient"].append(written.replace("-", "−"))
        for row, cells in expected.items():
            lines = [line.split(" | ") for line in shown.splitlines() if line.startswith((f"| {row} ", f"| ε {row} "))]
            assert [line[1 + place].removesuffix(" |") for line in lines] == cells, (case, row)


def test_the_page_shows_what_an_earlier_start_does():
    kept = (RESULTS / "translation" / "starts" / "table.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in kept.splitlines() if "±" in line]
    assert len(rows) == 4
    assert [row for row in rows if " | ".join(row).replace("- | ", "– | ", 1) not in PAGE] == []


def test_more_formats_were_measured_of_the_same_models():
    """Trained again, they got the very same weights."""
    paths = sorted((RESULTS / "sst2_formats").glob("*-seed*.json"))
    assert len(paths) == 18
    for path in paths:
        other = EvaluationRecord.load(RESULTS / "sst2_deployed" / path.name)
        assert EvaluationRecord.load(path).weights == other.weights, path.name


def test_the_search_shows_its_record():
    folder = RESULTS / "search_epsilon"
    record = SearchRecord.load(folder / "record.json")
    assert search_table(record) in (folder / "table.md").read_text(encoding="utf-8")
    shown = {f"{trial.strength:.2g}": f"{100 * trial.objective:.1f}" for trial in record.trials}
    section = PAGE[PAGE.index("**Which ε?**") :]
    for strength in ("0.058", "0.088", "0.17", "0.03", "0.068"):
        assert section.index(shown[strength]) < 900, "and it is what the page says"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (f"reproduce_sst2 {CAMPAIGN}", "sst2"),
        (f"defend_for_less {CAMPAIGN}", "less"),
        (f"radius_sst2 {CAMPAIGN}", "radius"),
        (f"worst_bit_flips {CAMPAIGN}", "worst_bit_flips"),
        (f"deploy_sst2 --size full --arms {' '.join(STUDIES['sst2']['full'].arms)} {CAMPAIGN}", "sst2_full"),
        (f"deploy_sst2 --size full --arms plain multi_step_risk-1 sam-half {CAMPAIGN}", "sst2_first"),
        (f"deploy_sst2 {CAMPAIGN}", "sst2_deployed"),
        (
            f"deploy_sst2 --measured formats --arms {' '.join(STUDIES['sst2-formats']['small'].arms)} {CAMPAIGN}",
            "sst2_formats",
        ),
        (f"deploy_sst2 --measured pruning {CAMPAIGN}", "sst2_pruned"),
        ("reproduce_parser --data none --output", "parser"),
        ("defend_embeddings --model none --data none --output", "embeddings"),
        ("layers_of_gptq --model none --data none --output", "gptq"),
        ("reproduce_images --arms plain --weights none --data none --output", "images"),
        ("reproduce_images --size tiny-imagenet-small --arms plain --data none --output", "tiny_imagenet"),
        ("reproduce_language_model --data none --output", "language_model"),
        ("reproduce_detection --data none --output", "detection"),
        ("quantization_while_training --data none --output", "quantization_while_training"),
        *(
            (f"usual_cases --case {case} --model none --data none --output", f"usual_cases/{case}")
            for case in ("vit", "lora", "causal-lm", "causal-lm-tuned", "seq2seq-tuned")
        ),
        ("large_decoders --data none --output", "large_decoders"),
        (f"reproduce_translation --study multi30k {TRANSLATION}", "translation/multi30k"),
        (f"reproduce_translation --study tatoeba --seeds 1 {TRANSLATION}", "translation/tatoeba"),
        (f"reproduce_translation --study multi30k {STARTS}", "translation/starts"),
    ],
    ids=lambda value: value.split()[0],
)
def test_finished_records_give_the_table_beside_them(command, folder, monkeypatch, tmp_path, capsys):
    """With every record there nothing is trained: the table, and the figure, are made of these alone."""
    output = tmp_path / "records"
    shutil.copytree(RESULTS / folder, output, ignore=shutil.ignore_patterns("*.md", "*.png"))
    name, *arguments = command.split()
    run(monkeypatch, name, *arguments, output)
    table = (RESULTS / folder / "table.md").read_text(encoding="utf-8")
    assert (output / "table.md").read_text(encoding="utf-8") == table
    assert capsys.readouterr().out.strip() == table.strip()
    assert {path.name for path in output.iterdir()} == {path.name for path in (RESULTS / folder).iterdir()}


def test_of_one_seed_there_are_values_and_no_tests(monkeypatch, tmp_path, capsys):
    shutil.copytree(RESULTS / "sst2_deployed", tmp_path / "records")
    arms = ("plain", "half-4-bits")
    words = f"--model none --data none --seeds 2 --arms {' '.join(arms)} --output {tmp_path / 'records'}".split()
    monkeypatch.setattr(sys, "argv", ["deploy_sst2", *words])
    importlib.import_module("scripts.deploy_sst2").main()
    table = capsys.readouterr().out
    records = [EvaluationRecord.load(RESULTS / "sst2_deployed" / f"{arm}-seed2.json") for arm in arms]
    for rows in zip(*(record.rows() for record in records), strict=True):
        cells = " | ".join(f"{100 * row.mean('accuracy'):.1f}" for row in rows)
        assert f"| {rows[0].label} | {cells} |\n" in table
    assert "±" not in table
    assert "t:" not in table
