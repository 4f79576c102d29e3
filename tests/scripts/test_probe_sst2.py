"""What is said of the probe on SST-2 is what its records say, and the figures are drawn from records."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import matplotlib.image
import pytest

from hf_parcor import EvaluationRecord, SweepRecord
from scripts import figures, probe_sst2

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "results" / "probes"
RECORDS = ROOT / "scripts" / "results" / "sst2"
SWEEPS = {
    grouping: {arm: [SweepRecord.load(FOLDER / f"{arm}-seed1-{grouping}.json")] for arm in probe_sst2.ARMS}
    for grouping in probe_sst2.GROUPINGS
}


def test_the_page_is_what_the_records_say():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == probe_sst2.readme(SWEEPS)


@pytest.mark.slow
@pytest.mark.parametrize("grouping", SWEEPS)
def test_the_reports_are_those_of_the_records_and_small(grouping, tmp_path):
    probe_sst2.draw(tmp_path, grouping, SWEEPS[grouping])
    for name in (f"{grouping}.html", f"{grouping}.md"):
        kept, made = ((folder / name).read_text(encoding="utf-8") for folder in (FOLDER, tmp_path))
        # Pictures may differ in the last digit with another Matplotlib.
        assert re.sub("<svg.*?</svg>", "", kept) == re.sub("<svg.*?</svg>", "", made)
    assert (FOLDER / f"{grouping}.html").stat().st_size < 300_000
    picture = matplotlib.image.imread(FOLDER / f"{grouping}.png")
    assert picture.shape == matplotlib.image.imread(tmp_path / f"{grouping}.png").shape


def test_how_it_was_made():
    runs = json.loads((FOLDER / "runs.json").read_text())
    assert set(runs) == {f"{arm}-seed1" for arm in probe_sst2.ARMS}
    for name, run in runs.items():
        assert run["command"] == probe_sst2.COMMAND
        assert run["flags"] == probe_sst2.ARMS[name.partition("-")[0]].flags
        assert (run["train_samples"], run["epochs"], run["collapsed"]) == (6920, 2, False)
    for grouping, of_arms in SWEEPS.items():
        for [sweep] in of_arms.values():
            labels = [str(corruption) for corruption in probe_sst2.corruptions_of(grouping)]
            assert all([row.label for row in record.corruptions] == labels for record in sweep.records.values())


def probe_of(values, norms):
    """Return a probe in which each group has one accuracy throughout, at ε = 1, and weights of a norm."""
    [first] = SWEEPS["kinds"]["plain"]
    record = next(iter(first.records.values()))

    def made(value, norm):
        rows = [dataclasses.replace(row, metrics={"accuracy": (value,)}) for row in record.corruptions]
        return dataclasses.replace(record, corruptions=tuple(rows), weights_norm=norm)

    records = {group: made(value, norm) for (group, value), norm in zip(values.items(), norms, strict=True)}
    return SweepRecord(records, "", 1, 0)


class TestObservations:
    def test_the_radius_at_half_of_what_is_above_chance(self):
        probe = probe_of({"a": 0.5, "b": 0.7}, (4.0, 2.0))
        clean = probe.clean.mean("accuracy")
        first = probe_sst2.RADII[0]
        # From clean at 0 to 0.5 at the first radius, in a line: half of it is lost half way.
        assert probe_sst2.radius_at_half(probe.records["a"]) == pytest.approx(first / 2)
        assert probe_sst2.relative_radius(probe.records["a"]) == pytest.approx(first / 8)
        assert (clean + 0.5) / 2 < 0.7
        assert probe_sst2.radius(probe_sst2.radius_at_half(probe.records["b"])) == "–"

    def test_weakest_kind(self):
        probe = probe_of({"layer-norm": 0.5, "linear": 0.55, "attention": 0.6}, (0.01, 1.0, 1.0))
        found = probe_sst2.weakest_kind(probe)
        assert found.startswith("Holds with the same ε and 10 weights as in paper 1 and random directions alone.")
        assert "with the same ε/‖w‖ the weakest is linear" in found
        probe = probe_of({"layer-norm": 0.5, "linear": 0.6}, (1.0, 1.0))
        assert probe_sst2.weakest_kind(probe).startswith("Holds in every setting.")
        assert probe_sst2.weakest_kind(probe, "linear").startswith("Does not hold in any setting.")

    def test_robust_kinds(self):
        probe = probe_of({"layer-norm": 0.5, "linear": 0.55, "attention": 0.6}, (1.0, 1.0, 1.0))
        assert probe_sst2.robust_kinds(probe, "attention").startswith("Holds in every setting.")
        assert "1 of 3 with the same ε," in probe_sst2.robust_kinds(probe, "layer-norm")

    @pytest.mark.parametrize(
        ("values", "said"),
        [((0.8, 0.7, 0.6, 0.5), "Holds in"), ((0.5, 0.6, 0.7, 0.8), "Does not"), ((0.5, 0.8, 0.6, 0.7), "Does not")],
    )
    def test_upper_layers(self, values, said):
        probe = probe_of({f"layer.{at}": value for at, value in enumerate(values)}, (1.0,) * 4)
        assert probe_sst2.weak_upper_layers(probe).startswith(said)

    def test_gains(self):
        before, after = (probe_of({"a": value, "b": 0.6}, (1.0, 1.0)) for value in (0.5, 0.75))
        assert probe_sst2.gains(before, after).startswith("1 of 2 groups are harder to break")
        assert "a +25.0, b +0.0" in probe_sst2.gains(before, after)


class TestFigures:
    FILES = (
        *(f"plain={RECORDS}/plain-seed1{part}.json" for part in ("", "-corrupt-last-layer")),
        f"K = 1={RECORDS}/multi_step_risk-1-seed1.json",
        *(str(FOLDER / f"{arm}-seed1-{grouping}.json") for grouping in SWEEPS for arm in probe_sst2.ARMS),
    )

    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
        figures.main()

    @pytest.mark.slow
    def test_everything_is_drawn(self, monkeypatch, tmp_path, capsys):
        self.run(monkeypatch, *self.FILES, "--output", tmp_path)
        names = ["paper-1-figure-3.png", "paper-1-figure-4.png", "paper-1-figure-5.png", "paper-1-table-1.md"]
        names += ["paper-2-figure-3.png", "paper-2-table-6.md"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert sorted(Path(line).name for line in capsys.readouterr().out.splitlines()) == names
        plain = EvaluationRecord.load(RECORDS / "plain-seed1.json")
        row = next(row for row in plain.corruptions if row.label == "gradient-based L2 ε=0.1")
        clean, value = 100 * plain.clean.mean("accuracy"), 100 * row.mean("accuracy")
        table = re.sub(" +", " ", (tmp_path / "paper-1-table-1.md").read_text())
        change = f"{value - clean:+.1f}".replace("-", "−")
        assert f"| L2, n = k, ε = 0.1 | – | {value:.1f} ({change}) | –" in table
        table = re.sub(" +", " ", (tmp_path / "paper-2-table-6.md").read_text())
        assert re.search(rf"^\| plain \| {clean:.1f} \| {value:.1f} \|", table, re.MULTILINE)
        assert "last-encoder-layer corrupted, gradient-based L2 ε=1" in table.splitlines()[0]
        for picture in tmp_path.glob("*.png"):
            assert matplotlib.image.imread(picture).std() > 0.05

    def test_what_holds_nothing_is_refused(self, monkeypatch, tmp_path, capsys):
        with pytest.raises(SystemExit, match="2"):
            self.run(monkeypatch, RECORDS / "plain-seed1-corrupt-last-layer.json", "--output", tmp_path)
        assert "expected records with random and gradient-based corruptions" in capsys.readouterr().err
        (tmp_path / "broken.json").write_text("{")
        with pytest.raises(SystemExit, match="2"):
            self.run(monkeypatch, tmp_path / "broken.json", "--output", tmp_path)
